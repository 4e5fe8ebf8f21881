// Light and dark theme, and the first drawing.

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
}

function start() {
  const theme = find("theme");
  const name = () => {
    theme.textContent = isDark() ? "Light" : "Dark";
  };
  // Canvas colors are not reached by styles.
  const repaint = () => {
    name();
    drawThumbnails();
    drawLarge();
  };
  theme.hidden = false;
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    repaint();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  window.matchMedia("print").addEventListener("change", repaint);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's browser bars come and go while scrolling
    width = window.innerWidth;
    choose({ size: width });
    repaint();
  });
  drawTextChoice();
  roving(find("tokens"), () => firstLine(find("tokens")), true);
  roving(find("thumbnails"), () => Math.min(data.heads, window.innerWidth < 500 ? 4 : 8), false);
  state.size = width;
  state.position = lastButOne(currentText());
  state.head = data.shown_head;
  name();
  for (const view of views) view.draw();
}
