/*
 * The script of the page of `cowdu report`.
 *
 * It may assume that the data in the element #data is consistent: parents of paths come before
 * their children, runs of owner sets are ascending, indices are in range.
 *
 * Invariants
 *   1. Every number of bytes is a sum of whole blocks, multiplied once: exact below 2^53.
 *   2. The tiles of the treemap add up to what deleting the shown set frees.
 *   3. Anybody who can make a file or a snapshot chooses its name, so names enter the document only
 *      as text.
 *   4. A held snapshot is never in the chosen set.
 */
"use strict";
(() => {
  /* Limits, in pieces or pixels. */
  const TILES_MAX = 300;           // of one folder; one more tile stands for the rest
  const INNER_TILES_MAX = 1400;    // inside the tiles of folders, all together
  const INNER_TILES_OF_ONE_MAX = 160;
  const LARGEST_MAX = 100;
  const PAIRS_MAX = 10;
  const NAMES_ONE_BY_ONE_MAX = 6;  // more chosen snapshots are written as ranges
  const BAR_PITCH_MIN_PX = 2;      // narrower bars scroll

  const SVG = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);

  /* ---------------------------------------------------------------- texts */

  /** A name as visible text: control, direction and half characters are escaped. */
  function visible(name) {
    return name.replace(
      /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g,
      (character) => {
        const code = character.charCodeAt(0);
        if (code >= 0xdc80 && code <= 0xdcff) return "\\x" + (code - 0xdc00).toString(16);
        if (code < 0x100) return "\\x" + code.toString(16).padStart(2, "0");
        return "\\u" + code.toString(16).padStart(4, "0");
      });
  }

  const grouped = new Intl.NumberFormat("en-US");
  const exact = (bytes) => grouped.format(bytes);

  function human(bytes) {
    const size = Math.abs(bytes);
    if (size < 1024) return `${exact(bytes)} B`;
    const units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = -1, value = bytes;
    do { value /= 1024; unit++; } while (Math.abs(value) >= 999.5 && unit < units.length - 1);
    const digits = Math.abs(value) < 9.995 ? 2 : Math.abs(value) < 99.95 ? 1 : 0;
    return `${value.toFixed(digits)} ${units[unit]}`;
  }

  const two = (number) => String(number).padStart(2, "0");

  /** A time in the reader's time zone, to the minute. */
  function time(nanoseconds) {
    const date = new Date(nanoseconds / 1e6);
    if (Number.isNaN(date.getTime())) return "unknown";
    return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${two(date.getHours())}:${two(date.getMinutes())}`;
  }

  const counted = (count, noun) => `${exact(count)} ${noun}${count === 1 ? "" : "s"}`;

  /** A word for a shell: quoted if anything in it is special; bytes that are not text as \xNN. */
  function quoted(word) {
    if (/[\x00-\x1f\x7f]|\p{Cs}/u.test(word)) {
      const shown = [...word].map((character) => {
        const code = character.codePointAt(0);
        if (code >= 0xdc80 && code <= 0xdcff) return "\\x" + (code - 0xdc00).toString(16);
        if (code < 0x20 || code === 0x7f) return "\\x" + code.toString(16).padStart(2, "0");
        return character === "'" || character === "\\" ? "\\" + character : character;
      });
      return `$'${shown.join("")}'`;
    }
    return /^[A-Za-z0-9_@%+:,.\/-]+$/.test(word) ? word : "'" + word.replaceAll("'", "'\\''") + "'";
  }

  /** Makes an element. The attribute `text` becomes its text, never markup. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "text") element.textContent = value;
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  function draw(tag, attributes = {}, text = null) {
    const element = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    return element;
  }

  /* ---------------------------------------------------------------- model */

  const data = JSON.parse(byId("data").textContent);
  const blockBytes = data.block_bytes ?? 4096;
  const bytesOf = (blocks) => blocks * blockBytes;
  const snapshots = data.snapshots ?? [];
  const snapshotCount = snapshots.length;
  const deletable = [];
  snapshots.forEach((snapshot, index) => { if (!snapshot.held) deletable.push(index); });
  const labelOf = snapshots.map((snapshot) => visible(snapshot.name));
  const sharedOf = (snapshot) => Math.max(0, snapshot.referenced - snapshot.exclusive);

  /** Owner sets as flat arrays: set s is runs[2 * runStart[s]] up to runs[2 * runStart[s + 1]]. */
  const sets = (() => {
    const given = data.sets ?? [];
    const runStart = new Int32Array(given.length + 1);
    for (let s = 0; s < given.length; s++) runStart[s + 1] = runStart[s] + given[s][0].length / 2;
    const runs = new Int32Array(2 * runStart[given.length]);
    const blocks = new Float64Array(given.length);
    for (let s = 0; s < given.length; s++) {
      runs.set(given[s][0], 2 * runStart[s]);
      blocks[s] = given[s][1] + given[s][2];
    }
    return { count: given.length, runStart, runs, blocks };
  })();

  /** The tree of paths, and the blocks that each set keeps of each path. */
  const tree = (() => {
    const given = data.paths?.length ? data.paths : [[0, ""]];
    const count = given.length;
    const parent = new Int32Array(count);
    const name = new Array(count);
    const childStart = new Int32Array(count + 1);
    for (let p = 0; p < count; p++) {
      parent[p] = given[p][0];
      name[p] = given[p][1];
      if (p) childStart[parent[p] + 1]++;
    }
    for (let p = 0; p < count; p++) childStart[p + 1] += childStart[p];
    const children = new Int32Array(Math.max(0, count - 1));
    const next = childStart.slice();
    for (let p = 1; p < count; p++) children[next[parent[p]]++] = p;

    const files = data.files ?? [];
    const filePath = new Int32Array(files.length);
    const fileSet = new Int32Array(files.length);
    const fileBlocks = new Float64Array(files.length);
    for (let f = 0; f < files.length; f++) [filePath[f], fileSet[f], fileBlocks[f]] = files[f];
    const gone = new Uint8Array(count);
    for (const p of data.gone ?? []) gone[p] = 1;
    return { count, parent, name, childStart, children, filePath, fileSet, fileBlocks, gone };
  })();
  data.sets = data.paths = data.files = data.gone = null;  // free memory: the flat arrays have it all

  const hasChildren = (path) => tree.childStart[path + 1] > tree.childStart[path];

  function fullPath(path) {
    const names = [];
    for (let p = path; p > 0; p = tree.parent[p]) names.push(visible(tree.name[p]));
    return "/" + names.reverse().join("/");
  }

  /**
   * Counts what deleting the chosen snapshots frees: `freed` marks the sets, `total` is in blocks.
   *
   * Each call passes over the runs of all sets: some hundred thousand steps. `difference` is, for
   * each snapshot, the blocks of the sets that are freed with it and not without it. For a snapshot
   * that is not chosen these are the sets that lack only this one; for a chosen one, the freed sets
   * that contain it.
   */
  function evaluate(isChosen) {
    const missingFrom = new Int32Array(snapshotCount + 2);
    missingFrom[snapshotCount] = missingFrom[snapshotCount + 1] = snapshotCount;
    for (let i = snapshotCount - 1; i >= 0; i--) missingFrom[i] = isChosen[i] ? missingFrom[i + 1] : i;

    const { runStart, runs, blocks } = sets;
    const freed = new Uint8Array(sets.count);
    const steps = new Float64Array(snapshotCount + 1);
    const difference = new Float64Array(snapshotCount);
    let total = 0;
    for (let s = 0; s < sets.count; s++) {
      let missing = -1, several = false;
      const end = 2 * runStart[s + 1];
      for (let r = 2 * runStart[s]; r < end; r += 2) {
        const firstMissing = missingFrom[runs[r]];
        if (firstMissing > runs[r + 1]) continue;
        if (missing >= 0 || missingFrom[firstMissing + 1] <= runs[r + 1]) { several = true; break; }
        missing = firstMissing;
      }
      if (several) continue;
      if (missing >= 0) { difference[missing] += blocks[s]; continue; }
      freed[s] = 1;
      total += blocks[s];
      for (let r = 2 * runStart[s]; r < end; r += 2) {
        steps[runs[r]] += blocks[s];
        steps[runs[r + 1] + 1] -= blocks[s];
      }
    }
    for (let i = 0, sum = 0; i < snapshotCount; i++) {
      sum += steps[i];
      if (isChosen[i]) difference[i] = sum;
    }
    return { freed, total, difference };
  }

  /** Blocks of the freed sets by path: `own` of the path itself, `total` with all below it. */
  function byPath(freed) {
    const own = new Float64Array(tree.count);
    const { filePath, fileSet, fileBlocks, parent, gone } = tree;
    for (let f = 0; f < filePath.length; f++) if (freed[fileSet[f]]) own[filePath[f]] += fileBlocks[f];
    const total = own.slice();
    for (let p = tree.count - 1; p > 0; p--) total[parent[p]] += total[p];
    let goneTotal = 0;
    for (let p = 0; p < tree.count; p++) if (gone[p]) goneTotal += own[p];
    return { own, total, goneTotal };
  }

  /** curve[k]: the blocks that deleting the k oldest snapshots that are not held frees. */
  const curve = (() => {
    const rank = new Int32Array(snapshotCount + 1);  // rank[i]: deletable snapshots before i
    for (let i = 0; i < snapshotCount; i++) rank[i + 1] = rank[i] + (snapshots[i].held ? 0 : 1);
    const freedAt = new Float64Array(deletable.length + 1);
    for (let s = 0; s < sets.count; s++) {
      let held = false, newest = -1;
      for (let r = 2 * sets.runStart[s]; r < 2 * sets.runStart[s + 1]; r += 2) {
        newest = sets.runs[r + 1];
        held ||= rank[newest + 1] - rank[sets.runs[r]] !== newest + 1 - sets.runs[r];
      }
      if (!held) freedAt[rank[newest + 1]] += sets.blocks[s];
    }
    for (let k = 1; k <= deletable.length; k++) freedAt[k] += freedAt[k - 1];
    return freedAt;
  })();

  const onlySnapshots = sets.blocks.reduce((sum, blocks) => sum + blocks, 0);

  /** Sets of exactly two snapshots, as [one, other, blocks] in flat arrays. */
  const pairs = (() => {
    const one = [], other = [], blocks = [];
    for (let s = 0; s < sets.count; s++) {
      const start = 2 * sets.runStart[s], end = 2 * sets.runStart[s + 1];
      const first = sets.runs[start], last = sets.runs[end - 1];
      const inOneRun = end - start === 2 && last === first + 1;
      const inTwoRuns = end - start === 4 && sets.runs[start + 1] === first && sets.runs[start + 2] === last;
      if (inOneRun || inTwoRuns) { one.push(first); other.push(last); blocks.push(sets.blocks[s]); }
    }
    return { one, other, blocks };
  })();

  /** The candidates with the largest positive values, largest first; at most `limit`. */
  function largest(candidates, valueOf, limit) {
    const found = [];
    let least = 0;
    for (const candidate of candidates) {
      const value = valueOf(candidate);
      if (value <= least) continue;
      let low = 0, high = found.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (valueOf(found[middle]) >= value) low = middle + 1; else high = middle;
      }
      found.splice(low, 0, candidate);
      if (found.length > limit) found.pop();
      if (found.length === limit) least = valueOf(found[limit - 1]);
    }
    return found;
  }

  /* ---------------------------------------------------------------- state */

  const chosen = new Uint8Array(snapshotCount);
  let chosenCount = 0;
  let now = evaluate(chosen);
  let base = chosen.slice();  // the chosen set before the range from `anchor` was extended
  let anchor = 0;
  let active = 0;
  let folder = 0;             // the path whose content the treemap shows
  let shown = null;           // byPath() of the set that the treemap and the paths show
  let shownBlocks = 0;
  let holders = new Uint8Array(snapshotCount);

  const allDeletable = Uint8Array.from(snapshots, (snapshot) => snapshot.held ? 0 : 1);
  const ofAll = evaluate(allDeletable);

  /** Makes `wanted`, without held snapshots, the chosen set, and draws everything. */
  function choose(wanted) {
    chosenCount = 0;
    for (let i = 0; i < snapshotCount; i++) {
      chosen[i] = wanted[i] && !snapshots[i].held ? 1 : 0;
      chosenCount += chosen[i];
    }
    show();
  }

  function toggle(index) {
    active = anchor = index;
    if (snapshots[index].held) {
      note(`${labelOf[index]} is held: release it before you can choose and delete it.`);
      showActive();
      return;
    }
    note("");
    const wanted = chosen.slice();
    wanted[index] = wanted[index] ? 0 : 1;
    choose(wanted);
    base = chosen.slice();
  }

  /** Chooses the range from the anchor to `index`, besides what was chosen before. */
  function extend(index) {
    active = index;
    const wanted = base.slice();
    const first = Math.min(anchor, index), last = Math.max(anchor, index);
    let held = 0;
    for (let i = first; i <= last; i++) { wanted[i] = 1; held += snapshots[i].held ? 1 : 0; }
    note(held ? `${counted(held, "held snapshot")} in this range ${held === 1 ? "is" : "are"} left out.` : "");
    choose(wanted);
  }

  function chooseThese(wanted) {
    note("");
    choose(wanted);
    base = chosen.slice();
    anchor = active;
  }

  const chooseNone = () => chooseThese(new Uint8Array(snapshotCount));
  const chooseAll = () => chooseThese(allDeletable);

  function chooseOldest(count) {
    const wanted = new Uint8Array(snapshotCount);
    for (const index of deletable.slice(0, count)) wanted[index] = 1;
    if (count > 0) active = deletable[count - 1];
    chooseThese(wanted);
  }

  /* ---------------------------------------------------------------- decision */

  /**
   * The command that deletes the chosen snapshots.
   *
   * A range names both ends: an open one would include snapshots made after this report.
   */
  function command() {
    const indices = [];
    for (let i = 0; i < snapshotCount; i++) if (chosen[i]) indices.push(i);
    if (!indices.length) return "";
    const words = [];
    for (let at = 0; at < indices.length; at++) {
      let end = at;
      while (indices.length > NAMES_ONE_BY_ONE_MAX && end + 1 < indices.length && indices[end + 1] === indices[end] + 1) end++;
      if (end - at >= 2) {
        words.push(`${snapshots[indices[at]].name}%${snapshots[indices[end]].name}`);
        at = end;
      } else {
        words.push(snapshots[indices[at]].name);
      }
    }
    let target = String(data.target ?? data.image ?? "TARGET");
    if (target.startsWith("-")) target = "./" + target;
    return ["cowfs", "snapshot", "delete", ...[target, ...words].map(quoted)].join(" ");
  }

  function note(text) { byId("note").textContent = text; }

  function showDecision() {
    const bytes = bytesOf(now.total);
    byId("chosen-count").textContent = chosenCount ? `${counted(chosenCount, "snapshot")} chosen` : "No snapshot chosen";
    byId("chosen-count").dataset.count = chosenCount;
    byId("verdict-words").textContent = chosenCount === 0 ? "deleting none frees" : chosenCount === 1 ? "deleting it frees" : "deleting them frees";
    byId("reclaim-human").textContent = human(bytes);
    byId("reclaim-bytes").textContent = exact(bytes);
    byId("reclaim-bytes").dataset.bytes = bytes;
    byId("command").textContent = command();
    byId("command-hint").hidden = chosenCount > 0;
    byId("copy").disabled = chosenCount === 0;
    byId("copy").textContent = "Copy";
    byId("choose-none").disabled = chosenCount === 0;
    byId("choose-all").disabled = chosenCount === deletable.length;
    showDisk();
  }

  function copyCommand() {
    const button = byId("copy");
    const said = (text) => { button.textContent = text; };
    const bySelection = () => {
      getSelection().selectAllChildren(byId("command"));
      said(document.execCommand("copy") ? "Copied" : "Press Ctrl C");
    };
    if (navigator.clipboard) navigator.clipboard.writeText(byId("command").textContent).then(() => said("Copied"), bySelection);
    else bySelection();
  }

  /* ---------------------------------------------------------------- header */

  function showHeader() {
    const image = visible(String(data.image ?? "no data"));
    document.title = `${image} · cowdu report`;
    byId("image").textContent = image;
    const facts = [];
    if (data.label) facts.push(`label ${visible(data.label)}`);
    if (data.generation !== undefined) facts.push(`generation ${exact(data.generation)}`);
    if (data.made_ns) facts.push(`read ${time(data.made_ns)}`);
    facts.push(counted(snapshotCount, "snapshot"));
    if (snapshotCount > deletable.length) facts.push(`${exact(snapshotCount - deletable.length)} held`);
    byId("facts").replaceChildren(...facts.map((fact) => make("span", { text: fact, class: "name" })));

    const total = data.total_bytes ?? 0, allocated = data.allocated_bytes ?? 0, available = data.available_bytes ?? 0;
    const rows = [
      ["allocated", "Allocated", allocated, null],
      ["live", "live files and what they share", Math.max(0, allocated - bytesOf(onlySnapshots)), "disk-live"],
      ["only-snapshots", "held by snapshots only", bytesOf(onlySnapshots), "disk-snapshots"],
      ["reserve", "reserved and structure", Math.max(0, total - allocated - available), "disk-reserve"],
      ["available", "available", available, "disk-available"],
      ["total", "Size", total, null],
    ];
    byId("totals").replaceChildren(...rows.map(([id, words, bytes, swatch]) => make("div", {},
      ...(swatch ? [make("i", { class: `swatch ${swatch}` })] : []),
      make("dt", { text: words }), " ",
      make("dd", { id: `total-${id}`, "data-bytes": bytes, title: `${exact(bytes)} bytes`, text: human(bytes) }))));
    if (!total) byId("totals").replaceChildren();
    byId("disk").hidden = !total;
    byId("disk").replaceChildren(...["live", "chosen", "snapshots", "reserve"].map((part) => make("span", { class: `disk-${part}` })));
  }

  /** Draws the bar of the whole disk; the chosen part of what only snapshots hold has a pattern. */
  function showDisk() {
    const total = data.total_bytes;
    if (!total) return;
    const snapshotsBytes = bytesOf(onlySnapshots), chosenBytes = bytesOf(now.total);
    const parts = [
      Math.max(0, data.allocated_bytes - snapshotsBytes), chosenBytes, snapshotsBytes - chosenBytes,
      Math.max(0, total - data.allocated_bytes - data.available_bytes),
    ];
    [...byId("disk").children].forEach((part, index) => { part.style.width = `${100 * parts[index] / total}%`; });
    byId("disk").setAttribute("aria-label",
      `${human(data.allocated_bytes)} of ${human(total)} allocated, ${human(snapshotsBytes)} by snapshots only, of that ${human(chosenBytes)} chosen`);
  }

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.style.colorScheme || (prefersDark.matches ? "dark" : "light")) === "dark";

  function showTheme() {
    const other = isDark() ? "light" : "dark";
    byId("theme").textContent = other === "dark" ? "Dark" : "Light";
    byId("theme").setAttribute("aria-label", `Switch to ${other} colours`);
  }

  /* ---------------------------------------------------------------- tooltip */

  const tip = byId("tip");

  function showTip(title, rows, x, y, extra = "") {
    tip.replaceChildren(make("strong", { text: title, class: "name" }));
    if (extra) tip.append(make("span", { text: extra, class: "muted name" }));
    const list = make("dl");
    for (const [word, value] of rows) list.append(make("dt", { text: word }), make("dd", { text: value }));
    tip.append(list);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - height - 4))}px`;
  }

  function hideTip() { tip.hidden = true; }

  /* ---------------------------------------------------------------- timeline */

  const timeline = byId("timeline");
  const bars = [];
  let mode = "referenced";

  function makeTimeline() {
    for (let i = 0; i < snapshotCount; i++) {
      const snapshot = snapshots[i];
      const bar = make("div", {
        class: snapshot.held ? "bar held" : "bar", role: "option", id: `bar-${i}`, "aria-selected": "false",
        "aria-disabled": snapshot.held ? "true" : null, "data-index": i, "data-name": snapshot.name,
        "aria-label": `${labelOf[i]}, ${time(snapshot.created_ns)}, exclusive ${human(bytesOf(snapshot.exclusive))}, shared ${human(bytesOf(sharedOf(snapshot)))}${snapshot.held ? ", held" : ""}`,
      }, make("div", { class: "stack" }, make("i", { class: "shared" }), make("i", { class: "own" })), make("div", { class: "mark" }));
      bars.push(bar);
    }
    timeline.replaceChildren(...bars);
    byId("timeline-hint").textContent = snapshotCount > deletable.length
      ? `${counted(snapshotCount, "snapshot")}, of which ${exact(snapshotCount - deletable.length)} held; a bar for each, in order of creation.`
      : `${counted(snapshotCount, "snapshot")}; a bar for each, in order of creation.`;
    placeTimeline();
  }

  /** Sets what depends on the width: gaps, scrolling, dates. */
  function placeTimeline() {
    const width = byId("scroller").clientWidth;
    const wanted = Math.max(width - 6, snapshotCount * BAR_PITCH_MIN_PX);
    const pitch = wanted / snapshotCount;
    timeline.style.width = byId("times").style.width = `${wanted}px`;
    timeline.style.setProperty("--bar-gap", pitch >= 24 ? "3px" : pitch >= 9 ? "1.5px" : pitch >= 5 ? ".75px" : pitch >= 3 ? ".3px" : "0px");
    timeline.classList.toggle("thin", pitch < 9);
    const labels = Math.max(1, Math.min(snapshotCount, Math.floor(wanted / 170)));
    const spans = [];
    for (let n = 0; n < labels; n++) {
      const index = labels === 1 ? 0 : Math.round(n * (snapshotCount - 1) / (labels - 1));
      const edge = pitch < 120 && n === 0 ? "first" : pitch < 120 && n === labels - 1 ? "last" : "";
      const at = edge === "first" ? 0 : edge === "last" ? 100 : 100 * (index + .5) / snapshotCount;
      const span = make("span", { text: time(snapshots[index].created_ns), class: edge });
      span.style.left = `${at}%`;
      spans.push(span);
    }
    byId("times").replaceChildren(...spans);
  }

  /** Round numbers of bytes from 0 to at least `max`, three to six of them. */
  function ticks(max) {
    if (!(max > 0)) return [0];
    const unit = 1024 ** Math.max(0, Math.floor(Math.log(max) / Math.log(1024)));
    const scaled = max / unit;
    let step = 10 ** Math.floor(Math.log10(scaled / 3));
    for (const factor of [1, 2, 2.5, 5, 10]) {
      if (scaled / (step * factor) <= 5) { step *= factor; break; }
    }
    const found = [];
    for (let n = 0; n * step < scaled + step * .999; n++) found.push(n * step * unit);
    return found;
  }

  function tickText(bytes) {
    if (bytes === 0) return "0";
    const power = Math.min(6, Math.floor(Math.log(bytes) / Math.log(1024) + 1e-9));
    return `${+(bytes / 1024 ** power).toPrecision(3)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][power]}`;
  }

  function showTimeline() {
    const ownOf = (i) => mode === "difference" ? now.difference[i] : snapshots[i].exclusive;
    const restOf = (i) => mode === "referenced" ? sharedOf(snapshots[i]) : 0;
    let max = 0;
    for (let i = 0; i < snapshotCount; i++) {
      if (mode === "difference" && snapshots[i].held) continue;
      max = Math.max(max, ownOf(i) + restOf(i));
    }
    const marks = ticks(bytesOf(max));
    const top = marks[marks.length - 1] || 1;
    byId("timeline-axis").replaceChildren(...marks.map((mark) => {
      const line = make("div", {}, make("span", { text: tickText(mark) }));
      line.style.bottom = `${100 * mark / top}%`;
      return line;
    }));
    for (let i = 0; i < snapshotCount; i++) {
      const bar = bars[i];
      const [rest, own] = bar.firstChild.children;
      const ownBlocks = mode === "difference" && snapshots[i].held ? 0 : ownOf(i);
      setHeight(rest, bytesOf(restOf(i)) / top);
      setHeight(own, bytesOf(ownBlocks) / top);
      bar.classList.toggle("chosen", chosen[i] === 1);
      bar.classList.toggle("holder", holders[i] === 1);
      const selected = chosen[i] ? "true" : "false";
      if (bar.getAttribute("aria-selected") !== selected) bar.setAttribute("aria-selected", selected);
    }
    byId("legend-shared").hidden = mode !== "referenced";
    byId("legend-own").lastChild.textContent = mode === "difference"
      ? "difference: what the chosen set frees with it, less what it frees without it" : "exclusive: freed by deleting it alone";
    showActive();
  }

  /** Sets a height in parts of 1; anything above 0 gets at least a pixel. */
  function setHeight(element, part) {
    const height = part > 0 ? `max(1px, ${(100 * part).toFixed(3)}%)` : "0";
    if (element.style.height !== height) element.style.height = height;
  }

  function showActive() {
    timeline.querySelector(".active")?.classList.remove("active");
    byId("snapshots").querySelector("tr.active")?.classList.remove("active");
    if (!snapshotCount) return;
    bars[active].classList.add("active");
    timeline.setAttribute("aria-activedescendant", bars[active].id);
    rowsOfTable[active]?.classList.add("active");
    showPairs();
  }

  function tipOfSnapshot(index, x, y) {
    const snapshot = snapshots[index];
    showTip(labelOf[index], [
      ["Created", time(snapshot.created_ns)],
      ["Referenced", human(bytesOf(snapshot.referenced))],
      ["Exclusive", human(bytesOf(snapshot.exclusive))],
      ["Shared", human(bytesOf(sharedOf(snapshot)))],
      ["Written", human(bytesOf(snapshot.written))],
      ["With all created before", human(bytesOf(snapshot.cumulative))],
      ...(snapshot.held ? [["State", "held"]] : [["Difference now", human(bytesOf(now.difference[index]))], ["State", chosen[index] ? "chosen" : "not chosen"]]),
    ], x, y, visible(snapshot.description ?? ""));
  }

  function tipOfActive() {
    bars[active].scrollIntoView({ block: "nearest", inline: "nearest" });
    const place = bars[active].getBoundingClientRect();
    tipOfSnapshot(active, place.right, place.top + 20);
  }

  function barAt(event) {
    const bar = event.target.closest?.(".bar");
    return bar ? Number(bar.dataset.index) : null;
  }

  function keyInTimeline(event) {
    const last = snapshotCount - 1;
    const moves = {
      ArrowRight: active + 1, ArrowDown: active + 1, ArrowLeft: active - 1, ArrowUp: active - 1,
      PageDown: active + 10, PageUp: active - 10, Home: 0, End: last,
    };
    const control = event.ctrlKey || event.metaKey;
    if (event.altKey) return;
    if (event.key in moves && (!control || event.shiftKey)) {
      const target = Math.max(0, Math.min(last, moves[event.key]));
      if (event.shiftKey) extend(target);
      else { active = anchor = target; base = chosen.slice(); showActive(); }
    } else if (event.key === " " || event.key === "Enter") {
      if (event.shiftKey) extend(active); else toggle(active);
    } else if (control && event.key.toLowerCase() === "a") {
      chooseAll();
    } else if (event.key === "Escape") {
      chooseNone();
      event.preventDefault();
      hideTip();
      return;
    } else {
      return;
    }
    event.preventDefault();
    tipOfActive();
  }

  /* ---------------------------------------------------------------- curve */

  const curveBox = byId("curve");
  const frame = { left: 68, right: 18, top: 14, bottom: 40, height: 250, width: 400 };
  const plotWidth = () => frame.width - frame.left - frame.right;
  const plotHeight = frame.height - frame.top - frame.bottom;

  function showCurve() {
    frame.width = Math.max(260, curveBox.clientWidth);
    const count = deletable.length;
    const marks = ticks(bytesOf(curve[count]));
    const top = marks[marks.length - 1] || 1;
    const xOf = (k) => frame.left + plotWidth() * k / Math.max(1, count);
    const yOf = (blocks) => frame.top + plotHeight * (1 - bytesOf(blocks) / top);
    const svg = draw("svg", { viewBox: `0 0 ${frame.width} ${frame.height}`, "aria-hidden": "true" });
    for (const mark of marks) {
      const y = frame.top + plotHeight * (1 - mark / top);
      svg.append(draw("line", { class: mark ? "grid" : "base", x1: frame.left, x2: frame.width - frame.right, y1: y, y2: y }),
        draw("text", { x: frame.left - 8, y: y + 4, "text-anchor": "end" }, tickText(mark)));
    }
    let path = `M${xOf(0)} ${yOf(0)}`;
    for (let k = 1; k <= count; k++) path += `H${xOf(k).toFixed(2)}V${yOf(curve[k]).toFixed(2)}`;
    svg.append(draw("path", { class: "area", d: `${path}V${yOf(0)}Z` }), draw("path", { class: "step", d: path }));
    const numbers = Math.max(1, Math.min(count, Math.floor(plotWidth() / 60)));
    let step = Math.max(1, Math.ceil(count / numbers));
    for (const nice of [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000]) if (nice >= step) { step = nice; break; }
    for (let k = 0; k <= count; k += step) {
      svg.append(draw("text", { x: xOf(k), y: frame.top + plotHeight + 16, "text-anchor": "middle" }, exact(k)));
    }
    svg.append(draw("text", { x: frame.left + plotWidth() / 2, y: frame.height - 6, "text-anchor": "middle" }, "number of the oldest snapshots deleted"));

    const x = xOf(chosenCount), y = yOf(now.total);
    if (chosenCount) {
      svg.append(draw("path", { class: "guide", fill: "none", d: `M${frame.left} ${y}H${x}V${frame.top + plotHeight}` }));
      // The line ascends, so the label has room above and left of the point, or below and right.
      const isAbove = now.total >= curve[chosenCount] && x > frame.left + 190;
      const toLeft = isAbove || x > frame.left + plotWidth() - 190;
      svg.append(draw("circle", { class: "point", id: "curve-point", cx: x, cy: y, r: 6, "data-count": chosenCount, "data-bytes": bytesOf(now.total) }),
        draw("text", { class: "said", x: x + (toLeft ? -12 : 12), y: Math.min(frame.top + plotHeight - 6, Math.max(frame.top + 4, y + (isAbove ? -10 : 20))), "text-anchor": toLeft ? "end" : "start" },
          `${exact(chosenCount)} chosen: ${human(bytesOf(now.total))}`));
    }
    const probe = draw("line", { class: "probe", y1: frame.top, y2: frame.top + plotHeight, x1: 0, x2: 0, visibility: "hidden" });
    svg.append(probe);
    curveBox.replaceChildren(svg);
    curveBox.setAttribute("aria-valuemax", count);
    curveBox.setAttribute("aria-valuenow", chosenCount);
    curveBox.setAttribute("aria-valuetext", `${counted(chosenCount, "snapshot")} chosen, frees ${human(bytesOf(now.total))}; the ${chosenCount} oldest free ${human(bytesOf(curve[chosenCount]))}`);
  }

  function oldestAt(event) {
    const box = curveBox.getBoundingClientRect();
    const scale = frame.width / box.width;
    const part = ((event.clientX - box.left) * scale - frame.left) / plotWidth();
    return Math.max(0, Math.min(deletable.length, Math.round(part * deletable.length)));
  }

  function probeCurve(event) {
    const count = oldestAt(event);
    const probe = curveBox.querySelector(".probe");
    const x = frame.left + plotWidth() * count / Math.max(1, deletable.length);
    probe.setAttribute("x1", x);
    probe.setAttribute("x2", x);
    probe.setAttribute("visibility", "visible");
    showTip(count ? `The ${exact(count)} oldest` : "None", [["Free", human(bytesOf(curve[count]))]],
      event.clientX, event.clientY, count ? `up to ${labelOf[deletable[count - 1]]}` : "");
  }

  function keyInCurve(event) {
    const moves = {
      ArrowRight: chosenCount + 1, ArrowUp: chosenCount + 1, ArrowLeft: chosenCount - 1, ArrowDown: chosenCount - 1,
      PageUp: chosenCount + 10, PageDown: chosenCount - 10, Home: 0, End: deletable.length,
    };
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    chooseOldest(Math.max(0, Math.min(deletable.length, moves[event.key])));
  }

  /* ---------------------------------------------------------------- treemap */

  const treemap = byId("treemap");
  let tiles = [];   // of the folder shown: { path, blocks, kind, box, element }
  let picked = null;

  /**
   * The items of a folder, the largest first: { path, blocks, kind }.
   *
   * Their blocks add up to those of the folder. Kinds: `path` is an entry; `own` is a file that had
   * the folder's name in some snapshot; `rest` stands for all smaller entries; `structure`, only at
   * the top, is the metadata, with the small files stored in it.
   */
  function contentOf(path, limit) {
    const children = tree.children.subarray(tree.childStart[path], tree.childStart[path + 1]);
    const items = largest(children, (child) => shown.total[child], limit - 1)
      .map((child) => ({ path: child, blocks: shown.total[child], kind: "path" }));
    if (shown.own[path] > 0) items.push({ path, blocks: shown.own[path], kind: "own" });
    let rest = shown.total[path];
    for (const item of items) rest -= item.blocks;
    if (rest > 0) {
      let count = 0;
      for (const child of children) if (shown.total[child] > 0) count++;
      items.push({ path, blocks: rest, kind: "rest", count: count - items.filter((item) => item.kind === "path").length });
    }
    const structure = path === 0 ? shownBlocks - shown.total[0] : 0;
    if (structure > 0) items.push({ path, blocks: structure, kind: "structure" });
    return items.sort((one, other) => other.blocks - one.blocks);
  }

  /** Squarified rectangles (Bruls, Huizing, van Wijk 2000) for values that descend. */
  function squarify(values, left, top, width, height) {
    const boxes = [];
    let sum = values.reduce((total, value) => total + value, 0);
    let at = 0;
    while (at < values.length) {
      const side = Math.min(width, height);
      const scale = width * height / sum;
      let row = 0, end = at, worst = Infinity;
      while (end < values.length) {
        const grown = row + values[end];
        const length = grown * scale / side;
        const ratio = Math.max(
          length * length / (values[end] * scale), values[at] * scale / (length * length));
        if (ratio > worst) break;
        worst = ratio;
        row = grown;
        end++;
      }
      const thick = end === values.length ? Math.max(width, height) : row * scale / side;
      let along = 0;
      for (; at < end; at++) {
        const length = side * values[at] / row;
        boxes.push(width >= height
          ? { left, top: top + along, width: thick, height: length }
          : { left: left + along, top, width: length, height: thick });
        along += length;
      }
      if (width >= height) { left += thick; width -= thick; } else { top += thick; height -= thick; }
      sum -= row;
    }
    return boxes;
  }

  function nameOf(item) {
    if (item.kind === "structure") return "(metadata and small files)";
    if (item.kind === "rest") return `(${exact(item.count)} smaller)`;
    if (item.kind === "own") return "(itself, as a file)";
    return visible(tree.name[item.path]);
  }

  const isFolder = (item) => item.kind === "path" && hasChildren(item.path);
  const isGone = (item) => (item.kind === "path" || item.kind === "own") && tree.gone[item.path] === 1;

  function classOf(item) {
    if (item.kind === "rest" || item.kind === "structure") return "tile rest";
    return `tile${isFolder(item) ? " folder" : ""}${isGone(item) ? " gone" : ""}`;
  }

  function place(element, box, around) {
    element.style.left = `${100 * box.left / around.width}%`;
    element.style.top = `${100 * box.top / around.height}%`;
    element.style.width = `${100 * box.width / around.width}%`;
    element.style.height = `${100 * box.height / around.height}%`;
  }

  /** Writes name and size into a tile, and draws a folder's items inside it if there is room. */
  function fillTile(element, item, box, depth, budget) {
    const line = depth ? 14 : 17;
    const opens = isFolder(item) && box.width >= 56 && box.height >= line + 24 && budget.left > 0 && depth < 3;
    const size = make("span", { class: "size", text: human(bytesOf(item.blocks)) });
    const name = make("b", { text: nameOf(item) });
    if (box.width >= 34 && box.height >= line) {
      if (!opens && box.height >= 2 * line + 2 && box.width >= 64) {
        element.append(make("span", { class: "label" }, name), make("span", { class: "label" }, size));
      } else if (box.width >= 130) {
        element.append(make("span", { class: "label" }, name, "  ", size));
      } else {
        element.append(make("span", { class: "label" }, name));
      }
    }
    if (!opens) return;
    const around = { width: box.width, height: box.height };
    const inner = { left: 3, top: line + 1, width: box.width - 8, height: box.height - line - 6 };
    const limit = Math.max(2, Math.min(INNER_TILES_OF_ONE_MAX, budget.left, Math.floor(inner.width * inner.height / 900)));
    const items = contentOf(item.path, limit);
    const boxes = squarify(items.map((each) => each.blocks), inner.left, inner.top, inner.width, inner.height);
    items.forEach((each, index) => {
      if (boxes[index].width < 3 || boxes[index].height < 3) return;
      budget.left--;
      const span = make("span", { class: classOf(each), "data-kind": each.kind, "data-path": each.path, "data-blocks": each.blocks, "data-count": each.count });
      place(span, boxes[index], around);
      fillTile(span, each, boxes[index], depth + 1, budget);
      element.append(span);
    });
  }

  function showTreemap() {
    const ofChosen = chosenCount > 0;
    const of = byId("treemap-of");
    of.dataset.shows = ofChosen ? "chosen" : "all";
    of.textContent = ofChosen
      ? `What deleting the ${chosenCount === 1 ? "chosen snapshot" : `${exact(chosenCount)} chosen snapshots`} frees. Click a folder to open it.`
      : `Nothing is chosen: this is what deleting all ${counted(deletable.length, "snapshot")} that are not held would free. Choose snapshots to see what they free.`;

    const around = { width: treemap.clientWidth, height: treemap.clientHeight };
    const items = contentOf(folder, TILES_MAX);
    const boxes = squarify(items.map((item) => item.blocks), 0, 0, around.width, around.height);
    const budget = { left: INNER_TILES_MAX };
    picked = null;
    let sum = 0;
    tiles = items.map((item, index) => {
      sum += item.blocks;
      const box = boxes[index];
      const said = `${nameOf(item)}, ${human(bytesOf(item.blocks))}${isGone(item) ? ", deleted" : ""}${isFolder(item) ? ", folder" : ""}`;
      const element = make("button", {
        type: "button", class: classOf(item), tabindex: index ? "-1" : "0", "aria-label": said, "data-tile": index,
        "data-kind": item.kind, "data-path": item.path, "data-blocks": item.blocks, "data-bytes": bytesOf(item.blocks),
        "data-count": item.count, "data-name": item.kind === "path" ? tree.name[item.path] : null,
      });
      place(element, box, around);
      fillTile(element, item, box, 0, budget);
      return { ...item, box, element };
    });
    treemap.replaceChildren(...tiles.map((tile) => tile.element));
    if (!tiles.length) {
      treemap.append(make("p", { class: "empty", text: folder
        ? "Nothing below this folder is freed."
        : snapshotCount && !deletable.length ? "All snapshots are held: nothing can be freed."
          : "Nothing is freed: other snapshots or the live files hold the same blocks." }));
    }
    byId("treemap-human").textContent = human(bytesOf(sum));
    byId("treemap-bytes").textContent = exact(bytesOf(sum));
    byId("treemap-bytes").dataset.bytes = bytesOf(sum);
    const gone = byId("treemap-gone");
    gone.dataset.bytes = bytesOf(shown.goneTotal);
    gone.replaceChildren(...(shown.goneTotal > 0
      ? [`${human(bytesOf(shown.goneTotal))} of this belongs to paths that the live files no longer have`, make("span", { class: "tag", text: "deleted" })] : []));
    showCrumbs();
  }

  function showCrumbs() {
    const line = [];
    for (let path = folder; ; path = tree.parent[path]) {
      line.push(path);
      if (path === 0) break;
    }
    byId("crumbs").replaceChildren(...line.reverse().map((path) => make("li", {}, make("button", {
      type: "button", class: "name", "data-path": path, "aria-current": path === folder ? "location" : null,
      text: path ? visible(tree.name[path]) : "all files",
    }))));
  }

  function openFolder(path, focusPath) {
    folder = path;
    detail("");
    hideTip();
    holders = new Uint8Array(snapshotCount);
    showTimeline();
    showTreemap();
    if (focusPath === null) return;
    focusTile(Math.max(0, tiles.findIndex((tile) => tile.kind === "path" && tile.path === focusPath)));
  }

  function focusTile(index) {
    if (!tiles[index]) return;
    for (const tile of tiles) tile.element.tabIndex = -1;
    tiles[index].element.tabIndex = 0;
    tiles[index].element.focus();
  }

  function detail(text) { byId("treemap-detail").textContent = text; }

  /** Marks the snapshots that hold any block of a path. */
  function holdersOf(path) {
    const steps = new Int32Array(snapshotCount + 1);
    for (let f = 0; f < tree.filePath.length; f++) {
      if (tree.filePath[f] !== path) continue;
      const s = tree.fileSet[f];
      for (let r = 2 * sets.runStart[s]; r < 2 * sets.runStart[s + 1]; r += 2) {
        steps[sets.runs[r]]++;
        steps[sets.runs[r + 1] + 1]--;
      }
    }
    const found = new Uint8Array(snapshotCount);
    for (let i = 0, sum = 0; i < snapshotCount; i++) { sum += steps[i]; found[i] = sum > 0 ? 1 : 0; }
    return found;
  }

  /** Opens a folder; describes any other tile, and marks the snapshots that hold it. */
  function actOnTile(tile, byKey) {
    if (isFolder(tile)) { openFolder(tile.path, byKey ? -1 : null); return; }
    const again = picked === tile;
    picked?.element.classList.remove("picked");
    picked = again ? null : tile;
    holders = new Uint8Array(snapshotCount);
    if (again) {
      detail("");
    } else {
      tile.element.classList.add("picked");
      const size = human(bytesOf(tile.blocks));
      if (tile.kind === "structure") detail(`${size} of tree nodes, and of small files stored inside them.`);
      else if (tile.kind === "rest") detail(`${counted(tile.count, "smaller entry").replace("entrys", "entries")} of this folder, together ${size}.`);
      else {
        holders = holdersOf(tile.path);
        const names = labelOf.filter((_, index) => holders[index]);
        const said = names.length > 4 ? `${names[0]} … ${names[names.length - 1]}` : names.join(", ");
        detail(`${fullPath(tile.path)}${isGone(tile) ? " (deleted)" : ""}: ${size} freed; ${counted(names.length, "snapshot")}, marked above, ${names.length === 1 ? "holds" : "hold"} blocks of it that the live files lack: ${said}.`);
      }
    }
    showTimeline();
  }

  /** The index of the nearest tile in a direction. */
  function neighbour(index, x, y) {
    const middle = (box) => [box.left + box.width / 2, box.top + box.height / 2];
    const [fromX, fromY] = middle(tiles[index].box);
    let best = index, least = Infinity;
    tiles.forEach((tile, other) => {
      const [toX, toY] = middle(tile.box);
      const ahead = (toX - fromX) * x + (toY - fromY) * y;
      const aside = Math.abs((toX - fromX) * y) + Math.abs((toY - fromY) * x);
      if (other === index || ahead <= .5) return;
      const distance = ahead + 2 * aside;
      if (distance < least) { least = distance; best = other; }
    });
    return best;
  }

  function keyInTreemap(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if ((event.key === "Escape" || event.key === "Backspace") && folder) {
      event.preventDefault();
      openFolder(tree.parent[folder], folder);
      return;
    }
    const element = event.target.closest(".tile[data-tile]");
    if (!element) return;
    const index = Number(element.dataset.tile);
    const moves = {
      ArrowRight: () => neighbour(index, 1, 0), ArrowLeft: () => neighbour(index, -1, 0),
      ArrowDown: () => neighbour(index, 0, 1), ArrowUp: () => neighbour(index, 0, -1),
      Home: () => 0, End: () => tiles.length - 1,
    };
    if (event.key in moves) focusTile(moves[event.key]());
    else return;
    event.preventDefault();
  }

  function tipOfTile(event) {
    const element = event.target.closest?.(".tile");
    if (!element) { hideTip(); return; }
    const { kind, path, blocks, count } = element.dataset;
    const item = { kind, path: Number(path), blocks: Number(blocks), count: Number(count) };
    const title = kind === "path" ? fullPath(item.path) : kind === "structure" ? nameOf(item) : `${fullPath(item.path)} ${nameOf(item)}`;
    const part = shownBlocks ? `${(100 * item.blocks / shownBlocks).toFixed(1)} %` : "";
    showTip(title, [["Freed", human(bytesOf(item.blocks))], ["Of all that is freed", part], ...(isGone(item) ? [["Live files", "deleted"]] : [])], event.clientX, event.clientY);
  }

  /* ---------------------------------------------------------------- tables */

  const columns = [
    { title: "Name", key: "name", value: (i) => i, text: (i) => labelOf[i] },
    { title: "Created", key: "created", value: (i) => snapshots[i].created_ns },
    { title: "Referenced", key: "referenced", value: (i) => snapshots[i].referenced, hint: "all that it reaches" },
    { title: "Exclusive", key: "exclusive", value: (i) => snapshots[i].exclusive, hint: "what deleting it alone frees" },
    { title: "Shared", key: "shared", value: (i) => sharedOf(snapshots[i]), hint: "referenced, less exclusive" },
    { title: "Written", key: "written", value: (i) => snapshots[i].written, hint: "what it holds and the snapshot before it does not" },
    { title: "Cumulative", key: "cumulative", value: (i) => snapshots[i].cumulative, hint: "what deleting it and all snapshots created before it frees" },
    { title: "Difference", key: "difference", value: (i) => snapshots[i].held ? -1 : now.difference[i], hint: "what the chosen set frees with it, less what it frees without it" },
  ];
  const rowsOfTable = [];
  let sortedBy = "created", sortedUp = true;

  function makeTable() {
    const head = byId("snapshots").tHead.rows[0];
    head.append(make("th", { class: "pick", scope: "col" }, make("span", {}, make("span", { class: "muted", text: "" }))));
    for (const column of columns) {
      const isNumber = column.key !== "name" && column.key !== "created";
      head.append(make("th", { scope: "col", class: `${column.key}${isNumber ? " number long" : ""}`, "data-key": column.key, title: column.hint },
        make("button", { type: "button", text: column.title })));
    }
    for (let i = 0; i < snapshotCount; i++) {
      const snapshot = snapshots[i];
      const box = make("input", {
        type: "checkbox", "data-index": i, "data-name": snapshot.name, disabled: Boolean(snapshot.held),
        "aria-label": snapshot.held ? `${labelOf[i]} is held and cannot be chosen` : `Choose ${labelOf[i]}`, autocomplete: "off",
      });
      const name = make("td", {}, make("span", { class: "name", text: labelOf[i] }));
      if (snapshot.held) name.append(" ", make("span", { class: "lock", role: "img", "aria-label": "held", title: "Held: release it before you can delete it." }));
      if (snapshot.description) name.append(make("span", { class: "description name", text: visible(snapshot.description), title: visible(snapshot.description) }));
      const row = make("tr", { "data-index": i, "data-name": snapshot.name }, make("td", {}, box), name,
        make("td", { class: "date", text: time(snapshot.created_ns) }));
      for (const column of columns.slice(2)) {
        const bytes = bytesOf(column.value(i));
        row.append(make("td", { class: "number", "data-key": column.key, "data-bytes": bytes, title: `${exact(bytes)} bytes`, text: human(bytes) }));
      }
      rowsOfTable.push(row);
    }
    sortTable();
  }

  function sortTable() {
    const column = columns.find((each) => each.key === sortedBy);
    const order = Array.from(snapshots, (_, index) => index);
    const names = new Intl.Collator("en", { numeric: true });
    const compare = sortedBy === "name"
      ? (one, other) => names.compare(snapshots[one].name, snapshots[other].name)
      : (one, other) => column.value(one) - column.value(other);
    order.sort((one, other) => (sortedUp ? 1 : -1) * (compare(one, other) || one - other));
    byId("snapshots").tBodies[0].replaceChildren(...order.map((index) => rowsOfTable[index]));
    for (const head of byId("snapshots").tHead.rows[0].cells) {
      if (head.dataset.key === sortedBy) head.setAttribute("aria-sort", sortedUp ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
  }

  function showTable() {
    for (let i = 0; i < snapshotCount; i++) {
      const row = rowsOfTable[i];
      const box = row.cells[0].firstChild, cell = row.lastChild;
      if (box.checked !== (chosen[i] === 1)) {
        box.checked = chosen[i] === 1;
        row.classList.toggle("chosen", box.checked);
      } else if (row.classList.contains("chosen") !== box.checked) {
        row.classList.toggle("chosen", box.checked);
      }
      const bytes = bytesOf(now.difference[i]);
      const text = snapshots[i].held ? "held" : human(bytes);
      if (Number(cell.dataset.bytes) !== bytes || cell.textContent !== text) {
        cell.dataset.bytes = bytes;
        cell.title = `${exact(bytes)} bytes`;
        cell.textContent = text;
      }
    }
  }

  function filterTable() {
    const wanted = byId("filter").value.trim().toLowerCase();
    let count = 0;
    for (let i = 0; i < snapshotCount; i++) {
      const matches = labelOf[i].toLowerCase().includes(wanted);
      rowsOfTable[i].hidden = !matches;
      count += matches ? 1 : 0;
    }
    byId("filter-count").textContent = wanted ? `${exact(count)} of ${counted(snapshotCount, "snapshot")} shown` : "";
    byId("choose-shown").disabled = !rowsOfTable.some((row) => !row.hidden && !snapshots[row.dataset.index].held);
  }

  function chooseShown() {
    const wanted = chosen.slice();
    for (const row of rowsOfTable) if (!row.hidden) wanted[row.dataset.index] = 1;
    chooseThese(wanted);
  }

  function showLargest() {
    const body = byId("largest").tBodies[0];
    const paths = largest(shown.own.keys(), (path) => shown.own[path], LARGEST_MAX);
    byId("largest-of").textContent = `${paths.length < LARGEST_MAX ? "The" : `The ${LARGEST_MAX}`} files that ${chosenCount ? "the chosen snapshots" : "all snapshots that are not held together"} keep the most of.`;
    body.replaceChildren(...paths.map((path) => {
      const bytes = bytesOf(shown.own[path]);
      const share = make("i", { class: "share" });
      share.style.width = `${Math.max(1, 100 * shown.own[path] / shown.own[paths[0]])}%`;
      const name = make("td", {}, make("span", { class: "name", text: fullPath(path) }));
      if (tree.gone[path]) name.append(make("span", { class: "tag", text: "deleted" }));
      name.append(share);
      return make("tr", { "data-path": path }, name, make("td", { class: "number", "data-bytes": bytes, title: `${exact(bytes)} bytes`, text: human(bytes) }));
    }));
    if (!paths.length) body.append(make("tr", {}, make("td", { colspan: 2, class: "empty", text: "No file is freed." })));
  }

  function showPairs() {
    if (!snapshotCount) return;
    const body = byId("pairs").tBodies[0];
    const withOther = new Float64Array(snapshotCount);
    for (let n = 0; n < pairs.one.length; n++) {
      if (pairs.one[n] === active) withOther[pairs.other[n]] += pairs.blocks[n];
      else if (pairs.other[n] === active) withOther[pairs.one[n]] += pairs.blocks[n];
    }
    const others = largest(withOther.keys(), (index) => withOther[index], PAIRS_MAX);
    byId("pairs-of").replaceChildren("What ", make("strong", { class: "name", text: labelOf[active] }),
      " and exactly one other snapshot hold: freed only if both are deleted.");
    body.replaceChildren(...others.map((other) => {
      const blocks = withOther[other];
      const both = snapshots[active].exclusive + snapshots[other].exclusive + blocks;
      const held = snapshots[active].held || snapshots[other].held;
      return make("tr", { "data-name": snapshots[other].name },
        make("td", {}, make("span", { class: "name", text: labelOf[other] })),
        make("td", { class: "number", "data-bytes": bytesOf(blocks), title: `${exact(bytesOf(blocks))} bytes`, text: human(bytesOf(blocks)) }),
        make("td", { class: "number", title: `${exact(bytesOf(both))} bytes`, text: human(bytesOf(both)) }),
        make("td", {}, make("button", { type: "button", "data-other": other, disabled: Boolean(held), "aria-label": `Choose ${labelOf[active]} and ${labelOf[other]}`, text: held ? "Held" : "Choose both" })));
    }));
    if (!others.length) body.append(make("tr", {}, make("td", { colspan: 4, class: "empty", text: "It shares no block with exactly one other snapshot." })));
  }

  /* ---------------------------------------------------------------- all together */

  function show() {
    now = evaluate(chosen);
    const about = chosenCount ? now : ofAll;
    shown = byPath(about.freed);
    shownBlocks = about.total;
    holders = new Uint8Array(snapshotCount);
    detail("");
    hideTip();
    // These two measure the page. They come first, so that the browser lays it out once.
    showTreemap();
    showCurve();
    showDecision();
    showTimeline();
    showTable();
    showLargest();
  }

  function listen() {
    byId("choose-none").addEventListener("click", chooseNone);
    byId("choose-all").addEventListener("click", chooseAll);
    byId("choose-shown").addEventListener("click", chooseShown);
    byId("copy").addEventListener("click", copyCommand);
    byId("filter").addEventListener("input", filterTable);
    byId("modes").addEventListener("change", (event) => { mode = event.target.value; showTimeline(); });

    timeline.addEventListener("click", (event) => {
      const index = barAt(event);
      if (index === null) return;
      if (event.shiftKey) extend(index); else toggle(index);
      tipOfSnapshot(index, event.clientX, event.clientY);
    });
    timeline.addEventListener("mousedown", (event) => { if (event.shiftKey) { event.preventDefault(); timeline.focus({ preventScroll: true }); } });
    timeline.addEventListener("pointermove", (event) => {
      const index = barAt(event);
      if (index === null) hideTip(); else tipOfSnapshot(index, event.clientX, event.clientY);
    });
    timeline.addEventListener("pointerleave", hideTip);
    timeline.addEventListener("keydown", (event) => { timeline.classList.add("keyed"); keyInTimeline(event); });
    timeline.addEventListener("focus", () => { if (timeline.matches(":focus-visible")) tipOfActive(); });
    timeline.addEventListener("blur", () => { timeline.classList.remove("keyed"); hideTip(); });

    curveBox.addEventListener("click", (event) => chooseOldest(oldestAt(event)));
    curveBox.addEventListener("pointermove", probeCurve);
    curveBox.addEventListener("pointerleave", () => { hideTip(); curveBox.querySelector(".probe")?.setAttribute("visibility", "hidden"); });
    curveBox.addEventListener("keydown", keyInCurve);

    treemap.addEventListener("click", (event) => {
      const element = event.target.closest(".tile[data-tile]");
      // A click made by Enter or Space has detail 0: only then the focus moves to the new tiles.
      if (element) actOnTile(tiles[Number(element.dataset.tile)], event.detail === 0);
    });
    treemap.addEventListener("keydown", keyInTreemap);
    treemap.addEventListener("pointermove", tipOfTile);
    treemap.addEventListener("pointerleave", hideTip);
    byId("crumbs").addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const left = folder;
      openFolder(Number(button.dataset.path), event.detail === 0 ? left : null);
    });

    byId("snapshots").addEventListener("change", (event) => { if (event.target.matches("input")) toggle(Number(event.target.dataset.index)); });
    byId("snapshots").addEventListener("click", (event) => {
      const button = event.target.closest("th > button");
      if (button) {
        const key = button.parentElement.dataset.key;
        sortedUp = sortedBy === key ? !sortedUp : key === "name" || key === "created";
        sortedBy = key;
        sortTable();
        return;
      }
      const row = event.target.closest("tbody tr");
      if (row && !event.target.matches("input")) { active = anchor = Number(row.dataset.index); base = chosen.slice(); showActive(); }
    });
    byId("pairs").addEventListener("click", (event) => {
      const button = event.target.closest("button[data-other]");
      if (!button) return;
      const wanted = chosen.slice();
      wanted[active] = wanted[Number(button.dataset.other)] = 1;
      chooseThese(wanted);
    });

    document.addEventListener("scroll", hideTip, { passive: true });

    let width = innerWidth;
    new ResizeObserver(() => {
      if (innerWidth === width) return;
      width = innerWidth;
      placeTimeline();
      showCurve();
      showTreemap();
    }).observe(document.body);
  }

  function start() {
    showHeader();
    showDisk();
    showTheme();
    byId("theme").addEventListener("click", () => {
      document.documentElement.style.colorScheme = isDark() ? "light" : "dark";
      showTheme();
    });
    prefersDark.addEventListener("change", showTheme);
    byId("foot").textContent = "The numbers are exact for this generation; they do not include what was written since.";
    if (!snapshotCount) {
      byId("nothing").textContent = data.image === undefined
        ? "This page contains no report data." : "There are no snapshots: everything allocated belongs to the live files, so there is nothing to delete.";
      byId("nothing").hidden = false;
      return;
    }
    for (const id of ["decision", "timeline-card", "left", "treemap-card", "snapshots-card", "largest-card"]) byId(id).hidden = false;
    makeTimeline();
    makeTable();
    filterTable();
    show();
    listen();
  }

  start();
})();
