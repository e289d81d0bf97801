// The page itself: reads the block of data, fills each part, and joins the parts to the slider.

// Of the slider in a narrow window.
const TICKS = 330;

const byId = (id) => document.getElementById(id);

function showAbout(about) {
  document.title = `${about.name}: layerprobe report`;
  byId("name").textContent = about.name;
  byId("model").textContent = about.facts[0][1];
  for (const [name, value] of about.facts) byId("facts").append(make("dt", {}, name), make("dd", {}, value));
  fillTable(byId("sites"), ["site", "kind", "dtype", "width"], about.sites.map((row) => row.map(String)));
  byId("made").textContent = `Made by layerprobe ${about.version}. This page loads nothing from elsewhere.`;
}

function fillTable(table, heads, rows) {
  table.append(make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))));
  table.append(make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell))))));
}

function showClasses(classes) {
  byId("classes").hidden = false;
  byId("classes-title").textContent = `How well each layer tells ${classes.labels} apart`;
  byId("classes-said").textContent = `A linear probe at each layer, right on texts it has not seen. ${classes.said}`;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const rows = classes.rows.map((row) => [
    row.name,
    make("meter", { min: 0, max: 1, value: row.accuracy, "aria-hidden": "true" }),
    percent(row.accuracy),
    row.ci.map(percent).join(" to "),
    formatNumber(row.f1),
    row.tied ? "best or tied" : "",
  ]);
  fillTable(byId("scores"), ["layer", "", "accuracy", "95 % interval", "macro F1", ""], rows);
  byId("scores").querySelectorAll("tbody tr").forEach((row, number) => {
    row.className = number >= classes.num_sites ? "simple" : classes.rows[number].tied ? "best" : "";
  });
  byId("verdict").append(...classes.verdict.map((sentence) => make("li", {}, sentence)));
}

function showDepth(depth, short) {
  byId("depth").hidden = false;
  byId("depth-said").textContent = depth.said;
  const curves = depth.curves.map((curve) => drawCurve(curve, short));
  byId("curves").append(...curves.map((curve) => curve.figure));
  byId("heat").append(...depth.heat.map((map) => drawHeat(map, short)));
  return (layer) => curves.forEach((curve) => curve.mark(layer));
}

function describeLayer(data, layer) {
  const { variance, trust } = data.points.panels[layer];
  const said = [data.sites[layer]];
  if (variance !== null) said.push(`${(100 * variance).toFixed(variance < 0.1 ? 1 : 0)} % of variance`);
  if (trust !== null) said.push(`trust ${trust.toFixed(2)}`);
  return said.join(", ");
}

function showPoints(data) {
  const { kind, of, all } = data.points;
  const count = (num) => num.toLocaleString("en");
  byId("scatter-title").textContent = kind === "rows" ? "Every token, layer by layer" : "Every text, layer by layer";
  const drawn = of.length < all ? `${count(of.length)} of ${count(all)} ${kind}, drawn at random` : `${count(all)} ${kind}`;
  byId("points-said").textContent =
    `${drawn}. Two principal components, each layer turned onto the one before, so that a point keeps its place as far as ` +
    "it can. The share of variance says how much of a layer two components show; trust is 1 where no neighbour here is far away in truth.";
  const named = new Set(placeNames(data.short, 0, TICKS / data.short.length, TICKS).map(([layer]) => layer));
  const isShort = data.short.every((name) => name.length <= MOST_LETTERS);
  byId("ticks").append(...data.short.map((name, layer) => make("span", {}, isShort && named.has(layer) ? name : "")));
  byId("layer").max = String(data.sites.length - 1);
}

// The reader's system decides until the button is pressed.
function watchTheme(onChange) {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const isDark = () => (chosen ?? (system.matches ? "dark" : "light")) === "dark";
  const apply = () => {
    document.documentElement.dataset.theme = isDark() ? "dark" : "light";
    byId("theme").textContent = isDark() ? "Light" : "Dark";
    onChange();
  };
  byId("theme").addEventListener("click", () => { chosen = isDark() ? "light" : "dark"; apply(); });
  system.addEventListener("change", apply);
  return { isDark, apply };
}

function start() {
  const data = JSON.parse(byId("data").textContent);
  let scatter = null;
  const theme = watchTheme(() => scatter?.recolour(scatter.field));
  theme.apply();
  showAbout(data.about);
  showPoints(data);
  const markDepth = data.depth ? showDepth(data.depth, data.short) : () => {};
  if (data.classes) showClasses(data.classes);
  let pick = () => {};
  if (data.attention) {
    byId("attention").hidden = false;
    pick = showAttention(data.attention);
  }
  const onLayer = (layer) => {
    byId("layer-name").textContent = describeLayer(data, layer);
    byId("layer").setAttribute("aria-valuetext", data.sites[layer]);
    markDepth(layer);
  };
  scatter = new Scatter(data, theme.isDark, onLayer, (ordinal) => pick(ordinal));
  scatter.colours.forEach((field, number) => byId("colour").append(make("option", { value: number }, field.name)));
  byId("colour").value = String(scatter.colours.indexOf(scatter.field));
  byId("colour").addEventListener("change", (event) => scatter.recolour(scatter.colours[Number(event.target.value)]));
  byId("layer").addEventListener("input", (event) => scatter.goTo(Number(event.target.value)));
  byId("search").addEventListener("input", (event) => scatter.search(event.target.value));
  scatter.recolour(scatter.field);
  onLayer(0);
  scatter.list();
  scatter.canvas.dataset.layer = "0";
  performance.mark("drawn");
  return scatter;
}

const scatter = start();
