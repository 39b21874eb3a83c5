// Zero-shot classification: pictures, labels, and how much each label fits.

import { ask, worded } from "./api.js";
import { byId, count, el, fill, fixed, guardBadge, listed, percent, say, sendFrom } from "./dom.js";
import { Well } from "./pictures.js";

const MOST = 16;
const SHOWN = 12; // labels of a picture before "all" is asked for
const SEND_CHARACTERS = 8_000_000; // of pictures in one request

let well = null;
let running = null;

export function start() {
  well = new Well("classify", {
    most: MOST,
    label: "Choose pictures",
    onChange: () => {},
    onProblem: (message) => say(byId("classify-problem"), message),
  });
  byId("classify-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("label-set").addEventListener("change", followSet);
  sendFrom(byId("labels"));
  return well;
}

/** Label sets that the server keeps. */
export function load(sets) {
  const chosen = byId("label-set").value;
  fill(byId("label-set"), el("option", { value: "" }, "the list below"),
    sets.map(({ name, count: many }) => el("option", { value: name }, `${name} (${count(many, "label")})`)));
  byId("label-set").value = sets.some(({ name }) => name === chosen) ? chosen : "";
  byId("label-set-row").hidden = !sets.length;
  followSet();
}

function followSet() {
  const own = byId("label-set").value === "";
  byId("labels-row").hidden = !own;
  byId("template-field").hidden = !own; // a set has its own prompts
}

/** What to ask of every picture, or a message about what is missing. */
function question() {
  const set = byId("label-set").value;
  const labels = listed(byId("labels").value);
  const template = byId("template").value.trim();
  const others = listed(byId("others").value);
  const floor = byId("floor").value;
  if (!well.pictures.length) return "Choose a picture first.";
  if (!set && !labels.length) return "Type at least one label.";
  return {
    ...(set ? { label_set: set } : { labels, ...(template && { templates: [template] }) }),
    ...((others.length || floor !== "") && { unknown: { ...(others.length && { prompts: others }), ...(floor !== "" && { min_cosine: Number(floor) }) } }),
    ...(byId("classify-model").value && { model: byId("classify-model").value }),
  };
}

/** Pictures in groups that fit into a request each. */
function groups(pictures) {
  const found = [[]];
  let length = 0;
  for (const picture of pictures) {
    if (length + picture.uri.length > SEND_CHARACTERS && found.at(-1).length) {
      found.push([]);
      length = 0;
    }
    found.at(-1).push(picture);
    length += picture.uri.length;
  }
  return found;
}

async function run() {
  running?.abort();
  const what = question();
  say(byId("classify-problem"), typeof what === "string" ? what : "");
  if (typeof what === "string") {
    (well.pictures.length ? byId("labels") : well.input).focus();
    return;
  }
  const mine = (running = new AbortController());
  byId("classify-status").textContent = "Classifying…";
  const done = [];
  try {
    for (const some of groups(well.pictures)) done.push(...(await judged(some, what, mine.signal)));
    const failed = done.filter(({ row }) => row.error).length;
    byId("classify-status").textContent = `${count(done.length - failed, "picture")} classified${failed ? `, ${failed} could not be used` : ""}.`;
    fill(byId("verdicts"), done.map(({ picture, row }) => verdict(picture, row)));
  } catch (error) {
    if (error.name === "AbortError") return;
    byId("classify-status").textContent = "";
    fill(byId("verdicts"));
    say(byId("classify-problem"), worded(error));
  } finally {
    if (running === mine) running = null;
  }
}

/** [{picture, row of the answer}]. A request none of whose pictures can be used is refused as a whole: each tells why. */
async function judged(pictures, what, signal) {
  try {
    const { body } = await ask("v1/classify", { ...what, images: pictures.map(({ uri }) => uri) }, signal);
    return body.data.map((row) => ({ picture: pictures[row.index], row }));
  } catch (error) {
    if (!/^images\[\d+\]$/.test(error.param || "")) throw error;
    if (pictures.length === 1) return [{ picture: pictures[0], row: { error: { message: error.message } } }];
    const each = [];
    for (const picture of pictures) each.push(...(await judged([picture], what, signal)));
    return each;
  }
}

function verdict(picture, row) {
  const image = el("img", { src: picture.uri, alt: "" });
  if (row.error) {
    return el("li", { className: "verdict" }, image,
      el("div", {}, el("h3", {}, picture.name), el("p", { className: "problem" }, worded(row.error, picture.name))));
  }
  const best = row.label ?? row.predictions[0].label;
  const unknown = row.unknown?.is_unknown;
  const reasons = { prompts: "it rather shows one of the other things", min_cosine: "the best cosine is too low", min_probability: "the best probability is too low" };
  return el("li", { className: "verdict" }, image,
    el("div", {},
      el("h3", {}, unknown ? "Unknown" : best),
      el("p", { className: "sub", title: picture.name }, picture.name),
      unknown ? el("p", { className: "sub" }, `None of the labels: ${reasons[row.unknown.reason] || "it fits none"}.`) : null,
      guardBadge(row.guard),
      table(row, picture.name)));
}

function table(row, name) {
  const others = typeof row.unknown?.probability === "number" ? [{ label: "other things", probability: row.unknown.probability, cosine: null, other: true }] : [];
  const lines = [...row.predictions, ...others];
  const body = el("tbody", {}, lines.map((line, n) => scoreLine(line, n)));
  const whole = el("table", { className: "scores", "aria-label": `Labels of ${name}` },
    el("thead", {}, el("tr", {}, ["Label", "Probability", "Cosine"].map((text) => el("th", { scope: "col" }, text)))), body);
  const hidden = [...body.rows].filter((line) => line.hidden);
  if (!hidden.length) return whole;
  const more = el("button", { type: "button", className: "quiet" }, `Show ${count(hidden.length, "more label")}`);
  more.addEventListener("click", () => {
    for (const line of hidden) line.hidden = false;
    more.remove();
  });
  return el("div", {}, whole, more);
}

function scoreLine({ label, probability, cosine, other }, place) {
  const bar = el("span", { className: "fill" });
  bar.style.width = `${Math.max(0, Math.min(1, probability ?? 0)) * 100}%`;
  return el("tr", { className: other ? "other" : "", hidden: !other && place >= SHOWN },
    el("td", {}, el("span", { className: "name" }, label), el("span", { className: "track" }, bar)),
    el("td", {}, percent(probability)),
    el("td", {}, other ? "" : fixed(cosine, 4)));
}
