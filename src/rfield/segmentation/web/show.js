"use strict";
// The page of `rfield show`. Texts of files (names of classes, images and paths) enter it by textContent alone.

const $ = (selector, root = document) => root.querySelector(selector);
const SVG = "http://www.w3.org/2000/svg";
const OPACITY = 0.55; // of the labels over the image, as in the overlays of `rfield predict`
const MARGIN = 0.6; // of the image's larger side, that a box may be drawn beyond it

const state = { setup: null, image: "", view: "labels", pixel: null, share: 0.95, models: [] };

async function ask(path, values = {}, options = {}) {
  const response = await fetch(`${path}?${new URLSearchParams(values)}`, options);
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new Error(answer.error || `the server answers ${response.status}`);
}

function fail(error) {
  const message = error instanceof TypeError ? "the server does not answer: is rfield show still running?" : error.message;
  $("#alert").textContent = message.charAt(0).toUpperCase() + message.slice(1) + ".";
  $("#alert").hidden = false;
}

function succeed() {
  $("#alert").hidden = true;
}

let announcing = 0;
function announce(text) { // the last of a row of results
  clearTimeout(announcing);
  announcing = setTimeout(() => { $("#live").textContent = text; }, 600);
}

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const plain = (number) => String(Math.round(number * 100) / 100);

// The link restores what is shown.

let saving = 0;
function saveLink() {
  clearTimeout(saving);
  saving = setTimeout(() => {
    const query = new URLSearchParams();
    query.set("image", state.image);
    query.set("view", state.view);
    state.models.forEach((model, index) => {
      if (model.dilations) query.set(index ? "dilations2" : "dilations", model.dilations.map(plain).join(","));
    });
    if (state.pixel) {
      query.set("x", state.pixel.x);
      query.set("y", state.pixel.y);
      query.set("share", state.share);
    }
    history.replaceState(null, "", `?${query}`);
  }, 250);
}

function readLink() {
  const query = new URLSearchParams(location.search);
  state.image = query.get("image") || "";
  state.view = query.get("view") || "labels";
  state.models.forEach((model, index) => {
    const text = query.get(index ? "dilations2" : "dilations");
    const found = text ? text.split(",").map(Number) : [];
    if (found.length && found.length === model.about.sliders.length && found.every((each) => each >= 1)) model.dilations = found;
  });
  const [x, y] = ["x", "y"].map((name) => Number.parseInt(query.get(name), 10));
  if (x >= 0 && y >= 0) state.pixel = { x, y };
  if (state.setup.shares.includes(Number(query.get("share")))) state.share = Number(query.get("share"));
}

// A network.

class Model {
  constructor(about, index) {
    Object.assign(this, { about, index, dilations: null, labels: null, confidence: null, reference: null, field: null });
    Object.assign(this, { busy: false, again: false, paths: [], milliseconds: 0 });
    this.root = $("#model").content.firstElementChild.cloneNode(true);
    this.canvas = $("canvas", this.root);
    $("h2", this.root).textContent = about.title;
    $(".weights", this.root).textContent = about.weights;
    $(".paths", this.root).hidden = !about.classes.length;
    $(".reset", this.root).hidden = !about.sliders.length;
    $(".reset", this.root).onclick = () => this.move(null);
    $(".clear", this.root).onclick = () => choosePixel(null);
    $(".save", this.root).onclick = () => this.save();
    for (const kind of ["votes", "scores"]) $(`.${kind}`, this.root).hidden = !about.classes.length;
    about.sliders.forEach((slider, path) => this.paths.push(this.makePath(slider, path)));
    this.canvas.onclick = (event) => {
      const at = this.place(event);
      if (at) choosePixel(at);
    };
    this.canvas.onpointermove = (event) => this.hover(this.place(event));
    this.canvas.onpointerleave = () => this.hover(null);
    $("#models").append(this.root);
  }

