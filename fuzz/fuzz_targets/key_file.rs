#![no_main]

kiln_fuzz::program!(key_file);
