//! Plain tables for terminals: columns as wide as their widest cell, no trailing blanks.

/// Lays rows out under a heading.
pub(super) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(heading.get(column).map(|h| h.chars().count())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    let mut text = line(&mut heading.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// How long ago, in the largest unit that fits.
pub(super) fn ago(then_ms: i64, now_ms: i64) -> String {
    let seconds = (now_ms - then_ms).max(0) / 1000;
    match seconds {
        _ if then_ms <= 0 => "never".to_owned(),
        0..=119 => format!("{seconds} s ago"),
        120..=7199 => format!("{} min ago", seconds / 60),
        7200..=172_799 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// How far ahead, in the largest unit that fits.
pub(super) fn ahead(then_ms: i64, now_ms: i64) -> String {
    match (then_ms - now_ms) / 1000 {
        ..=0 => "now".to_owned(),
        seconds @ 1..=119 => format!("in {seconds} s"),
        seconds @ 120..=7199 => format!("in {} min", seconds / 60),
        seconds @ 7200..=172_799 => format!("in {} h", seconds / 3600),
        seconds => format!("in {} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![vec!["a".into(), "long cell".into()], vec!["name".into(), String::new()]];
        assert_eq!(table(&["N", "WORDS"], &rows), "N     WORDS\na     long cell\nname\n");
    }

    #[test]
    fn ages() {
        assert_eq!((ago(0, 5), ago(1000, 61_000)), ("never".into(), "60 s ago".into()));
        assert_eq!((ahead(5, 5), ahead(61_000, 1000)), ("now".into(), "in 60 s".into()));
        assert_eq!((ago(1, 7_200_001), ago(1, 120_001)), ("2 h ago".into(), "2 min ago".into()));
    }
}
