// Curves over depth, heat maps of layer against layer, attention by head.
// Whatever comes from the store becomes a text node or a number, never markup.
"use strict";

// matplotlib's viridis and cividis at nine places each, and what lies between by straight lines.
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const CIVIDIS = ["#00224e", "#1a386f", "#434e6c", "#61656f", "#7d7c78", "#9b9476", "#bcae6c", "#dfc95e", "#fee838"];

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  // a string becomes a text node here
  node.append(...children);
  return node;
}

function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function unpack(text, Kind) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let place = 0; place < raw.length; place++) bytes[place] = raw.charCodeAt(place);
  return new Kind(bytes.buffer);
}

function mixColours(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const part = (stop, at) => parseInt(stop.slice(at, at + 2), 16);
  const mixed = [1, 3, 5].map((at) =>
    Math.round(part(stops[low], at) + (part(stops[low + 1], at) - part(stops[low], at)) * (place - low)));
  return `rgb(${mixed.join(" ")})`;
}

function formatNumber(value) {
  if (value === null || value === undefined) return "none";
  // years and the like are read without a comma
  if (Number.isInteger(value)) return Math.abs(value) < 10000 ? String(value) : value.toLocaleString("en");
  if (Math.abs(value) >= 100) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

// Three or four round numbers from low to high, both ends covered.
function findTicks(low, high) {
  const rough = (high - low) / 3 || 1;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * size).find((one) => one >= rough * 0.999);
  const ticks = [];
  for (let at = Math.floor(low / step + 1e-9); ticks.length < 2 || ticks.at(-1) < high - step * 1e-6; at++) {
    ticks.push(Number((at * step).toPrecision(10)));
  }
  return ticks;
}

// Where names of layers stand along an axis without running into each other, as layer, place and anchor: each, or every
// second, third, ... of short ones, the first and the last of long ones.
function placeNames(short, left, pitch, width) {
  const last = short.length - 1;
  if (Math.max(...short.map((name) => name.length)) > MOST_LETTERS) {
    return last ? [[0, 0, "start"], [last, width, "end"]] : [[0, 0, "start"]];
  }
  const room = (layer) => short[layer].length * LETTER + 4;
  for (let step = 1; ; step++) {
    const named = short.map((_, layer) => layer).filter((layer) => layer % step === 0);
    const isFree = named.every((layer, at) => !at || (room(layer) + room(named[at - 1])) / 2 <= pitch * step);
    if (isFree) return named.map((layer) => [layer, left + layer * pitch, "middle"]);
  }
}

// Of the type of a drawing; and layers of a map in whose cells a number can be read.
const LETTER = 6, MOST_LETTERS = 8, MOST_NUMBERED = 14;
const CURVE = { width: 300, height: 150, left: 40, right: 10, top: 10, bottom: 22 };

function drawCurve(curve, short) {
  const { width, height, left, right, top, bottom } = CURVE;
  const known = curve.values.filter((value) => value !== null);
  const ticks = findTicks(Math.min(0, ...known), Math.max(...known));
  const [low, high] = [ticks[0], ticks.at(-1)];
  const x = (place) => left + (place / Math.max(1, short.length - 1)) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": curve.name });
  for (const tick of ticks) {
    picture.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    picture.append(draw("text", { x: left - 6, y: y(tick) + 3, "text-anchor": "end" }, formatNumber(tick)));
  }
  const now = draw("line", { class: "now", y1: top, y2: height - bottom });
  picture.append(now);
  let path = "";
  curve.values.forEach((value, place) => {
    if (value !== null) path += `${path && curve.values[place - 1] !== null ? "L" : "M"}${x(place)} ${y(value)}`;
  });
  picture.append(draw("path", { class: "curve", d: path }));
  for (const [layer, at, anchor] of placeNames(short, left, x(1) - left, width)) {
    picture.append(draw("text", { x: at, y: height - 7, "text-anchor": anchor }, short[layer]));
  }
  curve.values.forEach((value, place) => {
    if (value === null) return;
    const title = draw("title", {}, `${short[place]}: ${formatNumber(value)}`);
    picture.append(draw("circle", { class: "dot", cx: x(place), cy: y(value), r: 3 }, title));
  });
  const mark = (place) => { now.setAttribute("x1", x(place)); now.setAttribute("x2", x(place)); };
  const caption = make("figcaption", {}, curve.name, make("span", {}, curve.about));
  return { figure: make("figure", {}, caption, picture), mark };
}

