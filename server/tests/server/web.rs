//! The web page in a real browser: headless Chromium, driven by WebDriver, against a running `kiln serve` and a machine
//! that proves its key.

use crate::common::chip::{Chip, boots, report};
use crate::common::*;
use crate::hostile::{evil, harmless};
use fantoccini::{Client, ClientBuilder, Locator};
use kiln_protocol::tpm::command::pcr_extend;
use kiln_protocol::{
    Acceptance, AttestationState, Condition, Difference, DriftKind, Failure, Health, INTRODUCTION_PATH, Introduction,
    LOG_PATH, LogBatch, LogLine, LogSource, Outcome, ProtectionClass, Report, Stage, StageRecord, StageState, Stale,
    TestKind, TestResult, TpmPresence, commitment,
};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Chromium's driver on a port of its own choice; ended with the test.
pub struct Driver {
    process: Child,
    url: String,
    _profile: tempfile::TempDir,
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The browser is in the driver's process group: a failed test must not leave it behind.
        let group = format!("-{}", self.process.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
        let _ = self.process.wait();
    }
}

pub async fn browser() -> Option<(Driver, Client)> {
    let spawned = Command::new("chromedriver").arg("--port=0").stdout(Stdio::piped()).process_group(0).spawn();
    let Ok(mut process) = spawned else {
        oracle::skipped("chromedriver is not installed (Debian's chromium-driver); `make setup` installs it");
        return None;
    };
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let port = lines
        .find_map(|line| Some(line.ok()?.strip_suffix('.')?.rsplit_once("started successfully on port ")?.1.to_owned()))
        .expect("chromedriver says its port");
    // Read on, so that it never blocks on a full pipe.
    std::thread::spawn(move || lines.for_each(drop));
    let profile = tempfile::tempdir().unwrap();
    let arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        &format!("--user-data-dir={}", profile.path().display()),
    ];
    let driver = Driver { process, url: format!("http://127.0.0.1:{port}"), _profile: profile };
    let capabilities = json!({ "acceptInsecureCerts": true, "goog:chromeOptions": { "args": arguments },
                "goog:loggingPrefs": { "browser": "ALL" } });
    let capabilities = capabilities.as_object().unwrap().clone();
    let client = ClientBuilder::new(hyper_util::client::legacy::connect::HttpConnector::new())
        .capabilities(capabilities)
        .connect(&driver.url)
        .await
        .unwrap();
    Some((driver, client))
}

