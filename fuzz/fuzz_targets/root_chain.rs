#![no_main]

kiln_fuzz::program!(root_chain);
