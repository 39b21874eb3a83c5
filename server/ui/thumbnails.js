// Thumbnails that the server keeps: asked for with the key, and only when their place comes near the window.

import { key } from "./api.js";
import { el } from "./dom.js";

const TRIES = 3;
const waiting = new Map(); // image -> {address, missing}
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) load(target);
}, { rootMargin: "300px" });
let asking = new AbortController();

/** An image that fills itself; `missing` is called where the point has none. */
export function thumbnail(address, alt, missing) {
  const image = el("img", { alt });
  waiting.set(image, { address, missing });
  watcher.observe(image);
  return image;
}

/** Ask for no more of those that were wanted up to now: their results are off the page. */
export function forgetThumbnails() {
  asking.abort();
  asking = new AbortController();
  for (const image of waiting.keys()) watcher.unobserve(image);
  waiting.clear();
}

async function load(image) {
  const wanted = waiting.get(image);
  if (!wanted) return; // forgotten since the watcher saw it
  const { signal } = asking;
  watcher.unobserve(image);
  waiting.delete(image);
  try {
    const source = URL.createObjectURL(await fetched(wanted.address, signal));
    image.addEventListener("load", () => URL.revokeObjectURL(source), { once: true });
    image.src = source;
  } catch {
    if (!signal.aborted) wanted.missing();
  }
}

async function fetched(address, signal) {
  const headers = key() ? { Authorization: `Bearer ${key()}` } : {};
  for (let tries = 1; ; tries++) {
    const answer = await fetch(address, { headers, signal });
    if (answer.ok) return answer.blob();
    if (answer.status !== 429 || tries === TRIES) throw new Error(`no thumbnail: ${answer.status}`);
    const seconds = Number(answer.headers.get("Retry-After")) || 1; // a page of results is many requests at once
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  }
}
