// Map of token embeddings: points, as many labels as fit, and the neighbors of one token.

const SVG = "http://www.w3.org/2000/svg";
const LETTER = 7.3;

function svgElement(tag, attributes, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

function drawMap() {
  const box = find("embedding");
  const { tokens, points, neighbors, cosines, variances } = data.embeddings;
  const width = Math.max(280, Math.min(1080, box.clientWidth));
  const height = Math.max(320, Math.round(width * 0.6));
  const [edgeX, edgeY] = [44, 22];
  const range = (axis) => [Math.min(...points.map((p) => p[axis])), Math.max(...points.map((p) => p[axis]))];
  const [[left, right], [low, high]] = [range(0), range(1)];
  const places = points.map(([x, y]) => [
    edgeX + ((x - left) / (right - left || 1)) * (width - 2 * edgeX),
    edgeY + ((high - y) / (high - low || 1)) * (height - 2 * edgeY),
  ]);
  const svg = svgElement("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "application", "aria-label": "Map of tokens. Arrow keys move to the next token in a direction." });
  const dots = places.map(([x, y]) => svgElement("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: 2.6 }));
  const boxes = places.map(([x, y], index) => [x + 4, y - 8, label(tokens[index]).length * LETTER, 14]);
  const names = new Map();
  for (const index of apart(boxes)) {
    const [x, y] = places[index];
    if (boxes[index][0] + boxes[index][2] <= width) names.set(index, svgElement("text", { x: x + 5, y: y + 4 }, label(tokens[index])));
  }
  svg.append(...dots, ...names.values());
  const read = element("p", { "aria-live": "polite", id: "map-read" });
  let here = 0;
  const show = (index) => {
    here = index;
    const near = new Set(neighbors[index]);
    dots.forEach((dot, other) => {
      dot.setAttribute("class", other === index ? "here" : near.has(tokens[other]) ? "near" : "");
      dot.setAttribute("r", other === index ? 5 : near.has(tokens[other]) ? 4 : 2.6);
    });
    const listed = neighbors[index].flatMap((token, rank) => [" ", tokenSpan(token), ` ${cosines[index][rank].toFixed(2)}`]);
    read.replaceChildren(tokenSpan(tokens[index]), ": nearest neighbors", ...listed, ".");
  };
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const scale = width / frame.width;
    show(nearest(places, [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale]));
  });
  svg.addEventListener("keydown", (event) => {
    if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
    const next = nearest(places, places[here], event.key);
    if (next >= 0) show(next);
  });
  const [first, second] = variances;
  const note = element("p", { class: "note" }, `The ${tokens.length} most frequent tokens. Horizontal: ${percent(first)} of their variance; vertical: ${percent(second)}. The rest of the variance is not shown.`);
  redraw(box, read, svg, note);
  show(here);
}

views.push({ on: ["size"], draw: drawMap });
