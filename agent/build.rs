//! What the linker leaves out of the static agent, whose size counts: it is in every boot program.

fn main() {
    println!("cargo:rerun-if-changed=link.ld");
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_ENV").as_deref() != Ok("musl") {
        return;
    }
    let here = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for every build script");
    for argument in [
        // No unwind tables, see link.ld.
        format!("-Wl,-T,{here}/link.ld"),
        "-Wl,--no-eh-frame-hdr".to_owned(),
        // The addresses that the program corrects at its start, in the short form (SHT_RELR): 2 KB instead of 126 KB.
        // musl applies it since 1.2.4.
        "-Wl,-z,pack-relative-relocs".to_owned(),
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
