// Draws the charts. The interpreter (`ast`) needs no eval, which the page's policy forbids.
const quiet = window.matchMedia("(prefers-reduced-motion: reduce)");
for (const figure of document.querySelectorAll("figure.chart")) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  vegaEmbed(plot, spec, {
    renderer: "svg",
    actions: false,
    ast: true,
    defaultStyle: false,
    hover: !quiet.matches,
    tooltip: { disableDefaultStyle: true },
  }).then(() => {
    // The plot has a name, and the values stand in a table; a screen reader need not read each mark.
    plot.querySelector("svg").setAttribute("aria-hidden", "true");
  }).catch((error) => { plot.textContent = `The chart could not be drawn (${error.message}); its values are below.`; });
}
