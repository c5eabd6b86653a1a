"use strict";
// Draws each figure when it comes near the window, hides the runs that are switched off, smooths
// curves, and loads the page again while its runs go on.
const specs = JSON.parse(document.getElementById("specs").textContent);
const boxes = [...document.querySelectorAll("input.run")];
const charts = [...document.querySelectorAll(".chart")];
const details = [...document.querySelectorAll("details")];
const slider = document.getElementById("smoothing");
const refresh = document.getElementById("refresh");
const views = {}; // figure -> promise of its view

const hiddenRuns = () => boxes.filter((box) => !box.checked).map((box) => box.value);

// The exponential moving average of each run's values, of which the first do not count as zeros.
function smoothed(rows, weight) {
  const state = {}; // run -> [weighted sum, sum of the weights]
  return rows.map((row) => {
    const [sum, total] = state[row.run] ?? [0, 0];
    state[row.run] = [weight * sum + (1 - weight) * row.mean, weight * total + 1 - weight];
    return { ...row, smooth: state[row.run][0] / state[row.run][1] };
  });
}

const texts = {
  text: (value) => String(value),
  number: (value) => String(Number(Number(value).toPrecision(4))),
  percent: (value) => `${(100 * value).toFixed(1)}%`,
};

// The rows of a tooltip: those fields that the figure names, as far as the point has them.
const tooltip = (fields) => (row, escape) =>
  "<table>" + fields
    .filter(([field]) => row[field] !== undefined && row[field] !== null)
    .map(([field, title, kind]) =>
      `<tr><td class="key">${escape(title)}</td><td>${escape(texts[kind](row[field]))}</td></tr>`)
    .join("") + "</table>";

function shownRows(chart) {
  const rows = specs[chart.dataset.figure].datasets.rows;
  return "smooth" in chart.dataset ? smoothed(rows, Number(slider.value)) : rows;
}

async function draw(chart) {
  const byRun = "byRun" in chart.dataset;
  const spec = specs[chart.dataset.figure];
  const inner = chart.appendChild(document.createElement("div")); // Vega gives it a role of its own
  const result = await vegaEmbed(inner, { ...spec, datasets: { rows: shownRows(chart) } }, {
    actions: false,
    renderer: "canvas",
    tooltip: { formatTooltip: tooltip(spec.usermeta.tooltip) },
    config: byRun ? { legend: { disable: true } } : {}, // the page's own list of runs is it
  });
  if (byRun) await result.view.signal("hidden_runs", hiddenRuns()).runAsync();
  return result.view;
}

const show = (chart) => (views[chart.dataset.figure] ??= draw(chart));
const drawn = (kind) => charts.filter((c) => kind in c.dataset && c.dataset.figure in views);

async function hideRuns() {
  for (const chart of drawn("byRun")) {
    (await views[chart.dataset.figure]).signal("hidden_runs", hiddenRuns()).runAsync();
  }
}

async function smooth() {
  slider.labels[0].querySelector("output").textContent = slider.value;
  for (const chart of drawn("smooth")) {
    (await views[chart.dataset.figure]).data("rows", shownRows(chart)).runAsync();
  }
}

// What the reader has set survives loading the page again; where nothing can be kept, nothing is.
const place = `poweropd ${location.pathname}`;

function save() {
  const state = {
    scroll: scrollY, smoothing: slider?.value, hidden: hiddenRuns(), refresh: refresh?.checked,
    open: details.map((one) => one.open),
  };
  try { sessionStorage.setItem(place, JSON.stringify(state)); } catch { /* no storage */ }
}

function restore() {
  let state = null;
  try { state = JSON.parse(sessionStorage.getItem(place)); } catch { /* no storage */ }
  if (!state) return;
  boxes.forEach((box) => (box.checked = !state.hidden.includes(box.value)));
  if (slider && state.smoothing) slider.value = state.smoothing;
  if (slider) slider.labels[0].querySelector("output").textContent = slider.value;
  if (refresh) refresh.checked = state.refresh ?? true;
  if (state.open.length === details.length) details.forEach((d, i) => (d.open = state.open[i]));
  history.scrollRestoration = "manual";
  scrollTo(0, state.scroll);
}

// A reader who points at a figure or marks text is not disturbed.
const busy = () =>
  document.hidden || !refresh.checked || !getSelection().isCollapsed ||
  document.querySelector("#vg-tooltip-element.visible") !== null;

function loadAgain() {
  if (busy()) return;
  save();
  location.reload();
}

restore();
const near = new IntersectionObserver(
  (entries) => entries.filter((e) => e.isIntersecting).forEach((e) => show(e.target)),
  { rootMargin: "600px" },
);
charts.forEach((chart) => near.observe(chart));
boxes.forEach((box) => box.addEventListener("change", hideRuns));
slider?.addEventListener("input", smooth);
window.addEventListener("pagehide", save);
window.addEventListener("beforeprint", () => charts.forEach(show));
if (refresh) setInterval(loadAgain, 1000 * Number(document.body.dataset.refresh));
