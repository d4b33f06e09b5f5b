// The rack, live: one event stream, one row a machine. Text only ever goes in as text.
"use strict";

const rows = new Map();
const body = document.querySelector("#machines tbody");
const table = document.getElementById("machines");
const empty = document.getElementById("empty");
const summary = document.getElementById("summary");
const stages = [...document.querySelectorAll("#stages li")].map((li) => li.dataset.stage);
let connected = false;

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

function show(machine) {
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
  cell(row, "name", machine.name, machine.id);
  const drift = machine.condition ? machine.condition.drift : [];
  const differs = drift.length ? `, drift ${machine.condition.drift_count}` : "";
  const why = [machine.reason, ...drift.map((difference) => difference.text)].join("\n");
  cell(row, "state", machine.state + differs, why);
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
  const name = machine.key_storage === "ephemeral" ? "name only, " : "";
  cell(row, "protection", name + (machine.protection || "–"), machine.rollback_memory === "none" ? "no rollback memory" : "");
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

const events = new EventSource("/api/v1/events");
events.addEventListener("hello", (event) => {
  connected = true;
  window.kilnFirstEventMs ??= performance.now();
  const all = JSON.parse(event.data);
  const here = new Set(all.map((machine) => machine.id));
  for (const [id, entry] of rows) {
    if (!here.has(id)) {
      entry.row.remove();
      rows.delete(id);
    }
  }
  all.forEach(show);
  arrange();
});
events.addEventListener("machine", (event) => {
  show(JSON.parse(event.data));
  arrange();
});
events.onerror = () => {
  connected = false;
  arrange();
};
setInterval(() => rows.forEach(({ row, machine }) => cell(row, "seen", ago(machine.last_seen_ms))), 1000);
