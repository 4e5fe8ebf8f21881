// Logit lens: layers by tokens, the last layer on top.

function drawLens() {
  const { lens, tokens } = currentText();
  const chosen = (position) => (position === state.position ? "chosen" : "");
  const heads = tokens.map((token, position) =>
    element(
      "th",
      { scope: "col", class: chosen(position) },
      element(
        "button",
        { type: "button", class: "token", "data-key": position, "aria-pressed": position === state.position, tabindex: position === state.position ? 0 : -1, onclick: () => choose({ position, word: 0 }) },
        label(token),
      ),
    ),
  );
  const head = element("tr", {}, element("th", {}, "after"), ...heads);
  roving(head, () => 1, true);
  const rows = lens.stages.map((name, stage) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, name),
      ...tokens.map((_, position) => {
        const token = lens.tokens[stage][position][0];
        const share = lens.probabilities[stage][position][0];
        const isRight = position + 1 < tokens.length && token === tokens[position + 1];
        const details = `${label(token)} ${percent(share)}; entropy ${lens.entropies[stage][position]} nats, KL to the output ${lens.divergences[stage][position]} nats`;
        return element("td", { class: chosen(position) }, tokenSpan(token, share / 1000, { class: isRight ? "right" : "", title: details }));
      }),
    ),
  );
  const goal = element("tr", {}, element("th", { scope: "row" }, "next in text"), ...tokens.map((_, position) =>
    element("td", { class: chosen(position) }, position + 1 < tokens.length ? tokenSpan(tokens[position + 1]) : "")));
  redraw(find("lens-table"), element("table", {}, element("thead", {}, head), element("tbody", {}, goal, ...rows.reverse())));
  scrollLens();
}

// Scroll the table just enough to show the chosen column.
function scrollLens() {
  const box = find("lens-table");
  const chosen = box.querySelector("thead .chosen");
  const edge = box.querySelector("thead th").offsetWidth;
  const [left, right] = [chosen.offsetLeft - edge - 40, chosen.offsetLeft + chosen.offsetWidth + 40];
  if (left < box.scrollLeft) box.scrollLeft = left;
  else if (right > box.scrollLeft + box.clientWidth) box.scrollLeft = right - box.clientWidth;
}

views.push({ on: ["text", "position"], draw: drawLens });
