// The node's page: follows the stream of snapshots and shows them. Plain JavaScript, no other file.

const at = (id) => document.getElementById(id);

/** An element with properties and children; children are elements or text, never markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name in element && name !== "scope") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function drawing(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const shown = new Map();
/** Replace the children of an element, unless they are made from the same data as before. */
function show(id, data, render) {
  const text = JSON.stringify(data);
  if (shown.get(id) === text) return;
  shown.set(id, text);
  at(id).replaceChildren(...[render()].flat());
}

// Words for numbers

function bytes(count) {
  if (count < 1024) return `${Math.round(count)} B`;
  for (const unit of ["KiB", "MiB", "GiB", "TiB"]) {
    count /= 1024;
    if (count < 1023.95 || unit === "TiB") return `${count.toFixed(1)} ${unit}`;
  }
}
const rate = (count) => `${bytes(count)}/s`;
function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}
const milliseconds = (seconds) => (seconds < 0.01 ? `${(seconds * 1000).toFixed(1)} ms` : seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`);
const number = (count) => Math.round(count).toLocaleString("en");
const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;
const clock = (posix) => new Date(posix * 1000).toLocaleTimeString("en-GB");
function since(posix, now) {
  const moment = now - posix < 86400 ? clock(posix) : new Date(posix * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  return `since ${moment} (${duration(Math.max(1, now - posix))})`;
}

// Served and fetched

const PERIODS = { minute: ["Last minute", 60], hour: ["Last hour", 3600], day: ["Last day", 86400] };

function total([name, counted]) {
  const [title, length] = PERIODS[name];
  const served = counted.local + counted.external, requests = counted.hit + counted.pending + counted.miss;
  const part = counted.seconds < length && name !== "minute" ? ` (${duration(counted.seconds)} so far)` : "";
  const percent = (count) => `${(100 * count) / requests}%`;
  const said = requests
    ? [`Served `, make("strong", {}, bytes(served)), `, fetched `, make("strong", {}, bytes(counted.fetched)), `: `,
       make("strong", {}, `${number(counted.hit)} of ${plural(requests, "request")}`), ` from disk`]
    : [`No requests`];
  const share = make("div", { class: "share", ariaHidden: "true" });
  if (requests) {
    for (const result of ["hit", "pending", "miss"]) {
      const piece = make("i", { class: result });
      piece.style.width = percent(counted[result]);
      share.append(piece);
    }
  }
  return make("div", { class: "card", id: `total-${name}` }, make("p", { class: "when" }, title + part), make("p", { class: "said" }, said), share);
}

// The volume

function usage(volume) {
  const taken = volume.used + volume.reserved, promised = Math.max(0, volume.reserved - volume.partial);
  const partial = volume.reserved - promised;
  const percent = (count) => `${Math.max(0, Math.min(100, (100 * count) / volume.limit))}%`;
  const parts = make("div", { class: "parts" });
  for (const [name, count] of [["used", volume.used], ["hatched", partial], ["hatched-light", promised]]) {
    const piece = make("div", { class: name });
    piece.style.width = percent(count);
    parts.append(piece);
  }
  const marks = [["low", volume.low], ["high", volume.high]].map(([name, mark]) => {
    const line = make("div", { class: `mark ${name}` }, make("span", {}, name));
    line.style.left = percent(mark);
    return line;
  });
  const entry = (swatch, words, count) =>
    make("li", {}, make("span", { class: `swatch ${swatch}` }), make("span", {}, `${words} `, make("b", {}, bytes(count))));
  const parked = volume.parked.objects ? `partial objects (${volume.parked.objects} not being fetched)` : "partial objects";
  return [
    make("div", { class: "usage", role: "img", ariaLabel: `${bytes(taken)} of ${bytes(volume.limit)} in use; watermarks at ${bytes(volume.low)} and ${bytes(volume.high)}` }, parts, marks),
    make("ul", { class: "legend" },
      entry("used", "objects", volume.used), entry("hatched", parked, partial), entry("hatched-light", "reserved", promised),
      entry("free", "free", Math.max(0, volume.limit - taken)), volume.leaving ? entry("miss", "being removed", volume.leaving) : null),
  ];
}

const short = (count) => (count >= 2 ** 30 ? `${count / 2 ** 30} GiB` : count >= 2 ** 20 ? `${count / 2 ** 20} MiB` : `${count / 2 ** 10} KiB`);
const IDLE_SHORT = (seconds) => (seconds < 60 ? `${seconds} s` : seconds < 3600 ? `${seconds / 60} min` : seconds < 86400 ? `${seconds / 3600} h` : `${seconds / 86400} d`);
const MAX_BLOCKS = 24;

function classOf(value, bounds) {
  const place = bounds.findIndex((bound) => value < bound);
  return place < 0 ? bounds.length : place;
}

/** A power of two of bytes that one block stands for, so that the fullest cell has MAX_BLOCKS at most. */
function blockUnit(cells) {
  const most = Math.max(1, ...cells.map(([, size]) => size));
  return 2 ** Math.max(0, Math.ceil(Math.log2(most / MAX_BLOCKS)));
}

function map(volume, victims) {
  const found = volume.map;
  if (!found?.cells) return make("p", { class: "muted" }, "The map comes from the evictor that leads, as soon as one does.");
  const unit = blockUnit(found.cells), columns = found.idle.length + 1;
  const heads = found.idle.map((bound) => `< ${IDLE_SHORT(bound)}`).concat("longer");
  const names = found.sizes.map((bound) => `< ${short(bound)}`).concat("larger");
  const rows = names.map((name, row) =>
    make("tr", {}, make("th", { scope: "row" }, name), heads.map((head, column) => {
      const [objects, size] = found.cells[row * columns + column];
      const blocks = make("div", { class: "blocks", ariaHidden: "true" });
      const count = Math.floor(size / unit + 0.5);
      for (let place = 0; place < count; place++) blocks.append(make("i", { class: `idle-${column}` }));
      if (objects && !count) blocks.append(make("i", { class: `idle-${column} small` }));
      for (const victim of victims) {
        if (classOf(victim.size ?? victim.bytes, found.sizes) !== row || classOf(victim.idle_seconds ?? 0, found.idle) !== column) continue;
        const block = make("i", { class: "victim", title: `${victim.id}: ${victim.words}` });
        block.style.animationDelay = `-${victim.shownFor}s`;
        blocks.append(block);
      }
      const words = objects ? `${plural(objects, "object")}, ${bytes(size)}` : "none";
      return make("td", { title: objects ? `${name}, not read for ${head}: ${words}` : "" }, blocks, make("span", { class: "hidden" }, words));
    })));
  return make("table", { class: "map" },
    make("caption", {}, `Objects by size and by the time since they were last read; one block is about ${bytes(unit)}, a dot less`),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, make("span", { class: "hidden" }, "Size")), heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, rows));
}

const VICTIM_SECONDS = 12;
/** Objects removed lately, with the seconds for which they have been shown fading. */
function victimsOf(volume, now) {
  return volume.removed.map((one) => ({ ...one, shownFor: Math.max(0, now - one.at) })).filter((one) => one.shownFor < VICTIM_SECONDS);
}

function removed(volume, now) {
  if (!volume.removed.length) return make("p", { class: "muted" }, "Nothing, as far as this page knows.");
  return make("ul", { class: "removed" }, volume.removed.toReversed().slice(0, 8).map((one) =>
    make("li", { class: now - one.at < VICTIM_SECONDS ? "new" : "" },
      make("span", {}, clock(one.at)), make("span", { class: "id mono", title: one.id }, one.path ?? one.id), make("span", {}, bytes(one.size ?? one.bytes)),
      make("span", {}, one.words + (one.idle_seconds === undefined ? "" : `; not read for ${duration(one.idle_seconds)}`)))));
}

// Components

function line(one, now) {
  const words = one.ok && one.kind === undefined ? one.words : `${one.words}, ${since(one.since, now)}`;
  return make("li", { class: one.ok ? "" : "wrong" }, make("span", { class: "lamp", ariaHidden: "true" }),
    make("span", {}, one.kind ? `${one.kind} ` : one.name, one.kind ? make("span", { class: "mono muted" }, one.name) : null,
      make("span", { class: "words" }, make("span", { class: "hidden" }, one.ok ? "works: " : "wrong: "), words)));
}

/** What an operator has set. It is no fault, and explains what the node does. */
function notice(one) {
  return make("li", { class: "noted" }, make("span", { class: "lamp", ariaHidden: "true" }), make("span", { class: "words" }, one.words));
}

let wrongBefore = null;
/** Tell screen readers what has changed, and nothing else: a page that is read out each second is of no use. */
function announce(wrong) {
  if (wrongBefore !== null && wrong !== wrongBefore) at("changes").textContent = wrong || "Everything works again.";
  wrongBefore = wrong;
}

// Downloads: one item each, kept between snapshots so that bars and dots move

const items = new Map();

function downloadItem(id) {
  const item = make("li", {},
    make("div", { class: "head" }, make("span", { class: "id mono" }, id), make("span", { class: "muted progress" })),
    make("div", { class: "track", ariaHidden: "true" }, make("div", { class: "held", title: "held back until the whole object is verified" })),
    make("div", { class: "foot" }, make("span", { class: "source" }), make("span", { class: "watching" })));
  item.viewers = new Map();
  item.extents = [];
  return item;
}

function updateDownload(item, one) {
  const track = item.querySelector(".track"), size = one.size || one.extents.at(-1)?.[1] || 1;
  const percent = (count) => `${Math.min(100, (100 * count) / size)}%`;
  while (item.extents.length < one.extents.length) item.extents.push(track.appendChild(make("div", { class: "extent" })));
  while (item.extents.length > one.extents.length) item.extents.pop().remove();
  one.extents.forEach(([first, end], place) => {
    item.extents[place].style.left = percent(first);
    item.extents[place].style.width = percent(end - first);
  });
  const held = track.querySelector(".held");
  held.hidden = one.heldBack === null;
  held.style.width = percent(size - (one.heldBack ?? size));
  const known = new Set(one.viewers.map((viewer) => viewer.key));
  for (const [key, dot] of item.viewers) if (!known.has(key)) { dot.remove(); item.viewers.delete(key); }
  for (const viewer of one.viewers) {
    let dot = item.viewers.get(viewer.key);
    if (!dot) item.viewers.set(viewer.key, (dot = track.appendChild(make("span", { class: "viewer" }))));
    dot.style.left = percent(viewer.at);
    dot.title = `a viewer at ${bytes(viewer.at)}`;
  }
  const onDisk = one.extents.reduce((sum, [first, end]) => sum + end - first, 0);
  const progress = [`${bytes(onDisk)} of ${one.size ? bytes(one.size) : "an unknown size"}`];
  if (one.phase === "parked") progress.push("interrupted, to be resumed");
  else if (one.paused) progress.push("paused: far enough ahead of its viewers");
  else if (one.rate !== null) progress.push(rate(one.rate));
  if (one.phase !== "parked" && !one.paused && one.secondsLeft !== null) progress.push(one.rate ? `${duration(Math.max(1, one.secondsLeft))} left` : "stands still");
  item.querySelector(".progress").textContent = progress.join(" · ");
  item.querySelector(".id").textContent = one.path ?? one.id;
  item.querySelector(".id").title = one.id;
  const before = one.sources.slice(0, -1), switches = plural(before.length, "switch", "switches");
  item.querySelector(".source").textContent = one.source ? `from ${one.source}${before.length ? ` after ${switches}: ${before.join(" → ")}` : ""}, by ${one.worker}` : `by ${one.worker || "no worker"}`;
  const viewers = one.viewers.length + one.moreViewers;
  item.querySelector(".watching").textContent = viewers ? plural(viewers, "viewer") : "no viewer";
}

function downloads(list) {
  const current = new Set(list.map((one) => one.id)), box = at("downloads");
  for (const [id, item] of items) if (!current.has(id)) { item.remove(); items.delete(id); }
  for (const one of list) {
    let item = items.get(one.id);
    if (!item) { items.set(one.id, (item = downloadItem(one.id))); box.append(item); }
    updateDownload(item, one);
  }
  at("no-downloads").hidden = list.length > 0;
}

function queue(found) {
  at("queue-words").textContent = `${found.downloads} running, ${found.paused ? `${found.paused} paused, ` : ""}${found.waiting} waiting, ${plural(found.slotsFree, "slot")} free`;
  show("queue", found.next, () => found.next.length === 0 ? [] : [make("h3", {}, "Waiting for a slot"),
    make("ul", { class: "chips" }, found.next.map((one) => make("li", {}, make("span", { class: "mono" }, one.id), make("span", { class: "muted" }, ` ${duration(one.age)}${one.viewers ? `, ${plural(one.viewers, "viewer")}` : ""}`))))]);
}

// Sources

function sparkline(values) {
  const most = Math.max(...values, 0.001);
  const points = values.map((value, place) => `${values.length === 1 ? 50 : (100 * place) / (values.length - 1)},${20 - (18 * value) / most}`);
  return drawing("svg", { viewBox: "0 0 100 22", preserveAspectRatio: "none", "aria-hidden": "true" }, drawing("polyline", { points: values.length === 1 ? `0,${20 - 18} 100,${20 - 18}` : points.join(" ") }));
}

function sourceState(one) {
  if (one.unreachable) return ["bad", `unreachable, asked last for ${duration(one.penaltyLeft)} more`];
  if (one.penaltyLeft > 0) return ["bad", `${plural(one.failuresInARow, "failure")} in a row, asked last for ${duration(one.penaltyLeft)} more`];
  return one.failuresInARow ? ["warn", "failed last time"] : ["good", "answers"];
}

function sources(list) {
  if (!list.length) return make("p", { class: "muted" }, "No source has been asked yet.");
  const head = (words, kind = "") => make("th", { scope: "col", class: kind }, words);
  return make("table", { class: "table" },
    make("thead", {}, make("tr", {}, head("Rank"), head("Source"), head("State"), head("First byte, last ten, of probes too"), head("Received", "number"), head("Requests", "number"), head("Failures"))),
    make("tbody", {}, list.map((one) => {
      const [kind, words] = sourceState(one), failures = Object.entries(one.failures).filter(([, count]) => count);
      const mean = one.firstBytes.reduce((sum, value) => sum + value, 0) / one.firstBytes.length;
      return make("tr", {},
        make("td", {}, String(one.rank)), make("td", { class: "mono" }, one.name), make("td", { class: kind }, words),
        make("td", {}, one.firstBytes.length ? make("span", { class: "spark" }, sparkline(one.firstBytes), `${milliseconds(mean)} mean${one.requests ? "" : ", of probes"}`) : "not known"),
        make("td", { class: "number" }, one.rate ? `${bytes(one.bytes)} at ${rate(one.rate)}` : bytes(one.bytes)), make("td", { class: "number" }, number(one.requests)),
        make("td", {}, failures.length ? failures.map(([reason, count]) => `${number(count)} ${reason.replaceAll("_", " ")}`).join(", ") : "none"));
    })));
}

// The fleet: which node is the home of how many objects, and what came from each

const RING_COLOURS = 6;
/** The class of each node's colour. Neighbours differ, and a node keeps its colour while others come and go. */
function colours(nodes) {
  const own = nodes.findIndex((one) => one.own);
  return new Map(nodes.map((one, place) =>
    [one.name, one.own ? "node-own" : `node-${((place - own - 1 + nodes.length) % nodes.length) % RING_COLOURS}`]));
}

/** One arc for each node alive, as long as its share of the objects. */
function ring(nodes, colour) {
  const radius = 44, around = 2 * Math.PI * radius, gap = nodes.length > 1 ? 2 : 0;
  let before = 0;
  const arcs = nodes.map((one) => {
    const length = Math.max(1, around * one.share - gap);
    const arc = drawing("circle", { class: `arc ${colour.get(one.name)}`, cx: 60, cy: 60, r: radius,
      "stroke-dasharray": `${length} ${around - length}`, "stroke-dashoffset": -around * before, transform: "rotate(-90 60 60)" },
      drawing("title", {}, `${one.name}: ${percentOf(one.share)}`));
    before += one.share;
    return arc;
  });
  return drawing("svg", { class: "ring", viewBox: "0 0 120 120", role: "img",
    "aria-label": `Shares of the objects: ${nodes.map((one) => `${one.name} ${percentOf(one.share)}`).join(", ")}` }, ...arcs);
}
const percentOf = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

function fleet(found) {
  const alive = found.nodes.filter((one) => one.alive), colour = colours(found.nodes), head = (words, kind = "") => make("th", { scope: "col", class: kind }, words);
  return make("div", { class: "fleet" }, ring(alive, colour), make("table", { class: "table" },
    make("caption", { class: "hidden" }, "The nodes of the fleet, as this node sees them"),
    make("thead", {}, make("tr", {}, head("Node"), head("State"), head("Home of", "number"), head("Received from it", "number"), head("Weight", "number"))),
    make("tbody", {}, found.nodes.map((one) => make("tr", {},
      make("th", { scope: "row", class: "mono" }, make("span", { class: one.alive ? `swatch ${colour.get(one.name)}` : "swatch", ariaHidden: "true" }), one.name),
      make("td", { class: one.alive ? "good" : "bad" }, one.own ? "this node" : one.alive ? "alive" : "not alive"),
      make("td", { class: "number" }, one.alive ? percentOf(one.share) : "nothing"),
      make("td", { class: "number" }, one.own ? "" : one.rate ? `${bytes(one.bytes)} at ${rate(one.rate)}` : bytes(one.bytes)),
      make("td", { class: "number" }, String(one.weight)))))));
}

// The last hour

const WIDTH = 360, HEIGHT = 100;

function niceCeiling(value, unit) {
  if (value <= 0) return 1;
  if (unit === rate) return 2 ** Math.ceil(Math.log2(value * 0.999));
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

function chart(title, series, { step, count, unit, stacked = false }) {
  const length = Math.max(...series.map((one) => one.values.length), 0), offset = count - length;
  const sums = Array.from({ length }, (_, place) => stacked ? series.reduce((sum, one) => sum + (one.values[place] ?? 0), 0) : Math.max(...series.map((one) => one.values[place] ?? 0)));
  const top = niceCeiling(Math.max(0, ...sums), unit), y = (value) => HEIGHT - (HEIGHT * value) / top, x = (place) => ((offset + place + 0.5) * WIDTH) / count;
  const shapes = [], below = new Array(length).fill(0);
  for (const one of series) {
    if (stacked) {
      const upper = [], lower = [];
      one.values.forEach((value, place) => {
        const base = below[place];
        below[place] += value ?? 0;
        upper.push(`${x(place)},${y(below[place])}`);
        lower.unshift(`${x(place)},${y(base)}`);
      });
      shapes.push(drawing("polygon", { class: `area ${one.kind}`, points: [...upper, ...lower].join(" ") }));
    } else {
      let path = "", open = false;
      one.values.forEach((value, place) => {
        if (value === null) { open = false; return; }
        path += `${open ? "L" : "M"}${x(place).toFixed(1)},${y(value).toFixed(2)}${open ? "" : "h.01"}`;
        open = true;
      });
      shapes.push(drawing("path", { class: `line ${one.kind}`, d: path || "M0,0" }));
    }
  }
  const latest = (one) => { const value = one.values.at(-1); return value === null || value === undefined ? "none" : unit(value); };
  return make("figure", { class: "chart", style: null },
    make("div", { class: "head" }, make("h3", {}, title),
      make("ul", { class: "legend" }, series.map((one) => make("li", {}, make("span", { class: `swatch ${one.kind}` }), make("span", {}, `${one.name} `, make("b", {}, latest(one))))))),
    make("div", { class: "plot", role: "img", ariaLabel: `${title} over the last ${duration(count * step)}, highest ${unit(Math.max(0, ...sums))}; last: ${series.map((one) => `${one.name} ${latest(one)}`).join(", ")}` },
      drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, ...shapes), make("span", { class: "top", ariaHidden: "true" }, unit(top))),
    make("div", { class: "axis", ariaHidden: "true" }, make("span", {}, `${duration(count * step)} ago`), make("span", {}, `${duration((count * step) / 2)} ago`), make("span", {}, "now")));
}

/** Of a node that has just been started, the axis shows as much time as there is to show, at least ten minutes. */
function span(history) {
  return [history.samples / 6, history.samples / 2].find((count) => history.hit.length <= count) ?? history.samples;
}

function charts(history) {
  const each = (values) => values.map((value) => value / history.step), form = { step: history.step, count: span(history) };
  const perSecond = (value) => `${value < 10 && value % 1 ? value.toFixed(1) : number(value)}/s`;
  return [
    chart("Requests", [{ name: "hit", kind: "hit", values: each(history.hit) }, { name: "pending", kind: "pending", values: each(history.pending) },
      { name: "miss", kind: "miss", values: each(history.miss) }, { name: "error", kind: "error", values: each(history.error) }], { ...form, unit: perSecond, stacked: true }),
    chart("Bytes", [{ name: "sent", kind: "hit", values: each(history.local.map((value, place) => value + history.external[place])) },
      { name: "fetched", kind: "pending", values: each(history.fetched) }], { ...form, unit: rate }),
    chart("First byte", [{ name: "median", kind: "hit", values: history.p50 }, { name: "95 %", kind: "pending", values: history.p95 }], { ...form, unit: milliseconds }),
    chart("Evictions", [{ name: "objects", kind: "error", values: history.evicted }], { ...form, unit: (value) => `${number(value)} in 10 s`, stacked: true }),
  ];
}

// Search

at("search").addEventListener("submit", async (event) => {
  event.preventDefault();
  const id = at("object").value.trim();
  let words;
  try {
    const response = await fetch(`explain.json?id=${encodeURIComponent(id)}`);
    const found = await response.json();
    words = response.ok ? found.words : [found.message];
  } catch {
    words = ["The node does not answer."];
  }
  at("answer").replaceChildren(make("ul", {}, words.map((sentence) => make("li", {}, sentence))));
});

// The stream

function update(snapshot) {
  const { node, totals, volume, at: now } = snapshot;
  at("node").textContent = node.id;
  at("version").textContent = `distributor node ${node.version}, ${node.environment}`;
  show("totals", totals, () => Object.entries(totals).map(total));
  at("volume-words").textContent = `${bytes(volume.used + volume.reserved)} of ${bytes(volume.limit)}, ${plural(volume.objects, "object")}`;
  show("usage", [volume.used, volume.reserved, volume.partial, volume.parked.objects, volume.limit, volume.low, volume.high, volume.leaving], () => usage(volume));
  const victims = victimsOf(volume, now);
  show("map", [volume.map, victims.map((one) => [one.id, one.at])], () => map(volume, victims));
  show("removed", [volume.removed, victims.length], () => removed(volume, now));
  const ticks = snapshot.components.some((one) => !one.ok) ? Math.floor(now) : 0;
  show("components", [snapshot.notices, snapshot.components, ticks],
    () => [...snapshot.notices.map(notice), ...snapshot.components.map((one) => line(one, now))]);
  show("processes", [snapshot.processes, Math.floor(now / 10)], () => snapshot.processes.map((one) => line(one, now)));
  downloads(snapshot.downloads);
  queue(snapshot.queue);
  show("sources", snapshot.sources, () => sources(snapshot.sources));
  at("fleet-card").hidden = !snapshot.fleet;
  if (snapshot.fleet) {
    const { nodes, moreNodes, copies } = snapshot.fleet, alive = nodes.filter((one) => one.alive).length;
    at("fleet-words").textContent = `${alive} of ${plural(nodes.length, "node")} alive${moreNodes ? `, ${number(moreNodes)} more` : ""}; ${plural(copies, "copy", "copies")} of a large object`;
    show("fleet", snapshot.fleet, () => fleet(snapshot.fleet));
  }
  const wrong = [...snapshot.components, ...snapshot.processes].filter((one) => !one.ok);
  const noted = snapshot.notices.map((one) => one.name).join(", ");
  announce([...snapshot.notices.map((one) => one.words), ...wrong.map((one) => `${one.kind ?? ""} ${one.name}: ${one.words}`.trim())].join("; "));
  connection(wrong.length ? plural(wrong.length, "problem") : noted || "everything works", wrong.length ? "bad" : noted ? "warn" : "good");
  document.title = `${wrong.length ? `(${wrong.length}) ` : ""}${node.id} – distributor node`;
}

function connection(words, kind) {
  const badge = at("connection");
  if (badge.textContent !== words) badge.textContent = words;
  badge.className = `badge ${kind}`;
}

const stream = new EventSource("events");
stream.addEventListener("snapshot", (event) => {
  document.body.classList.remove("stale");
  update(JSON.parse(event.data));
});
stream.addEventListener("history", (event) => {
  const history = JSON.parse(event.data);
  at("hour-words").textContent = "all processes together";
  show("charts", history, () => charts(history));
});
stream.addEventListener("error", () => {
  document.body.classList.add("stale");
  connection("not connected, trying again", "bad");
  announce("The page is not connected to the node. It tries again.");
});
