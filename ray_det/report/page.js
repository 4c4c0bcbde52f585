// Values under the pointer: the nearest point of each series of a chart.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart), figure = svg.parentElement;
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  const line = document.createElementNS(svg.namespaceURI, "line");
  line.setAttribute("class", "axis");
  line.setAttribute("visibility", "hidden");
  svg.append(line);
  figure.append(tip);
  const [low, high, start, end] = chart.x;
  svg.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const x = low + ((at.x - start) / (end - start)) * (high - low);
    const near = chart.series.map((s) => s.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)));
    const found = near.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a))[0];
    const pixel = start + ((found - low) / (high - low)) * (end - start);
    for (const [key, value] of [["x1", pixel], ["x2", pixel], ["y1", chart.y[2]], ["y2", chart.y[3]], ["visibility", "visible"]])
      line.setAttribute(key, value);
    const rows = chart.series.map((s, i) => s.name + "  " + Number(near[i][1].toPrecision(4)));
    tip.textContent = [chart.label + " " + found, ...rows].join("\n");
    tip.hidden = false;
    const box = figure.getBoundingClientRect(), left = event.clientX - box.left + 14;
    tip.style.left = (left + tip.offsetWidth > box.width ? left - tip.offsetWidth - 28 : left) + "px";
    tip.style.top = event.clientY - box.top + 10 + "px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    line.setAttribute("visibility", "hidden");
  });
}
