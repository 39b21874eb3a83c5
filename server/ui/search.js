// Search in a collection: words, a picture, both, or more like one of the results.

import { ask, worded } from "./api.js";
import { byId, count, definitions, el, fill, fixed, guardBadge, listed, say } from "./dom.js";
import { Well, pictureOf } from "./pictures.js";
import { forgetThumbnails, thumbnail } from "./thumbnails.js";

const PAGE = 24;
const SHORT = 60; // characters of a payload value that is worth a suggestion

let collections = [];
let well = null;
let running = null; // AbortController of the search in progress
let like = null; // the result that others are to be like
let offset = 0;
const seen = new Map(); // field -> values met in results, suggested in filters

export function start() {
  const form = byId("search-form");
  well = new Well("search", {
    most: 1,
    label: "Choose picture",
    onChange: () => well.pictures.length && fresh(),
    onProblem: (message) => say(byId("search-problem"), message),
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    fresh();
  });
  byId("c").addEventListener("change", () => {
    showFilters();
    like = null;
    if (asked()) fresh();
  });
  byId("earlier").addEventListener("click", () => turn(offset - size()));
  byId("later").addEventListener("click", () => turn(offset + size()));
  byId("details-close").addEventListener("click", () => byId("details").close());
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !byId("details").open) {
      running.abort();
      byId("search-status").textContent = "Stopped.";
    }
  });
  return well;
}

/** What the server has, and what the address asks for. */
export function load(known, query) {
  collections = known;
  const chosen = byId("c").value;
  fill(byId("c"), collections.map(({ name, points }) => el("option", { value: name }, `${name} (${count(points, "entry", "entries")})`)));
  const first = collections.find((one) => one.default) || collections.find(({ points }) => points > 0) || collections[0];
  byId("c").value = collections.some(({ name }) => name === chosen) ? chosen : first?.name || "";
  byId("collection-row").hidden = collections.length < 2;
  showFilters();
  if (!collections.length) byId("search-status").textContent = "This server has no collection to search in yet.";
  show(query);
}

/** The search that an address holds. */
export function show(query) {
  if (!collections.length) return;
  const given = new URLSearchParams(query);
  if (![...given.keys()].length) return;
  if (collections.some(({ name }) => name === given.get("c"))) byId("c").value = given.get("c");
  showFilters();
  for (const field of byId("search-form").elements) if (field.name && field.name !== "c") field.value = given.get(field.name) ?? "";
  byId("search-more").open = [...given.keys()].some((name) => !["q", "c", "page"].includes(name));
  like = null;
  if (!asked()) {
    byId("q").focus(); // the address names a collection and nothing to look for
    return;
  }
  run(Math.max(0, Number.parseInt(given.get("page") || "1", 10) - 1) * size());
}

const collection = () => collections.find(({ name }) => name === byId("c").value);
const size = () => Number(byId("size").value || PAGE);
const asked = () => like !== null || well.pictures.length > 0 || ["q", "words"].some((id) => byId(id).value.trim());

function fresh() {
  like = null;
  turn(0);
}

function turn(to) {
  const page = to ? Math.floor(to / size()) + 1 : "";
  const fields = new URLSearchParams([...new FormData(byId("search-form"))].filter(([, value]) => typeof value === "string" && value));
  if (collections.length < 2) fields.delete("c");
  if (page) fields.set("page", page);
  const address = `#search?${fields}`;
  // what the address cannot hold must not be found there again
  if (!well.pictures.length && !like && address !== location.hash) history.pushState(null, "", address);
  run(to, to !== offset);
}

// -- filters ------------------------------------------------------------------------------------------------------

function showFilters() {
  const found = collection();
  if (!found || byId("filters").dataset.of === found.name) return;
  byId("filters").dataset.of = found.name;
  byId("words-field").hidden = !found.captions;
  if (!found.captions) byId("words").value = "";
  fill(byId("filters"), Object.entries(found.fields).map(([name, kind]) => filterField(name, kind)));
}

