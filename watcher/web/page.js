// The page of a store: it asks for the documents once a second, and draws what has changed.
// What comes from the store becomes text nodes and numbers, never markup.
"use strict";

const TURN_SECONDS = 0.8, SPACE_SECONDS = 10; // how often it asks
const HISTORY_SECONDS = 600, LEAST_SECONDS = 60; // of rates, drawn at most and at least
const APART_SECONDS = 2; // between two of their points
const SHOWN = { downloads: 50, findings: 25, files: 10, uses: 15, events: 100 };
const BESIDE = ["download_stale", "download_at_risk"]; // findings that their articles leave out
const HERE = `${location.origin}${location.pathname}`; // without a password that the address may have
const TONES = JSON.parse(document.body.dataset.tones);

// ---------------------------------------------------------------- words

const UNITS = ["kB", "MB", "GB", "TB", "PB"];

function unitOf(bytes) {
  let unit = -1;
  for (let left = bytes; left >= 1000 && unit < UNITS.length - 1; left /= 1000) unit += 1;
  return unit;
}

function inUnit(bytes, unit) {
  const digits = unit < 0 ? 0 : 1;
  const places = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return (bytes / 1000 ** (unit + 1)).toLocaleString("en-US", places);
}

function size(bytes) {
  const unit = unitOf(bytes);
  const word = unit >= 0 ? UNITS[unit] : bytes === 1 ? "byte" : "bytes";
  return `${inUnit(bytes, unit)} ${word}`;
}

function partOf(part, whole) {
  return `${inUnit(part, unitOf(whole))} of ${size(whole)}`;
}

function count(number, what) {
  return `${number.toLocaleString("en-US")} ${what}${number === 1 ? "" : "s"}`;
}

function duration(seconds) {
  const days = Math.round(seconds / 86400), hours = Math.round(seconds / 3600);
  if (days >= 2) return `${days} days`;
  if (seconds >= 0.97 * 3600) return `${hours} h`;
  return seconds >= 0.97 * 60 ? `${Math.round(seconds / 60)} min` : `${Math.max(0, Math.round(seconds))} s`;
}

function countdown(seconds) {
  const left = Math.max(0, Math.round(seconds));
  if (left === 0) return "now";
  const [hours, minutes] = [Math.floor(left / 3600), Math.floor(left / 60) % 60];
  return `in ${hours ? `${hours} h ` : ""}${left >= 60 ? `${minutes} min ` : ""}${left % 60} s`;
}

/** A name of a document: what can't be printed, or turns the direction of text, is spelled. */
function shown(name) {
  return name
    .replace(/\0u([0-9a-f]{4})/g, "\\u$1")
    .replace(/\0([0-9a-f]{2})/g, "\\x$1")
    .replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (char) => `\\u{${char.codePointAt(0).toString(16)}}`);
}

/** The same, with digests as people see them. */
function short(text) {
  return shown(text).replace(/sha256[-:]([0-9a-f]{12})[0-9a-f]{52}/g, "sha256-$1");
}

function clock(at, seconds = false) {
  const style = { hour: "2-digit", minute: "2-digit", hour12: false };
  if (seconds) style.second = "2-digit";
  return new Date(at).toLocaleTimeString("en-GB", style);
}

// ---------------------------------------------------------------- elements

const SVG = new Set(["svg", "rect", "path"]);

function element(name, attributes = {}, ...children) {
  const made = SVG.has(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const place = (id) => document.getElementById(id);

function time(at, text) {
  return element("time", { datetime: at }, text ?? clock(at));
}

function sentence(text, command) {
  const line = element("p", {}, short(text));
  if (command) line.append(" Run: ", element("code", {}, command), ...copier(command));
  return line;
}

/** A button that copies a command, where the browser allows it. */
function copier(command) {
  if (!navigator.clipboard) return [];
  const button = element("button", { type: "button", "aria-label": `Copy ${command}` }, "Copy");
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(command);
    button.textContent = "Copied";
  });
  return [" ", button];
}

