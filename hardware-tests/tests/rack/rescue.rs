//! What would give a shell: a release of class *rescue* that the signers did publish, in the hands of a stolen boot server.

use crate::support::Bench;
use crate::support::hostile::{Forgery, Hostile, director_key, ordered};
use crate::thefts::{key, thief};
use kiln_lab::testing;
use kiln_protocol::{Class, OrderAction, Reply, Report};
use serde_json::{Value, json};
use std::path::Path;

/// The second release is of this class: signed by the site's signers, and listed.
fn publish_rescue(bench: &mut Bench) {
    let file = bench.site.join("build/minimal/2/manifest.json");
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    manifest["class"] = json!("rescue");
    std::fs::write(&file, serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
    bench.publish_second();
    // Machines see it once the boot server has signed the timestamp.
    bench.stop_server();
    bench.start_server();
}

/// The thief assigns that release, with an order that this key signed.
fn by_order(site: &Path, file: &str) -> impl FnMut(&Report, &str) -> Reply + use<> {
    let (site, signer) = (site.to_owned(), key(site, file));
    move |report, key| {
        let action = OrderAction::Assign { image: "minimal".parse().unwrap(), release: 2, class: Class::Rescue };
        let mut reply = Forgery::honest(&site, report, key, 2).reply(report);
        reply.desired.order = Some(ordered(report, key, action, &signer, &director_key(&site)));
        reply
    }
}

/// The director's key assigns it: to a machine that runs an ordinary release, and to one whose firmware was given the rescue
/// release's own boot program, which the site signed. Only an operator's order leads there, and no further than it goes.
#[test]
fn a_stolen_server_that_serves_a_rescue_release_gives_no_shell() {
    testing::processes(|paths| {
        let mut bench = Bench::start(paths);
        publish_rescue(&mut bench);
        let hostile = Hostile::start(&bench.site, thief(&bench.site, 2, |_| {}));
        let mut ordinary = bench.machine(1, 1);
        ordinary.look_at(&hostile.url);
        ordinary.refuses("order-missing");
        hostile.told("order-missing");

        let mut machine = bench.machine(1, 2);
        machine.boot["class"] = json!("rescue");
        machine.look_at(&hostile.url);
        machine.refuses("order-missing");
        hostile.told("order-missing");
        hostile.answer(by_order(&bench.site, "online/director.key"));
        machine.refuses("order-bad-signature");
        hostile.told("order-bad-signature");
        hostile.answer(by_order(&bench.site, "offline/operator.key"));
        machine.accepts();
        hostile.answer(thief(&bench.site, 2, |_| {}));
        machine.refuses("order-missing");
        hostile.told("order-missing");
        bench.stop_server();
    });
}
