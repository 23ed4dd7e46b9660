// Values over steps: unpacked from the page's own data, and laid out for the sources of the figures.
const readData = (id) => JSON.parse(document.getElementById(id)?.textContent ?? "null");
const series = (() => {
  const { layers, runs } = readData("series-data") ?? { layers: [], runs: [] };

  const decode = (packed) => {
    const bytes = Uint8Array.from(atob(packed.slice(3)), (letter) => letter.charCodeAt(0)).buffer;
    const kind = packed.slice(0, 2);
    if (kind === "f8") return new Float64Array(bytes);
    if (kind === "u4") return Float64Array.from(new Uint32Array(bytes));
    return Float64Array.from(new Uint16Array(bytes), (count) => (count === 65535 ? NaN : count));
  };

  // Columns of one layer of one run, or null where it has none.
  const of = (run, layer) => {
    const packed = runs[run].layers[layer];
    if (!packed) return null;
    const [place, smaller, near, lower, upper] = packed;
    const near_rank = decode(near);
    return {
      step: decode(runs[run].steps[place]),
      near_rank,
      lower: lower ? decode(lower) : near_rank,
      upper: upper ? decode(upper) : near_rank,
      ratio: near_rank.map((count) => (smaller ? count / smaller : NaN)),
      smaller,
    };
  };

  const scale = (run, unit) => (unit === "epoch" ? runs[run].rate ?? NaN : 1);

  const line = ({ run, layer }, unit) => {
    const { smaller, ...columns } = of(run, layer);
    const x = columns.step.map((step) => step * scale(run, unit));
    return { ...columns, x, run: new Array(x.length).fill(runs[run].text) };
  };

  // Each step's cell reaches half-way to its neighbours, so uneven steps are drawn where they are.
  const edges = (steps) => {
    if (steps.length === 1) return [[steps[0] - 0.5], [steps[0] + 0.5]];
    const middles = Array.from(steps.slice(1), (step, index) => (step + steps[index]) / 2);
    return [[steps[0], ...middles], [...middles, steps[steps.length - 1]]];
  };

  const names = ["step", "near_rank", "ratio", "lower", "upper"];
  const empty = (...more) => Object.fromEntries([...names, ...more].map((name) => [name, []]));

  const heat = ({ run, layers: shown }) => {
    const columns = empty("left", "right", "row", "layer");
    shown.forEach((layer, row) => {
      const values = of(run, layer);
      if (!values) return;
      const [left, right] = edges(values.step);
      left.forEach((start, index) => {
        for (const name of names) columns[name].push(values[name][index]);
        columns.left.push(start);
        columns.right.push(right[index]);
        columns.row.push(row);
        columns.layer.push(layers[layer].text);
      });
    });
    return columns;
  };

  // All panels of a grid at once: lines with gaps between panels and runs, and bands where bounds differ.
  const grid = ({ runs: shown, cells, width, height }, unit, end) => {
    const columns = empty("x", "y", "run", "layer");
    const band = { left: [], right: [], top: [], bottom: [] };
    for (const [layer, left, bottom] of cells) {
      for (const run of shown) {
        const values = of(run, layer);
        if (!values) continue;
        const place = (step) => left + (width * step * scale(run, unit)) / end;
        const level = (ratio) => bottom - height * ratio;
        const [starts, stops] = edges(values.step);
        values.step.forEach((step, index) => {
          for (const name of names) columns[name].push(values[name][index]);
          columns.x.push(place(step));
          columns.y.push(level(values.ratio[index]));
          columns.run.push(runs[run].text);
          columns.layer.push(layers[layer].text);
          if (values.smaller && values.upper[index] > values.lower[index]) {
            band.left.push(place(starts[index]));
            band.right.push(place(stops[index]));
            band.bottom.push(level(values.lower[index] / values.smaller));
            band.top.push(level(values.upper[index] / values.smaller));
          }
        });
        for (const name of [...names, "x", "y"]) columns[name].push(NaN);
        columns.run.push("");
        columns.layer.push("");
      }
    }
    return { columns, band };
  };

  return { of, line, heat, grid, runs, layers };
})();
