//! Processors: all of them compute the same chain of hashes, each bound to its own, until the time is over. Every link of
//! every chain must be the same: one that differs names its processor. Beside that, what the kernel counted meanwhile:
//! machine checks, and times at which a processor slowed down because it was too hot.

use super::result;
use kiln_protocol::{Outcome, TestKind, TestResult};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use ring::digest::{SHA256, digest};
use std::path::Path;
use std::time::{Duration, Instant};

/// Hashes between two links that are compared.
const LINK: usize = 20_000;
/// Links kept of a processor: some hours.
const LINKS: usize = 1 << 20;

/// The first bytes of each link's hash.
type Chain = Vec<u64>;

fn chain(until: Instant) -> Chain {
    let mut links = Chain::new();
    let mut hash = [0; 32];
    while links.is_empty() || (Instant::now() < until && links.len() < LINKS) {
        for _ in 0..LINK {
            let next = digest(&SHA256, &hash);
            hash.copy_from_slice(next.as_ref());
        }
        links.push(u64::from_le_bytes(hash[..8].try_into().expect("eight bytes")));
    }
    links
}

/// Which chains are not as most are, each with its first such link.
fn dissenters(chains: &[Chain]) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    let longest = chains.iter().map(Vec::len).max().unwrap_or(0);
    for link in 0..longest {
        // What a wrong link begets is wrong as well: such a chain has no voice any more.
        let voices: Vec<(usize, u64)> = chains
            .iter()
            .enumerate()
            .filter(|(n, _)| !found.iter().any(|(known, _)| known == n))
            .filter_map(|(n, chain)| Some((n, *chain.get(link)?)))
            .collect();
        if voices.windows(2).all(|pair| pair[0].1 == pair[1].1) {
            continue;
        }
        let votes = |value: u64| voices.iter().filter(|(_, other)| *other == value).count();
        let most = voices.iter().map(|(_, value)| *value).max_by_key(|value| votes(*value));
        found.extend(voices.iter().filter(|(_, value)| Some(*value) != most).map(|(n, _)| (*n, link)));
    }
    found
}

/// Machine checks: the sum over the processors of `/proc/interrupts`' line MCE.
fn machine_checks(interrupts: &str) -> u64 {
    let line = interrupts.lines().find_map(|line| line.trim_start().strip_prefix("MCE:"));
    line.into_iter().flat_map(str::split_whitespace).map_while(|word| word.parse::<u64>().ok()).sum()
}

/// How often processors slowed down for heat.
fn throttled(cpus: &Path) -> u64 {
    let number = |path: &Path| std::fs::read_to_string(path).ok().and_then(|n| n.trim().parse::<u64>().ok());
    let counts = std::fs::read_dir(cpus).into_iter().flatten().flatten().filter_map(|cpu| {
        let folder = cpu.path().join("thermal_throttle");
        let core = number(&folder.join("core_throttle_count"));
        Some(core? + number(&folder.join("package_throttle_count")).unwrap_or(0))
    });
    counts.sum()
}

const CPUS: &str = "/sys/devices/system/cpu";

fn counters() -> (u64, u64) {
    let interrupts = std::fs::read_to_string("/proc/interrupts").unwrap_or_default();
    (machine_checks(&interrupts), throttled(Path::new(CPUS)))
}

pub fn test(within: Duration) -> Vec<TestResult> {
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let (checks, hot) = counters();
    let begun = Instant::now();
    let until = begun + within;
    // One alone is compared with itself: two chains that take turns on it.
    let chains: Vec<Chain> = std::thread::scope(|scope| {
        let run = |cpu: usize| {
            let mut only = CpuSet::new();
            // A processor that cannot be chosen computes all the same, only its name is not known.
            let _ = only.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
            chain(until)
        };
        let threads: Vec<_> = (0..count.max(2)).map(|n| scope.spawn(move || run(n % count))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_default()).collect()
    });
    let links: usize = chains.iter().map(Vec::len).sum();
    let rate = (links * LINK) as u64 / begun.elapsed().as_secs().max(1);
    let (checks_now, hot_now) = counters();
    judge(&chains, count, checks_now - checks, hot_now - hot, rate)
}

fn judge(chains: &[Chain], count: usize, checks: u64, hot: u64, rate: u64) -> Vec<TestResult> {
    let cpu = TestKind::Cpu;
    let mut results: Vec<TestResult> = dissenters(chains)
        .into_iter()
        .map(|(n, link)| {
            let detail = format!("its result {link} is not the others'");
            result(cpu, format!("CPU {}", n % count), Outcome::Failed, detail, &[])
        })
        .collect();
    if checks > 0 {
        let detail = format!("{checks} machine checks under load: the kernel's log names the part");
        results.push(result(cpu, "CPUs", Outcome::Failed, detail, &[]));
    }
    if hot > 0 {
        let detail = format!("slowed down {hot} times because of heat: are fans and heat sinks well?");
        results.push(result(cpu, "CPUs", Outcome::Failed, detail, &[("throttled", hot)]));
    }
    if results.is_empty() {
        let links: usize = chains.iter().map(Vec::len).sum();
        let detail = format!("{count} processors agree in {links} results, without a machine check, and stayed cool");
        results.push(result(cpu, "CPUs", Outcome::Passed, detail, &[("hashes_s", rate)]));
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_that_computes_otherwise_is_named() {
        let good: Chain = vec![1, 2, 3, 4];
        let says = |chains: &[Chain]| {
            judge(chains, chains.len(), 0, 0, 1).iter().map(|r| format!("{} {}", r.part, r.outcome)).collect::<Vec<_>>()
        };
        assert_eq!(says(&[good.clone(), good[..2].to_vec(), good.clone()]), ["CPUs passed"]);
        assert_eq!(says(&[good.clone(), vec![1, 9, 8, 7], good.clone()]), ["CPU 1 failed"]);
        assert_eq!(says(&[good.clone(), good.clone(), vec![1, 2, 3], vec![7, 7]]), ["CPU 3 failed"]);
        assert_eq!(says(&[vec![1, 2, 3, 5], good.clone()]).len(), 1, "of two nobody knows which, and one is named");
        let counted = judge(&[good.clone(), good], 2, 1, 3, 1);
        assert!(counted.len() == 2 && counted.iter().all(|r| r.outcome == Outcome::Failed));
    }

    #[test]
    fn a_chain_is_always_the_same_and_has_a_link_at_least() {
        let now = Instant::now();
        let (one, two) = (chain(now), chain(now));
        assert_eq!((one.len(), &one), (1, &two));
    }

    #[test]
    fn the_kernels_counts_are_read() {
        let text = "           CPU0       CPU1\n  0:         22          0  IO-APIC\n MCE:          2          1   Machine check exceptions\n MCP:  9 9 polls\n";
        assert_eq!(machine_checks(text), 3);
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("cpu1/thermal_throttle");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("core_throttle_count"), "4\n").unwrap();
        std::fs::write(folder.join("package_throttle_count"), "1\n").unwrap();
        std::fs::create_dir(dir.path().join("cpu0")).unwrap();
        assert_eq!(throttled(dir.path()), 5);
    }
}