function filterField(name, kind) {
  const id = `filter-${name}`;
  if (kind === "bool") {
    const choices = [["", "any"], ["true", "yes"], ["false", "no"]];
    return el("div", {}, el("label", { htmlFor: id }, name),
      el("select", { id, name: `f.${name}` }, choices.map(([value, text]) => el("option", { value }, text))));
  }
  if (kind === "integer" || kind === "float") {
    const bound = (end, word) => el("input", { id: end === "gte" ? id : null, name: `f.${name}.${end}`, type: "number", step: kind === "float" ? "any" : "1", placeholder: word, "aria-label": `${name} ${word}` });
    return el("div", {}, el("label", { htmlFor: id }, name), el("div", { className: "pair" }, bound("gte", "from"), bound("lte", "to")));
  }
  return el("div", {}, el("label", { htmlFor: id }, name),
    el("input", { id, name: `f.${name}`, autocomplete: "off", spellcheck: false, placeholder: "any", list: `${id}-values` }),
    el("datalist", { id: `${id}-values` }, options(name)));
}

const options = (name) => [...(seen.get(name) || [])].sort().map((value) => el("option", { value }));

function remember(hits) {
  for (const name of Object.keys(collection()?.fields || {})) {
    const values = seen.get(name) || new Set();
    for (const { payload } of hits) {
      for (const value of [payload[name]].flat()) if (typeof value === "string" && value.length <= SHORT && values.size < 100) values.add(value);
    }
    seen.set(name, values);
    const list = byId(`filter-${name}-values`);
    if (list) fill(list, options(name));
  }
}

function filter() {
  const where = {};
  for (const [name, kind] of Object.entries(collection()?.fields || {})) {
    const value = (part) => byId("search-form").elements[`f.${name}${part}`]?.value.trim() || "";
    if (kind === "bool") {
      if (value("")) where[name] = value("") === "true";
    } else if (kind === "integer" || kind === "float") {
      const bounds = ["gte", "lte"].filter((end) => value(`.${end}`)).map((end) => [end, Number(value(`.${end}`))]);
      if (bounds.length) where[name] = Object.fromEntries(bounds);
    } else {
      const wanted = listed(value(""));
      if (wanted.length) where[name] = wanted.length > 1 ? wanted : wanted[0];
    }
  }
  return where;
}

// -- asking -------------------------------------------------------------------------------------------------------

function request(from) {
  const text = byId("q").value.trim();
  const queries = [];
  if (like) queries.push({ id: like.id });
  else {
    if (text) queries.push({ text });
    for (const { uri } of well.pictures) queries.push({ image: uri });
  }
  const words = like ? "" : byId("words").value.trim();
  const away = byId("not").value.trim();
  const least = byId("least").value;
  const where = filter();
  return {
    queries,
    ...(queries.length && away && { negative: [{ text: away }] }),
    ...(words && { keywords: words }),
    ...(Object.keys(where).length && { filter: where }),
    ...(queries.length && least !== "" && { threshold: Number(least) }),
    ...(byId("spread").value && { mmr: { diversity: Number(byId("spread").value) } }),
    limit: size(),
    offset: from,
  };
}

async function run(from, turned = false) {
  running?.abort();
  say(byId("search-problem"), "");
  const where = collection();
  if (!where) {
    say(byId("search-problem"), "There is no collection to search in.");
    return;
  }
  if (!asked()) {
    say(byId("search-problem"), "Say what to look for: words, a picture, or both.");
    byId("q").focus();
    return;
  }
  const mine = (running = new AbortController());
  byId("search-status").textContent = "Searching…";
  byId("hits").classList.add("old");
  try {
    const { body, guards } = await ask(`v1/collections/${encodeURIComponent(where.name)}/search`, request(from), mine.signal);
    offset = from;
    results(body, guards);
    if (turned) byId("search-status").focus();
  } catch (error) {
    if (error.name === "AbortError") return;
    byId("search-status").textContent = "";
    say(byId("search-problem"), worded(error, well.pictures[0]?.name));
  } finally {
    if (running === mine) {
      running = null;
      byId("hits").classList.remove("old");
    }
  }
}

function results(body, guards) {
  const { hits, next } = body;
  remember(hits);
  fill(byId("search-guard"), guards.length ? guardBadge(guards[0]) : null);
  const last = offset + hits.length;
  const range = next === null && offset === 0 ? count(hits.length, "result") : `Results ${offset + 1} to ${last}`;
  byId("search-status").textContent = hits.length ? `${range} for ${subject()}.` : offset ? "No further results." : `Nothing found for ${subject()}.`;
  forgetThumbnails();
  fill(byId("hits"), hits.map(card));
  byId("search-pages").hidden = next === null && offset === 0;
  byId("earlier").disabled = offset === 0;
  byId("later").disabled = next === null;
  byId("range").textContent = hits.length ? `${offset + 1}–${last}` : "";
}

