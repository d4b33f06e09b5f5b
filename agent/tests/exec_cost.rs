//! What the allow-list costs: starts of a small program, and a compile job whose every program is judged. And how soon it
//! answers what it cannot judge in time, and tells of what it denied.
#![allow(clippy::unwrap_used)]

mod bed;

use bed::{Bed, inside, list, longer, program, put};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Of each kind.
const LOOKS: u8 = 9;
/// Longer than what is hashed within a verdict's 100 ms.
const LONG: u64 = 250 << 20;

/// A source file of 700 lines.
fn source(unit: usize) -> String {
    let mut text = String::from("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n");
    for n in 0..70 {
        text.extend([format!(
            "int f{unit}_{n}(const char *s, int *out, int many) {{\n    int sum = {n};\n    for (int i = 0; i < many; i++) {{\n        \
             size_t length = strlen(s);\n        if (length > {n}) sum += s[i % length] * (i ^ {n});\n        else out[i & 7] -= sum;\n    \
             }}\n    if (sum < 0) fprintf(stderr, \"%d %s\\n\", sum, s);\n    return sum;\n}}\n"
        )]);
    }
    if unit == 0 {
        text += "int main(int n, char **words) { int out[8] = {0}; return f0_0(words[0], out, n) == 7; }\n";
    }
    text
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// The middle one, and the most.
fn summed_up(what: &str, mut values: Vec<f64>) -> serde_json::Value {
    values.sort_by(f64::total_cmp);
    let (median, most) = (values[values.len() / 2], values[values.len() - 1]);
    eprintln!("{what}: {median:.1} ms, {most:.1} ms at most");
    serde_json::json!({ "median_ms": median, "most_ms": most })
}

/// From a denied start to the service's knowing of it; and how long a start waits whose program takes too long to judge, the
/// hasher being busy with those before.
fn latencies() -> Option<[serde_json::Value; 2]> {
    let mut bed = Bed::start("enforce", "closed", &list())?;
    let mut told = Vec::new();
    for n in 1..=LOOKS {
        bed.put("other", &longer(program("true"), n.into()));
        let begun = Instant::now();
        bed.is_denied("other");
        bed.wait(|state| state.denied >= u64::from(n));
        told.push(milliseconds(begun));
    }
    let mut late = Vec::new();
    for n in 1..=LOOKS {
        // Nearly all of it a hole.
        let path = bed.place.join(format!("long-{n}"));
        put(&path, &program("true"));
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(LONG).unwrap();
        file.write_all_at(&[n], LONG - 1).unwrap();
        drop(file);
        let begun = Instant::now();
        bed.is_denied(&format!("long-{n}"));
        late.push(milliseconds(begun));
    }
    bed.wait(|state| state.late + state.denied >= 2 * u64::from(LOOKS));
    Some([summed_up("a denied start is told after", told), summed_up("a start that cannot be judged waits", late)])
}

/// Figures for docs/benchmarks.md, by `make bench`; also as JSON into the file that KILN_FIGURES names.
#[test]
#[ignore = "a measurement"]
fn what_it_costs() {
    if !inside("what_it_costs") {
        return;
    }
    let tools: Vec<(&str, Vec<u8>)> = ["gcc", "cc1", "as", "collect2", "ld"]
        .into_iter()
        .map(|tool| {
            let found = Command::new("gcc").arg(format!("-print-prog-name={tool}")).output().unwrap().stdout;
            let found = String::from_utf8(found).unwrap();
            let path = if found.contains('/') { PathBuf::from(found.trim()) } else { Path::new("/usr/bin").join(tool) };
            (tool, std::fs::read(path).unwrap())
        })
        .chain(list())
        .collect();
    let Some(bed) = Bed::start("enforce", "closed", &tools) else { return };
    let free = bed.dir.path().join("free");
    std::fs::create_dir(&free).unwrap();
    assert!(Command::new("mount").args(["-t", "tmpfs", "test"]).arg(&free).status().unwrap().success());
    for (name, bytes) in &tools {
        put(&free.join(name), bytes);
    }
    // Headers and start files are those of the host's gcc, whose programs were copied.
    let libgcc = Command::new("gcc").arg("-print-libgcc-file-name").output().unwrap().stdout;
    let libgcc = PathBuf::from(String::from_utf8(libgcc).unwrap().trim()).parent().unwrap().to_owned();
    let work = bed.dir.path().join("work");
    std::fs::create_dir(&work).unwrap();
    let units: Vec<String> = (0..4).map(|unit| format!("unit{unit}")).collect();
    for (number, unit) in units.iter().enumerate() {
        std::fs::write(work.join(format!("{unit}.c")), source(number)).unwrap();
    }
    let compile = |place: &Path| {
        let gcc = |arguments: &[String]| {
            let mut gcc = Command::new(place.join("gcc"));
            gcc.current_dir(&work).arg("-B").arg(format!("{}/", place.display()));
            gcc.arg("-B").arg(format!("{}/", libgcc.display())).arg("-O2");
            assert!(gcc.args(arguments).status().unwrap().success());
        };
        for unit in &units {
            gcc(&["-c".into(), format!("{unit}.c"), "-o".into(), format!("{unit}.o")]);
        }
        let objects: Vec<String> = units.iter().map(|unit| format!("{unit}.o")).collect();
        gcc(&[vec!["-o".into(), "program".into()], objects].concat());
    };
    let starts = |place: &Path| {
        for _ in 0..400 {
            assert!(Command::new(place.join("true")).status().unwrap().success());
        }
    };
    let seconds = |work: &dyn Fn(&Path), place: &Path| {
        let begun = Instant::now();
        work(place);
        begun.elapsed().as_secs_f64()
    };
    let mut figures = serde_json::Map::new();
    let works = [("start", "400 starts of true, each", 400.0), ("compile", "four files compiled and linked", 1.0)];
    for (n, (name, what, times)) in works.into_iter().enumerate() {
        let work: &dyn Fn(&Path) = if n == 0 { &starts } else { &compile };
        work(&bed.place);
        work(&free);
        // In turns, so that what else the host does meets both.
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..9 {
            with.push(seconds(work, &bed.place) / times * 1e6);
            without.push(seconds(work, &free) / times * 1e6);
        }
        with.sort_by(f64::total_cmp);
        without.sort_by(f64::total_cmp);
        let (with, without) = (with[4], without[4]);
        let more = with / without - 1.0;
        eprintln!("{what}: {without:.0} µs, guarded {with:.0} µs: {:+.1} %", more * 100.0);
        figures.insert(name.into(), serde_json::json!({ "free_us": without, "guarded_us": with, "more": more }));
    }
    let (resident, most) = (bed.guard_status("VmRSS:"), bed.guard_status("VmHWM:"));
    eprintln!("guard: {resident} kB resident, {most} kB at most");
    figures.insert("guard".into(), serde_json::json!({ "rss_kib": resident, "peak_kib": most }));
    if let Some([told, late]) = latencies() {
        figures.extend([("told".to_owned(), told), ("late".to_owned(), late)]);
    }
    if let Some(path) = std::env::var_os("KILN_FIGURES").map(PathBuf::from) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, serde_json::Value::Object(figures).to_string()).unwrap();
    }
    let _ = nix::mount::umount2(&free, nix::mount::MntFlags::MNT_DETACH);
}
