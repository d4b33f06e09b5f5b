#![no_main]

kiln_fuzz::program!(names);