/** What ends a sentence about all of a store, if not all of it was seen. */
function seen(unseen) {
  return unseen.length ? ", as far as visible" : "";
}

function notInspected(unseen) {
  const found = unseen.slice(0, SHOWN.findings);
  return found.map(({ path, why }) => element("p", {}, `Not inspected: ${short(path)}: ${shown(why)}.`));
}

function list(items) {
  return element("ul", {}, ...items.map((each) => element("li", {}, each)));
}

function table(caption, heads, rows) {
  const cells = heads.map((each) => element("th", { scope: "col" }, each));
  const lines = rows.map((row) => element("tr", {}, ...row.map((each) => element("td", {}, each))));
  return element(
    "table",
    {},
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...cells)),
    element("tbody", {}, ...lines),
  );
}

/** Elements behind a word that opens them; they stay open when they are drawn anew in `id`. */
function folded(id, word, ...children) {
  const made = element("details", {}, element("summary", {}, word), ...children);
  made.open = place(id).querySelector("details")?.open ?? false;
  return made;
}

/** A drawing as wide as its place; `label` says the same in words. */
function drawing(kind, width, height, label, ...children) {
  const look = { class: kind, viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" };
  return element("svg", { ...look, role: "img", "aria-label": label }, ...children);
}

// ---------------------------------------------------------------- ranges of bytes

function common(some, others) {
  const found = [];
  for (let a = 0, b = 0; a < some.length && b < others.length; ) {
    const start = Math.max(some[a][0], others[b][0]), end = Math.min(some[a][1], others[b][1]);
    if (start < end) found.push([start, end]);
    if (some[a][1] < others[b][1]) a += 1;
    else b += 1;
  }
  return found;
}

function without(some, others, total) {
  const gaps = [];
  let at = 0;
  for (const [start, end] of others) {
    if (at < start) gaps.push([at, start]);
    at = end;
  }
  return common(some, [...gaps, [at, Math.max(at, total)]]);
}

function sum(ranges) {
  return ranges.reduce((bytes, [start, end]) => bytes + end - start, 0);
}

// ---------------------------------------------------------------- downloads

const MAP = 1000, HIGH = 24; // units of a drawing; what is not recorded stands lower
const STATES = {
  recorded: "recorded",
  present: "on disk, not recorded",
  lacking: "recorded, but not on disk",
  proven: "as the registry's sums say",
};
const TOPS = { present: HIGH / 3, proven: (5 * HIGH) / 6 };

function statesOf({ claimed, present, proven }, total) {
  return {
    proven,
    recorded: common(claimed, present),
    present: without(present, claimed, total),
    lacking: without(claimed, present, total),
  };
}

function swatch(state) {
  const box = { viewBox: "0 0 10 10", "aria-hidden": "true", class: "map" };
  return element("svg", box, element("rect", { class: state, width: 10, height: 10 }));
}

function partMap(ranges, total) {
  const states = statesOf(ranges, total);
  const scaled = (bytes) => (MAP * bytes) / total;
  const rects = [], words = [];
  for (const [state, name] of Object.entries(STATES)) {
    const top = TOPS[state] ?? 0;
    for (const [start, end] of states[state]) {
      const box = { x: scaled(start), y: top, width: scaled(end - start), height: HIGH - top };
      rects.push(element("rect", { class: state, ...box }));
    }
    if (states[state].length) words.push([state, `${name}: ${size(sum(states[state]))}`]);
  }
  const missing = total - sum(ranges.present);
  if (missing > 0) words.push(["missing", `missing: ${size(missing)}`]);
  const label = `Map of its bytes: ${words.map(([, each]) => each).join("; ")}`;
  const marks = [0, Math.floor(total / 2), total].map((each) => element("span", {}, size(each)));
  const legend = words.map(([state, each]) => element("li", {}, swatch(state), each));
  return [
    drawing("map", MAP, HIGH, label, ...rects),
    element("div", { class: "scale", "aria-hidden": "true" }, ...marks),
    element("ul", { class: "legend" }, ...legend),
  ];
}

/** How many bytes of a download were on the disk when, over the last minutes. */
class History {
  points = [];
  #hasBegun = false;

  add(at, bytes) {
    const last = this.points.at(-1)?.at ?? 0;
    if (at - last >= 1000 * APART_SECONDS) this.points.push({ at, bytes });
    this.points = this.points.filter((each) => each.at >= at - 1000 * HISTORY_SECONDS);
  }

  /** Begin with what the log says of a download: a daemon reports its progress once a minute. */
  begin(digest) {
    if (this.#hasBegun || !events.all.length) return;
    this.#hasBegun = true;
    const first = this.points[0]?.at ?? Infinity;
    const about = events.all.filter(
      ({ details }) => details.digest === digest && Number.isInteger(details.allocated_bytes),
    );
    const earlier = about.map((each) => ({
      at: Date.parse(each.timestamp),
      bytes: each.details.allocated_bytes,
    }));
    this.points.unshift(...earlier.filter((each) => each.at < first - 1000 * APART_SECONDS));
  }

  /** Ends of intervals, in seconds ago, with the bytes a second that arrived in each. */
  rates(now) {
    return this.points.slice(1).map((each, number) => {
      const before = this.points[number];
      const rate = Math.max(0, each.bytes - before.bytes) / ((each.at - before.at) / 1000);
      return { from: (now - before.at) / 1000, to: (now - each.at) / 1000, rate };
    });
  }
}

function rateLine(history, now) {
  const rates = history.rates(now);
  if (!rates.length) return [];
  const most = Math.max(...rates.map((each) => each.rate), 1);
  const [wide, high] = [Math.max(LEAST_SECONDS, rates[0].from), 50];
  const points = rates.flatMap(({ from, to, rate }) => {
    const y = high - (high - 4) * (rate / most);
    return [`${wide - from} ${y}`, `${wide - to} ${y}`];
  });
  const least = Math.min(...rates.map((each) => each.rate));
  const known = `in the last ${duration(rates[0].from)}`; // it begins with the page, or the log
  const label = `Rate ${known}: from ${size(Math.round(least))}/s`
    + ` to ${size(Math.round(most))}/s`;
  return [
    drawing("rate", wide, high, label, element("path", { d: `M${points.join("L")}` })),
    element(
      "div",
      { class: "scale", "aria-hidden": "true" },
      element("span", {}, `${duration(wide)} ago`),
      element("span", {}, `at most ${size(Math.round(most))}/s ${known}`),
      element("span", {}, "now"),
    ),
  ];
}

function keyOf(download) {
  return `${download.digest} ${download.transfer} ${download.ours}`;
}

/** One download's article: its pieces are replaced where they have changed. */
class Card {
  history = new History();
  root = element("article");
  #pieces = new Map();

  piece(name, value, draw) {
    const text = JSON.stringify(value);
    let piece = this.#pieces.get(name);
    if (!piece) {
      piece = { holder: element("div") };
      this.#pieces.set(name, piece);
      this.root.append(piece.holder);
    }
    if (piece.text !== text) {
      piece.text = text;
      piece.holder.replaceChildren(...draw());
    }
  }

  draw(found, known, now) {
    const { digest, models, stale, words, because } = found;
    this.piece("head", [digest, models, stale], () => {
      const name = models.length ? models.map(shown).join(", ") : short(digest);
      const more = `${models.length ? ` ${short(digest)}` : ""}${stale ? " stale" : ""}`;
      return [element("h3", {}, name, element("small", {}, more))];
    });
    const total = found.total_bytes, ranges = known?.ranges;
    this.piece("map", total && ranges, () => (total && ranges ? partMap(ranges, total) : []));
    const pace = this.#pace(found, known);
    this.piece("pace", pace, () => [element("p", {}, pace)]);
    const isLive = found.condition === "live";
    if (isLive) {
      this.history.begin(digest);
      this.history.add(now, found.allocated_bytes);
    }
    this.piece("rate", isLive && now, () => (isLive ? rateLine(this.history, now) : []));
    const state = `${words}: ${because}.`;
    this.piece("state", [state, known?.advice], () => [sentence(state, known?.advice)]);
  }

  #pace(found, known) {
    const { total_bytes: total, present_bytes: present, per_second_bytes: rate } = found;
    const words = [`${total ? partOf(present, total) : size(present)} on disk`];
    if (rate !== null) words.push(`${size(rate)}/s`);
    if (found.left_seconds !== null) words.push(`${duration(found.left_seconds)} left`);
    if (found.condition !== "live" && known)
      words.push(`no bytes for ${duration(known.age_seconds)}`);
    for (const each of found.writers) words.push(`written by ${shown(each.process)} (${each.pid})`);
    return `${words.join(", ")}.`;
  }
}

/** Whether it is a layer that ollama-watch has fetched, and that only waits for the others. */
function waits(download) {
  return download.ours && download.present_bytes === download.total_bytes;
}

const cards = new Map(), downloadNotes = element("div");

function drawDownloads(status, audit, now) {
  const known = new Map(audit.downloads.map((each) => [keyOf(each), each]));
  const found = status.downloads.filter((each) => !waits(each));
  const live = (each) => each.condition === "live";
  found.sort((a, b) => live(b) - live(a) || b.allocated_bytes - a.allocated_bytes);
  const keys = new Set(found.map(keyOf));
  for (const key of cards.keys()) if (!keys.has(key)) cards.delete(key);
  const roots = found.slice(0, SHOWN.downloads).map((each) => {
    const key = keyOf(each);
    if (!cards.has(key)) cards.set(key, new Card());
    cards.get(key).draw(each, known.get(key), now);
    return cards.get(key).root;
  });
  const notes = [], waiting = status.downloads.length - found.length;
  if (!status.downloads.length) notes.push(`No unfinished downloads${seen(status.unseen)}.`);
  if (found.length > roots.length) notes.push(`and ${count(found.length - roots.length, "more download")}`);
  if (waiting) notes.push(`${count(waiting, "complete layer")} of models that are not complete.`);
  const lines = notes.map((each) => element("p", {}, each));
  downloadNotes.replaceChildren(...lines, ...notInspected(status.unseen));
  const holder = place("downloads"), wanted = [...roots, downloadNotes];
  // What stays in its place keeps the focus and what is selected in it.
  if (wanted.length !== holder.children.length
    || wanted.some((each, at) => holder.children[at] !== each)) holder.replaceChildren(...wanted);
}

// ---------------------------------------------------------------- the other sections

function drawStart({ forecast, downloads, unseen }) {
  if (forecast === null) return [element("p", {}, "Not known.")];
  const { deletes, later } = forecast, parts = [];
  const named = downloads.filter((each) => each.models.length);
  const models = new Map(
    named.map((each) => [each.digest.slice("sha256:".length), each.models.map(shown).join(", ")]),
  );
  if (forecast.start_fails) parts.push(element("p", {}, "The server can't start."));
  if (forecast.pruning_off) parts.push(element("p", {}, "It keeps every file: pruning is off."));
  if (deletes.length) {
    const files = count(deletes.length, "file");
    parts.push(element("p", {}, `It deletes ${files}, freeing ${size(forecast.bytes)}:`));
    parts.push(...filesOf(deletes, models));
  }
  if (later.length) {
    const bytes = later.reduce((total, each) => total + each.bytes, 0);
    const what = count(later.length, deletes.length ? "more file" : "file");
    const left = element("strong", { role: "timer", "data-until": later[0].at });
    const line = element("p", {}, `${what} (${size(bytes)}) can be deleted from `);
    line.append(time(later[0].at), " on, ", left, ":");
    parts.push(line, ...filesOf(later.map((each) => each.path), models));
  }
  if (!parts.length) parts.push(element("p", {}, `It deletes nothing${seen(unseen)}.`));
  parts.push(...forecast.why.slice(0, SHOWN.files).map((each) => sentence(`${each}.`)));
  return parts;
}

/** Files by what they belong to: the models of a download, else their own names. */
function filesOf(paths, models) {
  const groups = new Map();
  for (const path of paths) {
    const digest = path.match(/sha256-([0-9a-f]{64})/)?.[1];
    const name = models.get(digest) ?? short(digest ? `sha256-${digest}` : path);
    groups.set(name, (groups.get(name) ?? 0) + 1);
  }
  const names = [...groups].map(([name, files]) => `${name}: ${count(files, "file")}`);
  const first = list(names.slice(0, SHOWN.files)), left = names.length - SHOWN.files;
  return left > 0 ? [first, element("p", {}, `and ${left.toLocaleString("en-US")} more`)] : [first];
}

/** What is not said with a download. */
function drawFindings(findings) {
  const others = findings.filter(({ kind }) => BESIDE.includes(kind) || !kind.startsWith("download_"));
  if (!others.length) return [element("p", {}, "None.")];
  const notices = others.filter((each) => each.severity === "info");
  const parts = messages(others.filter((each) => each.severity !== "info"));
  if (notices.length) parts.push(folded("findings", count(notices.length, "notice"), ...messages(notices)));
  return parts;
}

function messages(findings) {
  const parts = findings.slice(0, SHOWN.findings).map((each) => sentence(`${each.message}.`, each.command));
  const left = findings.length - parts.length;
  if (left > 0) parts.push(element("p", {}, `and ${left.toLocaleString("en-US")} more`));
  return parts;
}

function around(status, audit) {
  const servers = audit.servers.map(
    (each) => `pid ${each.pid}${each.serves_this_store ? "" : " (possibly of this store)"}`,
  );
  const words = [
    `server: ${servers.join(", ") || "not running"}`,
    `daemon: ${status.daemon ? `pid ${status.daemon.pid}` : "not running"}`,
  ];
  const { visibility, why } = audit.visibility;
  if (visibility !== "full") words.push(`not all processes are visible: ${why}`);
  return words.join("; ");
}

function drawQueue(queue) {
  if (!queue.items.length) return [element("p", {}, "The queue is empty.")];
  const rows = queue.items.slice(0, SHOWN.uses).map((each) => [
    `${each.position}`,
    shown(each.model),
    each.state,
    each.done_by ? time(each.done_by) : "",
  ]);
  const by = queue.run_by ? `run by pid ${queue.run_by.pid}` : "nothing runs it";
  const caption = `${count(queue.items.length, "model")}, ${queue.paused ? "paused" : by}`;
  return [table(caption, ["#", "model", "state", "done by"], rows)];
}

function drawQuarantine({ kept, unseen }) {
  const notes = notInspected(unseen);
  if (!kept.length) return notes.length ? notes : [element("p", {}, "The quarantine is empty.")];
  const rows = kept.slice(0, SHOWN.uses).map((each) => [
    shown(each.label),
    size(each.size_bytes),
    each.replaced ? "yes" : "no",
  ]);
  const taken = size(kept.reduce((total, each) => total + each.size_bytes, 0));
  const heads = ["label", "size", "replaced by a valid blob"];
  return [...notes, table(`${count(kept.length, "file")}, ${taken}`, heads, rows)];
}

function drawSpace(df) {
  const uses = df.uses.filter((each) => each.sizes.allocated_bytes);
  const most = Math.max(...uses.map((each) => each.sizes.allocated_bytes), 1);
  const bytes = (each) => each.sizes.allocated_bytes;
  const rows = uses.map((each) => {
    const width = (MAP * bytes(each)) / most;
    const bar = element("rect", { class: each.kind, width, height: 10 });
    const look = { class: "bar", viewBox: `0 0 ${MAP} 10`, preserveAspectRatio: "none" };
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, short(each.words)),
      element("td", {}, element("svg", { ...look, "aria-hidden": "true" }, bar)),
      element("td", { class: "size" }, size(bytes(each))),
    );
  });
  const rest = uses.slice(SHOWN.uses), free = size(df.store.free_bytes);
  const on = `${size(df.total.allocated_bytes)} on disk${seen(df.unlisted)}, ${free} free, at `;
  const parts = [
    element("p", {}, on, time(df.time, clock(df.time, true)), "."),
    element("table", { class: "uses" }, element("tbody", {}, ...rows.slice(0, SHOWN.uses))),
  ];
  if (rest.length) {
    const together = size(rest.reduce((total, each) => total + bytes(each), 0));
    const smaller = element("table", { class: "uses" }, element("tbody", {}, ...rows.slice(SHOWN.uses)));
    parts.push(folded("space", `${rest.length} smaller ones, ${together}`, smaller));
  }
  return parts;
}

