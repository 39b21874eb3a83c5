// The page: which view is shown, the key, and what the server has.

import { ask, key, setKey } from "./api.js";
import * as classify from "./classify.js";
import * as detect from "./detect.js";
import { byId, el, fill, say } from "./dom.js";
import { takeFiles } from "./pictures.js";
import * as search from "./search.js";
import * as server from "./server.js";

const VIEWS = { search: "Search", classify: "Classify", detect: "Detect", server: "Server" };

let wells = {};
let view = "";

/** The address after the mark: [view, query]. */
function place() {
  const [name, query = ""] = location.hash.slice(1).split(/\?(.*)/s);
  return [name in VIEWS ? name : "search", query];
}

function show() {
  const [name, query] = place();
  const moved = name !== view;
  const first = view === "";
  view = name;
  for (const other of Object.keys(VIEWS)) byId(`view-${other}`).hidden = other !== name;
  for (const link of document.querySelectorAll(".top nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${VIEWS[name]} · vlp`;
  if (moved && !first) {
    byId(`${name}-title`).focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  if (name === "server" && !first) load();
  else if (name === "search" && !first) search.show(query);
}

// -- what the server has ------------------------------------------------------------------------------------------

async function load() {
  say(byId("page-problem"), "");
  try {
    const [models, collections, sets, ready] = await Promise.all([
      ask("v1/models"), ask("v1/collections"), ask("v1/label-sets"), readiness(),
    ]);
    const known = { models: models.body.data, collections: collections.body.data, sets: sets.body.data, ready };
    byId("key-form").hidden = true;
    byId("forget").hidden = !key();
    chooseModels(known.models);
    search.load(known.collections, view === "search" ? place()[1] : "");
    classify.load(known.sets);
    server.show(known);
    byId("foot").textContent = known.models.map(({ id }) => id).join(", ");
  } catch (error) {
    if (error.status !== 401) say(byId("page-problem"), error.message);
  }
}

async function readiness() {
  try {
    await ask("readyz");
    return "Ready: every model has just answered.";
  } catch (error) {
    return error.status === 503 ? "Not ready: a model does not answer, or the server is stopping." : error.message;
  }
}

function chooseModels(models) {
  for (const id of ["classify-model", "detect-model"]) {
    const chosen = byId(id).value;
    fill(byId(id), models.map((model) => el("option", { value: model.id }, model.id)));
    byId(id).value = models.some((model) => model.id === chosen) ? chosen : models[0]?.id || "";
  }
  for (const field of document.querySelectorAll(".models")) field.hidden = models.length < 2;
}

async function findDocs() {
  try {
    byId("docs").hidden = !(await fetch("docs", { method: "HEAD" })).ok;
  } catch {
    byId("docs").hidden = true;
  }
}

// -- the key ------------------------------------------------------------------------------------------------------

function askForKey(wrong) {
  const problem = wrong ? "The server does not know this key." : "";
  if (wrong) setKey("");
  byId("forget").hidden = true;
  if (!byId("key-form").hidden && !wrong) return; // several requests were refused at once
  byId("key-form").hidden = false;
  say(byId("key-problem"), problem);
  byId("key").focus();
}

function start() {
  wells = { search: search.start(), classify: classify.start(), detect: detect.start() };
  takeFiles(() => wells[view] || null);
  addEventListener("hashchange", show);
  addEventListener("key-needed", (event) => askForKey(event.detail));
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    setKey(byId("key").value.trim());
    byId("key").value = "";
    await load();
    if (byId("key-form").hidden) document.querySelector("section:not([hidden]) h1").focus();
  });
  byId("forget").addEventListener("click", () => {
    setKey("");
    location.reload();
  });
  show();
  load();
  findDocs();
}

start();
