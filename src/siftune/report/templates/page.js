"use strict";
(() => {
  const tip = document.getElementById("tip");

  // ---- figures: what stands under the pointer, in words
  const written = (value) => String(Number(value.toPrecision(4))).replace("-", "−");
  const overLines = (data, x) => {
    const low = data.x[0], high = data.x.at(-1), wanted = low + x * (high - low);
    const nearest = (xs) => xs.reduce((best, one) => Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best, xs[0]);
    const step = nearest(data.x);
    const told = data.lines.map(([name, xs, ys]) => {
      const value = written(ys[xs.indexOf(nearest(xs))]);
      return name ? `${name}: ${value}` : value;
    });
    return [`step ${Math.round(step).toLocaleString("en")}`, ...told].join("\n");
  };
  const place = (event) => {
    const left = event.clientX + 14 + tip.offsetWidth > innerWidth ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4))}px`;
  };
  for (const figure of document.querySelectorAll("figure")) {
    const source = figure.querySelector('script[type="application/json"]');
    if (!source) continue;
    const data = JSON.parse(source.textContent);
    for (const area of figure.querySelectorAll(".hit")) {
      area.addEventListener("pointermove", (event) => {
        const box = area.getBoundingClientRect();
        const x = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
        tip.textContent = overLines(data, x);
        tip.hidden = false;
        place(event);
      });
      area.addEventListener("pointerleave", () => { tip.hidden = true; });
    }
  }
})();