// ---------------------------------------------------------------- events

const events = { all: [], model: "" };

function modelsOf(event) {
  const several = Array.isArray(event.details.models) ? event.details.models : [];
  return [event.model_name, ...several].filter((each) => typeof each === "string");
}

function drawEvents(found) {
  events.all = found;
  const models = [...new Set(found.flatMap(modelsOf))].sort();
  let choice = place("model");
  if (!choice) {
    choice = element("select", { id: "model" });
    choice.addEventListener("change", () => {
      events.model = choice.value;
      place("timeline").replaceChildren(...timeline());
    });
    const label = element("label", { for: "model" }, "Events of ");
    const line = element("ol", { id: "timeline", class: "timeline" });
    place("events").replaceChildren(element("p", {}, label, choice), line);
  }
  if (events.model && !models.includes(events.model)) models.push(events.model);
  const options = ["", ...models];
  const before = [...choice.options].map((each) => each.value);
  if (JSON.stringify(options) !== JSON.stringify(before)) {
    const named = (each) => element("option", { value: each }, each ? short(each) : "everything");
    choice.replaceChildren(...options.map(named));
    choice.value = events.model;
  }
  place("timeline").replaceChildren(...timeline());
}

function timeline() {
  const about = (event) => !events.model || modelsOf(event).includes(events.model);
  const found = events.all.filter(about).reverse();
  const lines = [];
  let day = "";
  for (const event of found.slice(0, SHOWN.events)) {
    const at = new Date(event.timestamp);
    const date = at.toLocaleDateString("en-CA");
    if (date !== day) lines.push(element("li", { class: "day" }, date));
    day = date;
    const kind = element("span", { class: "kind" }, shown(event.event_type).replaceAll("_", " "));
    const tone = TONES[event.event_type] ?? "plain";
    const when = time(event.timestamp, clock(at, true));
    const message = element("span", { class: "message" }, short(event.message));
    lines.push(element("li", { class: "event", "data-tone": tone }, when, " ", kind, " ", message));
  }
  if (!found.length) lines.push(element("li", {}, "No events."));
  const left = found.length - SHOWN.events;
  if (left > 0) lines.push(element("li", {}, `and ${count(left, "earlier event")}`));
  return lines;
}

