"use strict";
// A cursor over all panels: pointer and arrow keys move it, and every legend shows its values at that snapshot.

const data = JSON.parse(document.getElementById("data").textContent);
const panels = document.getElementById("panels");
let current = data.steps.length - 1;

function show(index) {
  current = Math.max(0, Math.min(data.steps.length - 1, index));
  document.getElementById("step").textContent =
    `step ${data.steps[current].toLocaleString("en")} (point at a panel, or use the arrow keys)`;
  for (const line of document.querySelectorAll(".cursor")) {
    line.setAttribute("x1", data.places[current]);
    line.setAttribute("x2", data.places[current]);
  }
  for (const cell of document.querySelectorAll("output")) {
    const value = data.values[cell.dataset.series][current];
    cell.textContent = value === null ? "none" : value.toFixed(3);
  }
}

function followPointer(event) {
  const svg = event.target.closest("svg");
  if (!svg) return;
  const box = svg.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
  const distances = data.places.map((place) => Math.abs(place - x));
  show(distances.indexOf(Math.min(...distances)));
}

panels.addEventListener("pointermove", followPointer);
panels.addEventListener("pointerdown", followPointer);
panels.addEventListener("keydown", (event) => {
  const target = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: data.steps.length - 1 }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  show(target);
});
show(current);
