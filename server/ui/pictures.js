// Pictures of the visitor: chosen, dropped or pasted, made ready to be sent.

import { byId, el, fill } from "./dom.js";

const READ = ["image/jpeg", "image/png", "image/webp", "image/gif"]; // what the server decodes
const SEND_BYTES = 6_000_000; // base64 makes a third more of it, and a request may hold ten million
const SEND_PIXELS = 25_000_000;
const SHRUNK_SIDE = 2048;

/** A File as {name, uri, note}: `uri` a data URI, `note` what was done to it. Raises Error with a message to show. */
export async function read(file) {
  const name = file.name || "picture";
  const direct = READ.includes(file.type) && file.size <= SEND_BYTES;
  let bitmap = null;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    // a damaged picture of a kind that the server reads goes there all the same: it says best what is wrong
    if (!direct) throw new Error(`${name} is not a picture that this browser can read.`);
  }
  try {
    if (direct && (bitmap === null || bitmap.width * bitmap.height <= SEND_PIXELS)) {
      return { name, uri: await dataUri(file), note: "" };
    }
    const scale = Math.min(1, SHRUNK_SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = el("canvas", { width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)) });
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff"; // JPEG knows no transparency
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const note = scale < 1 ? `reduced to ${canvas.width} × ${canvas.height}` : "sent as JPEG";
    return { name, uri: canvas.toDataURL("image/jpeg", 0.92), note };
  } finally {
    bitmap?.close();
  }
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

/** The pictures chosen in one view: a button, and chips that show what was chosen and take it away again. */
export class Well {
  constructor(view, { most, label, onChange, onProblem }) {
    Object.assign(this, { view, most, onChange, onProblem, pictures: [] });
    this.chips = document.querySelector(`[data-chosen="${view}"]`);
    const place = document.querySelector(`[data-well="${view}"]`);
    this.input = el("input", { type: "file", accept: "image/*", multiple: most > 1, id: `${view}-file`, "aria-label": label });
    this.input.addEventListener("change", () => {
      this.add([...this.input.files]);
      this.input.value = ""; // so that the same file can be chosen again
    });
    fill(place, this.input, el("span", { className: "button", "aria-hidden": "true" }, label));
  }

  async add(files) {
    const problems = [];
    const fresh = [];
    for (const file of files.slice(0, this.most)) {
      try {
        fresh.push(await read(file));
      } catch (error) {
        problems.push(error.message);
      }
    }
    const kept = this.most === 1 && fresh.length ? [] : this.pictures;
    if (files.length > this.most || kept.length + fresh.length > this.most) {
      problems.push(this.most === 1 ? "One picture at a time: the first was taken." : `At most ${this.most} pictures at a time.`);
    }
    this.pictures = [...kept, ...fresh].slice(0, this.most);
    this.show();
    this.onProblem(problems.join("\n"));
    if (fresh.length) this.onChange();
  }

  remove(picture) {
    this.pictures = this.pictures.filter((other) => other !== picture);
    this.show();
    this.onProblem("");
    (this.chips.querySelector("button") || this.input).focus();
    this.onChange();
  }

  show() {
    fill(this.chips, this.pictures.map((picture) =>
      el("div", { className: "chip" },
        el("img", { src: picture.uri, alt: "" }),
        el("span", { title: picture.name }, picture.name, picture.note ? el("small", {}, ` (${picture.note})`) : null),
        el("button", { type: "button", className: "quiet", "aria-label": `Remove ${picture.name}`, onclick: () => this.remove(picture) }, "✕"))));
  }
}

/** Pictures dropped or pasted anywhere go to the well of the view that is shown. */
export function takeFiles(current) {
  const holds = (transfer) => [...(transfer?.types || [])].includes("Files");
  const away = () => document.body.classList.remove("dragging");
  addEventListener("dragover", (event) => {
    if (!holds(event.dataTransfer)) return;
    event.preventDefault(); // a picture beside the mark must not replace the page
    event.dataTransfer.dropEffect = current() ? "copy" : "none";
    document.body.classList.toggle("dragging", Boolean(current()));
  });
  addEventListener("dragleave", (event) => event.relatedTarget === null && away());
  addEventListener("drop", (event) => {
    away();
    if (!holds(event.dataTransfer)) return;
    event.preventDefault();
    current()?.add([...event.dataTransfer.files]);
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files || [])];
    if (!files.length || byId("details").open || !current()) return;
    event.preventDefault();
    current().add(files);
  });
}

const STORED = ["thumbnail", "image", "picture", "url", "image_url"];
const BASE64 = /^(\/9j\/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/=]+$/;

/** Address of a result's picture, from what its payload holds; null without one. `large`: the best rather than the smallest. */
export function pictureOf(payload, large = false) {
  const names = large ? [...STORED.slice(1), STORED[0]] : STORED;
  for (const name of names) {
    const value = payload[name];
    if (typeof value !== "string") continue;
    if (value.startsWith("data:image/") || value.startsWith("https://")) return value;
    if (value.startsWith("http://") && sameHost(value)) return value;
    if (BASE64.test(value)) return `data:image/*;base64,${value}`;
  }
  return null;
}

function sameHost(address) {
  try {
    return new URL(address).origin === location.origin;
  } catch {
    return false;
  }
}