// ---------------------------------------------------------------- the verdict

const SEVERITIES = { error: "bad", warning: "warning" };
const news = element("p", { class: "hidden", role: "status" });
place("verdict").after(news);

function say(text, command, tone) {
  place("verdict").dataset.tone = tone;
  place("verdict").replaceChildren(sentence(text, command));
  // Read aloud only where more than its numbers has changed.
  const words = short(text);
  if (words.replace(/[0-9.,]+/g, "") !== news.textContent.replace(/[0-9.,]+/g, ""))
    news.textContent = words;
}

let clockAhead = 0; // of the store's machine, in milliseconds

function drawNow(status, audit) {
  const now = Date.parse(status.time);
  clockAhead = now - Date.now();
  place("store").textContent = shown(status.store);
  place("asof").replaceChildren("As of ", time(status.time, clock(now, true)));
  place("around").textContent = around(status, audit);
  const worst = Object.keys(SEVERITIES).find((each) =>
    audit.findings.some((finding) => finding.severity === each),
  );
  say(audit.verdict.text, audit.verdict.command, worst ? SEVERITIES[worst] : "good");
  drawDownloads(status, audit, now);
  const downloads = audit.downloads.map(({ digest, models }) => ({ digest, models }));
  changed("findings", audit.findings, drawFindings);
  changed("start", { forecast: audit.forecast, downloads, unseen: status.unseen }, drawStart);
}