  makePath(slider, path) {
    const name = `path-${this.index}-${path}`;
    const root = document.createElement("div");
    root.className = "path";
    const row = root.appendChild(document.createElement("div"));
    row.className = "row";
    const label = row.appendChild(document.createElement("label"));
    label.htmlFor = `${name}-number`;
    label.textContent = this.about.sliders.length > 1 ? `Path ${path + 1}` : "Dilation";
    const [number, range] = ["number", "range"].map((type) => {
      const input = document.createElement("input");
      Object.assign(input, { type, min: slider.least, max: slider.greatest, step: slider.step });
      if (type === "number") input.step = slider.step === 1 ? 1 : "any";
      input.id = `${name}-${type}`;
      input.value = plain(slider.learned);
      input.setAttribute("autocomplete", "off");
      return input;
    });
    range.setAttribute("aria-label", `${label.textContent}: dilation`);
    row.append(number);
    const chart = drawCurve(root, slider);
    root.append(range);
    const loss = root.appendChild(document.createElement("p"));
    loss.className = "loss";
    $(".sliders", this.root).append(root);
    const moved = (input, done) => {
      const value = Math.min(Math.max(Number(input.value), slider.least), slider.greatest);
      if (!value) return;
      const all = this.dilations ? [...this.dilations] : this.about.sliders.map((each) => each.learned);
      all[path] = value;
      this.move(all, input, done);
    };
    range.oninput = () => moved(range, false);
    range.onchange = () => moved(range, true);
    number.oninput = () => moved(number, false);
    number.onchange = () => moved(number, true);
    return { slider, number, range, chart, loss };
  }

  at() {
    return this.dilations || this.about.sliders.map((each) => each.learned);
  }

  move(dilations, source = null, done = true) {
    this.dilations = dilations;
    this.showDilations(source);
    saveLink();
    this.refresh();
    if (done && state.pixel) this.look();
  }

  showDilations(source = null) {
    $(".reset", this.root).disabled = !this.dilations;
    this.at().forEach((value, path) => {
      const { slider, number, range, chart, loss } = this.paths[path];
      if (number !== source) number.value = plain(value);
      if (range !== source) range.value = value;
      chart(value);
      const found = lossAt(slider.curve, value);
      loss.textContent = found === null ? (slider.curve.length ? "beyond the curve that the search has read" : "no held-out curve for this path") : `held-out loss ${found.toFixed(4)}`;
    });
  }

  query() {
    const values = { model: this.index, image: state.image };
    if (this.dilations) values.dilations = this.dilations.join(",");
    return values;
  }

  async refresh() { // one request at a time; of the moves meanwhile the last
    if (!this.about.classes.length) return this.draw();
    if (this.busy) { this.again = true; return; }
    this.busy = true;
    this.root.classList.add("busy");
    try {
      do {
        this.again = false;
        const values = this.query();
        if (values.dilations && this.reference === null) {
          this.reference = (await this.load({ model: this.index, image: values.image })).labels;
        }
        const found = await this.load(values);
        if (values.image !== state.image) { this.again = true; continue; }
        Object.assign(this, found);
        if (!values.dilations) this.reference = this.labels;
        this.draw();
        this.describe();
        succeed();
      } while (this.again);
    } catch (error) {
      fail(error);
    } finally {
      this.busy = false;
      this.root.classList.remove("busy");
    }
  }

  async load(values) {
    const response = await ask("labels", values);
    const bytes = new Uint8Array(await response.arrayBuffer());
    const half = bytes.length / 2;
    const milliseconds = Number(response.headers.get("x-milliseconds"));
    return { labels: bytes.subarray(0, half), confidence: bytes.subarray(half), milliseconds };
  }

  describe() {
    const count = this.labels.length;
    let other = 0, sum = 0;
    for (let at = 0; at < count; at += 1) {
      if (this.labels[at] !== this.reference[at]) other += 1;
      sum += this.confidence[at];
    }
    const where = `Mean confidence ${(sum / 255 / count).toFixed(2)}`;
    const at = this.at().map(plain).join(", ");
    const moved = this.dilations
      ? `${percent(other / count)} of the pixels have another label than at the learned ${this.about.sliders.map((each) => plain(each.learned)).join(", ")}. `
      : this.about.sliders.length ? "The learned dilations. " : "";
    $(".result", this.root).textContent = `${moved}${where}; ${this.milliseconds} ms.`;
    announce(`${this.about.sliders.length ? `Dilations ${at}. ` : ""}${moved}${where}.`);
  }

