// What waits for a second person, and which machines hold which secrets: on the first page, for who is logged in. Text only
// ever goes in as text, and a secret's value never comes here.
"use strict";

(() => {
  const pending = document.getElementById("pending");
  const secrets = document.getElementById("secrets");
  const said = document.getElementById("pending-said");
  let person = null;

  const day = (ms) => `${new Date(ms).toISOString().slice(0, 16).replace("T", " ")} UTC`;
  // A call as it was sent; what a browser would obey in it is spelled out.
  const plain = (text) => text.replace(/[^\x20-\x7e]/gu, (mark) => `\\u{${mark.codePointAt(0).toString(16)}}`);

  // Drawn anew only where it says something else: nobody loses the button they are at.
  function draw(list, rows) {
    const key = JSON.stringify(rows.map((row) => row.key));
    if (list.dataset.drawn === key) return;
    list.dataset.drawn = key;
    list.replaceChildren(...rows.flatMap((row) => row.make()));
  }

  function button(word, label, id) {
    const made = element("button", label, word);
    made.type = "button";
    made.addEventListener("click", async () => {
      said.textContent = "…";
      let words;
      try {
        const { json } = await person.call("POST", `pending/${encodeURIComponent(id)}/${word}`, {});
        const kept = json.pending || json;
        // Whoever confirms a token is the one who gets to see it.
        const token = json.answer && json.answer.text;
        words = `${kept.what}: ${kept.state}${token ? `; the token is shown only now: ${token}` : ""}`;
      } catch (error) {
        words = error.message;
      }
      // What is said is true of what is shown.
      await lookAtPending().catch(() => {});
      said.textContent = words;
    });
    return made;
  }

  function proposal(kept) {
    const row = element("li", "");
    row.dataset.pending = kept.id;
    const call = document.createElement("details");
    call.append(element("summary", "The call, whole"), element("code", plain(`${kept.path} ${kept.body}`)));
    row.append(
      element("p", `${kept.by} asked on ${day(kept.at_ms)}: ${kept.what}`),
      element("p", `It ends on ${day(kept.deadline_ms)}. Who confirms it needs the access role ${kept.least}.`),
      call,
    );
    const own = kept.by === person.name();
    if (!own && person.may(kept.least)) row.append(button("confirm", "Confirm: it is done now", kept.id), " ");
    row.append(button("refuse", own ? "Take back" : "Refuse", kept.id));
    return row;
  }

  async function lookAtPending() {
    const open = (await person.call("GET", "pending")).json.filter((kept) => kept.open);
    draw(pending.querySelector("ul"), open.map((kept) => ({ key: kept.id, make: () => [proposal(kept)] })));
    pending.hidden = !open.length && !said.textContent;
  }

  function line(texts) {
    const row = document.createElement("tr");
    row.append(...texts.map((text, at) => element(at ? "td" : "th", text)));
    row.firstElementChild.scope = "row";
    return row;
  }

  function holders(secret) {
    const all = secret.holding + secret.lacking;
    const lines = secret.machines.map((holder) => {
      const holds = holder.version ? `holds version ${holder.version}` : "does not hold it";
      return element("li", `${holder.machine} ${holds}${holder.why ? `: ${holder.why}` : ""}`);
    });
    if (all > secret.machines.length) lines.push(element("li", `and ${all - secret.machines.length} more`));
    const part = document.createElement("details");
    const list = document.createElement("ul");
    list.append(...lines);
    part.append(element("summary", `${secret.holding} of ${all} machines hold it`), list);
    return part;
  }

  function secretRow(secret) {
    const whom = secret.role ? `role ${secret.role}` : `machine ${secret.machine}`;
    const row = line([secret.name, String(secret.version), whom, `${day(secret.set_ms)} by ${secret.by}`]);
    const held = document.createElement("td");
    held.append(holders(secret));
    row.append(held);
    return row;
  }

  async function lookAtSecrets() {
    const all = (await person.call("GET", "secrets")).json;
    draw(secrets.querySelector("tbody"), all.map((secret) => ({ key: secret, make: () => [secretRow(secret)] })));
    secrets.hidden = !all.length;
  }

  // As long as the page is looked at; a server that is away is said by the summary.
  async function watch(look, pause) {
    if (!document.hidden) await look().catch(() => {});
    setTimeout(watch, pause, look, pause);
  }

  function begin() {
    if (person || only || !window.kilnPerson) return;
    person = window.kilnPerson;
    if (person.may("technician")) watch(lookAtPending, 5000);
    if (person.may("operator")) watch(lookAtSecrets, 60000);
  }
  document.addEventListener("kiln-person", begin);
  begin();
})();