const drawn = new Map();

/** Draw a section where what it shows is another value than before. */
function changed(id, value, draw) {
  const text = JSON.stringify(value);
  if (drawn.get(id) === text) return;
  drawn.set(id, text);
  place(id).replaceChildren(...draw(value));
}

function tick() {
  for (const each of document.querySelectorAll("[data-until]")) {
    const left = (Date.parse(each.dataset.until) - Date.now() - clockAhead) / 1000;
    each.textContent = countdown(left);
  }
}

// ---------------------------------------------------------------- asking

class Failure extends Error {
  constructor(text, command = "") {
    super(text);
    this.command = command;
  }
}

/** A function that gives a document, and asks for it at most once in so many seconds. */
function source(path, seconds, read = (answer) => answer.json()) {
  let tag = "", value = null, due = 0;
  return async () => {
    if (performance.now() < due) return value;
    const headers = tag ? { "If-None-Match": tag } : {};
    const options = { headers, cache: "no-store", signal: AbortSignal.timeout(15_000) };
    const answer = await fetch(new URL(path, HERE), options);
    if (answer.status !== 304) {
      if (!answer.ok) {
        const found = await answer.json().catch(() => ({ error: `error ${answer.status}` }));
        throw new Failure(found.error, found.command);
      }
      value = await read(answer);
      tag = answer.headers.get("ETag") ?? "";
    }
    due = performance.now() + 1000 * seconds - 50;
    return value;
  };
}