  async look() {
    const { pixel } = state;
    if (!pixel) return;
    this.root.classList.add("busy");
    try {
      const response = await ask("field", { ...this.query(), ...pixel, share: state.share });
      const buffer = await response.arrayBuffer();
      const length = new DataView(buffer).getUint32(0, true);
      const found = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
      if (state.pixel !== pixel) return;
      this.field = { ...found, heat: new Uint8Array(buffer, 4 + length), pixel };
      this.showField();
      this.draw();
      succeed();
    } catch (error) {
      fail(error);
    } finally {
      if (!this.busy) this.root.classList.remove("busy");
    }
  }

  showField() {
    $(".seen", this.root).hidden = !this.field;
    if (!this.field) return;
    const { theoretical, note, square, votes, scores, pixel } = this.field;
    const size = ([top, left, bottom, right]) => `${plain(right - left)}\u00d7${plain(bottom - top)} px`;
    const box = theoretical ? `It can see ${size(theoretical)}${note ? ` (${note})` : ""}.` : `Its theoretical field is not known: ${note}.`;
    const kept = `${percent(state.share, 0)} of its contributions come from ${size(square)}.`;
    $(".boxes", this.root).textContent = `Pixel ${pixel.x}, ${pixel.y}. ${box} ${kept}`;
    $(".kept", this.root).textContent = `only the ${size(square)}`;
    const name = (index) => this.about.classes[index].name;
    fillTable($(".votes tbody", this.root), votes.map(([label, share]) => [name(label), percent(share)]));
    fillTable($(".scores tbody", this.root), scores.map(([label, before, after]) => [name(label), before.toFixed(3), after.toFixed(3)]));
    announce(`${$(".boxes", this.root).textContent} ${votes.map(([label, share]) => `${name(label)} ${percent(share, 0)}`).join(", ")}.`);
  }

  // Drawing.

  area() { // in px of the image: what the canvas shows, with the padding that a box reaches
    const { width, height } = pictureSize;
    const area = { left: 0, top: 0, right: width, bottom: height };
    const box = this.field && this.field.theoretical;
    if (!box) return area;
    const most = MARGIN * Math.max(width, height);
    area.top = Math.floor(Math.max(-most, Math.min(0, box[0])));
    area.left = Math.floor(Math.max(-most, Math.min(0, box[1])));
    area.bottom = Math.ceil(Math.min(height + most, Math.max(height, box[2])));
    area.right = Math.ceil(Math.min(width + most, Math.max(width, box[3])));
    return area;
  }

  draw() {
    if (!pictureBitmap) return;
    const { width, height } = pictureSize;
    const area = this.area();
    const across = area.right - area.left, down = area.bottom - area.top;
    const zoom = Math.max(1, Math.min(6, Math.round(1500 / across)));
    const canvas = this.canvas;
    Object.assign(canvas, { width: across * zoom, height: down * zoom });
    canvas.style.setProperty("--ratio", across / down);
    this.frame = { area, zoom };
    const ink = canvas.getContext("2d");
    ink.setTransform(zoom, 0, 0, zoom, -area.left * zoom, -area.top * zoom);
    ink.imageSmoothingEnabled = false; // true pixels, and no colours in between
    drawPadding(ink, area);
    const grey = ["confidence", "difference", "field"].includes(state.view);
    ink.filter = grey ? "grayscale(1)" : "none";
    ink.drawImage(pictureBitmap, 0, 0);
    ink.filter = "none";
    const layer = this.layer();
    if (layer) ink.drawImage(layer, 0, 0, width, height);
    if (this.field) this.drawField(ink, zoom);
    this.showLegend();
    canvas.setAttribute("aria-label", `${$("#image").selectedOptions[0]?.textContent || "image"}, view ${state.view}, ${this.about.title}`);
  }

  layer() {
    const { width, height } = pictureSize;
    const colour = this.colours();
    if (!colour) return null;
    const layer = new OffscreenCanvas(width, height);
    const pixels = new ImageData(width, height);
    const words = new Uint32Array(pixels.data.buffer); // alpha, blue, green, red
    for (let at = 0; at < words.length; at += 1) words[at] = colour(at);
    layer.getContext("2d").putImageData(pixels, 0, 0);
    return layer;
  }

