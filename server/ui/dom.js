// Small words for making and filling elements. Text only ever enters the page as text, never as markup.

export const byId = (id) => document.getElementById(id);

const present = (children) => children.flat(Infinity).filter((child) => child !== null && child !== undefined);

/** An element with properties (aria- and data- names become attributes) and children; null children are left out. */
export function el(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (key.includes("-") || key === "scope" || key === "list") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...present(children));
  return element;
}

export function fill(element, ...children) {
  element.replaceChildren(...present(children));
}

/** A message in a live region that is hidden while it has none. */
export function say(element, message) {
  element.hidden = !message;
  element.textContent = message || "";
}

export function definitions(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el("dl", {}, known.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

const whole = new Intl.NumberFormat("en");

export const count = (number, one, many = `${one}s`) => `${whole.format(number)} ${number === 1 ? one : many}`;
export const fixed = (number, digits = 3) => (typeof number === "number" ? number.toFixed(digits).replace("-", "−") : "–");
export const percent = (share) => (typeof share === "number" ? `${(share * 100).toFixed(1)} %` : "–");

/** What people write into a list field: one per line, or one line with commas. */
export function listed(text) {
  const lines = text.split("\n").map((line) => line.trim()).filter(Boolean);
  const parts = lines.length === 1 ? lines[0].split(",").map((part) => part.trim()).filter(Boolean) : lines;
  return [...new Set(parts)];
}

/** What the guard made of a picture, as a badge; null without a guard. */
export function guardBadge(guard) {
  if (!guard) return null;
  const score = guard.score === null ? "no score" : `score ${fixed(guard.score, 2)}`;
  return guard.flagged
    ? el("span", { className: "badge warn", title: "The guard suspects a trigger in this picture: do not rely on what the model says of it." },
        `⚠ Guard: suspicious, ${score}`)
    : el("span", { className: "badge good", title: "The guard saw nothing unusual." }, `Guard: nothing unusual, ${score}`);
}

/** Ctrl+Enter (⌘+Enter) in a text area sends its form. */
export function sendFrom(area) {
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      area.form.requestSubmit();
    }
  });
}