async function linesOf(answer) {
  const lines = (await answer.text()).split("\n").filter(Boolean);
  return lines.map((line) => JSON.parse(line));
}

/** A function that draws from sources where one of their values is new. */
function section(sources, draw, failed) {
  let before = [];
  return async () => {
    let values;
    try {
      values = await Promise.all(sources.map((each) => each()));
    } catch (error) {
      before = [];
      failed(error);
      return;
    }
    if (values.every((each, at) => each === before[at])) return;
    draw(...values);
    before = values;
  };
}

function inPlace(id) {
  return (error) => {
    drawn.delete(id);
    if (error instanceof Failure) place(id).replaceChildren(sentence(`${error.message}.`, error.command));
  };
}

function noAnswer(error) {
  const text = error instanceof Failure ? error.message : "No answer from ollama-watch";
  say(`${text}. Below is what was so before.`, error.command, "bad");
}

const sections = [
  section(
    [source("status.json", TURN_SECONDS), source("audit.json", TURN_SECONDS)],
    drawNow,
    noAnswer,
  ),
  ...[
    ["queue", TURN_SECONDS, drawQueue],
    ["quarantine", TURN_SECONDS, drawQuarantine],
    ["df", SPACE_SECONDS, drawSpace, "space"],
  ].map(([name, seconds, draw, id = name]) =>
    section([source(`${name}.json`, seconds)], (value) => changed(id, value, draw), inPlace(id)),
  ),
  section([source("log.jsonl", TURN_SECONDS, linesOf)], drawEvents, inPlace("events")),
];

async function turn() {
  try {
    if (!document.hidden) await Promise.all(sections.map((each) => each()));
  } finally {
    setTimeout(turn, 1000 * TURN_SECONDS);
  }
}

setInterval(tick, 1000);
turn();
