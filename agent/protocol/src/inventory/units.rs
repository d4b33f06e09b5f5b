//! Sizes and speeds as people read them.

/// `64 GiB`, `1.5 TiB`: the largest binary unit, a decimal where it says something. For memory.
pub fn binary_size(bytes: u64) -> String {
    size(bytes, 1024, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// `960 GB`, `7.7 TB`: likewise with decimal units. For disks.
pub fn decimal_size(bytes: u64) -> String {
    size(bytes, 1000, &["B", "kB", "MB", "GB", "TB", "PB", "EB"])
}

fn size(bytes: u64, step: u64, units: &[&str]) -> String {
    let (mut unit, mut power) = (0, 1_u64);
    while unit + 1 < units.len() && bytes / power >= step {
        power *= step;
        unit += 1;
    }
    // One decimal below ten, rounded to the nearest.
    let tenths = (u128::from(bytes) * 10 + u128::from(power) / 2) / u128::from(power);
    let (whole, tenth) = (tenths / 10, tenths % 10);
    let name = units.get(unit).copied().unwrap_or_default();
    if tenth == 0 || whole >= 10 {
        let rounded = (u128::from(bytes) + u128::from(power) / 2) / u128::from(power);
        format!("{rounded} {name}")
    } else {
        format!("{whole}.{tenth} {name}")
    }
}

/// `25 Gb/s`, `100 Mb/s`, `2.5 Gb/s`.
pub fn speed(mbps: u32) -> String {
    match (mbps / 1000, mbps % 1000 / 100) {
        (0, _) => format!("{mbps} Mb/s"),
        (gbps, 0) => format!("{gbps} Gb/s"),
        (gbps, tenth) => format!("{gbps}.{tenth} Gb/s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_speeds_are_read_aloud() {
        let binary = |b: u64| binary_size(b);
        assert_eq!(
            (binary(64 << 30), binary(1536 << 20), binary(0)),
            ("64 GiB".into(), "1.5 GiB".into(), "0 B".into())
        );
        assert_eq!(decimal_size(960_197_124_096), "960 GB");
        assert_eq!((decimal_size(7_681_501_126_656), decimal_size(999)), ("7.7 TB".into(), "999 B".into()));
        assert_eq!(binary(u64::MAX), "16 EiB");
        assert_eq!((speed(25_000), speed(2_500), speed(100)), ("25 Gb/s".into(), "2.5 Gb/s".into(), "100 Mb/s".into()));
    }
}
