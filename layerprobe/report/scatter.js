// The points: one canvas, a slider through the layers, hover, search, brush, colours.
// A point has the same number at every layer, so what is chosen at one stays chosen at all.

const MARKS = [
  (c, r) => c.arc(0, 0, r, 0, 2 * Math.PI),
  (c, r) => c.rect(-r * 0.88, -r * 0.88, r * 1.76, r * 1.76),
  (c, r) => trace(c, [[0, -r * 1.15], [r * 1.1, r * 0.85], [-r * 1.1, r * 0.85]]),
  (c, r) => trace(c, [[0, -r * 1.25], [r * 1.1, 0], [0, r * 1.25], [-r * 1.1, 0]]),
  (c, r) => trace(c, [[0, r * 1.15], [r * 1.1, -r * 0.85], [-r * 1.1, -r * 0.85]]),
  (c, r) => { c.rect(-r * 1.15, -r * 0.4, r * 2.3, r * 0.8); c.rect(-r * 0.4, -r * 1.15, r * 0.8, r * 2.3); },
  (c, r) => trace(c, [[0, -r * 0.4], [r * 0.7, -r * 1.1], [r * 1.1, -r * 0.7], [r * 0.4, 0], [r * 1.1, r * 0.7],
    [r * 0.7, r * 1.1], [0, r * 0.4], [-r * 0.7, r * 1.1], [-r * 1.1, r * 0.7], [-r * 0.4, 0],
    [-r * 1.1, -r * 0.7], [-r * 0.7, -r * 1.1]]),
];
const NUM_SHADES = 32;
const MOST_LISTED = 200;
const REACH = 12;
const STEP_MS = 350;

