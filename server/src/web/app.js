// The rack, live: one event stream, one row a machine. Text only ever goes in as text.
"use strict";

const rows = new Map();
const body = document.querySelector("#machines tbody");
const table = document.getElementById("machines");
const empty = document.getElementById("empty");
const summary = document.getElementById("summary");
const stages = [...document.querySelectorAll("#stages li")].map((li) => li.dataset.stage);
const labels = new Map([...document.querySelectorAll("#stages li")].map((li) => [li.dataset.stage, li.textContent]));
let connected = false;
// On /m/MACHINE: the one machine, and its boots.
const only = location.pathname.startsWith("/m/") ? decodeURIComponent(location.pathname.slice(3)) : null;
const boots = document.getElementById("boots");

function ago(ms) {
  if (!ms) return "never";
  const s = Math.max(0, Math.round((Date.now() - ms) / 1000));
  if (s < 120) return `${s} s ago`;
  if (s < 7200) return `${Math.floor(s / 60)} min ago`;
  return s < 172800 ? `${Math.floor(s / 3600)} h ago` : `${Math.floor(s / 86400)} d ago`;
}

const release = (r) => (r && r.image ? `${r.image}/${r.release}` : "–");

function cell(row, name, text, title) {
  let td = row.querySelector(`[data-cell="${name}"]`);
  if (!td) {
    td = document.createElement(name === "name" ? "th" : "td");
    if (name === "name") td.scope = "row";
    td.dataset.cell = name;
    row.append(td);
  }
  if (td.textContent !== text) td.textContent = text;
  td.title = title || "";
  return td;
}

const clock = (ms) => new Date(ms).toISOString().slice(11, 23);
const is = (machine) => !only || machine.name === only || machine.id === only;
// The lines of each boot shown, and how many stages are between them.
const traces = new Map();

