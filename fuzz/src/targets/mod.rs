//! What is fuzzed: one function for each kind of bytes that come from elsewhere. It takes any bytes and panics where a
//! property does not hold; that a reader does not panic is the least of them.
//!
//! One piece of code for two drivers: libFuzzer (`make fuzz`, the programs in `fuzz_targets/`), and
//! `server/tests/server/fuzzed.rs`, which gives the same functions a bounded number of mutations of the same seeds in every
//! `make test`. Seeds are made here; none lies in the repository beside the fixtures of the tests.
//!
//! Where signatures would keep all mutations out, the target signs what was mutated: a stolen key is what the checks
//! behind a signature are for.

#[allow(dead_code)] // what only the rest of the agent uses
mod agent;
mod answers;
mod cabling;
mod certificates;
mod directives;
mod disks;
mod documents;
mod ima;
mod images;
mod lists;
mod metadata;
pub mod mutate;
mod names;
mod netboot;
mod repository;
mod token;
mod tpm;
mod wire;

/// One target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, also that of its program and of its folders under `fuzz/`.
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
    /// Inputs that lead far in.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($name:ident: $module:ident,)+) => {
        /// Every target, in alphabetical order.
        pub const TARGETS: &[Target] = &[$(Target {
            name: stringify!($name),
            run: $module::$name::run,
            seeds: $module::$name::seeds,
        },)+];
    };
}

targets! {
    canonical_json: metadata,
    certificate: certificates,
    cpio: images,
    dhcp: netboot,
    dhcp6_answer: answers,
    dhcp_answer: answers,
    directive: directives,
    document: documents,
    efi_list: certificates,
    envelope: metadata,
    event_log: tpm,
    expected_list: lists,
    fat: disks,
    gpt: disks,
    ima_list: ima,
    key_file: certificates,
    lldp: cabling,
    names: names,
    oidc_token: token,
    pe: images,
    proc_text: cabling,
    recipe: lists,
    report: wire,
    root_chain: metadata,
    smbios: cabling,
    tar: images,
    tftp: netboot,
    tpm_answer: tpm,
    tpm_quote: tpm,
    tuf_update: repository,
    verity: images,
    wire: wire,
}

/// The first byte as a choice, and the rest.
fn choice(data: &[u8]) -> Option<(usize, &[u8])> {
    let (first, rest) = data.split_first()?;
    Some((usize::from(*first), rest))
}

/// Puts the choice before each text.
fn chosen<'a>(choice: u8, inputs: impl IntoIterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
    inputs.into_iter().map(|input| [&[choice], input].concat()).collect()
}

/// What a document says is the same after it was written and read: nothing is lost or gained between two readers.
fn stable<T: serde::Serialize + serde::de::DeserializeOwned>(value: &T) -> Vec<u8> {
    let once = serde_json::to_vec(value).expect("what was read can be written");
    let again: T = serde_json::from_slice(&once).expect("what was written can be read");
    assert_eq!(once, serde_json::to_vec(&again).expect("and written"), "written twice, it differs");
    once
}
