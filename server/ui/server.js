// What this server has: models, collections, label sets, and whether it answers.

import { byId, count, definitions, el, fill, fixed, percent } from "./dom.js";

const ABILITIES = { embed: "texts", image_embed: "pictures", classify: "classification", search: "search" };

export function show({ models, collections, sets, ready }) {
  byId("server-status").textContent = ready;
  fill(byId("models"), models.map(model));
  fill(byId("collections"), collections.length ? collections.map(collection) : none("None yet. POST /v1/collections makes one, and “vlp index build” makes one out of embeddings."));
  fill(byId("label-sets"), sets.length ? sets.map(labelSet) : none("None yet. POST /v1/label-sets keeps a list of labels under a name."));
}

const none = (text) => el("li", { className: "none" }, text);

function model({ id, dimensions, capabilities = [], guard }) {
  const badge = guard ? el("span", { className: guard.flagged ? "badge warn" : "badge good" }, "guarded") : null;
  const pictures = guard ? `${count(guard.pictures, "picture")} seen, ${guard.flagged} flagged` : null;
  return el("li", {}, el("h3", {}, id, badge), definitions([
    ["Dimensions", String(dimensions)],
    ["Understands", capabilities.map((name) => ABILITIES[name] || name).join(", ")],
    ["Guard", pictures],
    ["Threshold", guard ? `${fixed(guard.threshold, 2)}, flags ${percent(guard.fpr)} of clean pictures (${guard.mode})` : null],
  ]));
}

function collection({ name, default: first, model: made, dimensions, modality, fields, captions, thumbnails, points }) {
  const filters = Object.entries(fields).map(([field, kind]) => `${field} (${kind})`).join(", ");
  return el("li", {},
    el("h3", {}, el("a", { href: `#search?${new URLSearchParams({ c: name })}` }, name), first ? el("span", { className: "badge" }, "default") : null),
    definitions([
      ["Entries", count(points, modality === "text" ? "text" : "picture")],
      ["Model", made || "not known"],
      ["Dimensions", String(dimensions)],
      ["Filters", filters || "none"],
      ["Words of", captions || "not searchable"],
      ["Thumbnails", thumbnails ? `up to ${thumbnails} pixels` : null],
    ]));
}

function labelSet({ name, count: many, templates }) {
  return el("li", {}, el("h3", {}, name), definitions([["Labels", String(many)], ["Prompts", templates.join(" · ")]]));
}