function element(name, text, kind) {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function arrangeTrace(trace) {
  const stages = trace.boot.stages.map((s) => ({
    at_ms: s.at_ms, source: "stage", level: s.state === "failed" ? 3 : 6,
    text: [labels.get(s.stage), s.state, s.kind && `[${s.kind}]`, s.message].filter(Boolean).join(" "),
  }));
  const rows = [...trace.entries, ...stages].sort((a, b) => a.at_ms - b.at_ms);
  trace.lines.replaceChildren(...rows.map((line) => {
    const row = element("li", "", `${line.source}${line.level < 5 ? " bad" : ""}`);
    row.append(element("time", clock(line.at_ms)), element("b", line.source), element("span", line.text));
    return row;
  }));
}

// Reads on until the page goes: the server answers as soon as there is a line.
async function follow(machine, trace) {
  for (;;) {
    const last = trace.entries.at(-1);
    const query = new URLSearchParams({ boot: trace.boot.boot_id });
    if (last) query.set("after", last.number);
    if (trace.read) query.set("wait", true);
    let more = null;
    try {
      const answer = await fetch(`/api/v1/machines/${machine.id}/log?${query}`);
      if (answer.status === 404) return;
      if (answer.ok) more = (await answer.json()).entries;
    } catch { /* the server is away: asked again below */ }
    if (more) trace.read = more.length === 0 || trace.read;
    if (more && more.length) {
      trace.entries.push(...more);
      arrangeTrace(trace);
    }
    const newest = [...traces.keys()].at(-1);
    if (trace.read && trace.boot.boot_id !== newest) return;
    if (!more) await new Promise((wake) => setTimeout(wake, 2000));
  }
}

// What the list of expected machines says of this one.
function showComparison(comparison) {
  const part = document.getElementById("expected");
  part.hidden = !comparison;
  if (!comparison) return;
  const place = (at) => [at && at.rack && `rack ${at.rack}`, at && at.unit].filter(Boolean).join(" ");
  const words = [
    comparison.entry ? `Is ${comparison.entry} of the list of expected machines` : "Is on no list",
    place(comparison.expected) && `belongs to ${place(comparison.expected)}`,
    place(comparison.found) && `is at ${place(comparison.found)}`,
  ];
  const end = comparison.differences.length ? ":" : ", and is as expected.";
  part.querySelector("p").textContent = words.filter(Boolean).join(", ") + end;
  part.querySelector("ul").replaceChildren(...comparison.differences.map((text) => element("li", text)));
}

// What the acceptance run found, part by part.
function showAcceptance(machine) {
  const part = document.getElementById("acceptance");
  const run = machine.acceptance;
  part.hidden = !run && !machine.awaits_acceptance;
  const state = run && (run.run.done ? (run.failures.length ? "failed" : "passed") : "running");
  part.querySelector("p").textContent = run
    ? [`The run on ${release(run.release)} is ${state}`, run.run.doing, ...run.failures].filter(Boolean).join("; ")
    : "Its role holds it until it passed an acceptance run, which an operator orders.";
  const results = run ? run.run.results : [];
  part.querySelector("ul").replaceChildren(
    ...results.map((found) => element("li", `${found.part} ${found.outcome}: ${found.detail}`, found.outcome)),
  );
}

function showBoots(machine) {
  document.title = `${machine.name} – Kiln`;
  const code = document.getElementById("code");
  code.hidden = !machine.code;
  code.lastElementChild.textContent = machine.code || "";
  showComparison(machine.comparison);
  showAcceptance(machine);
  const held = Object.entries(machine.secrets || {}).map(([name, version]) => `${name} (version ${version})`);
  const secrets = document.getElementById("held");
  secrets.hidden = !held.length;
  secrets.textContent = `Holds the secrets ${held.join(", ")}, by its own word.`;
  boots.hidden = false;
  for (const boot of machine.boots) {
    if (!boot.boot_id) continue;
    let trace = traces.get(boot.boot_id);
    if (!trace) {
      trace = { boot, entries: [], read: false, part: document.createElement("details"), lines: document.createElement("ol") };
      trace.part.append(element("summary", `Boot of ${release(boot)} by ${boot.via} at ${clock(boot.started_ms)}`), trace.lines);
      trace.part.dataset.boot = boot.boot_id;
      trace.part.addEventListener("toggle", () => {
        if (trace.part.open && !trace.follows) {
          trace.follows = true;
          follow(machine, trace);
        }
      });
      for (const older of traces.values()) older.part.open = false;
      traces.set(boot.boot_id, trace);
      boots.querySelector("h2").after(trace.part);
    }
    trace.boot = boot;
    arrangeTrace(trace);
  }
  const newest = [...traces.values()].at(-1);
  if (newest && !newest.shown) newest.shown = newest.part.open = true;
}

function show(machine) {
  if (!is(machine) && !rows.has(machine.id)) return;
  if (only) {
    showBoots(machine);
    window.kilnMachine = machine;
    document.dispatchEvent(new Event("kiln-machine"));
  }
  let entry = rows.get(machine.id);
  if (!entry) {
    entry = { row: document.createElement("tr") };
    rows.set(machine.id, entry);
  }
  entry.machine = machine;
  const { row } = entry;
  row.dataset.machine = machine.name;
  row.dataset.state = machine.state;
  row.dataset.stage = machine.stage || "";
  const name = cell(row, "name", machine.name, machine.id);
  if (!name.querySelector("a") || name.dataset.linked !== machine.name) {
    const link = element("a", machine.name);
    link.href = `/m/${encodeURIComponent(machine.name)}`;
    name.replaceChildren(link);
    name.dataset.linked = machine.name;
  }
  const drift = machine.condition ? machine.condition.drift : [];
  const differs = drift.length ? `, drift ${machine.condition.drift_count}` : "";
  const other = machine.comparison ? machine.comparison.differences : [];
  const listed = other.length ? `, not as expected ${other.length}` : "";
  const expired = machine.stale ? `${machine.stale.file} expired at ${machine.stale.expires}` : "";
  const stale = expired ? ", stale" : "";
  const why = [machine.reason, expired, ...other, ...drift.map((difference) => difference.text)].filter(Boolean).join("\n");
  cell(row, "state", machine.state + stale + differs + listed, why);
  row.dataset.drift = drift.length ? "yes" : "no";
  const stage = cell(row, "stage", machine.stage_label || "–");
  const at = stages.indexOf(machine.stage);
  const bar = document.createElement("progress");
  bar.max = stages.indexOf("healthy") + 1;
  bar.value = Math.min(at + 1, bar.max);
  bar.setAttribute("aria-label", "stage");
  if (at >= 0) stage.append(" ", bar);
  cell(row, "release", release(machine), machine.root_hash ? `root hash ${machine.root_hash}` : "");
  const way = machine.prefetch && !machine.prefetch.ready && machine.prefetch.progress;
  const fetched = way ? `, ${Math.floor((100 * way.received_bytes) / Math.max(1, way.total_bytes))} % fetched` : "";
  cell(row, "assigned", release(machine.assigned) + fetched);
  const weak = machine.key_storage !== "ephemeral" ? "" : machine.position ? "position, " : "name only, ";
  const proof = machine.attestation;
  const memory = machine.rollback_memory === "none" ? "no rollback memory" : "";
  const verdict = proof ? `${proof.state}: ${proof.reason}` : "";
  const key = machine.key_storage === "efi-variable" ? "key in an EFI variable (weak)" : "";
  cell(row, "protection", weak + (machine.protection_words || "–"), [verdict, key, memory].filter(Boolean).join("; "));
  cell(row, "words", machine.last_words || machine.reason || "");
  cell(row, "seen", ago(machine.last_seen_ms));
}

function arrange() {
  const sorted = [...rows.values()].sort((a, b) => a.machine.name.localeCompare(b.machine.name, undefined, { numeric: true }));
  sorted.forEach((entry, index) => {
    if (body.children[index] !== entry.row) body.insertBefore(entry.row, body.children[index] || null);
  });
  table.hidden = rows.size === 0;
  empty.hidden = rows.size !== 0;
  const healthy = sorted.filter((entry) => entry.machine.state === "healthy").length;
  summary.textContent = connected ? `${healthy} of ${rows.size} machines healthy` : "Connection lost; trying again …";
  summary.dataset.connected = connected;
}

function forget(id) {
  rows.get(id)?.row.remove();
  rows.delete(id);
}

const events = new EventSource("/api/v1/events");
events.addEventListener("hello", (event) => {
  connected = true;
  window.kilnFirstEventMs ??= performance.now();
  const all = JSON.parse(event.data);
  const here = new Set(all.map((machine) => machine.id));
  [...rows.keys()].filter((id) => !here.has(id)).forEach(forget);
  all.forEach(show);
  arrange();
});
events.addEventListener("machine", (event) => {
  show(JSON.parse(event.data));
  arrange();
});
// It was another by its firmware's words, or one that nobody knew and that was silent for longest.
events.addEventListener("gone", (event) => {
  forget(JSON.parse(event.data).id);
  arrange();
});
events.onerror = () => {
  connected = false;
  arrange();
};
setInterval(() => rows.forEach(({ row, machine }) => cell(row, "seen", ago(machine.last_seen_ms))), 1000);

// What a person should know of the site itself: ends of signed metadata, and firmware without the revocation list.
async function warn() {
  const list = document.getElementById("warnings");
  try {
    const answer = await fetch("/api/v1/status");
    if (answer.ok) {
      const { expiries, dbx } = await answer.json();
      const lines = expiries.map((expiry) => expiry.warning).filter(Boolean);
      const lacking = dbx ? dbx.lacking : [];
      if (lacking.length) {
        const names = lacking.slice(0, 8).map((machine) => `${machine.machine} (${machine.why})`).join("; ");
        lines.push(`${lacking.length} machines lack the list of revoked boot programs: ${names}`);
      }
      list.replaceChildren(...lines.map((line) => element("li", line)));
      list.hidden = !lines.length;
    }
  } catch { /* the server is away, which the summary says */ }
  setTimeout(warn, 60000);
}
warn();
