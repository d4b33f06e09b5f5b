//! Compares a log with the one in the documents: the words must be the same, in the same order; what differs from boot
//! to boot (times, numbers, hashes, paths) is masked on both sides.

/// The lines of `page`'s code block that `log` does not have in this order, and lines of `log` that the page lacks.
pub fn differences(page: &str, log: &str) -> Vec<String> {
    let block = page.split("```").nth(1).unwrap_or_default();
    let masked = |text: &str| -> Vec<String> {
        let lines = text.lines().map(mask).filter(|l| !l.is_empty());
        // The services start side by side: which of them listens first differs.
        let (mut listens, others): (Vec<String>, Vec<String>) = lines.partition(|l| l.contains(" listens on "));
        listens.sort();
        listens.into_iter().chain(others).collect()
    };
    let (expected, got) = (masked(block), masked(log));
    let mut different = Vec::new();
    let mut at = 0;
    for line in &expected {
        match got[at..].iter().position(|l| l == line) {
            Some(skipped) => {
                different.extend(got[at..at + skipped].iter().map(|l| format!("only in the log: {l}")));
                at += skipped + 1;
            }
            None => different.push(format!("only in the page: {line}")),
        }
    }
    different.extend(got[at..].iter().map(|l| format!("only in the log: {l}")));
    different
}

/// Words without what changes: a word with a `/` that begins with one is a path, long hex is a hash, digits are a number.
fn mask(line: &str) -> String {
    let word = |word: &str| -> String {
        if word.starts_with('/') {
            return "PATH".to_owned();
        }
        let mut out = String::new();
        let mut rest = word;
        while let Some(first) = rest.chars().next() {
            let hex = rest.bytes().take_while(u8::is_ascii_hexdigit).count();
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let skip = match (hex, digits) {
                (hex, _) if hex >= 16 => {
                    out.push_str("HASH");
                    hex
                }
                (_, digits) if digits > 0 => {
                    out.push('N');
                    digits
                }
                (_, _) => {
                    out.push(first);
                    first.len_utf8()
                }
            };
            rest = &rest[skip..];
        }
        out
    };
    line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changes_is_masked() {
        let page = "words\n```\n10:11:12  kiln   listens on /srv/kiln/x\n10:11:13  rack-1  has b/aaaaaaaaaaaaaaaa11/kiln.efi (5 bytes)\n```\n";
        let same =
            "00:00:00 kiln listens on /tmp/else\n00:00:01  rack-1  has b/bbbbbbbbbbbbbbbb22/kiln.efi (77 bytes)\n";
        assert!(differences(page, same).is_empty(), "{:?}", differences(page, same));
        let other = same.replace("listens", "hears");
        assert_eq!(differences(page, &other).len(), 2);
        assert_eq!(differences(page, "").len(), 2);
        assert_eq!(differences(page, &format!("{same}more\n")), ["only in the log: more"]);
        let (one, two) = ("1:1 kiln listens on 1: a\n", "2:2 kiln listens on 2: b\n");
        assert!(differences(&format!("```\n{one}{two}```"), &format!("{two}{one}")).is_empty());
    }
}
