//! A short slice of `make fuzz`: every target of `fuzz/` on its seeds and on mutations of them, the same ones each time.

/// What the targets call the server's readers.
mod server {
    pub use kiln_server::{expected, oidc};
}
#[path = "../../../fuzz/src/targets/mod.rs"]
#[allow(dead_code, clippy::wildcard_imports, clippy::module_inception, unreachable_pub)]
// also for other tests; a module for each program
mod targets;

use kiln_server::config::Config;
use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant};
use targets::mutate::{Random, mutate};
use targets::{TARGETS, Target};

/// Mutations of each target, unless its time is up before: a signature check costs a thousand times a name's.
const MUTATIONS: usize = 4000;
const TIME: Duration = Duration::from_millis(500);

/// The site's configuration, whose reader needs all of the server and is therefore not among the fuzzers' programs.
const KILN_TOML: Target = Target { name: "kiln_toml", run: kiln_toml, seeds: kiln_toml_seeds };

fn kiln_toml(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(text) {
        Ok(config) => assert_eq!(Config::parse(text).unwrap(), config, "the same file, read otherwise"),
        Err(error) => {
            let text = error.to_string();
            assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?} goes to a terminal");
        }
    }
}

fn kiln_toml_seeds() -> Vec<Vec<u8>> {
    let site = r#"
[http]
listen = "0.0.0.0:8080"
max_connections = 100
shared = ["10.0.0.0/8"]
[dhcp]
mode = "proxy"
[tftp]
max_transfers = 50
[fleet]
max_unavailable = 2
firmware_patience = "30m"
[[role]]
name = "web"
image = "minimal"
max_age = "30d"
drift = "reimage"
exec = "report"
boot_first = "network"
acceptance = "required"
acceptance_least = { disk_read_mib_s = 100 }
thresholds = { "disk./var" = "10%", "time" = "500ms" }
[[machine]]
id = "00000000-0000-0000-0000-000000000001"
name = "rack-1"
role = "web"
"#;
    let people = r#"
[access]
anonymous = "none"
token_max = "90d"
four_eyes = ["order"]
[https]
listen = "0.0.0.0:443"
names = ["kiln.example"]
[oidc]
issuer = "https://id.example"
client_id = "kiln"
url = "https://kiln.example"
roles = { ops = "operator" }
"#;
    vec![site.as_bytes().to_vec(), people.as_bytes().to_vec(), b"[dhcp]\nmode = \"full\"\n".to_vec()]
}

fn slice(target: &Target) -> Result<usize, String> {
    let seeds = (target.seeds)();
    assert!(!seeds.is_empty(), "{} has no seeds", target.name);
    let run = |input: &[u8], what: &str| {
        catch_unwind(|| (target.run)(input)).map_err(|_| {
            let shown = String::from_utf8_lossy(&input[..input.len().min(2000)]).into_owned();
            format!("{}: {what}, {} bytes: {shown:?}", target.name, input.len())
        })
    };
    for (number, seed) in seeds.iter().enumerate() {
        run(seed, &format!("seed {number}"))?;
        for cut in [seed.len() / 3, seed.len().saturating_sub(1)] {
            run(&seed[..cut], &format!("seed {number} cut at {cut}"))?;
        }
    }
    run(&[], "nothing")?;
    let begun = Instant::now();
    let mut done = 0;
    while done < MUTATIONS && begun.elapsed() < TIME {
        let mut random = Random::new(done as u64);
        let mut input = seeds[random.below(seeds.len())].clone();
        mutate(&mut random, &mut input, &seeds);
        run(&input, &format!("mutation {done}"))?;
        done += 1;
    }
    Ok(done)
}

#[test]
fn every_target_holds_on_mutations_of_its_seeds() {
    let mut failed = Vec::new();
    for target in TARGETS.iter().chain([&KILN_TOML]) {
        match slice(target) {
            Ok(done) => println!("{}: {done} mutations", target.name),
            Err(failure) => failed.push(failure),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// A target that nobody runs finds nothing.
#[test]
fn every_target_has_its_program() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    let mut programs: Vec<String> = std::fs::read_dir(fuzz.join("fuzz_targets"))
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    programs.sort();
    assert_eq!(programs, TARGETS.iter().map(|target| target.name).collect::<Vec<_>>());
    for name in &programs {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in fuzz/Cargo.toml");
        let text = std::fs::read_to_string(fuzz.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(text.contains(&format!("program!({name})")), "{name}'s program is another's");
    }
}
