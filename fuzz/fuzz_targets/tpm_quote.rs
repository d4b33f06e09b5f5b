#![no_main]

kiln_fuzz::program!(tpm_quote);
