// One neuron at a time: where it is strongest, and which tokens it promotes there.

function drawNeuron() {
  const box = find("neuron");
  if (!data.neurons) {
    redraw(box, element("p", { class: "note" }, "No examples: the model has no neurons, or the run's validation text is not available."));
    return;
  }
  const neurons = data.neurons.layers[state.layer];
  const neuron = neurons[state.neuron];
  const largest = element("span", {}, `${state.neuron + 1} of ${neurons.length}, largest output first`);
  const step = (change) => () => choose({ neuron: (state.neuron + change + neurons.length) % neurons.length });
  const layers = data.neurons.layers.map((_, layer) =>
    element(
      "button",
      { type: "button", "data-key": `layer${layer}`, "aria-pressed": layer === state.layer, onclick: () => choose({ layer, neuron: 0 }) },
      `Layer ${layer}`,
    ),
  );
  const group = element("span", { class: "choices", role: "group", "aria-label": "Layers" }, ...layers);
  group.style.margin = "0";
  roving(group, () => 1, false);
  const controls = element(
    "div",
    { class: "controls" },
    group,
    element("button", { type: "button", "data-key": "before", "aria-label": "Previous neuron", onclick: step(-1) }, "←"),
    element("button", { type: "button", "data-key": "after", "aria-label": "Next neuron", onclick: step(1) }, "→"),
    largest,
  );
  const examples = neuron.examples.map((example) =>
    element(
      "div",
      { class: "example" },
      element("span", {}, signed(example.activation)),
      element("div", { class: "tokens" }, ...example.tokens.map((token, index) =>
        tokenSpan(token, example.shades[index] / 100, { class: index === example.peak ? "peak" : "" }))),
    ),
  );
  const promoted = neuron.promoted.flatMap((token) => [tokenSpan(token), " "]);
  redraw(
    box,
    controls,
    element("h3", { "aria-live": "polite" }, `Neuron ${neuron.neuron} of layer ${state.layer}`),
    ...examples,
    element("p", { class: "spaced" }, "Promotes at its strongest: ", ...promoted),
    element("p", { class: "note" }, `Over ${data.neurons.num_tokens.toLocaleString("en")} tokens of validation text. Activations are signed: blue is positive, orange negative.`),
  );
}

views.push({ on: ["layer", "neuron"], draw: drawNeuron });
