"use strict";
// Draws each figure when it comes near the window, and hides the runs that are switched off.
const specs = JSON.parse(document.getElementById("specs").textContent);
const boxes = [...document.querySelectorAll("input.run")];
const charts = [...document.querySelectorAll(".chart")];
const views = {}; // figure -> promise of its view

const hiddenRuns = () => boxes.filter((box) => !box.checked).map((box) => box.value);

async function draw(chart) {
  const byRun = "byRun" in chart.dataset;
  const inner = chart.appendChild(document.createElement("div")); // Vega gives it a role of its own
  const result = await vegaEmbed(inner, specs[chart.dataset.figure], {
    actions: false,
    renderer: "canvas",
    config: byRun ? { legend: { disable: true } } : {}, // the page's own list of runs is it
  });
  if (byRun) await result.view.signal("hidden_runs", hiddenRuns()).runAsync();
  return result.view;
}

const show = (chart) => (views[chart.dataset.figure] ??= draw(chart));

const near = new IntersectionObserver(
  (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => show(e.target)),
  { rootMargin: "600px" },
);
charts.forEach((chart) => near.observe(chart));
window.addEventListener("beforeprint", () => charts.forEach(show));

for (const box of boxes) {
  box.addEventListener("change", async () => {
    for (const chart of charts) {
      if ("byRun" in chart.dataset && chart.dataset.figure in views) {
        (await views[chart.dataset.figure]).signal("hidden_runs", hiddenRuns()).runAsync();
      }
    }
  });
}