function trace(context, corners) {
  corners.forEach(([x, y], number) => (number ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.closePath();
}

// Numbers from 0, mixed the same each time.
function shuffle(count) {
  const order = Uint32Array.from({ length: count }, (_, number) => number);
  let state = 1;
  for (let place = count - 1; place > 0; place--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const other = Math.floor((state / 2 ** 32) * (place + 1));
    [order[place], order[other]] = [order[other], order[place]];
  }
  return order;
}

class Scatter {
  constructor(data, isDark, onLayer, onPick) {
    this.data = data;
    this.points = data.points;
    this.num = data.points.of.length;
    this.places = unpack(data.points.places, Int16Array);
    // in no order of the store's, so that what comes last in it hides nothing
    this.order = shuffle(this.num);
    this.isDark = isDark;
    this.onLayer = onLayer;
    this.onPick = onPick;
    this.layer = 0;
    // where points are drawn now: on their way from one layer to the next
    this.now = Float32Array.from(this.places.subarray(0, 2 * this.num));
    this.query = "";
    this.found = null;
    this.brushed = null;
    this.box = null;
    this.hover = -1;
    this.canvas = document.getElementById("plane");
    this.context = this.canvas.getContext("2d");
    this.lower = null;
    for (const field of data.fields) {
      if (field.packed) field.bySite = unpack(field.packed, Float32Array);
    }
    this.colours = data.fields.filter((field) => field.colours !== false);
    this.field = this.colours.find((field) => field.name === data.first) ?? this.colours[0];
    this.listen();
    this.resize();
  }

  listen() {
    const canvas = this.canvas;
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerleave", () => this.point(-1));
    canvas.addEventListener("pointerdown", (event) => {
      const [x, y] = this.locate(event);
      this.point(this.nearest(x, y), x, y);
      if (event.pointerType === "touch") return;
      this.drag = [x, y];
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointerup", (event) => this.drop(event));
    document.getElementById("clear").addEventListener("click", () => this.clear());
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    if (!width || !height) return;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.ratio = ratio;
    this.radius = Math.min(6, Math.max(2.2, Math.sqrt((width * height) / this.num) * 0.09));
    const half = Math.min(width, height) / 2 - this.radius - 8;
    // the picture is as wide as its place, so that no room is lost; both axes have one scale
    this.scale = half / 32767;
    this.middle = [width / 2, height / 2];
    this.sprites = null;
    this.paint();
  }

  // Where a point stands on the canvas.
  screen(number) {
    return [this.middle[0] + this.now[2 * number] * this.scale, this.middle[1] - this.now[2 * number + 1] * this.scale];
  }

  locate(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  nearest(x, y) {
    let [best, least] = [-1, REACH * REACH];
    for (let number = 0; number < this.num; number++) {
      if (!this.isLit(number)) continue;
      const [px, py] = this.screen(number);
      const far = (px - x) ** 2 + (py - y) ** 2;
      if (far < least) [best, least] = [number, far];
    }
    return best;
  }

  isLit(number) {
    return (!this.found || this.found[number]) && (!this.brushed || this.brushed[number]);
  }

  move(event) {
    const [x, y] = this.locate(event);
    if (this.drag && Math.hypot(x - this.drag[0], y - this.drag[1]) > 4) {
      this.box = [...this.drag, x, y];
      this.point(-1);
      this.paint();
      return;
    }
    this.point(this.nearest(x, y), x, y);
  }

  drop(event) {
    if (!this.drag) return;
    const box = this.box;
    this.drag = null;
    if (!box) {
      const number = this.nearest(...this.locate(event));
      if (number >= 0) this.onPick(this.points.ordinals[this.points.of[number]]);
      return;
    }
    const [left, right] = [Math.min(box[0], box[2]), Math.max(box[0], box[2])];
    const [top, bottom] = [Math.min(box[1], box[3]), Math.max(box[1], box[3])];
    this.brushed = new Uint8Array(this.num);
    for (let number = 0; number < this.num; number++) {
      const [x, y] = this.screen(number);
      this.brushed[number] = x >= left && x <= right && y >= top && y <= bottom ? 1 : 0;
    }
    this.paint();
    this.list();
  }

  clear() {
    this.brushed = this.box = null;
    this.search("");
    document.getElementById("search").value = "";
  }

  // The text that a point stands for.
  text(number) {
    return this.points.texts[this.points.of[number]] ?? "";
  }

  search(query) {
    this.query = query;
    const wanted = query.trim().toLowerCase();
    this.found = null;
    if (wanted) {
      this.lower ??= this.points.texts.map((text) => (text ?? "").toLowerCase());
      const holds = this.lower.map((text) => text.includes(wanted));
      this.found = Uint8Array.from(this.points.of, (of) => (holds[of] ? 1 : 0));
    }
    this.paint();
    this.list();
  }

  // List what search and brush leave.
  list() {
    const list = document.getElementById("chosen");
    const isAsked = Boolean(this.found || this.brushed);
    document.getElementById("clear").hidden = !isAsked;
    const lit = [];
    for (let number = 0; isAsked && number < this.num; number++) {
      if (this.isLit(number)) lit.push(number);
    }
    const num = lit.length;
    // in the order of the input, rows of an example as they stand in it
    lit.sort((a, b) => this.ordinal(a) - this.ordinal(b) || a - b);
    list.replaceChildren(...lit.slice(0, MOST_LISTED).map((number) => this.item(number)));
    const kind = this.points.kind;
    const said = document.getElementById("chosen-said");
    said.textContent = !isAsked ? "Drag a box to choose points; point at one to read it."
      : `${num.toLocaleString("en")} of ${this.num.toLocaleString("en")} ${kind} chosen` +
        (num > MOST_LISTED ? `, the first ${MOST_LISTED} listed.` : ".");
  }

  item(number) {
    const node = make("li", {}, make("span", { class: "number" }, String(this.ordinal(number))), this.name(number));
    node.addEventListener("pointerenter", () => { this.hover = number; this.paint(); });
    node.addEventListener("pointerleave", () => { this.hover = -1; this.paint(); });
    return node;
  }

  ordinal(number) {
    return this.points.ordinals[this.points.of[number]];
  }

  name(number) {
    const token = this.points.kind === "rows" && this.data.fields.find((field) => field.name === "token" && field.values);
    return (token ? `${token.values[token.codes[number]]} in: ` : "") + (this.text(number) || "(no text)");
  }

  value(field, number, layer = this.layer) {
    if (field.bySite) return field.bySite[layer * this.num + number];
    return field.numbers ? field.numbers[number] : field.values[field.codes[number]];
  }

  // Show what a point is, beside the pointer.
  point(number, x = 0, y = 0) {
    const tip = document.getElementById("tip");
    if (number !== this.hover) {
      this.hover = number;
      this.paint();
      if (number >= 0) {
        const facts = make("dl", {}, make("dt", {}, "example"), make("dd", {}, String(this.ordinal(number))));
        for (const field of this.data.fields) {
          const value = this.value(field, number);
          facts.append(make("dt", {}, field.name));
          facts.append(make("dd", {}, typeof value === "string" ? value : formatNumber(value)));
        }
        tip.replaceChildren(make("p", {}, this.text(number) || "(no text)"), facts);
      }
    }
    tip.hidden = number < 0;
    if (number < 0) return;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    const left = Math.max(4, x + 14 + tip.offsetWidth > width ? x - tip.offsetWidth - 14 : x + 14);
    const top = Math.max(4, Math.min(y + 14, height - tip.offsetHeight - 4));
    tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  }

  goTo(layer) {
    this.layer = layer;
    this.box = null;
    this.point(-1);
    this.onLayer(layer);
    const from = this.now.slice();
    const to = this.places.subarray(layer * 2 * this.num, (layer + 1) * 2 * this.num);
    const start = performance.now();
    const isStill = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    const run = (this.run = (this.run ?? 0) + 1);
    const step = () => {
      if (run !== this.run) return;
      const share = isStill ? 1 : Math.min(1, (performance.now() - start) / STEP_MS);
      const eased = share * share * (3 - 2 * share);
      for (let place = 0; place < to.length; place++) this.now[place] = from[place] + (to[place] - from[place]) * eased;
      if (share < 1) requestAnimationFrame(step);
      else this.canvas.dataset.layer = String(layer);
      this.paint();
    };
    step();
    if (this.field.bySite) this.recolour(this.field);
  }

  // Which sprite each point has, and what the key says of them.
  recolour(field) {
    this.field = field;
    this.sprites = null;
    const palette = this.data.palette.map((one) => (this.isDark() && one === "#000000" ? "#ffffff" : one));
    this.looks = new Uint16Array(this.num);
    if (field.values) {
      this.kinds = field.values.slice(0, palette.length).map((_, number) => [palette[number], MARKS[number % MARKS.length]]);
      this.kinds.push([this.data.grey, MARKS[0]]);
      field.codes.forEach((code, number) => { this.looks[number] = Math.min(code, this.kinds.length - 1); });
      this.ends = null;
    } else {
      const values = Array.from({ length: this.num }, (_, number) => this.value(field, number));
      const known = values.filter((value) => value !== null).sort((a, b) => a - b);
      const [low, high] = [known[Math.floor(known.length * 0.01)], known[Math.floor((known.length - 1) * 0.99)]];
      this.kinds = Array.from({ length: NUM_SHADES }, (_, shade) => [mixColours(VIRIDIS, shade / (NUM_SHADES - 1)), MARKS[0]]);
      this.kinds.push([this.data.grey, MARKS[0]]);
      const span = high - low || 1;
      values.forEach((value, number) => {
        const share = value === null ? 2 : Math.min(1, Math.max(0, (value - low) / span));
        this.looks[number] = share > 1 ? NUM_SHADES : Math.round(share * (NUM_SHADES - 1));
      });
      // points beyond the ends have the colours of the ends
      const [below, above] = [known[0] < low ? "up to " : "", known.at(-1) > high ? " and more" : ""];
      this.ends = [below + formatNumber(low), formatNumber(high) + above];
    }
    this.paint();
    this.showKey();
  }

  showKey() {
    document.getElementById("key-title").textContent = this.field.name;
    const items = [];
    if (this.ends) {
      const ramp = make("canvas", { width: NUM_SHADES, height: 1 });
      for (let shade = 0; shade < NUM_SHADES; shade++) {
        ramp.getContext("2d").fillStyle = this.kinds[shade][0];
        ramp.getContext("2d").fillRect(shade, 0, 1, 1);
      }
      const ends = make("span", { class: "ends" }, ...this.ends.map((end) => make("span", {}, end)));
      items.push(make("li", { class: "scale" }, ramp, ends));
    } else {
      const counts = new Array(this.kinds.length).fill(0);
      for (const look of this.looks) counts[look]++;
      const named = this.field.values.slice(0, this.kinds.length - 1);
      const names = [...named, named.includes("other") ? "the rest" : "other"];
      names.forEach((name, number) => {
        if (!counts[number]) return;
        const count = make("span", { class: "number" }, counts[number].toLocaleString("en"));
        items.push(make("li", {}, this.sprite(number, 5, 2), make("span", {}, name), count));
      });
    }
    document.getElementById("key").replaceChildren(...items);
  }

  sprite(number, radius, ratio) {
    const size = Math.ceil(radius * 3.2);
    const canvas = make("canvas", { width: size * ratio, height: size * ratio });
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.translate(size / 2, size / 2);
    context.fillStyle = this.kinds[number][0];
    context.beginPath();
    this.kinds[number][1](context, radius);
    context.fill();
    return canvas;
  }

  paint() {
    if (!this.kinds || !this.scale) return;
    const context = this.context;
    this.sprites ??= this.kinds.map((_, number) => this.sprite(number, this.radius, this.ratio));
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.canvas.clientWidth, this.canvas.clientHeight);
    const isAsked = this.found || this.brushed;
    // what was asked for stands out from thousands
    const size = Math.ceil(this.radius * 3.2) * (isAsked ? 1.6 : 1);
    const faint = this.isDark() ? "#59626d" : "#b9c0c8";
    context.fillStyle = faint;
    context.globalAlpha = 0.35;
    for (let number = 0; isAsked && number < this.num; number++) {
      if (this.isLit(number)) continue;
      const [x, y] = this.screen(number);
      context.fillRect(x - 1, y - 1, 2, 2);
    }
    context.globalAlpha = 0.78;
    // what shares a grey lies below
    for (const isLast of [true, false]) {
      for (const number of this.order) {
        if ((this.looks[number] === this.kinds.length - 1) !== isLast || !this.isLit(number)) continue;
        const [x, y] = this.screen(number);
        context.drawImage(this.sprites[this.looks[number]], x - size / 2, y - size / 2, size, size);
      }
    }
    context.globalAlpha = 1;
    this.paintMarks(context);
  }

  paintMarks(context) {
    context.strokeStyle = this.isDark() ? "#ffffff" : "#1b1f24";
    context.lineWidth = 1.5;
    if (this.hover >= 0) {
      context.beginPath();
      context.arc(...this.screen(this.hover), this.radius + 4, 0, 2 * Math.PI);
      context.stroke();
    }
    if (this.box) {
      const [x, y, toX, toY] = this.box;
      context.setLineDash([4, 3]);
      context.strokeRect(x, y, toX - x, toY - y);
      context.setLineDash([]);
    }
  }
}
