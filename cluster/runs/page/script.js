"use strict";
// Pointing at one chart reads all of them at the same step. A point is [step, place in %, height in %, text].
const charts = [...document.querySelectorAll(".chart:not([data-lines='[]'])")].map((figure) => ({
  lines: JSON.parse(figure.dataset.lines),
  plot: figure.querySelector(".plot"),
  field: figure.querySelector(".field"),
  cursor: figure.querySelector(".cursor"),
  output: figure.querySelector("output"),
  at: figure.querySelector(".at"),
}));
const places = [...new Set(charts.flatMap((chart) => chart.lines.flatMap((line) => line.points.map((point) => point[1]))))];
places.sort((a, b) => a - b);
let current = null;

function nearest(points, place) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][1] < place) low = middle + 1; else high = middle;
  }
  return low > 0 && place - points[low - 1][1] <= points[low][1] - place ? points[low - 1] : points[low];
}

function read(place) {
  current = place;
  for (const chart of charts) {
    const found = chart.lines.filter((line) => line.points.length).map((line) => nearest(line.points, place));
    chart.output.textContent = found.map((point) => point[3]).join(" · ");
    chart.at.textContent = found.length ? "step " + [...new Set(found.map((point) => point[0]))].join(" · ") : "";
    chart.cursor.hidden = false;
    chart.cursor.style.left = place + "%";
  }
}

function rest() {
  current = null;
  for (const chart of charts) {
    chart.output.textContent = chart.output.dataset.rest;
    chart.at.textContent = "";
    chart.cursor.hidden = true;
  }
}

for (const chart of charts) {
  const point = (event) => {
    const box = chart.field.getBoundingClientRect();
    const place = Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width));
    read(nearest(places.map((at) => [0, at]), place)[1]);
  };
  chart.plot.addEventListener("pointermove", point);
  chart.plot.addEventListener("pointerdown", point);
  chart.plot.addEventListener("pointerleave", rest);
  chart.plot.addEventListener("blur", rest);
  chart.plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const index = current === null ? (step > 0 ? -1 : places.length) : places.indexOf(current);
    read(places[Math.min(places.length - 1, Math.max(0, index + step))]);
  });
}
