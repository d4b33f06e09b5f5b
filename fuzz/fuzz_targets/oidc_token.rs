#![no_main]

kiln_fuzz::program!(oidc_token);