function subject() {
  if (like) return `what is like “${title(like)}”`;
  const text = byId("q").value.trim() || byId("words").value.trim();
  const parts = [text && `“${text}”`, well.pictures.length && `the picture ${well.pictures[0].name}`];
  return parts.filter(Boolean).join(" and ");
}

// -- results ------------------------------------------------------------------------------------------------------

function title({ id, payload }) {
  const caption = payload[collection()?.captions || "caption"] ?? payload.caption ?? payload.title ?? payload.key;
  return String(caption ?? id);
}

function scores({ cosine, bm25 }) {
  const parts = [typeof cosine === "number" && `cosine ${fixed(cosine)}`, typeof bm25 === "number" && `words ${fixed(bm25, 1)}`];
  return parts.filter(Boolean).join(" · ");
}

// numbers above 2^53 are not what they were once JavaScript has read them
const exact = (id) => typeof id === "string" || Number.isSafeInteger(id);

/** The picture of a result: the server's thumbnail, else what its payload names, else nothing. `large`: for the dialog. */
function illustrate(hit, place, large = false) {
  const source = pictureOf(hit.payload, large);
  const fallBack = () => {
    if (!source) return place.classList.add("bare");
    const image = el("img", { alt: title(hit), loading: "lazy", referrerPolicy: "no-referrer", src: source });
    image.addEventListener("error", () => {
      image.remove();
      place.classList.add("bare");
    });
    place.prepend(image);
  };
  const { name, thumbnails } = collection();
  const better = source && (large || source.startsWith("data:")); // it is here already, or larger
  if (!thumbnails || better || !exact(hit.id)) return fallBack();
  const image = thumbnail(`v1/collections/${encodeURIComponent(name)}/points/${hit.id}/thumbnail`, title(hit), () => {
    image.remove();
    fallBack();
  });
  place.prepend(image);
}

function card(hit) {
  const name = title(hit);
  const key = hit.payload.key !== undefined && String(hit.payload.key) !== name ? String(hit.payload.key) : "";
  const item = el("li", { className: "hit" },
    el("div", { className: "text" },
      el("button", { type: "button", className: "open", "aria-haspopup": "dialog", onclick: () => details(hit) }, name),
      key ? el("p", { className: "sub", title: key }, key) : null),
    el("div", { className: "foot" },
      el("span", {}, scores(hit)),
      exact(hit.id) ? el("button", { type: "button", className: "quiet", "aria-label": `More like ${name}`, onclick: () => similar(hit) }, "Similar") : null));
  illustrate(hit, item);
  return item;
}

function similar(hit) {
  like = hit;
  byId("details").close();
  turn(0);
  byId("search-status").focus();
}

function shown(value) {
  if (typeof value === "string" && /^https?:\/\//.test(value)) {
    return el("a", { href: value, target: "_blank", rel: "noopener noreferrer" }, value);
  }
  const text = typeof value === "string" ? value : Array.isArray(value) && value.every((part) => typeof part !== "object") ? value.join(", ") : JSON.stringify(value);
  return text.length > 1000 ? `${text.slice(0, 1000)}…` : text;
}

function details(hit) {
  const source = pictureOf(hit.payload, true);
  const kept = Object.entries(hit.payload).filter(([, value]) => !(typeof value === "string" && (value.startsWith("data:") || value === source?.split(",")[1])));
  byId("details-title").textContent = title(hit);
  fill(byId("details-body"),
    definitions([["Cosine", hit.cosine === null ? null : fixed(hit.cosine, 4)], ["Words", hit.bm25 === undefined ? null : fixed(hit.bm25, 2)],
      ...kept.map(([name, value]) => [name, shown(value)]), ["id", String(hit.id)]]),
    exact(hit.id) ? el("button", { type: "button", className: "main", onclick: () => similar(hit) }, "More like this") : null);
  illustrate(hit, byId("details-body"), true);
  byId("details").showModal();
}
