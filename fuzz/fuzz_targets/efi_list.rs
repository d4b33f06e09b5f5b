#![no_main]

kiln_fuzz::program!(efi_list);
