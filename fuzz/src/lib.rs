//! Fuzzing of every reader of foreign bytes: see [`targets`]. `make fuzz` builds and runs the programs of
//! `fuzz_targets/`, `cargo fuzz run NAME` one of them.

pub mod server;
pub mod targets;

/// The program of one target. With `KILN_FUZZ_SEEDS` it first writes the target's seeds into that folder.
#[macro_export]
macro_rules! program {
    ($name:ident) => {
        libfuzzer_sys::fuzz_target!(init: $crate::write_seeds(stringify!($name)), |data: &[u8]| {
            static RUN: std::sync::LazyLock<fn(&[u8])> =
                std::sync::LazyLock::new(|| $crate::target(stringify!($name)).run);
            RUN(data);
        });
    };
}

/// A target by its name.
pub fn target(name: &str) -> &'static targets::Target {
    targets::TARGETS.iter().find(|target| target.name == name).expect("each program is of a target")
}

/// Writes a target's seeds where `KILN_FUZZ_SEEDS` says.
pub fn write_seeds(name: &str) {
    let Some(folder) = std::env::var_os("KILN_FUZZ_SEEDS") else { return };
    for (number, seed) in (target(name).seeds)().iter().enumerate() {
        let path = std::path::Path::new(&folder).join(format!("seed-{number:02}"));
        std::fs::write(&path, seed).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}