// A number in a cell: ".57", "1", "0"; of small cells those above 1 with fewer digits.
function writeShare(value, cell) {
  const written = value.toFixed(value > 1 && cell < 22 ? 1 : 2);
  return Number(written) === 0 ? "0" : written.replace(/^(-?)0\./, "$1.").replace(/\.0+$/, "");
}

function drawHeat(map, short) {
  const size = 300, bottom = 24, left = Math.max(34, 10 + LETTER * Math.max(...short.map((name) => name.length)));
  const cell = (size - left) / short.length;
  const known = map.values.flat().filter((value) => value !== null);
  const top = Math.max(1e-9, ...known) <= 1 && map.values[0][0] === 1 ? 1 : Math.max(1e-9, ...known);
  const picture = draw("svg", { viewBox: `0 0 ${size} ${size - left + bottom}`, role: "img", "aria-label": map.name });
  for (const [layer, at, anchor] of placeNames(short, left + cell / 2, cell, size)) {
    picture.append(draw("text", { x: at, y: size - left + 14, "text-anchor": anchor }, short[layer]));
  }
  const step = Math.ceil(short.length / MOST_NUMBERED);
  map.values.forEach((row, number) => {
    const y = size - left - (number + 1) * cell;
    if (number % step === 0) {
      picture.append(draw("text", { x: left - 5, y: y + cell / 2 + 3, "text-anchor": "end" }, short[number]));
    }
    row.forEach((value, column) => {
      if (value === null) return;
      const x = left + column * cell;
      const title = draw("title", {}, `${short[number]} and ${short[column]}: ${formatNumber(value)}`);
      const shade = mixColours(CIVIDIS, 1 - value / top);
      picture.append(draw("rect", { x, y, width: cell + 0.3, height: cell + 0.3, fill: shade }, title));
      if (short.length > MOST_NUMBERED) return;
      const look = `cell ${value / top > 0.55 ? "on-dark" : "on-light"}`;
      const place = { x: x + cell / 2, y: y + cell / 2 + 3, "text-anchor": "middle", "pointer-events": "none" };
      picture.append(draw("text", { class: look, ...place }, writeShare(value, cell)));
    });
  });
  const scale = short.length > MOST_NUMBERED ? ` Dark blue is ${formatNumber(top)}, yellow 0.` : "";
  return make("figure", {}, make("figcaption", {}, map.name, make("span", {}, map.about + scale)), picture);
}

function showAttention(attention) {
  const [examples, sites] = ["attention-example", "attention-site"].map((id) => document.getElementById(id));
  const heads = document.getElementById("heads");
  const said = document.getElementById("attention-said");
  attention.examples.forEach((example, number) => {
    const text = example.tokens.join(" ");
    const name = `${example.ordinal}: ${text.length > 60 ? `${text.slice(0, 60)}...` : text}`;
    examples.append(make("option", { value: number }, name));
  });
  attention.sites.forEach((site, number) => sites.append(make("option", { value: number }, site)));
  const show = () => {
    const example = attention.examples[Number(examples.value)];
    const map = example.maps[Number(sites.value)];
    const weights = unpack(map.packed, Uint8Array);
    said.textContent = `The strongest weight is ${formatNumber(map.top)}. Point at a map to read one.`;
    heads.replaceChildren();
    for (let head = 0; head < map.heads; head++) heads.append(drawHead(example.tokens, weights, head, map.top, said));
  };
  examples.addEventListener("change", show);
  sites.addEventListener("change", show);
  show();
  return (ordinal) => {
    const place = attention.examples.findIndex((example) => example.ordinal === ordinal);
    if (place < 0 || String(place) === examples.value) return;
    examples.value = String(place);
    show();
  };
}

function drawHead(tokens, weights, head, top, said) {
  const size = tokens.length;
  const canvas = make("canvas", { width: size, height: size, "aria-label": `head ${head}` });
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  const start = head * size * size;
  for (let cell = 0; cell < size * size; cell++) {
    // no weight is no ink, so that the map stands on light and dark alike
    image.data.set([46, 134, 200, weights[start + cell]], cell * 4);
  }
  context.putImageData(image, 0, 0);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const at = (along, length) => Math.min(size - 1, Math.max(0, Math.floor((along / length) * size)));
    const [row, column] = [at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width)];
    const weight = (weights[start + row * size + column] / 255) * top;
    said.textContent = `head ${head}: ${tokens[row]} attends to ${tokens[column]} with ${formatNumber(weight)}`;
  });
  return make("figure", {}, make("figcaption", {}, `head ${head}`), canvas);
}
