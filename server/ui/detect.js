// Open-vocabulary detection: a picture, names of things, and boxes around those that were found.

import { ask, worded } from "./api.js";
import { byId, count, el, fill, fixed, guardBadge, listed, say, sendFrom } from "./dom.js";
import { Well } from "./pictures.js";

const MOST = 100; // objects of one picture, whatever their scores: the slider chooses among them
// told apart also by those who see few colours; each with the ink that is legible on it
const COLOURS = [
  ["#ffc107", "#000"], ["#1e88e5", "#000"], ["#d81b60", "#fff"], ["#00bfa5", "#000"],
  ["#8e24aa", "#fff"], ["#ff7043", "#000"], ["#cddc39", "#000"], ["#795548", "#fff"],
];

let well = null;
let running = null;
let found = null; // {image, labels, width, height, detections} of the last answer
let marked = -1;

export function start() {
  well = new Well("detect", {
    most: 1,
    label: "Choose picture",
    onChange: clear,
    onProblem: (message) => say(byId("detect-problem"), message),
  });
  byId("detect-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("shown").addEventListener("input", () => show());
  sendFrom(byId("things"));
  new ResizeObserver(() => draw()).observe(byId("boxes").parentElement);
  return well;
}

function clear() {
  found = null;
  byId("found").hidden = true;
  byId("detect-status").textContent = "";
}

async function run() {
  running?.abort();
  const labels = listed(byId("things").value);
  const missing = !well.pictures.length ? "Choose a picture first." : !labels.length ? "Type at least one thing to find." : "";
  say(byId("detect-problem"), missing);
  if (missing) {
    (well.pictures.length ? byId("things") : well.input).focus();
    return;
  }
  const mine = (running = new AbortController());
  const [picture] = well.pictures;
  const model = byId("detect-model").value;
  byId("detect-status").textContent = "Looking…";
  try {
    const { body } = await ask("v1/detect", { images: [picture.uri], labels, top_k: MOST, threshold: 0, ...(model && { model }) }, mine.signal);
    const [row] = body.data;
    const image = el("img", { src: picture.uri });
    await image.decode();
    found = { ...row, image, labels, name: picture.name };
    marked = -1;
    byId("found").hidden = false;
    show();
  } catch (error) {
    if (error.name === "AbortError") return;
    clear();
    say(byId("detect-problem"), error.code === "no_detection_parts" ? `Nothing was looked for: ${error.message}.` : worded(error, picture.name));
  } finally {
    if (running === mine) running = null;
  }
}

const colour = (label) => COLOURS[Math.max(0, found.labels.indexOf(label)) % COLOURS.length];

function shownObjects() {
  const least = Number(byId("shown").value);
  return found.detections.filter(({ score }) => score !== null && score >= least);
}

function show() {
  if (!found) return;
  const objects = shownObjects();
  const hidden = found.detections.length - objects.length;
  byId("shown-value").textContent = fixed(Number(byId("shown").value), 2);
  fill(byId("detect-status"), objects.length ? `${count(objects.length, "object")} found in ${found.name}` : `Nothing found in ${found.name} with this score`,
    hidden ? `; ${hidden} with lower scores. ` : ". ", guardBadge(found.guard));
  fill(byId("objects"), objects.map((object, n) => {
    const swatch = el("span", { className: "swatch" });
    [swatch.style.background] = colour(object.label);
    const button = el("button", { type: "button", "aria-pressed": String(n === marked) }, swatch, object.label, el("span", { className: "score" }, fixed(object.score, 2)));
    button.addEventListener("click", () => mark(n === marked ? -1 : n));
    return el("li", {}, button);
  }));
  if (marked >= objects.length) marked = -1;
  draw();
}

function mark(n) {
  marked = n;
  for (const [place, button] of [...byId("objects").querySelectorAll("button")].entries()) button.setAttribute("aria-pressed", String(place === n));
  draw();
}

function draw() {
  if (!found || byId("found").hidden) return;
  const canvas = byId("boxes");
  const room = canvas.parentElement.clientWidth;
  const height = Math.min((room * found.height) / found.width, innerHeight * 0.8);
  const width = (height * found.width) / found.height;
  const dots = devicePixelRatio || 1;
  canvas.width = Math.round(width * dots);
  canvas.height = Math.round(height * dots);
  canvas.style.width = `${width}px`;
  canvas.style.marginInline = "auto";
  const context = canvas.getContext("2d");
  context.scale(dots, dots);
  context.drawImage(found.image, 0, 0, width, height);
  const objects = shownObjects();
  const scale = width / found.width;
  // the best is drawn last, so that it lies on top; with one marked the others step back
  for (let n = objects.length - 1; n >= 0; n -= 1) if (n !== marked) box(context, objects[n], scale, width, marked >= 0);
  if (marked >= 0 && objects[marked]) box(context, objects[marked], scale, width, false);
  const names = [...new Set(objects.map(({ label }) => label))].map((label) => `${objects.filter((one) => one.label === label).length} × ${label}`);
  canvas.setAttribute("aria-label", `${found.name} with ${names.length ? `boxes around ${names.join(", ")}` : "no boxes"}`);
}

function box(context, { label, score, box: sides }, scale, width, faint) {
  const [paint, ink] = colour(label);
  const [x, y, w, h] = [sides.xmin * scale, sides.ymin * scale, (sides.xmax - sides.xmin) * scale, (sides.ymax - sides.ymin) * scale];
  context.globalAlpha = faint ? 0.35 : 1;
  context.lineJoin = "round";
  context.strokeStyle = "#000"; // a dark seam on both sides, for pictures of the same colour
  context.lineWidth = 5;
  context.strokeRect(x, y, w, h);
  context.strokeStyle = paint;
  context.lineWidth = 3;
  context.strokeRect(x, y, w, h);
  if (!faint) {
    context.font = "600 13px system-ui, sans-serif";
    const text = `${label} ${fixed(score, 2)}`;
    const wide = context.measureText(text).width + 10;
    const left = Math.max(0, Math.min(x - 1.5, width - wide));
    const top = y >= 20 ? y - 20 : y;
    context.fillStyle = paint;
    context.fillRect(left, top, wide, 20);
    context.fillStyle = ink;
    context.textBaseline = "middle";
    context.fillText(text, left + 5, top + 10.5);
  }
  context.globalAlpha = 1;
}
