#![no_main]

kiln_fuzz::program!(smbios);
