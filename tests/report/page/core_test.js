// The unit tests of core.js: `run()` gives the failures as lines of text. Python puts core.js before this file, and runs
// both in node or in a browser.

function run() {
  const failures = [];
  const same = (name, found, expected) => {
    const [left, right] = [JSON.stringify(found), JSON.stringify(expected)];
    if (left !== right) failures.push(`${name}: ${left} is not ${right}`);
  };
  same("percent of much", percent(634), "63%");
  same("percent of little", percent(4), "0.4%");
  same("percent of almost nothing", percent(0), "<0.1%");
  same("percent of all", percent(1000), "100%");
  same("percent of what is missing", percent(null), "–");
  same("signed up", signed(1.234), "+1.23");
  same("signed down", signed(-0.5), "−0.50");
  same("signed nothing", signed(-0.001), "0.00");
  same("argmax takes the first", argmax([1, 3, 3]), 1);
  same("by size", bySize([1, -3, 2, 3]), [1, 3, 2, 0]);
  same("largest size", largestSize([1, -3, null]), 3);
  same("waterfall", waterfall([2, -3, 0.5]), { bars: [[0, 2], [2, -1], [-1, -0.5]], total: -0.5 });
  same("mean row", meanRow([[1, 2], [3, 6]]), [2, 4]);
  same("right", moved(1, "ArrowRight", 5), 2);
  same("down a line", moved(1, "ArrowDown", 12, 4), 5);
  same("no further than the end", moved(11, "ArrowDown", 12, 4), 11);
  same("no further than the start", moved(0, "ArrowLeft", 3), 0);
  same("end", moved(0, "End", 3), 2);
  same("another key", moved(0, "a", 3), null);
  same("blend nothing", blend(0, [10, 20, 30], [0, 0, 0], [255, 255, 255]), [10, 20, 30]);
  same("blend up", blend(1, [10, 20, 30], [0, 1, 2], [255, 255, 255]), [0, 1, 2]);
  same("blend down", blend(-2, [10, 20, 30], [0, 1, 2], [255, 254, 253]), [255, 254, 253]);
  const points = [[0, 0], [10, 0], [0, 10], [10, 12]];
  same("nearest", nearest(points, [9, 1]), 1);
  same("to the right", nearest(points, [0, 0], "ArrowRight"), 1);
  same("down", nearest(points, [0, 0], "ArrowDown"), 2);
  same("nothing above", nearest(points, [0, 0], "ArrowUp"), -1);
  same("labels apart", apart([[0, 0, 10, 10], [5, 5, 10, 10], [20, 0, 5, 5]]), [0, 2]);
  return failures;
}
