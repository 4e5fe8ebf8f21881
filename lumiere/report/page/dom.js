// The data, the selection, and helpers that make elements. Text is inserted as text, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const state = { text: 0, position: 0, word: 0, head: null, layer: 0, neuron: 0 };
const views = [];

const find = (id) => document.getElementById(id);
const label = (token) => data.labels[token];
const currentText = () => data.texts[state.text];
const headName = (layer, head) => `L${layer}H${head}`;

// Make an element with attributes and children; strings become text nodes.
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// A token, shaded by a value from -1 to 1.
function tokenSpan(token, value = 0, attributes = {}) {
  const { class: extra = "", ...rest } = attributes;
  return shaded(element("span", { class: `token ${extra}`, ...rest }, label(token)), value);
}

function shaded(node, value) {
  node.classList.add("shade");
  node.classList.toggle("down", value < 0);
  node.style.setProperty("--shade", Math.min(1, Math.abs(value)).toFixed(3));
  return node;
}

// Replace the children of a container; the child with the same data-key keeps the focus.
function redraw(container, ...children) {
  const focused = container.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const scrolled = container.scrollLeft;
  container.replaceChildren(...children);
  container.scrollLeft = scrolled;
  if (focused !== undefined) {
    const again = [...container.querySelectorAll("[data-key]")].find((node) => node.dataset.key === focused);
    again?.focus({ preventScroll: true });
  }
}

// Change the selection and redraw the views that depend on it.
function choose(changes) {
  const changed = Object.keys(changes).filter((name) => state[name] !== changes[name]);
  Object.assign(state, changes);
  for (const view of views) {
    if (view.on.some((name) => changed.includes(name))) view.draw();
  }
}

// Move the focus inside a group of buttons with the arrow keys.
function roving(container, columns, pick) {
  container.addEventListener("keydown", (event) => {
    const buttons = [...container.querySelectorAll("button")];
    const index = buttons.indexOf(document.activeElement);
    const next = index < 0 ? null : moved(index, event.key, buttons.length, columns());
    if (next === null) return;
    event.preventDefault();
    buttons[next].focus();
    if (pick) buttons[next].click();
  });
}

// Number of buttons in the first line of a wrapping group.
function firstLine(container) {
  const buttons = [...container.children];
  const count = buttons.findIndex((button) => button.offsetTop > buttons[0].offsetTop + 4);
  return count < 0 ? buttons.length : count;
}

// A name, a bar from one value to another, and a number.
function barRow(name, from, to, lowest, highest, text, kind = "") {
  const across = (value) => ((value - lowest) / (highest - lowest)) * 100;
  const bar = element("div", { class: `bar ${kind} ${to < from ? "down" : ""}` });
  bar.style.left = `${across(Math.min(from, to))}%`;
  bar.style.width = `${Math.abs(across(to) - across(from))}%`;
  const track = element("div", { class: "track" }, bar);
  track.style.setProperty("--zero", `${across(0)}%`);
  return [element("span", {}, name), track, element("span", { class: "value" }, text)];
}

function rgb(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim().split(/\s+/).map(Number);
}
