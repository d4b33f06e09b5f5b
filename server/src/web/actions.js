// Log-in, and what a person may do here by access role. Text only ever goes in as text; every change carries the word
// that only this page knows.
"use strict";

(() => {
  const ranks = ["viewer", "technician", "operator", "admin"];
  const by = (id) => document.getElementById(id);
  const said = by("said");
  let session = {};
  let machine = null;

  async function call(method, path, body) {
    const headers = { "content-type": "application/json" };
    if (session.csrf) headers[session.csrf_header] = session.csrf;
    const answer = await fetch(`/api/v1/${path}`, { method, headers, body: body && JSON.stringify(body) });
    const json = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(json.error || `the server answered ${answer.status}`);
    return { json, kept: answer.status === 202 };
  }

  function options(select, values) {
    const before = select.value;
    select.replaceChildren(...values.map((value) => new Option(value, value)));
    if (values.includes(before)) select.value = before;
  }

  const may = (role) => session.role && ranks.indexOf(session.role) >= ranks.indexOf(role);

  // What is shown follows from who is logged in and where the machine stands; the server checks all of it again.
  function arrange() {
    by("who").textContent = session.name ? `${session.name} (${session.role})` : "";
    by("log-in").hidden = Boolean(session.name) || location.protocol !== "https:";
    by("log-out").hidden = !session.csrf;
    by("oidc").hidden = !session.oidc;
    if (!session.name && session.anonymous_reads === false) by("summary").textContent = "Log in to see the machines.";
    const waits = machine && machine.state === "discovered";
    const works = machine && machine.state === "healthy";
    const shown = {
      approve: waits && may("technician"),
      excuse: machine && !waits && !works && machine.state !== "retired" && may("technician"),
      assign: machine && !waits && machine.state !== "retired" && may("operator"),
      clear: machine && !waits && may("operator"),
    };
    for (const [name, show] of Object.entries(shown)) by(name).hidden = !show;
    by("actions").hidden = !Object.values(shown).some(Boolean);
    // Which key is the machine's, its own console says; nothing here is chosen before a person types it.
    const others = (machine && machine.other_keys_note) || "";
    by("other-keys").textContent = others;
    by("other-keys").hidden = by("clear-key-label").hidden = !others;
    if (!others) by("clear-key").value = "";
  }

  async function learn() {
    try {
      session = (await call("GET", "session")).json;
    } catch (error) {
      said.textContent = error.message;
    }
    arrange();
    window.kilnPerson = { call, may, name: () => session.name };
    document.dispatchEvent(new Event("kiln-person"));
    if (may("technician")) {
      options(by("approve-role"), (await call("GET", "roles")).json);
      const releases = (await call("GET", "releases")).json.filter((release) => release.class === "normal");
      options(by("assign-release"), releases.map((release) => `${release.image}/${release.release}`).reverse());
    }
  }

  async function act(method, path, body, done) {
    said.textContent = "…";
    try {
      const { json, kept } = await call(method, `machines/${encodeURIComponent(machine.id)}/${path}`, body);
      said.textContent = kept
        ? `Kept: another person confirms it on the first page, or by kiln pending confirm ${json.pending.id}.`
        : `${json.name}: ${done}`;
    } catch (error) {
      said.textContent = error.message;
    }
  }

  function on(id, run) {
    by(id).addEventListener("submit", (event) => {
      event.preventDefault();
      run();
    });
  }

  on("approve", () => {
    const name = by("approve-name").value.trim();
    const body = { role: by("approve-role").value, code: by("approve-code").value.trim() };
    if (name) body.name = name;
    return act("POST", "approve", body, "approved");
  });
  on("assign", () => {
    const [image, release] = by("assign-release").value.split("/");
    return act("PUT", "assignment", { image, release: Number(release), via: by("assign-via").value }, "assigned");
  });
  on("excuse", () => act("POST", "excuse", { reason: by("excuse-reason").value.trim() }, "excused"));
  on("clear", () => {
    const key = by("clear-key").value.trim();
    by("clear-key").value = "";
    return act("POST", "clear", key ? { key } : {}, key ? "cleared; that key is its own" : "cleared");
  });

  const dialog = by("log-in-dialog");
  by("log-in").addEventListener("click", () => dialog.showModal());
  by("log-in-close").addEventListener("click", () => dialog.close());
  on("log-in-form", async () => {
    const token = by("token");
    try {
      await call("POST", "session", { token: token.value });
      location.reload();
    } catch (error) {
      by("log-in-said").textContent = error.message;
    }
    token.value = "";
  });
  by("log-out").addEventListener("click", async () => {
    try {
      await call("DELETE", "session");
      location.reload();
    } catch (error) {
      said.textContent = error.message;
    }
  });

  // It may have been heard of before this script was there.
  const look = () => {
    machine = window.kilnMachine || null;
    arrange();
  };
  document.addEventListener("kiln-machine", look);
  look();
  learn();
})();
