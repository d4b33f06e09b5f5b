#![no_main]

kiln_fuzz::program!(proc_text);
