"use strict";
// Draws the charts of the page with uPlot, from the JSON in the element "charts": lines that share the zoom and the cursor.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const style = getComputedStyle(document.documentElement);
  const tone = name => style.getPropertyValue("--" + name).trim();
  const from = document.getElementById("zoom-from"), to = document.getElementById("zoom-to");
  const ends = charts.flatMap(chart => chart.lines.flatMap(line => [line.x[0], line.x[line.x.length - 1]]));
  const first = Math.min(...ends), last = Math.max(...ends), pad = first === last ? 1 : 0;
  const whole = [first - pad, last + pad];
  let range = whole;
  const plots = [];

  const show = value => value == null ? "–" : Math.abs(value) >= 1e6 || (value !== 0 && Math.abs(value) < 1e-3)
    ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(4)));

  function latest(values, place) {  // a curve's value where the cursor is, or at its last point before; without one, the last
    if (place == null) place = values.length - 1;
    while (place >= 0 && values[place] == null) place--;
    return place < 0 ? null : values[place];
  }

  function series(label, stroke, more) {
    return {label, stroke: () => tone(stroke), width: 1.6, spanGaps: true,
            value: (plot, value, at, place) => show(latest(plot.data[at], place)), ...more};
  }

  function described(chart) {
    const tables = [], lines = [], bands = [];
    for (const line of chart.lines) {
      const faint = line.ends !== "";
      tables.push([line.x, line.y]);
      lines.push(series(line.label, line.tone, {width: faint ? 0.8 : 1.6,
                 points: {show: line.x.length < 40, size: 5, fill: () => tone(line.tone)}}));
      if (line.ends === "high") {
        const low = chart.lines.findIndex(other => other.ends === "low");
        bands.push({series: [lines.length, low + 1], fill: () => tone(line.tone) + "26"});
      }
    }
    for (const line of chart.lines.filter(line => line.low)) {  // what a long curve's means are of
      tables.push([line.x, line.low], [line.x, line.high]);
      const hidden = {width: 0, points: {show: false}, class: "edge"};
      lines.push(series("", line.tone, hidden), series("", line.tone, hidden));
      bands.push({series: [lines.length, lines.length - 1], fill: () => tone(line.tone) + "2e"});
    }
    if (chart.level) {
      tables.push([whole, [chart.level[0], chart.level[0]]]);
      lines.push(series(chart.level[1], "grey", {dash: [3, 4], width: 1.2, points: {show: false}}));
    }
    return {data: uPlot.join(tables), lines, bands};
  }

  function zoom(low, high) {
    range = high > low ? [Math.max(low, whole[0]), Math.min(high, whole[1])] : whole;
    for (const plot of plots) plot.setScale("x", {min: range[0], max: range[1]});
    if (from) { from.value = Math.ceil(range[0] + pad); to.value = Math.floor(range[1] - pad); }
  }

  function draw(box, chart) {
    const {data, lines, bands} = described(chart);
    const axis = {stroke: () => tone("soft"), grid: {stroke: () => tone("grid"), width: 1}, font: "12px system-ui, sans-serif",
                  ticks: {stroke: () => tone("line"), width: 1, size: 5}};
    const plot = new uPlot({
      width: box.clientWidth, height: 220, bands,
      cursor: {sync: {key: "steps"}, drag: {x: true, y: false, setScale: false, dist: 5}, points: {size: 7}, y: false},
      legend: {markers: {width: 2}},
      scales: {x: {time: false, range: () => range}, y: chart.limits ? {range: chart.limits} : {}},
      axes: [{...axis, label: "optimizer step", labelSize: 18, labelFont: "12px system-ui, sans-serif", size: 32},
             {...axis, size: 62, values: (_, ticks) => ticks.map(show)}],
      series: [{label: "step", value: (plot, _, at, place) => String(latest(plot.data[0], place))}, ...lines],
      hooks: {setSelect: [plot => {
        if (plot.select.width > 0) zoom(plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x"));
        plot.setSelect({left: 0, top: 0, width: 0, height: 0}, false);
      }]},
    }, data, box);
    plot.over.addEventListener("dblclick", () => zoom(...whole));
    box.querySelectorAll(".u-legend .edge").forEach(row => row.remove());
    new ResizeObserver(() => plot.setSize({width: box.clientWidth, height: 220})).observe(box);
    plots.push(plot);
  }

  document.querySelectorAll(".plot").forEach((box, place) => draw(box, charts[place]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(plot => plot.redraw(false)));
  if (from) {
    zoom(...whole);
    for (const field of [from, to]) field.addEventListener("change", () => zoom(Number(from.value) - pad, Number(to.value) + pad));
    document.getElementById("zoom-all").addEventListener("click", () => zoom(...whole));
  }
})();
