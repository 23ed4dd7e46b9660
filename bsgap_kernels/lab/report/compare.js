// The comparison of two runs: tables of what differs, one layer over steps, every layer at the end.
(() => {
  const data = readData("compare-data");
  const at = (name) => document.getElementById(`compare-${name}`);
  const chosen = () => [data.runs[at("a").value], data.runs[at("b").value]];
  const { unit, labels } = readData("switch-data") ?? { unit: "step", labels: { step: "step" } };
  const WIDTH = 1064;
  // A second colour where both runs have the same.
  const colors = ([a, b]) => (a.color === b.color ? [a.color, "#009E73"] : [a.color, b.color]);

  const element = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const drawing = (name, attributes = {}, ...children) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const write = (x, y, text, attributes = {}) => drawing("text", { x, y, ...attributes }, text);
  const said = (number) => {
    if (number === null || !Number.isFinite(number)) return "–";
    const digits = Math.abs(number) >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 4 };
    return number.toLocaleString("en", digits).replace("-", "−");
  };

  const table = (heads, rows) => {
    const line = (kind, cells) => element("tr", {}, ...cells.map((cell) => element(kind, {}, cell)));
    const body = rows.map((cells) => line("td", cells));
    return element("table", {}, element("thead", {}, line("th", heads)), element("tbody", {}, ...body));
  };

  const options = ([a, b]) => {
    const rows = data.options
      .map((name, index) => [name, a.options[index] ?? "–", b.options[index] ?? "–"])
      .filter(([, first, second]) => first !== second);
    if (!rows.length) return element("p", { class: "absent" }, "No recorded option differs.");
    return table(["option", a.name, b.name], rows);
  };

  const numbers = ([a, b]) => {
    const rows = data.numbers.map((name, index) => {
      const [first, second] = [a.numbers[index], b.numbers[index]];
      return [name, said(first), said(second), first === null || second === null ? "–" : said(second - first)];
    });
    return table(["at the end", a.name, b.name, "B − A"], rows);
  };

  const heading = (text) => element("h3", {}, text);
  const legend = (runs) => {
    const names = runs.map(({ name }, index) => {
      const swatch = element("span", { class: "swatch", style: `background: ${colors(runs)[index]}` });
      return element("span", {}, swatch, `${"AB"[index]}: ${name}`);
    });
    return element("div", { class: "key" }, ...names);
  };

  // 0 and a few round numbers up to `end`.
  const ticks = (end) => {
    const power = 10 ** Math.floor(Math.log10(end));
    const step = [2, 1, 0.5, 0.2, 0.1].map((size) => size * power).find((size) => end / size >= 3);
    return Array.from({ length: Math.floor(end / step + 1e-9) + 1 }, (_, place) => place * step);
  };

  const frame = (height, bottom) => drawing("svg", {
    viewBox: `0 0 ${WIDTH} ${height + bottom}`, height: height + bottom, role: "img",
  });

  // Near-rank of one layer: both runs on one axis, of steps or epochs as the trajectories start with.
  const lines = (runs) => {
    const layer = Number(at("layer").value);
    const found = runs.map(({ series: run }) => (run === null ? null : series.of(run, layer)));
    if (!found.some(Boolean)) return element("p", { class: "absent" }, "Neither run has values of this layer over steps.");
    const finite = found.flatMap((values) => (values ? [...values.upper, ...values.near_rank] : [])).filter(Number.isFinite);
    const top = 1.05 * Math.max(1, ...finite);
    const rates = runs.map(({ series: run }) => (unit === "epoch" && run !== null ? series.runs[run].rate : 1));
    const places = found.map((values, index) => (values ? Array.from(values.step, (step) => step * rates[index]) : []));
    const end = Math.max(1e-9, ...places.map((along) => along[along.length - 1] ?? 0));
    const [height, left, right] = [230, 58, WIDTH - 14];
    const x = (place) => left + ((right - left) * place) / end;
    const y = (count) => 8 + (height - 8) * (1 - count / top);
    const svg = frame(height, 38);
    for (const count of ticks(top)) {
      svg.append(drawing("line", { x1: left, x2: right, y1: y(count), y2: y(count), stroke: "#e6eaee" }));
      svg.append(write(left - 6, y(count) + 4, said(count), { "text-anchor": "end" }));
    }
    for (const place of ticks(end)) {
      svg.append(write(x(place), height + 15, said(place), { "text-anchor": place > 0.98 * end ? "end" : "middle" }));
    }
    svg.append(write((left + right) / 2, height + 33, labels[unit], { "text-anchor": "middle", class: "muted" }));
    found.forEach((values, index) => {
      if (!values) return;
      const color = colors(runs)[index];
      const points = places[index].map((along, place) => [x(along), values.near_rank[place], place]);
      const edge = (bound) => points.filter(([, count]) => Number.isFinite(count)).map(([place, , k]) => `${place.toFixed(1)},${y(bound[k]).toFixed(1)}`);
      if (values.upper.some((bound, place) => bound > values.lower[place])) {
        const outline = [...edge(values.upper), ...edge(values.lower).reverse()].join(" ");
        svg.append(drawing("polygon", { points: outline, fill: color, "fill-opacity": 0.2 }));
      }
      // A new piece after every gap.
      let [path, open] = ["", false];
      for (const [place, count] of points) {
        if (Number.isFinite(count)) path += `${open ? "L" : "M"}${place.toFixed(1)},${y(count).toFixed(1)}`;
        open = Number.isFinite(count);
      }
      svg.append(drawing("path", { d: path, fill: "none", stroke: color, "stroke-width": 2, class: "trajectory" }));
    });
    const name = data.layers[layer];
    return element("div", {}, heading(`Near-rank of ${name} on the probe (count)`), legend(runs), svg);
  };

  // B − A of the near-rank ratio at the end, a bar a layer.
  const layers = ([a, b]) => {
    const changes = data.layers.map((name, index) => {
      const [first, second] = [a.ratios[index], b.ratios[index]];
      return { name, first, second, change: first === null || second === null ? null : second - first };
    });
    const known = changes.filter(({ change }) => change !== null);
    if (!known.length) return element("p", { class: "absent" }, "No layer has a ratio at the end in both runs.");
    const most = Math.max(0.01, ...known.map(({ change }) => Math.abs(change)));
    const [left, right, height] = [58, WIDTH - 14, 170];
    const width = (right - left) / changes.length;
    const y = (change) => 8 + ((height - 8) * (1 - change / most)) / 2;
    // Turned names below the bars; with many layers each is narrow, and the name is cut.
    const turned = width < 90;
    const bottom = turned ? 112 : 22;
    const svg = frame(height, bottom);
    const above = ticks(most);
    for (const change of [...above.slice(1).map((each) => -each), ...above]) {
      const row = y(change);
      svg.append(drawing("line", { x1: left, x2: right, y1: row, y2: row, stroke: change ? "#e6eaee" : "#8a949e" }));
      svg.append(write(left - 6, row + 4, said(change), { "text-anchor": "end" }));
    }
    changes.forEach(({ name, first, second, change }, index) => {
      const middle = left + (index + 0.5) * width;
      if (change !== null) {
        const [high, low] = [Math.min(y(change), y(0)), Math.max(y(change), y(0))];
        const bar = drawing("rect", {
          x: middle - 0.36 * width, y: high, width: 0.72 * width, height: Math.max(low - high, 0.5),
          fill: change < 0 ? "#0072B2" : "#D55E00", class: "change",
        });
        const tip = `${name}: ${a.name} ${said(first)}, ${b.name} ${said(second)}, B − A ${said(change)}`;
        bar.append(drawing("title", {}, tip));
        svg.append(bar);
      }
      const shown = name.length > 20 ? `${name.slice(0, 9)}…${name.slice(-10)}` : name;
      const place = turned
        ? { transform: `rotate(-90 ${middle} ${height + 8})`, "text-anchor": "end", "font-size": Math.min(11, width), dy: "0.35em" }
        : { "text-anchor": "middle", dy: "0.7em" };
      svg.append(write(middle, height + 8, shown, place));
    });
    return element("div", {}, heading("Near-rank ratio on the probe at the end, B − A, layer by layer"), svg);
  };

  const show = () => {
    const runs = chosen();
    at("chosen").textContent = `A: ${runs[0].name}, B: ${runs[1].name}`;
    at("options").replaceChildren(options(runs));
    at("numbers").replaceChildren(numbers(runs));
    if (!data.layers.length) return;
    at("lines").replaceChildren(lines(runs));
    at("layers").replaceChildren(layers(runs));
  };
  for (const name of ["a", "b", "layer"]) at(name)?.addEventListener("change", show);
  show();
})();
