"use strict";
// Values under the pointer. The charts are complete without this: it only reads what they already show.
for (const plot of document.querySelectorAll(".plot")) {
  const end = +plot.dataset.x, bottom = +plot.dataset.y0, top = +plot.dataset.y1, kind = plot.dataset.kind;
  let curves = null, hair = null, tip = null;
  const units = (value, steps) => {
    for (const [unit, size] of steps) if (Math.abs(value) >= size) return (value / size).toPrecision(3) + " " + unit;
    return value.toPrecision(3);
  };
  const written = value => {
    if (kind === "bytes") return units(value, [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]);
    if (kind === "count") return units(value, [["G", 1e9], ["M", 1e6], ["k", 1e3]]);
    if (kind === "share") return (100 * value).toFixed(1) + " %";
    if (kind === "watts") return value.toFixed(0) + " W";
    return Math.abs(value) >= 1e-3 || Math.abs(value) < 1e-12 ? String(+value.toPrecision(4)) : value.toExponential(2);
  };
  const time = s => s < 60 ? s.toFixed(1) + " s" : s < 3600
    ? Math.floor(s / 60) + " min " + String(Math.floor(s % 60)).padStart(2, "0") + " s"
    : Math.floor(s / 3600) + " h " + String(Math.floor(s % 3600 / 60)).padStart(2, "0") + " min";
  const read = () => [...plot.querySelectorAll("polyline")].map(line => ({
    name: line.dataset.name, points: line.getAttribute("points").split(" ").map(pair => pair.split(",").map(Number)),
  }));
  const hide = () => { hair?.remove(); tip?.remove(); hair = tip = null; };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", event => {
    curves ??= read();
    const box = plot.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    if (at < 0 || at > 1) return hide();
    const lines = [time(at * end)];
    for (const { name, points } of curves) {
      let low = 0, high = points.length - 1;
      while (high - low > 1) { const middle = (low + high) >> 1; if (points[middle][0] <= at * 1e4) low = middle; else high = middle; }
      const point = Math.abs(points[low][0] - at * 1e4) <= Math.abs(points[high][0] - at * 1e4) ? points[low] : points[high];
      if (Math.abs(point[0] - at * 1e4) < 600) lines.push(name + "  " + written(bottom + (1 - point[1] / 1e4) * (top - bottom)));
    }
    if (!hair) {
      hair = plot.appendChild(Object.assign(document.createElement("div"), { className: "hair" }));
      tip = plot.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));
    }
    tip.textContent = lines.join("\n");
    hair.style.left = 100 * at + "%";
    tip.style.left = at < .5 ? `calc(${100 * at}% + 10px)` : "auto";
    tip.style.right = at < .5 ? "auto" : `calc(${100 * (1 - at)}% + 10px)`;
  });
}
