//! The network to the boot server: this release's own boot program is downloaded again and again, and its hash compared.
//! Beside the speed: what the link was negotiated to, what was damaged, dropped or came out of order meanwhile, and what of
//! a counted set of echoes is lost while nothing else is under way.

use super::echo::{self, Echoes};
use super::result;
use crate::fetch;
use crate::handoff::Handoff;
use crate::inventory::{Root, nics};
use kiln_protocol::{Nic, Outcome, TestKind, TestResult, speed};
use kiln_release::{AcceptancePlan, hex};
use std::path::Path;
use std::time::{Duration, Instant};

/// What the kernel counted so far.
#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    /// Segments of TCP that came.
    segments: u64,
    /// Those that came before an earlier one: that one was lost, or overtaken.
    out_of_order: u64,
    /// Frames that cards refused as damaged.
    damaged: u64,
}

/// A field of `/proc/net/snmp` and `/proc/net/netstat`: a line with names, then one with numbers.
fn field(text: &str, group: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(':'));
    let (Some(names), Some(numbers)) = (lines.next(), lines.next()) else { return 0 };
    let at = names.split_whitespace().position(|known| known == name);
    at.and_then(|at| numbers.split_whitespace().nth(at)?.parse().ok()).unwrap_or(0)
}

fn counts(root: &Root, nics: &[Nic]) -> Counts {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let errors = |nic: &Nic| {
        let path = root.sys.join("class/net").join(&nic.name).join("statistics/rx_errors");
        std::fs::read_to_string(path).ok().and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    Counts {
        segments: field(&text("/proc/net/snmp"), "Tcp", "InSegs"),
        out_of_order: field(&text("/proc/net/netstat"), "TcpExt", "TCPOFOQueue"),
        damaged: nics.iter().map(errors).sum(),
    }
}

/// The card that has the way to an IPv4 or IPv6 address, by the kernel's table; the only one with a link, else.
fn way(nics: &[Nic], routes: &str) -> Option<Nic> {
    let default = routes.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (name, destination) = (words.next()?, words.next()?);
        (destination == "00000000").then(|| name.to_owned())
    });
    let up = || nics.iter().filter(|nic| nic.carrier == Some(true));
    let by_route = default.and_then(|name| nics.iter().find(|nic| nic.name == name));
    by_route.or_else(|| up().next().filter(|_| up().count() == 1)).cloned()
}

/// What was downloaded.
#[derive(Debug, Default)]
struct Got {
    bytes: u64,
    seconds: f64,
    rounds: u64,
}

async fn download(handoff: &Handoff, within: Duration) -> Result<Got, String> {
    let wanted = &handoff.manifest.uki;
    let base = handoff.servers.http.first().ok_or("no boot server is known")?;
    let path = format!("a/{}", wanted.sha256);
    let begun = Instant::now();
    let mut got = Got::default();
    while got.rounds == 0 || begun.elapsed() < within {
        let body = fetch::document(base, &path, wanted.length).await.map_err(|e| e.to_string())?;
        let body = body.ok_or_else(|| format!("{base} does not have {path}"))?;
        if hex::sha256(&body) != wanted.sha256 {
            return Err(format!("download {} from {base} came damaged", got.rounds + 1));
        }
        got.bytes += body.len() as u64;
        got.rounds += 1;
    }
    got.seconds = begun.elapsed().as_secs_f64();
    Ok(got)
}

pub fn test(plan: &AcceptancePlan, within: Duration) -> Vec<TestResult> {
    let kind = TestKind::Network;
    let root = Root::of_this_machine();
    let nics = nics(&root).unwrap_or_default();
    let routes = std::fs::read_to_string(Path::new("/proc/net/route")).unwrap_or_default();
    let nic = way(&nics, &routes);
    let part = nic.as_ref().map_or("network".to_owned(), |nic| format!("{} ({})", nic.name, nic.mac));
    let failed = |detail: String| vec![result(kind, part.clone(), Outcome::Failed, detail, &[])];
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(error.to_string()),
    };
    let handoff = match Handoff::read() {
        Ok(handoff) => handoff,
        Err(error) => return failed(error.to_string()),
    };
    let before = counts(&root, &nics);
    let got = runtime.block_on(download(&handoff, within));
    let after = counts(&root, &nics);
    let got = match got {
        Ok(got) => got,
        Err(reason) => return failed(reason),
    };
    let server = handoff.servers.http.first().ok_or_else(|| "no boot server is known".to_owned());
    let echoes = server.and_then(|base| echo::probe(base));
    vec![judge(plan, part, nic.map_or(0, |nic| nic.mbps), &got, (before, after), &echoes)]
}

