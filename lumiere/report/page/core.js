// Pure functions that need no document, so that they can be tested on their own.

// Thousandths as a percentage: 634 is "63%", 4 is "0.4%", 0 is "<0.1%".
function percent(thousandths) {
  if (thousandths === null) return "–";
  if (thousandths === 0) return "<0.1%";
  return thousandths < 100 ? `${(thousandths / 10).toFixed(1)}%` : `${Math.round(thousandths / 10)}%`;
}

// A number with its sign and a typographic minus.
function signed(value, decimals = 2) {
  if (value === null) return "–";
  const size = Math.abs(value).toFixed(decimals);
  return Number(size) === 0 ? size : `${value < 0 ? "−" : "+"}${size}`;
}

// Index of the largest value, the first of equal values.
function argmax(values) {
  return values.reduce((best, value, index) => (value > values[best] ? index : best), 0);
}

// Indices of values, largest absolute value first.
function bySize(values) {
  return values.map((_, index) => index).sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]) || a - b);
}

function largestSize(values) {
  return values.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0);
}

// Start and end of each bar of a waterfall, and the total.
function waterfall(added) {
  const bars = [];
  let total = 0;
  for (const value of added) {
    bars.push([total, total + value]);
    total += value;
  }
  return { bars, total };
}

// Mean of rows of equal length.
function meanRow(rows) {
  return rows[0].map((_, index) => rows.reduce((total, row) => total + row[index], 0) / rows.length);
}

// Index that a key leads to in a list laid out in rows of `columns`; null for other keys.
function moved(index, key, count, columns = 1) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  if (key === "Home") return 0;
  if (key === "End") return count - 1;
  if (!(key in steps)) return null;
  const next = index + steps[key];
  return next < 0 || next >= count ? index : next;
}

// [red, green, blue] between the page's color and that of a value from -1 to 1.
function blend(value, page, up, down) {
  const size = Math.min(1, Math.abs(value));
  const towards = value < 0 ? down : up;
  return page.map((from, channel) => Math.round(from + (towards[channel] - from) * size));
}

// Index of the point nearest to [x, y], optionally in the direction of an arrow key; -1 if there is none.
function nearest(points, [x, y], key = null) {
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  let best = -1;
  let least = Infinity;
  points.forEach(([otherX, otherY], index) => {
    const [right, down] = [otherX - x, otherY - y];
    let distance = Math.hypot(right, down);
    if (key) {
      const ahead = right * ways[key][0] + down * ways[key][1];
      const aside = Math.abs(right * ways[key][1]) + Math.abs(down * ways[key][0]);
      if (ahead <= 0.5) return;
      distance = ahead + 2 * aside;
    }
    if (distance < least) [best, least] = [index, distance];
  });
  return best;
}

// Indices of the boxes [x, y, width, height] that overlap no earlier box.
function apart(boxes) {
  const kept = [];
  boxes.forEach(([x, y, width, height], index) => {
    const clashes = kept.some((other) => {
      const [otherX, otherY, otherWidth, otherHeight] = boxes[other];
      return x < otherX + otherWidth && otherX < x + width && y < otherY + otherHeight && otherY < y + height;
    });
    if (!clashes) kept.push(index);
  });
  return kept;
}
