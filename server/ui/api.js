// Requests to the server that this page came from, and what went wrong in words for people.

const NAME = "vlp-key";
let memory = ""; // for browsers that keep no session storage

export function key() {
  try {
    return sessionStorage.getItem(NAME) || memory;
  } catch {
    return memory;
  }
}

export function setKey(value) {
  memory = value;
  try {
    if (value) sessionStorage.setItem(NAME, value);
    else sessionStorage.removeItem(NAME);
  } catch {
    // the key lives as long as the page
  }
}

/** An answer other than success; its message is meant to be shown. */
export class Refusal extends Error {
  constructor(message, status = 0, code = "", param = "") {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

/** JSON from a path of this server: {body, guards}. Raises Refusal; an aborted request raises AbortError. */
export async function ask(path, content, signal) {
  const headers = {};
  if (key()) headers.Authorization = `Bearer ${key()}`;
  if (content !== undefined) headers["Content-Type"] = "application/json";
  const method = content === undefined ? "GET" : "POST";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: content && JSON.stringify(content), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Is it running, and is this device online?");
  }
  let body = null;
  try {
    body = await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (answer.ok) throw new Refusal("The server's answer broke off. Try again.");
  }
  if (answer.ok) return { body, guards: verdicts(answer.headers) };
  const refusal = refused(answer, body);
  if (refusal.status === 401) dispatchEvent(new CustomEvent("key-needed", { detail: key() !== "" }));
  throw refusal;
}

function refused(answer, body) {
  const error = (body && typeof body.error === "object" && body.error) || {};
  let message = error.message || `The server answered ${answer.status}.`;
  const wait = answer.headers.get("Retry-After");
  if (answer.status === 401) message = "This needs an API key.";
  else if (answer.status === 413) message = "This is too large for the server. Take fewer or smaller pictures.";
  else if (answer.status === 429) message = `Too busy: ${message}${wait ? ` (wait ${wait} s)` : ""}`;
  else if (answer.status >= 500) {
    const id = answer.headers.get("X-Request-Id");
    message = `The server could not do this: ${message}${id && !message.includes(id) ? ` (request ${id})` : ""}`;
  }
  return new Refusal(message, answer.status, error.code || "", error.param || "");
}

/** The guard's words about the pictures of a request, for answers that have no place for them. */
function verdicts(headers) {
  const flags = headers.get("X-Guard-Flagged");
  if (!flags) return [];
  const scores = (headers.get("X-Guard-Score") || "").split(",").map(Number);
  return flags.split(",").map((flag, n) => ({ flagged: flag === "1", score: Number.isFinite(scores[n]) ? scores[n] : null }));
}

/** A refusal's message with the name of a file in place of the parameter that the API speaks of. */
export function worded(error, name) {
  const found = /^(?:(?:queries\[\d+\]\.)?image|images\[\d+\]|queries\[\d+\])(?=:? )/.exec(error.message);
  if (found && name) return name + error.message.slice(found[0].length);
  return error.message.charAt(0).toUpperCase() + error.message.slice(1);
}
