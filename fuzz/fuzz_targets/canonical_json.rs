#![no_main]

kiln_fuzz::program!(canonical_json);
