#![no_main]

kiln_fuzz::program!(dhcp6_answer);
