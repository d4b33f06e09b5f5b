#![no_main]

kiln_fuzz::program!(tar);
