#![no_main]

kiln_fuzz::program!(expected_list);
