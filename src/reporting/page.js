// Charts in the page's colours and width, tables that sort, grids of samples that move through training.
"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const root = document.documentElement;
const dark = () =>
  root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;

// Rows come as columns and lists, which are shorter than objects.
const datasets = {};
for (const [name, { columns, rows }] of Object.entries(report.data)) {
  datasets[name] = rows.map((row) => Object.fromEntries(columns.map((column, i) => [column, row[i]])));
}

let drawing = Promise.resolve();
let drawn = [];
async function draw() {
  const theme = dark() ? "dark" : "light";
  drawn.forEach((result) => result.finalize());
  drawn = [];
  for (const place of document.querySelectorAll("[data-chart]")) {
    const { spec, sources, label } = report.charts[place.dataset.chart];
    const config = structuredClone(report.config[theme]);
    config.legend.columns = Math.max(1, Math.floor(place.clientWidth / label));
    const own = Object.fromEntries(Object.entries(sources).map(([as, name]) => [as, datasets[name]]));
    const whole = { ...spec, datasets: own, config };
    const actions = { export: true, source: false, compiled: false, editor: false };
    const options = { renderer: "canvas", actions, tooltip: { theme }, downloadFileName: place.dataset.chart };
    drawn.push(await vegaEmbed(place, whole, options));
  }
  root.dataset.drawn = theme;
}
const redraw = () => (drawing = drawing.then(draw).catch((error) => console.error(error)));

const button = document.getElementById("theme");
function name() {
  button.textContent = dark() ? "Light" : "Dark";
  button.setAttribute("aria-label", dark() ? "Switch to light colours" : "Switch to dark colours");
}
button.addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  name();
  redraw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  name();
  redraw();
});
name();
redraw();
let width = innerWidth;
addEventListener("resize", () => {
  if (Math.abs(innerWidth - width) > 80) redraw(); // charts follow by themselves; legends need new columns
  if (Math.abs(innerWidth - width) > 80) width = innerWidth;
});

// A click on a column's title sorts by it, another turns the order round; what has no value stays below.
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [row.cells[column].dataset.value, row]);
      const numeric = rows.every(([value]) => value === "" || Number.isFinite(Number(value)));
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
        return rising ? order : -order;
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

// The slider shows, of each run, the last grid that it had drawn by then.
const slider = document.getElementById("time");
if (slider) {
  const steps = report.steps;
  const play = document.getElementById("play");
  const show = () => {
    const now = steps[Number(slider.value)];
    document.getElementById("now").textContent = `step ${now.toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", `step ${now}`);
    for (const figure of document.querySelectorAll(".grids figure")) {
      const images = [...figure.querySelectorAll("img")];
      const shown = images.filter((image) => Number(image.dataset.step) <= now).at(-1) ?? images[0];
      images.forEach((image) => (image.hidden = image !== shown));
      figure.querySelector("span").textContent = shown.dataset.caption;
    }
  };
  let timer = 0;
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  };
  slider.addEventListener("input", () => (stop(), show()));
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === steps.length - 1) slider.value = 0;
    else slider.value = Number(slider.value) + 1;
    show();
    play.textContent = "Pause";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === steps.length - 1) stop();
    }, 600);
  });
  for (const size of document.querySelectorAll(".size")) {
    size.addEventListener("click", () => {
      const large = size.dataset.size === "large";
      document.querySelector(".grids").classList.toggle("large", large);
      document.querySelectorAll(".size").forEach((other) => other.setAttribute("aria-pressed", String(other === size)));
    });
  }
  show();
}