/// What the echoes say, and whether more of them are lost than is allowed. A server may be told to answer none.
fn heard(plan: &AcceptancePlan, echoes: &Result<Echoes, String>) -> (String, bool) {
    match echoes {
        Ok(Echoes { back: 0, .. }) => ("the boot server answers no echoes (ICMP): loss was not probed".into(), false),
        Ok(echoes) => {
            let many = echoes.lost_per_million() > plan.network_lost_per_million;
            let allowed = u64::from(echoes.sent) * plan.network_lost_per_million / 1_000_000;
            let asked = if many { format!(", more than {allowed}") } else { String::new() };
            (format!("of {} echoes {} were lost{asked}", echoes.sent, echoes.lost()), many)
        }
        Err(reason) => (format!("loss was not probed: {reason}"), false),
    }
}

fn judge(
    plan: &AcceptancePlan,
    part: String,
    mbps: u32,
    got: &Got,
    (before, after): (Counts, Counts),
    echoes: &Result<Echoes, String>,
) -> TestResult {
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    // a figure for people
    let rate = (got.bytes as f64 / got.seconds.max(0.001) / f64::from(1 << 20)) as u64;
    let segments = after.segments.saturating_sub(before.segments).max(1);
    let out_of_order = after.out_of_order.saturating_sub(before.out_of_order);
    let damaged = after.damaged.saturating_sub(before.damaged);
    let lost = (out_of_order + damaged).saturating_mul(1_000_000) / segments;
    let link = if mbps == 0 { "a link of unknown speed".to_owned() } else { format!("a link of {}", speed(mbps)) };
    let many = lost > plan.network_lost_per_million;
    let asked = if many { format!(", more than {}", plan.network_lost_per_million) } else { String::new() };
    let (words, too_few_back) = heard(plan, echoes);
    let detail = format!(
        "{rate} MiB/s over {link} in {} downloads; of a million packets {lost} came damaged or out of order{asked}; {words}",
        got.rounds
    );
    let mut measures = vec![("mib_s", rate), ("lost_per_million", lost)];
    if mbps != 0 {
        measures.push(("link_mbit_s", u64::from(mbps)));
    }
    if let Some(echoes) = echoes.as_ref().ok().filter(|echoes| echoes.back > 0) {
        measures.push(("echo_lost_per_million", echoes.lost_per_million()));
    }
    let outcome = if many || too_few_back { Outcome::Failed } else { Outcome::Passed };
    result(TestKind::Network, part, outcome, detail, &measures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_counted_of_what_came() {
        let got = Got { bytes: 300 << 20, seconds: 3.0, rounds: 10 };
        let before = Counts { segments: 1_000, out_of_order: 5, damaged: 1 };
        let after = Counts { segments: 201_000, out_of_order: 105, damaged: 101 };
        let plan = AcceptancePlan { network_lost_per_million: 1000, ..AcceptancePlan::default() };
        let counts = (before, after);
        let echoes = |back| Ok(Echoes { sent: 1000, back });
        let said = judge(&plan, "eth0".into(), 1000, &got, counts, &echoes(999));
        assert_eq!(said.outcome, Outcome::Passed);
        assert_eq!(
            said.detail,
            "100 MiB/s over a link of 1 Gb/s in 10 downloads; of a million packets 1000 came damaged or out of order; of \
             1000 echoes 1 were lost"
        );
        assert_eq!(said.measures["echo_lost_per_million"], 1000);
        let strict = AcceptancePlan { network_lost_per_million: 999, ..plan.clone() };
        let said = judge(&strict, "eth0".into(), 0, &got, counts, &echoes(1000));
        assert!(said.outcome == Outcome::Failed && said.detail.contains("out of order, more than 999;"), "{said:?}");
        assert!(!said.measures.contains_key("link_mbit_s"), "what is not known is not measured");

        // What the echoes lose counts by itself; a server that answers none says nothing of the way.
        let said = judge(&plan, "eth0".into(), 0, &got, counts, &echoes(998));
        assert!(said.outcome == Outcome::Failed && said.detail.ends_with("2 were lost, more than 1"), "{said:?}");
        for unknown in [echoes(0), Err("no way".to_owned())] {
            let said = judge(&plan, "eth0".into(), 0, &got, counts, &unknown);
            assert!(said.outcome == Outcome::Passed && said.detail.contains("loss was not probed"), "{said:?}");
            assert!(!said.measures.contains_key("echo_lost_per_million"), "{said:?}");
        }
    }

    #[test]
    fn the_kernels_tables_are_read() {
        let text = "Ip: Forwarding\nIp: 1\nTcp: RtoAlgorithm InSegs OutSegs\nTcp: 1 77 88\n";
        assert_eq!((field(text, "Tcp", "InSegs"), field(text, "Tcp", "None"), field("", "Tcp", "InSegs")), (77, 0, 0));
        let nic = |name: &str, carrier| Nic { name: name.into(), carrier, ..Nic::default() };
        let nics = [nic("eth0", Some(true)), nic("eth1", Some(true))];
        let routes = "Iface Destination Gateway\neth0\t0000A8C0\t0\neth1\t00000000\t0100A8C0\n";
        assert_eq!(way(&nics, routes).unwrap().name, "eth1");
        assert_eq!(way(&nics, ""), None, "two are up, and nobody says which");
        assert_eq!(way(&nics[..1], "").unwrap().name, "eth0");
    }
}
