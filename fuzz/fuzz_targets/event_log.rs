#![no_main]

kiln_fuzz::program!(event_log);
