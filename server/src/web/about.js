// On the page of one machine: what no event carries. The certificate that it was issued, and what machines of its hardware class
// have shown. Text only ever goes in as text.
"use strict";

(() => {
  const by = (id) => document.getElementById(id);
  const until = (ms) => `${new Date(ms).toISOString().slice(0, 16).replace("T", " ")} UTC`;
  // It may have come before this file.
  let machine = window.kilnMachine || null;
  let looks = false;
  let again = false;

  function showCertificate(certificate) {
    const words = by("certificate").querySelector("p");
    words.className = certificate && certificate.revoked ? "failed" : "";
    words.title = certificate ? `serial ${certificate.serial}` : "";
    words.textContent = certificate
      ? [
        `Serial ${certificate.serial.slice(0, 16)}…, until ${until(certificate.expires_ms)}`,
        certificate.revoked && `revoked: ${certificate.revoked}`,
      ].filter(Boolean).join("; ")
      : "None, or none that is not over.";
    by("certificate").hidden = false;
  }

  const way = (shown) => (shown ? "came up" : "not yet");

  function showClass(name, classes) {
    const known = classes.find((one) => `${one.model}, firmware ${one.firmware}` === name);
    by("class").querySelector("p").textContent = name
      ? [name, known && `${known.machines} in service`].filter(Boolean).join("; ")
      : "Not known: no inventory came that names its model and firmware.";
    by("class").querySelector("ul").replaceChildren(...(known ? known.releases : []).map((shown) => {
      const line = document.createElement("li");
      line.className = shown.kexec_failed ? "failed" : "";
      const kexec = shown.kexec_failed ? "failed" : way(shown.kexec);
      line.textContent = `${shown.image}/${shown.release}: cold ${way(shown.cold)}, kexec ${kexec}`;
      return line;
    }));
    by("class").hidden = false;
  }

  // One look at a time, and a pause behind each: a machine that changes every second costs the server no more than this.
  async function look() {
    if (!machine) return;
    if (looks) {
      again = true;
      return;
    }
    looks = true;
    try {
      const paths = [`/api/v1/machines/${encodeURIComponent(machine.id)}`, "/api/v1/classes"];
      const answers = await Promise.all(paths.map((path) => fetch(path)));
      if (answers.every((answer) => answer.ok)) {
        const [one, classes] = await Promise.all(answers.map((answer) => answer.json()));
        showCertificate(one.certificate);
        showClass(one.class, classes);
      }
    } catch { /* the server is away, which the summary says */ }
    setTimeout(() => {
      looks = false;
      if (again) {
        again = false;
        look();
      }
    }, 2000);
  }

  document.addEventListener("kiln-machine", () => {
    machine = window.kilnMachine;
    look();
  });
  look();
  // What other machines of its class show meanwhile.
  setInterval(look, 30000);
})();
