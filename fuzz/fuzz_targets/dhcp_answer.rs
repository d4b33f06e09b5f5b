#![no_main]

kiln_fuzz::program!(dhcp_answer);