/// The text of one cell of one machine's row, once it satisfies `wanted`.
async fn cell(page: &Client, machine: &str, name: &str, wanted: impl Fn(&str) -> bool) -> String {
    let css = format!("tr[data-machine=\"{machine}\"] [data-cell=\"{name}\"]");
    let begun = std::time::Instant::now();
    loop {
        // A row may be rewritten between finding and reading: it is looked for again.
        if let Ok(element) = page.wait().at_most(PATIENCE).for_element(Locator::Css(&css)).await
            && let Ok(text) = element.text().await
            && wanted(&text)
        {
            return text;
        }
        assert!(begun.elapsed() < PATIENCE, "{css} never became what it should");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_rack_is_live_in_a_browser() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let first = agent.report();
    agent.send(&server, &first).await;
    let Some((driver, page)) = browser().await else { return };
    page.goto(&format!("http://{}/", server.http)).await.unwrap();

    cell(&page, "rack-1", "state", |text| text == "booting").await;
    // Measured in the page, from its own start to the first event.
    let first_event = page.execute("return window.kilnFirstEventMs", vec![]).await.unwrap();
    assert!(first_event.as_f64().is_some_and(|ms| ms > 0.0), "{first_event}");
    println!("first event {first_event} ms after the page's start");

    // What the machine says is on the page without a reload, and as text only.
    let mut healthy = agent.healthy();
    let (stage, state) = (Stage::Healthy, StageState::Done);
    healthy.stages.push(StageRecord { stage, state, at_ms: healthy.at_ms });
    agent.send(&server, &healthy).await;
    cell(&page, "rack-1", "state", |text| text == "healthy").await;
    assert_eq!(cell(&page, "rack-1", "release", |text| !text.is_empty()).await, "minimal/1");
    let stage = cell(&page, "rack-1", "stage", |text| text.starts_with(Stage::Healthy.label())).await;
    assert_eq!(stage.trim(), Stage::Healthy.label());
    let summary = page.find(Locator::Id("summary")).await.unwrap().text().await.unwrap();
    assert_eq!(summary, "1 of 1 machines healthy");

    // The stages of the page are the stage enum, in order.
    let labels = page.execute("return [...document.querySelectorAll('#stages li')].map((l) => l.textContent)", vec![]);
    let expected: Vec<&str> = Stage::ALL.iter().map(|s| s.label()).collect();
    assert_eq!(labels.await.unwrap(), json!(expected));

    // A boot that proved nothing, and a machine that has nothing to prove with, are told apart.
    let mut other = Agent::new(2, &site.manifest(1));
    let mut report = other.report();
    report.machine.tpm = Some(TpmPresence::Absent);
    other.send(&server, &report).await;
    cell(&page, "rack-1", "protection", |text| text == "unprotected, unattested").await;
    cell(&page, "rack-2", "protection", |text| text == "unprotected, no-tpm").await;

    // One that is forgotten goes from the page: `crowd` shows when the server says so.
    let gone = "events.dispatchEvent(new MessageEvent('gone', { data: JSON.stringify({ id: arguments[0] }) })); \
                return document.querySelectorAll('tr[data-machine]').length";
    let left = page.execute(gone, vec![json!(other.report().machine.id)]).await.unwrap();
    assert_eq!(left, json!(1));

    // Expired metadata is said beside the state.
    let stale = Stale { file: "targets.json".into(), expires: "2026-01-01T00:00:00Z".parse().unwrap() };
    let report = Report { stale: Some(stale), ..agent.healthy() };
    agent.send(&server, &report).await;
    cell(&page, "rack-1", "state", |text| text == "healthy, stale").await;

    // The page of one machine: its newest boot, the kernel's lines and the stages in order, as text only.
    let line = |at_us, text: &str| LogLine { source: LogSource::Kernel, level: 6, at_us, text: text.to_owned() };
    let lines = vec![line(0, "Linux version 6.12"), line(9_000_000, "<b>late</b>")];
    let (boot_id, machine) = (first.boot_id.clone(), first.machine.id.clone());
    let batch = LogBatch { boot_id, machine, first: 0, at_us: 9_000_000, lines };
    let body = serde_json::to_vec(&batch).unwrap();
    let answer = server.post_to(LOG_PATH, server.tls(Some(agent.identity())), body).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    page.find(Locator::Css("tr[data-machine=rack-1] [data-cell=name] a")).await.unwrap().click().await.unwrap();
    let last = page.wait().at_most(PATIENCE).for_element(Locator::Css("#boots li.kernel")).await;
    last.unwrap();
    let text = "return [...document.querySelectorAll('#boots li span')].map((s) => s.textContent).join('\\n')";
    let text = page.execute(text, vec![]).await.unwrap();
    let text = text.as_str().unwrap();
    let at = |words: &str| text.find(words).unwrap_or_else(|| panic!("{words} is not in\n{text}"));
    assert!(at("Linux version 6.12") < at("<b>late</b>"), "{text}");
    at(&format!("{} done", Stage::Start.label()));
    assert_eq!(page.title().await.unwrap(), "rack-1 – Kiln");

    // Nothing came from another host, and the browser had nothing to complain of (its policy would).
    let fetched = "return performance.getEntriesByType('resource').map((r) => new URL(r.name).host)";
    let hosts = page.execute(fetched, vec![]).await.unwrap();
    let own = server.http.to_string();
    assert!(hosts.as_array().unwrap().iter().all(|host| *host == json!(own)), "{hosts}");

    // A server that goes away is said, one that comes back is found.
    server.signal("-TERM");
    let lost = "#summary[data-connected=\"false\"]";
    page.wait().at_most(PATIENCE).for_element(Locator::Css(lost)).await.unwrap();
    page.close().await.unwrap();
    drop(driver);
}

/// How a boot stands, in each of its four states, is told apart on the page, and in the words for the machine's own screen.
#[tokio::test]
async fn what_each_boot_can_promise_is_told_apart_in_a_browser_and_on_the_machines_screen() {
    let Some(mut chip) = Chip::new() else { return };
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let (mut agent, mut bare) = (Agent::new(1, &site.manifest(1)), Agent::new(2, &site.manifest(1)));
    report(&server, &mut agent, TpmPresence::Ready).await;
    let mut enforced = bare.report();
    (enforced.machine.tpm, enforced.machine.protection) = (Some(TpmPresence::Absent), ProtectionClass::Enforced);
    let screen = |reply: kiln_protocol::Reply| reply.about.unwrap().protection;
    assert_eq!(screen(bare.send(&server, &enforced).await), "enforced, no-tpm");
    let Some((driver, page)) = browser().await else { return };
    page.goto(&format!("http://{}/", server.http)).await.unwrap();
    cell(&page, "rack-1", "protection", |text| text == "unprotected, unattested").await;
    cell(&page, "rack-2", "protection", |text| text == "enforced, no-tpm").await;

    chip.boot(1, b"firmware", 1);
    agent.restart(&site.manifest(1));
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Attested, "{judged:?}");
    cell(&page, "rack-1", "protection", |text| text == "attested").await;
    assert_eq!(screen(report(&server, &mut agent, TpmPresence::Ready).await), "attested");

    // Something else was started before the next kernel.
    chip.run(&pcr_extend(11, &[7; 32]));
    agent.restart(&site.manifest(1));
    let judged = boots(&server, &mut agent, &mut chip).await;
    assert_eq!(judged.state, AttestationState::Failed, "{judged:?}");
    cell(&page, "rack-1", "protection", |text| text == "unprotected, attestation failed").await;
    let title = "return document.querySelector('tr[data-machine=\"rack-1\"] [data-cell=\"protection\"]').title";
    let title = page.execute(title, vec![]).await.unwrap();
    assert!(title.as_str().unwrap().starts_with("failed: ") && title.as_str().unwrap().contains("PCR 11"), "{title}");
    assert_eq!(screen(report(&server, &mut agent, TpmPresence::Ready).await), "unprotected, attestation failed");
    page.close().await.unwrap();
    drop(driver);
}

