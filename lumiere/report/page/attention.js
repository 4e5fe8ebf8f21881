// Thumbnails of all heads on the chosen text, and one head enlarged.

// One pixel per pair of tokens; the square root makes small weights visible.
function paintPattern(canvas, rows) {
  const size = rows.length;
  canvas.width = size;
  canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  const [page, up, down] = [rgb("--page-rgb"), rgb("--up-rgb"), rgb("--down-rgb")];
  for (let t = 0; t < size; t++) {
    for (let s = 0; s < size; s++) {
      const color = blend(s <= t ? Math.sqrt(rows[t][s] / 1000) : 0, page, up, down);
      image.data.set([...color, 255], 4 * (t * size + s));
    }
  }
  context.putImageData(image, 0, 0);
}

function drawThumbnails() {
  const grid = find("thumbnails");
  const columns = Math.min(data.heads, window.innerWidth < 500 ? 4 : 8);
  grid.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  const buttons = currentText().patterns.flatMap((layer, l) =>
    layer.map((rows, h) => {
      const canvas = element("canvas", { "aria-hidden": "true" });
      paintPattern(canvas, rows);
      const isChosen = state.head?.[0] === l && state.head?.[1] === h;
      return element(
        "button",
        {
          type: "button",
          "data-key": headName(l, h),
          "aria-pressed": isChosen,
          "aria-label": `Enlarge head ${headName(l, h)}`,
          onclick: () => choose({ head: isChosen ? null : [l, h] }),
        },
        canvas,
        headName(l, h),
      );
    }),
  );
  redraw(grid, ...buttons);
}

// The chosen head with its tokens along the edges. Pointer and arrow keys move a cursor; the caption reads it out.
function drawLarge() {
  const figure = find("large");
  if (!state.head) {
    redraw(figure, element("figcaption", {}, "No head chosen."));
    return;
  }
  const [layer, head] = state.head;
  const text = currentText();
  const rows = text.patterns[layer][head];
  const canvas = element("canvas", { tabindex: 0, role: "img", "data-key": "large", "aria-label": `Attention of ${headName(layer, head)}; arrow keys move` });
  const caption = element("figcaption", { "aria-live": "polite" });
  let cursor = [state.position, argmax(rows[state.position])];
  const show = (t, s) => {
    cursor = [t, s];
    const geometry = paintLarge(canvas, figure.clientWidth, rows, text.tokens, cursor);
    canvas.onpointermove = (event) => {
      const box = canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left - geometry.left) / geometry.cell);
      const row = Math.floor((event.clientY - box.top - geometry.top) / geometry.cell);
      if (row >= 0 && row < rows.length && column >= 0 && column <= row) show(row, column);
    };
    caption.replaceChildren(
      `${headName(layer, head)}: `, tokenSpan(text.tokens[t]), ` (position ${t}) attends ${percent(rows[t][s])} to `,
      tokenSpan(text.tokens[s]), ` (position ${s}).`,
    );
  };
  canvas.onclick = () => choose({ position: cursor[0], word: 0 });
  canvas.onkeydown = (event) => {
    const [t, s] = cursor;
    const moves = { ArrowUp: [t - 1, s], ArrowDown: [t + 1, s], ArrowLeft: [t, s - 1], ArrowRight: [t, s + 1] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [row, column] = moves[event.key];
    if (row >= 0 && row < rows.length && column >= 0) show(row, Math.min(column, row));
  };
  redraw(figure, caption, canvas);
  show(...cursor);
}

function paintLarge(canvas, width, rows, tokens, [chosenRow, chosenColumn]) {
  const size = rows.length;
  const left = Math.min(110, width * 0.25);
  const top = 84;
  const cell = Math.max(4, Math.min(20, Math.floor((width - left - 2) / size)));
  const ratio = window.devicePixelRatio || 1;
  const [whole, high] = [left + cell * size + 2, top + cell * size + 2];
  canvas.width = whole * ratio;
  canvas.height = high * ratio;
  canvas.style.width = `${whole}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const [page, up, down] = [rgb("--page-rgb"), rgb("--up-rgb"), rgb("--down-rgb")];
  for (let t = 0; t < size; t++) {
    for (let s = 0; s <= t; s++) {
      context.fillStyle = `rgb(${blend(Math.sqrt(rows[t][s] / 1000), page, up, down).join(" ")})`;
      context.fillRect(left + s * cell, top + t * cell, cell, cell);
    }
  }
  context.strokeStyle = style.getPropertyValue("--line");
  context.strokeRect(left - 0.5, top - 0.5, cell * size + 1, cell * size + 1);
  context.strokeStyle = style.getPropertyValue("--ink");
  context.strokeRect(left + chosenColumn * cell + 0.5, top + chosenRow * cell + 0.5, cell - 1, cell - 1);
  context.font = `${Math.min(12, Math.max(9, cell - 2))}px ui-monospace, Menlo, Consolas, monospace`;
  context.textBaseline = "middle";
  for (let index = 0; index < size; index++) {
    // Without room for all labels, only those of the cursor.
    const isRow = cell >= 9 || index === chosenRow;
    const isColumn = cell >= 9 || index === chosenColumn;
    const text = label(tokens[index]).slice(0, 13);
    const middle = index * cell + cell / 2;
    context.textAlign = "right";
    context.fillStyle = style.getPropertyValue(index === chosenRow ? "--ink" : "--quiet");
    if (isRow) context.fillText(text, left - 5, top + middle, left - 6);
    if (!isColumn) continue;
    context.save();
    context.translate(left + middle, top - 5);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    context.fillStyle = style.getPropertyValue(index === chosenColumn ? "--ink" : "--quiet");
    context.fillText(text, 0, 0, top - 6);
    context.restore();
  }
  return { left, top, cell };
}

views.push({ on: ["text", "head"], draw: drawThumbnails });
views.push({ on: ["text", "position", "head"], draw: drawLarge });