  colours() { // the function that gives each pixel's colour over the image
    const alpha = (share) => Math.round(255 * share) << 24 >>> 0;
    if (state.view === "field") {
      const heat = this.field && this.field.heat;
      const ramp = Array.from({ length: 256 }, (_, value) => heatColour(value));
      return heat && ((at) => ramp[heat[at]]);
    }
    if (state.view === "image" || !this.labels || this.labels.length !== pictureSize.width * pictureSize.height) return null;
    const palette = this.about.classes.map(({ colour: [red, green, blue] }) => red | (green << 8) | (blue << 16));
    if (state.view === "confidence") {
      return (at) => (0x00 | (0x5e << 8) | (0xd5)) + alpha(0.9 * (1 - this.confidence[at] / 255));
    }
    if (state.view === "difference") {
      return (at) => (this.labels[at] === this.reference[at] ? 0 : palette[this.labels[at]] + alpha(0.9));
    }
    return (at) => palette[this.labels[at]] + alpha(OPACITY);
  }

  drawField(ink, zoom) {
    const { theoretical, square, pixel } = this.field;
    const thin = Math.max(1, this.canvas.width / 900) / zoom;
    const frame = (box, colour, dashes) => {
      const [top, left, bottom, right] = box;
      for (const [width, stroke] of [[3.5, "#000000a0"], [2, colour]]) {
        Object.assign(ink, { lineWidth: width * thin, strokeStyle: stroke });
        ink.setLineDash(dashes.map((each) => each * thin));
        ink.strokeRect(left, top, right - left, bottom - top);
      }
    };
    if (theoretical) frame(theoretical, "#56b4e9", []);
    frame(square, "#f0e442", [6, 4]);
    ink.setLineDash([]);
    for (const [width, stroke] of [[4, "#000000"], [2, "#ffffff"]]) {
      Object.assign(ink, { lineWidth: width * thin, strokeStyle: stroke });
      ink.beginPath();
      ink.arc(pixel.x + 0.5, pixel.y + 0.5, 5 * thin, 0, 7);
      ink.stroke();
    }
  }

  showLegend() {
    const list = $(".legend", this.root);
    const entry = (name, value, paint) => {
      const item = document.createElement("li");
      const swatch = item.appendChild(document.createElement("i"));
      paint(swatch);
      item.append(document.createTextNode(name));
      item.appendChild(document.createElement("small")).textContent = value;
      return item;
    };
    const solid = (colour) => (swatch) => { swatch.style.background = colour; };
    const outline = (colour) => (swatch) => { swatch.style.boxShadow = `inset 0 0 0 2px ${colour}`; };
    const items = [];
    if (this.labels && ["labels", "difference"].includes(state.view)) {
      const counts = new Uint32Array(256);
      for (let at = 0; at < this.labels.length; at += 1) counts[this.labels[at]] += 1;
      const found = Array.from(counts, (count, label) => [label, count]).filter(([, count]) => count);
      for (const [label, count] of found.sort((one, other) => other[1] - one[1])) {
        const { name, colour } = this.about.classes[label];
        items.push(entry(name, percent(count / this.labels.length), solid(`rgb(${colour})`)));
      }
    }
    const scale = (colours) => (swatch) => {
      swatch.className = "scale";
      swatch.style.background = `linear-gradient(90deg, ${colours})`;
    };
    if (state.view === "confidence") items.push(entry("certain to uncertain", "", scale("#8c8c8c, #d55e00")));
    if (this.field) {
      if (state.view === "field") items.push(entry("contribution, from a thousandth of the largest", "", scale("#8c8c8c, #d55e00, #ffe08a")));
      if (this.field.theoretical) items.push(entry("theoretical field", "", outline("#56b4e9")));
      items.push(entry(`${percent(state.share, 0)} of the contributions`, "", outline("#f0e442")));
    }
    list.replaceChildren(...items);
  }

  place(event) { // the pixel of the image at the pointer, or null outside of it
    if (!this.frame) return null;
    const bounds = this.canvas.getBoundingClientRect();
    const { area } = this.frame;
    const x = Math.floor(area.left + (event.clientX - bounds.left) / bounds.width * (area.right - area.left));
    const y = Math.floor(area.top + (event.clientY - bounds.top) / bounds.height * (area.bottom - area.top));
    return x >= 0 && y >= 0 && x < pictureSize.width && y < pictureSize.height ? { x, y } : null;
  }

  hover(at) {
    const index = at && at.y * pictureSize.width + at.x;
    const label = at && this.labels && this.about.classes[this.labels[index]];
    const text = label ? `: ${label.name}, ${(this.confidence[index] / 255).toFixed(2)}` : "";
    $(".hover", this.root).textContent = at ? `x ${at.x}, y ${at.y}${text}` : "";
  }

