// Logit attribution: the strongest parts in the explorer, all parts as a waterfall.

const STRONGEST = 9;

// Buttons for the tokens that can be explained: the most probable, and the next one in the text.
function wordChoices(key) {
  const { words, tokens } = currentText();
  const { position } = state;
  const seen = new Set();
  const box = element("div", { class: "choices", role: "group", "aria-label": "Possible next tokens" });
  words.forEach((word, index) => {
    const token = word.tokens[position];
    if (seen.has(token)) return;
    seen.add(token);
    const isNext = token === tokens[position + 1];
    box.append(
      element(
        "button",
        { type: "button", "data-key": `${key}${index}`, "aria-pressed": index === state.word, onclick: () => choose({ word: index }) },
        tokenSpan(token), ` ${percent(word.probabilities[position])}${isNext ? ", next in text" : ""}`,
      ),
    );
  });
  roving(box, () => 1, false);
  return box;
}

function drawPushes() {
  const text = currentText();
  const added = text.words[state.word].added[state.position];
  const most = largestSize(added) || 1;
  const bars = element("div", { class: "bars" });
  bySize(added).slice(0, STRONGEST).forEach((part) => {
    bars.append(...barRow(text.parts[part], 0, added[part], -most, most, signed(added[part])));
  });
  redraw(find("pushes"), wordChoices("push"), bars);
}

function drawWaterfall() {
  const text = currentText();
  const word = text.words[state.word];
  const added = word.added[state.position];
  const { bars, total } = waterfall(added);
  const ends = bars.flat();
  const [lowest, highest] = [Math.min(0, ...ends), Math.max(0.01, ...ends)];
  const rows = element("div", { class: "bars", id: "waterfall-bars" });
  bars.forEach(([from, to], part) => {
    rows.append(...barRow(text.parts[part], from, to, lowest, highest, signed(added[part])));
  });
  rows.append(...barRow("total", 0, total, lowest, highest, signed(word.logits[state.position]), "whole"));
  const sources = word.sources[state.position];
  const most = largestSize(sources) || 1;
  const words = sources.map((value, index) =>
    tokenSpan(text.tokens[index], value / most, { title: `${signed(value)} from position ${index}, by all heads` }));
  redraw(
    find("waterfall"),
    element("p", {}, "After ", tokenSpan(text.tokens[state.position]), ", the logit of ", tokenSpan(word.tokens[state.position]), ":"),
    wordChoices("fall"),
    rows,
    element("h3", { class: "spaced" }, "By source token"),
    element("div", { class: "tokens", id: "sources" }, ...words),
    element("p", { class: "note" }, "What all heads add, by the token they read from: blue raises the logit, orange lowers it; the largest is ", signed(sources[bySize(sources)[0]]), "."),
  );
}

views.push({ on: ["text", "position", "word"], draw: drawPushes }, { on: ["text", "position", "word"], draw: drawWaterfall });