/// What the page of one machine shows, as text, and what has become of it in the document.
const SHOWN: &str = "const all = (css) => [...document.querySelectorAll(css)];
    return {
        trace: all('#boots li span').map((s) => s.textContent),
        drift: document.querySelector('[data-cell=state]').title,
        made: all('[onclick], #boots li span *, [data-cell=words] *, [data-cell=state] *').length,
        scripts: all('script').filter((script) => !script.src).length,
        text: all('[title]').map((titled) => titled.title).join('\\n') + document.body.textContent,
    };";

/// Escapes, marks that turn text round, and elements: in a failure, in what is not healthy, in drift and in a line of the log.
#[tokio::test]
async fn what_a_hostile_machine_says_is_text_and_no_part_of_the_page() {
    let site = TestSite::new();
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let failed = Failure { kind: "k".into(), message: evil(), attempt: 1, retry_in_ms: None };
    let drift = vec![Difference { kind: DriftKind::User, what: evil(), text: evil() }];
    let mut report = agent.healthy();
    report.stages.push(StageRecord { stage: Stage::Network, state: StageState::Failed(failed), at_ms: 2 });
    report.health = Some(Health { healthy: false, detail: evil() });
    report.condition = Some(Condition { drift, drift_count: 1, ..Condition::default() });
    agent.send(&server, &report).await;
    let line = LogLine { source: LogSource::Kernel, level: 3, at_us: 1, text: evil() };
    let (boot_id, machine) = (report.boot_id.clone(), report.machine.id.clone());
    let batch = LogBatch { boot_id, machine, first: 0, at_us: 9, lines: vec![line] };
    let body = serde_json::to_vec(&batch).unwrap();
    let answer = server.post_to(LOG_PATH, server.tls(Some(agent.identity())), body).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());

    let Some((driver, page)) = browser().await else { return };
    page.goto(&format!("http://{}/m/rack-1", server.http)).await.unwrap();
    let element = "</script><b onclick=x>";
    let health = cell(&page, "rack-1", "words", |text| text.contains(element)).await;
    harmless("what is not healthy", &health);
    page.wait().at_most(PATIENCE).for_element(Locator::Css("#boots li.kernel")).await.unwrap();
    let shown = page.execute(SHOWN, vec![]).await.unwrap();
    let trace: Vec<&str> = shown["trace"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    let with_element = |start: &str| trace.iter().any(|text| text.contains(start) && text.contains(element));
    assert!(with_element(&format!("{} failed [k]", Stage::Network.label())), "the failure: {trace:?}");
    assert!(with_element("\\u{1b}[2J"), "the log's line, its escape made visible: {trace:?}");
    assert!(shown["drift"].as_str().unwrap().contains(element), "{shown}");
    assert_eq!((&shown["made"], &shown["scripts"]), (&json!(0), &json!(0)), "text has become elements: {shown}");
    harmless("the page", shown["text"].as_str().unwrap());
    page.close().await.unwrap();
    drop(driver);
}