  save() {
    this.canvas.toBlob((blob) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = `rfield-${state.view}-${this.at().map(plain).join("-") || "field"}.png`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }
}

function heatColour(value) { // orange, then a light yellow, over a grey image
  const share = value / 255;
  const mix = (from, to, part) => Math.round(from + (to - from) * part);
  const part = Math.max(0, (share - 0.5) / 0.5);
  const [red, green, blue] = [mix(0xd5, 0xff, part), mix(0x5e, 0xe0, part), mix(0x00, 0x8a, part)];
  const alpha = Math.round(255 * Math.min(0.9, 1.5 * share));
  return (red | (green << 8) | (blue << 16)) + (alpha << 24 >>> 0);
}

function drawPadding(ink, area) { // outside of the image: what the network reads there is padding
  const across = area.right - area.left, down = area.bottom - area.top;
  ink.fillStyle = "#e4e4e4";
  ink.fillRect(area.left, area.top, across, down);
  const step = Math.max(across, down) / 60;
  ink.lineWidth = step / 8;
  ink.strokeStyle = "#bdbdbd";
  ink.beginPath();
  for (let at = -down; at < across; at += step) {
    ink.moveTo(area.left + at, area.bottom);
    ink.lineTo(area.left + at + down, area.top);
  }
  ink.stroke();
}

function lossAt(curve, dilation) { // between two points of the curve by interpolation, beyond it null
  const after = curve.findIndex(([at]) => at >= dilation);
  if (after < 0) return null;
  const [at, loss] = curve[after];
  if (at === dilation) return loss;
  if (after === 0) return null;
  const [before, least] = curve[after - 1];
  return least + (loss - least) * (dilation - before) / (at - before);
}

function drawCurve(root, { least, greatest, learned, curve }) { // above the slider, on the same scale
  if (curve.length < 2) return () => {};
  const chart = root.appendChild(document.createElementNS(SVG, "svg"));
  chart.setAttribute("role", "img");
  const losses = curve.map(([, loss]) => loss);
  const low = Math.min(...losses), high = Math.max(...losses);
  const across = (at) => `${100 * (at - least) / (greatest - least)}%`;
  const down = (loss) => 6 + 44 * (1 - (loss - low) / (high - low || 1));
  const add = (name, kind, values) => {
    const part = chart.appendChild(document.createElementNS(SVG, name));
    part.setAttribute("class", kind);
    for (const [key, value] of Object.entries(values)) part.setAttribute(key, value);
    return part;
  };
  const line = (kind, [x1, y1], [x2, y2]) => add("line", kind, { x1: across(x1), y1, x2: across(x2), y2 });
  line("learned", [learned, 0], [learned, 58]);
  curve.forEach(([at, loss, error], index) => {
    if (error) line("bar", [at, down(loss - error)], [at, down(loss + error)]);
    if (index) line("line", [curve[index - 1][0], down(curve[index - 1][1])], [at, down(loss)]);
  });
  for (const [at, loss] of curve) add("circle", "dot", { cx: across(at), cy: down(loss), r: 2.2 });
  const here = add("circle", "here", { cx: across(learned), cy: 0, r: 5 });
  const best = curve.reduce((one, other) => (other[1] < one[1] ? other : one));
  return (value) => {
    const loss = lossAt(curve, value);
    here.setAttribute("cx", across(value));
    here.setAttribute("cy", loss === null ? 54 : down(loss));
    const now = loss === null ? "beyond the curve" : `a loss of ${loss.toFixed(4)}`;
    chart.setAttribute("aria-label", `Held-out loss over the dilation: at ${plain(value)} ${now}, least ${best[1].toFixed(4)} at ${plain(best[0])}`);
  };
}

function fillTable(body, rows) {
  body.replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    cells.forEach((text, column) => {
      const cell = row.appendChild(document.createElement(column ? "td" : "th"));
      if (!column) cell.scope = "row";
      cell.textContent = text;
    });
    return row;
  }));
}

// The image, the pixel and the view, which all networks share.

let pictureBitmap = null;
let pictureSize = { width: 1, height: 1 };

