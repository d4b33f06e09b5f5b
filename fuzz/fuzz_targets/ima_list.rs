#![no_main]

kiln_fuzz::program!(ima_list);