/// Why new hardware is held, and which part of it failed, on the page of the machine; what parts call themselves is text only.
#[tokio::test]
async fn a_failed_acceptance_run_names_the_part_in_a_browser() {
    let site = TestSite::new();
    let path = site.path().join("kiln.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    let required = "image = \"minimal\"\nacceptance = \"required\"\n";
    std::fs::write(&path, config.replacen("image = \"minimal\"\n", required, 1)).unwrap();
    let tests = site.publish_as(2, |manifest| manifest.class = "acceptance".into());
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.report();
    let reply = agent.send(&server, &report).await;
    assert!(waits(&reply).contains("wants a passed acceptance run first"), "{}", waits(&reply));
    let Some((driver, page)) = browser().await else { return };
    page.goto(&format!("http://{}/m/{}", server.http, machine_id(1))).await.unwrap();
    text_of(&page, "acceptance", |text| text.contains("Its role holds it until it passed an acceptance run")).await;

    let ordered = site.kiln(&["assign", "rack-1", "minimal/2", "--order-key", "offline/operator.key", "--site", "."]);
    assert!(ordered.0, "{ordered:?}");
    agent.restart(&tests);
    let part = |test, part: &str, outcome, detail: &str| TestResult {
        test,
        part: part.into(),
        outcome,
        detail: detail.into(),
        measures: BTreeMap::new(),
    };
    let mut run = Acceptance {
        done: false,
        doing: "tests disks, at most 900 s".into(),
        results: vec![
            part(TestKind::Memory, "memory", Outcome::Passed, "800 MiB twice"),
            part(TestKind::Cpu, "CPUs", Outcome::Passed, "2 under load"),
            part(TestKind::Network, "eth0", Outcome::Passed, "11 MiB/s"),
        ],
    };
    let report = Report { acceptance: Some(run.clone()), ..agent.healthy() };
    agent.send(&server, &report).await;
    text_of(&page, "acceptance", |text| text.contains("minimal/2 is running; tests disks, at most 900 s")).await;
    run.done = true;
    run.doing.clear();
    run.results.push(part(TestKind::Disk, "disk vda (<b>loud</b>)", Outcome::Failed, "reading at byte 0: EIO"));
    let report = Report { acceptance: Some(run), ..agent.healthy() };
    agent.send(&server, &report).await;
    let text = text_of(&page, "acceptance", |text| text.contains("minimal/2 is failed")).await;
    assert!(text.contains("is failed; disk vda (<b>loud</b>): reading at byte 0: EIO"), "{text}");
    // Read in one step: what else becomes of the machine writes the list anew.
    let failed = "return [...document.querySelectorAll('#acceptance li.failed')].map((li) => li.textContent)";
    let failed = page.execute(failed, vec![]).await.unwrap();
    assert_eq!(failed, json!(["disk vda (<b>loud</b>) failed: reading at byte 0: EIO"]), "{text}");
    assert_eq!(page.find_all(Locator::Css("#acceptance li.passed")).await.unwrap().len(), 3, "{text}");
    page.close().await.unwrap();
    drop(driver);
}

/// Enter, as a keyboard gives it to WebDriver.
const ENTER: &str = "\u{e007}";

/// The text of an element, once it satisfies `wanted`.
pub async fn text_of(page: &Client, id: &str, wanted: impl Fn(&str) -> bool) -> String {
    let begun = std::time::Instant::now();
    loop {
        if let Ok(element) = page.find(Locator::Id(id)).await
            && let Ok(text) = element.text().await
        {
            if wanted(&text) {
                return text;
            }
            assert!(begun.elapsed() < PATIENCE, "{id} says {text:?}");
        }
        assert!(begun.elapsed() < PATIENCE, "there is no {id}");
        tokio::task::yield_now().await;
    }
}

/// Waits until there is such an element, shown or not.
async fn is_there(page: &Client, css: &str) {
    page.wait().at_most(PATIENCE).for_element(Locator::Css(css)).await.unwrap();
}

/// Types into what is shown under this id.
async fn keys(page: &Client, id: &str, text: &str) {
    let css = format!("#{id}");
    let begun = std::time::Instant::now();
    loop {
        let element = page.wait().at_most(PATIENCE).for_element(Locator::Css(&css)).await.unwrap();
        // It is shown once the page has heard of the machine and of who looks at it.
        match element.send_keys(text).await {
            Ok(()) => return,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{id}: {error}"),
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_person_logs_in_and_acts_with_the_keyboard_alone() {
    let site = TestSite::new();
    site.configure("[https]\nlisten = \"127.0.0.1:0\"");
    let server = Server::start(&site).await;
    let token = server.token("ann", "operator").await;
    let mut agent = Agent::new(9, &site.manifest(1));
    let report = agent.report();
    agent.send(&server, &report).await;
    let nonce: kiln_protocol::Nonce = "ab".repeat(32).parse().unwrap();
    let commit = Introduction::Commit { machine: machine_id(9), commitment: commitment(&nonce) };
    for step in [commit, Introduction::Reveal { machine: machine_id(9), nonce }] {
        let body = serde_json::to_vec(&step).unwrap();
        let answer = server.post_to(INTRODUCTION_PATH, server.tls(Some(agent.identity())), body).await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let code = server.machine(machine_id(9).as_str()).await.code.unwrap().to_string();
    let Some((driver, page)) = browser().await else { return };
    let url = format!("https://{}/m/{}", server.https.unwrap(), machine_id(9));
    page.goto(&url).await.unwrap();
    text_of(&page, "code", |text| text.contains(&code)).await;
    let actions = page.find(Locator::Id("actions")).await.unwrap();
    assert!(!actions.is_displayed().await.unwrap(), "nobody is logged in");

    keys(&page, "log-in", ENTER).await;
    keys(&page, "token", "kiln_wrong").await;
    keys(&page, "token", ENTER).await;
    text_of(&page, "log-in-said", |text| text.contains("no token of this site")).await;
    keys(&page, "token", &token).await;
    keys(&page, "token", ENTER).await;
    text_of(&page, "who", |text| text == "token ann (operator)").await;

    // The form is there before what can be chosen in it.
    is_there(&page, "#approve-role option").await;
    keys(&page, "approve-name", "found").await;
    keys(&page, "approve-code", "ABCD-EFGH").await;
    keys(&page, "approve-code", ENTER).await;
    text_of(&page, "said", |text| text.contains("not the code")).await;
    page.find(Locator::Id("approve-code")).await.unwrap().clear().await.unwrap();
    keys(&page, "approve-code", &code).await;
    keys(&page, "approve-code", ENTER).await;
    text_of(&page, "said", |text| text == "found: approved").await;
    assert_eq!(server.machine("found").await.role.as_deref(), Some("lab"));

    is_there(&page, "#assign-release option").await;
    keys(&page, "assign-via", "cold").await;
    let assign = page.wait().at_most(PATIENCE).for_element(Locator::Css("#assign button")).await.unwrap();
    assign.send_keys(ENTER).await.unwrap();
    text_of(&page, "said", |text| text == "found: assigned").await;
    keys(&page, "excuse-reason", "disk ordered").await;
    keys(&page, "excuse-reason", ENTER).await;
    text_of(&page, "said", |text| text == "found: excused").await;
    assert!(server.machine("found").await.reason.contains("disk ordered"));
    let clear = page.find(Locator::Css("#clear button")).await.unwrap();
    clear.send_keys(ENTER).await.unwrap();
    text_of(&page, "said", |text| text == "found: cleared").await;
    let audit = server.audit().await;
    let did = |what: &str| audit.iter().any(|r| r.actor == "token ann" && r.what.contains(what) && r.result == "done");
    assert!(
        did("its code was compared") && did("via cold") && did("excused: disk ordered") && did("cleared"),
        "{audit:?}"
    );

    // The session's cookie is not for scripts, and what is drawn needed no other host.
    assert_eq!(page.execute("return document.cookie", vec![]).await.unwrap(), json!(""));
    keys(&page, "log-out", ENTER).await;
    text_of(&page, "who", str::is_empty).await;
    let actions = page.find(Locator::Id("actions")).await.unwrap();
    assert!(!actions.is_displayed().await.unwrap());
    page.close().await.unwrap();
    drop(driver);
}

/// The button of this kind beside what waits for a second person under this id, pressed with the keyboard.
async fn press(page: &Client, id: &str, kind: &str) {
    let css = format!("#pending li[data-pending=\"{id}\"] button.{kind}");
    let button = page.wait().at_most(PATIENCE).for_element(Locator::Css(&css)).await.unwrap();
    button.send_keys(ENTER).await.unwrap();
}

#[tokio::test]
async fn a_second_person_decides_on_the_page_which_shows_secrets_without_their_values() {
    let site = TestSite::new();
    site.configure("[https]\nlisten = \"127.0.0.1:0\"\n[access]\nfour_eyes = [\"assign\"]");
    let server = Server::start(&site).await;
    let mut agent = Agent::new(1, &site.manifest(1));
    let report = agent.healthy();
    agent.send(&server, &report).await;
    let (ann, ben) = (server.token("ann", "operator").await, server.token("ben", "operator").await);
    let set = server.order("PUT", "secrets/db-password?role=lab", json!("tell nobody")).await;
    assert_eq!(set.status, 200, "{}", set.text());
    let version = set.json()["version"].as_u64().unwrap();
    let ask = async |token: &str| {
        let body = json!({ "image": "minimal", "release": 1, "via": "cold" });
        let asked = server.with(token, "PUT", "machines/rack-1/assignment", body).await;
        asked.json()["pending"]["id"].as_str().unwrap().to_owned()
    };
    let id = ask(&ann).await;
    let Some((driver, page)) = browser().await else { return };
    page.goto(&format!("https://{}/", server.https.unwrap())).await.unwrap();
    cell(&page, "rack-1", "state", |text| text == "healthy").await;
    for hidden in ["pending", "secrets"] {
        assert!(!page.find(Locator::Id(hidden)).await.unwrap().is_displayed().await.unwrap(), "nobody is logged in");
    }
    keys(&page, "log-in", ENTER).await;
    keys(&page, "token", &ben).await;
    keys(&page, "token", ENTER).await;
    text_of(&page, "who", |text| text == "token ben (operator)").await;

    // Who asked, what, and until when; then it is done, once, in both names.
    let shown = text_of(&page, "pending", |text| text.contains("token ann asked on")).await;
    assert!(shown.contains("assign rack-1") && shown.contains("It ends on 2"), "{shown}");
    let item = format!("#pending li[data-pending=\"{id}\"]");
    assert!(page.find(Locator::Css(&item)).await.unwrap().is_displayed().await.unwrap());
    press(&page, &id, "confirm").await;
    text_of(&page, "pending-said", |text| text.ends_with("confirmed by token ben: done")).await;
    assert_eq!(server.machine("rack-1").await.assigned.unwrap().sequence, 2);
    let audit = server.audit().await;
    assert!(audit.iter().any(|r| r.actor == "token ann, confirmed by token ben"), "{audit:?}");

    // No is said as well. One's own can only be taken back.
    let id = ask(&ann).await;
    press(&page, &id, "refuse").await;
    text_of(&page, "pending-said", |text| text.ends_with("refused by token ben")).await;
    ask(&ben).await;
    text_of(&page, "pending", |text| text.contains("token ben asked on") && text.contains("Take back")).await;
    assert!(page.find(Locator::Css("#pending button.confirm")).await.is_err(), "nobody is two persons");
    assert_eq!(server.machine("rack-1").await.assigned.unwrap().sequence, 2);

    // Names and versions of secrets, who lacks them and why; and nothing of their values.
    let shown = text_of(&page, "secrets", |text| text.contains("db-password")).await;
    assert!(shown.contains(&version.to_string()) && shown.contains("role lab"), "{shown}");
    assert!(shown.contains("0 of 1 machines hold it"), "{shown}");
    page.find(Locator::Css("#secrets summary")).await.unwrap().click().await.unwrap();
    text_of(&page, "secrets", |text| text.contains("rack-1 does not hold it: ")).await;
    assert!(!page.source().await.unwrap().contains("tell nobody"));
    page.close().await.unwrap();
    drop(driver);
}