async function chooseImage(key, note = "") {
  state.image = key;
  $("#image").value = key;
  try {
    const response = await ask("image", { image: key });
    const bitmap = await createImageBitmap(await response.blob(), { colorSpaceConversion: "none" });
    if (state.image !== key) return;
    pictureBitmap?.close();
    pictureBitmap = bitmap;
  } catch (error) {
    fail(error);
    return;
  }
  pictureSize = { width: pictureBitmap.width, height: pictureBitmap.height };
  const said = response_note(note);
  $("#note").textContent = said;
  $("#note").hidden = !said;
  $("#x").max = pictureSize.width - 1;
  $("#y").max = pictureSize.height - 1;
  if (state.pixel && (state.pixel.x >= pictureSize.width || state.pixel.y >= pictureSize.height)) state.pixel = null;
  for (const model of state.models) Object.assign(model, { labels: null, confidence: null, reference: null, field: null });
  saveLink();
  for (const model of state.models) {
    model.showField();
    model.draw();
    model.refresh();
    if (state.pixel) model.look();
  }
}

const notes = new Map();
function response_note(note) {
  if (note) notes.set(state.image, note);
  return notes.has(state.image) ? `This image was ${notes.get(state.image)}.` : "";
}

function choosePixel(at) {
  state.pixel = at;
  $("#x").value = at ? at.x : "";
  $("#y").value = at ? at.y : "";
  if (at) chooseView("field");
  else {
    for (const model of state.models) { model.field = null; model.showField(); }
    if (state.view === "field") chooseView(state.models.some((model) => model.about.classes.length) ? "labels" : "image");
    for (const model of state.models) model.draw();
  }
  saveLink();
  for (const model of state.models) model.look();
}

function chooseView(view) {
  state.view = view;
  for (const input of document.getElementsByName("view")) input.checked = input.value === view;
  saveLink();
  for (const model of state.models) model.draw();
}

async function upload(file) {
  if (!file) return;
  try {
    if (file.size > state.setup.mostBytes) {
      throw new Error(`the file has ${(file.size / 2 ** 20).toFixed(1)} MB, more than ${state.setup.mostBytes / 2 ** 20} MB: make it smaller`);
    }
    const response = await ask("upload", { name: file.name }, { method: "PUT", body: file });
    const { key, name, note } = await response.json();
    $("#image").append(new Option(name, key));
    succeed();
    await chooseImage(key, note);
  } catch (error) {
    fail(error);
  }
}

async function start() {
  state.setup = await (await ask("setup")).json();
  const { models, images, shares } = state.setup;
  state.models = models.map((about, index) => new Model(about, index));
  $("#models").classList.toggle("two", models.length > 1);
  document.title = `${models.map(({ title }) => title).join(" and ")} \u2013 rfield show`;
  for (const [key, name] of images) $("#image").append(new Option(name, key));
  for (const share of shares) $("#share").append(new Option(percent(share, 0), share));
  for (const label of document.querySelectorAll("[data-needs]")) {
    const needs = label.dataset.needs === "labels" ? "classes" : "sliders";
    label.hidden = !models.some((about) => about[needs].length);
  }
  readLink();
  if (!models.some((about) => about.classes.length) && state.view !== "field") state.view = "image";
  $("#share").value = state.share;
  if (state.pixel) { $("#x").value = state.pixel.x; $("#y").value = state.pixel.y; }
  for (const model of state.models) model.showDilations();
  $("#tools").onsubmit = (event) => {
    event.preventDefault();
    const [x, y] = ["#x", "#y"].map((name) => Number.parseInt($(name).value, 10));
    if (x >= 0 && y >= 0) choosePixel({ x, y });
    else fail(new Error("give the pixel's x and y"));
  };
  $("#image").onchange = (event) => chooseImage(event.target.value);
  $("#share").onchange = (event) => { state.share = Number(event.target.value); saveLink(); for (const model of state.models) model.look(); };
  $("#upload").onclick = () => $("#file").click();
  $("#file").onchange = (event) => { upload(event.target.files[0]); event.target.value = ""; };
  for (const input of document.getElementsByName("view")) input.onchange = () => chooseView(input.value);
  chooseView(state.view);
  const first = state.image || images[0]?.[0];
  if (first) await chooseImage(first);
  else $("#note").textContent = "Upload an image to begin.", $("#note").hidden = false;
}

start().catch(fail);
