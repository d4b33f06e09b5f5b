#![no_main]

kiln_fuzz::program!(tuf_update);
