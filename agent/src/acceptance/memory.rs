//! Memory: patterns written to most of what is free and read back, by all processors at once. Which module fails is the
//! memory controller's to say (EDAC); a pattern that comes back wrong says only that one does.

use super::result;
use crate::facts;
use kiln_protocol::{Outcome, TestKind, TestResult, binary_size};
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

/// Taken, written and read at once: larger than the caches in front of a processor's own memory.
const CHUNK: usize = 64 << 20;
/// Left for everything else.
const MARGIN: u64 = 64 << 20;
const WORD: usize = size_of::<u64>();

/// Each bit both ways, neighbours different, and each address another.
const PATTERNS: [Pattern; 4] = [|_| 0xaaaa_aaaa_aaaa_aaaa, |_| 0x5555_5555_5555_5555, mixed, |at| !mixed(at)];
type Pattern = fn(u64) -> u64;

/// Another number for every address (the finaliser of `MurmurHash3`).
fn mixed(at: u64) -> u64 {
    let at = (at ^ (at >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let at = (at ^ (at >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    at ^ (at >> 33)
}

fn fill(words: &mut [u64], base: u64, pattern: Pattern) {
    for (at, word) in (base..).zip(words.iter_mut()) {
        *word = pattern(at);
    }
    // Written for real: what the compiler cannot see used is not left out.
    black_box(words);
}

/// How many words are not what was written.
fn wrong(words: &[u64], base: u64, pattern: Pattern) -> u64 {
    let words = black_box(words);
    (base..).zip(words).map(|(at, word)| u64::from(*word != pattern(at))).sum()
}

/// What one processor's share gave.
#[derive(Debug, Default, Clone, Copy)]
struct Share {
    bytes: u64,
    errors: u64,
    patterns: usize,
}

fn share(bytes: u64, first: u64, until: Instant) -> Share {
    let mut chunks: Vec<Vec<u64>> = Vec::new();
    let mut left = bytes;
    while left > 0 {
        let words = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK) / WORD;
        let mut chunk: Vec<u64> = Vec::new();
        if words == 0 || chunk.try_reserve_exact(words).is_err() {
            break;
        }
        chunk.resize(words, 0);
        left -= (words * WORD) as u64;
        chunks.push(chunk);
    }
    let mut done = Share { bytes: bytes - left, ..Share::default() };
    let base = |n: usize| first + (n * CHUNK / WORD) as u64;
    for pattern in PATTERNS {
        for (n, chunk) in chunks.iter_mut().enumerate() {
            fill(chunk, base(n), pattern);
        }
        for (n, chunk) in chunks.iter().enumerate() {
            done.errors += wrong(chunk, base(n), pattern);
            if Instant::now() >= until {
                return done;
            }
        }
        done.patterns += 1;
    }
    done
}

/// Errors that the memory controllers counted, by module: `(label, corrected, uncorrected)`.
fn controllers(edac: &Path) -> Vec<(String, u64, u64)> {
    let text = |path: &Path| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let number = |path: &Path| text(path).parse().unwrap_or(0);
    let mut found = Vec::new();
    for controller in std::fs::read_dir(edac).into_iter().flatten().flatten() {
        for module in std::fs::read_dir(controller.path()).into_iter().flatten().flatten() {
            let path = module.path();
            if path.join("dimm_ce_count").exists() {
                let label = text(&path.join("dimm_label"));
                let label = if label.is_empty() { module.file_name().to_string_lossy().into_owned() } else { label };
                found.push((label, number(&path.join("dimm_ce_count")), number(&path.join("dimm_ue_count"))));
            }
        }
    }
    found.sort();
    found
}

const EDAC: &str = "/sys/devices/system/edac/mc";

pub fn test(percent: u8, within: Duration) -> Vec<TestResult> {
    let free = facts::memory("MemAvailable:");
    let wanted = (free / 100 * u64::from(percent)).min(free.saturating_sub(MARGIN)) / WORD as u64 * WORD as u64;
    let until = Instant::now() + within;
    let before = controllers(Path::new(EDAC));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    let each = wanted / threads / WORD as u64 * WORD as u64;
    let shares: Vec<Share> = std::thread::scope(|scope| {
        let starts: Vec<_> =
            (0..threads).map(|n| scope.spawn(move || share(each, n * each / WORD as u64, until))).collect();
        starts.into_iter().map(|thread| thread.join().unwrap_or_default()).collect()
    });
    let mut results = vec![judge(&shares, each)];
    for ((label, ce, ue), (_, ce_before, ue_before)) in controllers(Path::new(EDAC)).into_iter().zip(before) {
        if (ce, ue) != (ce_before, ue_before) {
            let detail = format!(
                "its controller counted {} corrected and {} uncorrected errors",
                ce - ce_before,
                ue - ue_before
            );
            results.push(result(TestKind::Memory, format!("DIMM {label}"), Outcome::Failed, detail, &[]));
        }
    }
    results
}

/// `each`: what every processor was to test.
fn judge(shares: &[Share], each: u64) -> TestResult {
    let bytes: u64 = shares.iter().map(|share| share.bytes).sum();
    let errors: u64 = shares.iter().map(|share| share.errors).sum();
    let patterns = shares.iter().map(|share| share.patterns).min().unwrap_or(0);
    let short = shares.iter().any(|share| share.bytes < each) || bytes == 0;
    let (outcome, detail) = if errors > 0 {
        (Outcome::Failed, format!("{errors} words came back other than they were written, of {}", binary_size(bytes)))
    } else if short {
        (Outcome::Failed, format!("only {} could be had", binary_size(bytes)))
    } else if patterns == 0 {
        (Outcome::Failed, format!("one pattern over {} did not end in time", binary_size(bytes)))
    } else {
        (Outcome::Passed, format!("{} held {patterns} of {} patterns", binary_size(bytes), PATTERNS.len()))
    };
    result(TestKind::Memory, "memory", outcome, detail, &[("tested_mib", bytes >> 20), ("errors", errors)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_bit_that_does_not_hold_is_found_by_a_pattern() {
        for bit in [0, 1, 31, 63] {
            for stuck in [0_u64, 1] {
                let mut found = 0;
                for pattern in PATTERNS {
                    let mut words = vec![0; 512];
                    fill(&mut words, 7, pattern);
                    assert_eq!(wrong(&words, 7, pattern), 0);
                    words[300] = words[300] & !(1 << bit) | (stuck << bit);
                    found += wrong(&words, 7, pattern);
                }
                assert!(found >= 1, "bit {bit} stuck at {stuck}");
            }
        }
        // A line that is not decoded: two addresses are one.
        let mut words = vec![0; 512];
        fill(&mut words, 0, PATTERNS[2]);
        words[1] = words[257];
        assert_eq!(wrong(&words, 0, PATTERNS[2]), 1);
    }

    #[test]
    fn a_share_tests_what_it_should_and_its_end_is_known() {
        let far = Instant::now() + Duration::from_secs(600);
        let done = share(CHUNK as u64 + 4096, 0, far);
        assert_eq!((done.bytes, done.errors, done.patterns), (CHUNK as u64 + 4096, 0, PATTERNS.len()));
        assert_eq!(judge(&[done], done.bytes).outcome, Outcome::Passed);
        let cut = share(1 << 20, 0, Instant::now());
        assert_eq!(judge(&[cut], 1 << 20).detail, "one pattern over 1 MiB did not end in time");
        assert_eq!(judge(&[Share { errors: 1, ..done }], done.bytes).outcome, Outcome::Failed);
        assert_eq!(judge(&[done], done.bytes + 8).detail, "only 64 MiB could be had");
    }

    #[test]
    fn a_controllers_counts_are_read_by_module() {
        let dir = tempfile::tempdir().unwrap();
        let module = dir.path().join("mc0/dimm1");
        std::fs::create_dir_all(&module).unwrap();
        for (file, text) in [("dimm_ce_count", "3\n"), ("dimm_ue_count", "0\n"), ("dimm_label", "A2\n")] {
            std::fs::write(module.join(file), text).unwrap();
        }
        assert_eq!(controllers(dir.path()), [("A2".to_owned(), 3, 0)]);
    }
}
