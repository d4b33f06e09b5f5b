//! docs/boot-walkthrough.md's headings are the stages, in order: a newcomer meets the same words everywhere.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::disallowed_types)]

use kiln_protocol::Stage;

#[test]
fn the_walkthroughs_headings_are_the_stages() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/boot-walkthrough.md");
    let page = std::fs::read_to_string(page).unwrap();
    let headings: Vec<&str> = page.lines().filter_map(|l| l.strip_prefix("## ")).collect();
    let labels: Vec<&str> = Stage::ALL.iter().map(|s| s.label()).collect();
    assert_eq!(headings, labels);
}
