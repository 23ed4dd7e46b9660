// The x-axis switch of the trajectories: copies the column "step" or "epoch" of every line into "x".
(() => {
  const options = JSON.parse(document.getElementById("switch-options").textContent);
  const buttons = document.querySelectorAll(".switch button");
  const models = (ids) => ids.map((id) => Bokeh.documents[0].get_model_by_id(id)).filter(Boolean);
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const unit = button.dataset.unit;
      for (const source of models(options.sources)) source.data = { ...source.data, x: source.data[unit] };
      for (const axis of models(options.axes)) axis.axis_label = options.labels[unit];
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
    });
  }
})();
