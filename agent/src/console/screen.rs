//! What a person in front of the machine sees: a page on a text screen, a block of lines on a serial console. Pure.

use super::qr;
use kiln_protocol::{ApprovalCode, Stage, StageState, cut_at, printable};
use std::fmt::{Arguments, Write};

/// The text screen that every kernel has; a larger one shows the page in its corner.
const COLUMNS: usize = 80;
const ROWS: usize = 25;
/// Width of a block's lines on a serial console.
const WIDTH: usize = 100;

/// All that is shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// What the server calls it; the machine's id until it has said so.
    pub name: String,
    /// The release that this boot image holds, or that runs.
    pub release: String,
    /// Address and interface.
    pub address: String,
    /// The boot server.
    pub server: String,
    pub stage: Option<(Stage, StageState)>,
    pub code: Option<ApprovalCode>,
    /// The machine's page.
    pub page: Option<String>,
    /// What this boot can promise, as the server has it; empty until it has said so.
    pub protection: String,
}

/// How the machine stands, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Booting,
    Waiting,
    Failing,
    Restarting,
    Healthy,
    Leaving,
}

impl Mood {
    fn word(self) -> &'static str {
        match self {
            Self::Booting => "BOOTING",
            Self::Waiting => "WAITING",
            Self::Failing => "TRYING AGAIN",
            Self::Restarting => "RESTARTING",
            Self::Healthy => "HEALTHY",
            Self::Leaving => "REIMAGING",
        }
    }

    /// SGR colours of the word on a text screen: red is for what needs a person.
    fn colours(self) -> &'static str {
        match self {
            Self::Booting | Self::Leaving => "1;37;44",
            Self::Waiting => "1;37;45",
            Self::Failing | Self::Restarting => "1;37;41",
            Self::Healthy => "1;37;42",
        }
    }
}

impl Status {
    pub fn mood(&self) -> Mood {
        match &self.stage {
            None | Some((_, StageState::Started)) => match self.stage {
                Some((Stage::Going, _)) => Mood::Leaving,
                Some(_) | None => Mood::Booting,
            },
            Some((stage, StageState::Done)) => match stage {
                Stage::Healthy | Stage::Prefetch | Stage::Grant | Stage::Drain => Mood::Healthy,
                Stage::Going => Mood::Leaving,
                Stage::Dhcp
                | Stage::Program
                | Stage::Start
                | Stage::Modules
                | Stage::Network
                | Stage::Server
                | Stage::Metadata
                | Stage::Assignment
                | Stage::Root
                | Stage::Verity
                | Stage::Handover
                | Stage::Service
                | Stage::Health
                | Stage::Wipe => Mood::Booting,
            },
            Some((_, StageState::Waiting { .. })) => Mood::Waiting,
            Some((_, StageState::Failed(f))) if f.retry_in_ms.is_some() => Mood::Failing,
            Some((_, StageState::Failed(_))) => Mood::Restarting,
        }
    }

    /// The reason, with its deadline.
    fn why(&self) -> String {
        match &self.stage {
            Some((_, StageState::Failed(f))) => {
                let then = match f.retry_in_ms {
                    Some(ms) => format!("try {} failed, the next in {} s", f.attempt, ms.div_ceil(1000)),
                    None => "given up: the machine restarts".to_owned(),
                };
                format!("{} ({}; {then})", f.message, f.kind)
            }
            Some((_, StageState::Waiting { reason })) => reason.clone(),
            Some((_, StageState::Started | StageState::Done)) | None => String::new(),
        }
    }

    /// What the person can do.
    fn advice(&self) -> &'static str {
        match (self.mood(), self.stage.as_ref().map(|(stage, _)| *stage)) {
            (Mood::Waiting, _) if self.code.is_some() => {
                "compare the code with the one that the machine's page or `kiln machine show` names, then approve it"
            }
            (Mood::Waiting, _) => "nothing is wrong: it goes on when the boot server lets it",
            (Mood::Failing | Mood::Restarting, Some(Stage::Network)) => {
                "check the cable and the switch port, then the site's DHCP server; it goes on by itself"
            }
            (Mood::Failing | Mood::Restarting, Some(Stage::Server)) => {
                "check that `kiln serve` runs and that no firewall closes its port; it goes on by itself"
            }
            (Mood::Failing | Mood::Restarting, _) => {
                "look the word in brackets up in operations.md; it tries by itself"
            }
            (Mood::Booting | Mood::Leaving, _) => "nothing: it goes on by itself",
            (Mood::Healthy, _) => "nothing",
        }
    }

    fn stage_label(&self) -> &'static str {
        self.stage.as_ref().map_or("", |(stage, _)| stage.label())
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        let code = self.code.as_ref().map(ToString::to_string);
        let all = [
            ("stage", self.stage_label().to_owned()),
            ("why", self.why()),
            ("release", self.release.clone()),
            ("class", self.protection.clone()),
            ("address", self.address.clone()),
            ("server", self.server.clone()),
            ("code", code.unwrap_or_default()),
            ("page", self.page.clone().unwrap_or_default()),
            ("to do", self.advice().to_owned()),
        ];
        // The server's and the network's words: nothing in them may move the cursor.
        let shown = |(name, text): (&'static str, String)| (name, printable(cut_at(&text, 400)));
        all.into_iter().map(shown).filter(|(_, text)| !text.is_empty()).collect()
    }

    /// What must differ for another block on a serial console: not every step is news there.
    pub fn news(&self) -> (String, &'static str, String) {
        let kind = match &self.stage {
            Some((_, StageState::Failed(f))) => f.kind.clone(),
            Some((_, StageState::Waiting { reason })) => reason.clone(),
            Some((_, StageState::Started | StageState::Done)) | None => String::new(),
        };
        let code = self.code.as_ref().map(ToString::to_string).unwrap_or_default();
        let page = self.page.as_deref().unwrap_or_default();
        (kind, self.mood().word(), format!("{page} {code} {}", self.protection))
    }

    /// The block; `with_qr` where the page is new to this console.
    pub fn block(&self, with_qr: bool) -> String {
        let mut text = format!("\r\n+--- kiln: {}: {} ---\r\n", printable(&self.name), self.mood().word());
        for (name, value) in self.rows() {
            for (n, line) in wrap(&value, WIDTH - 12).into_iter().enumerate() {
                put(&mut text, format_args!("| {:<8} {line}\r\n", if n == 0 { name } else { "" }));
            }
        }
        text += "+---\r\n";
        if let Some(qr) = self.page.as_deref().filter(|_| with_qr).and_then(qr::encode) {
            for line in qr.blocks(4) {
                put(&mut text, format_args!("{line}\r\n"));
            }
        }
        text
    }

    /// The whole screen: cleared, the words on the left, the page's QR code on the right.
    pub fn page(&self) -> String {
        // ECMA-48: attributes off, cursor home, clear; and no cursor (DECTCEM).
        let mut text = "\x1b[0m\x1b[?25l\x1b[H\x1b[2J".to_owned();
        let qr = self.page.as_deref().and_then(qr::encode);
        // The quiet zone is four modules (9.1); the largest symbol has room for three, which readers bear.
        let quiet = |qr: &qr::Qr| if qr.size + 8 <= 2 * (ROWS - 1) { 4 } else { 3 };
        let code: Vec<String> = qr.as_ref().map(|qr| qr.half_blocks(quiet(qr))).unwrap_or_default();
        let across = code.first().map_or(0, |line| line.chars().count());
        let width = COLUMNS - 1 - across - usize::from(across > 0);
        let mood = self.mood();
        let mut left = vec![
            (String::new(), "1", format!("Kiln  {}", printable(cut_at(&self.name, 60)))),
            (String::new(), mood.colours(), format!(" {} ", mood.word())),
            (String::new(), "0", String::new()),
        ];
        for (name, value) in self.rows() {
            let attributes = if name == "code" { "1;7" } else { "0" };
            for (n, line) in wrap(&value, width.saturating_sub(9).max(12)).into_iter().enumerate() {
                left.push((format!("{:<8} ", if n == 0 { name } else { "" }), attributes, line));
            }
        }
        for (row, (name, attributes, line)) in left.into_iter().take(ROWS - 1).enumerate() {
            let line: String = line.chars().take(width - name.len()).collect();
            put(&mut text, format_args!("\x1b[{};1H{name}\x1b[{attributes}m{line}\x1b[0m", row + 1));
        }
        for (row, line) in code.into_iter().enumerate() {
            put(&mut text, format_args!("\x1b[{};{}H\x1b[1;37;40m{line}\x1b[0m", row + 1, COLUMNS - across));
        }
        put(&mut text, format_args!("\x1b[{ROWS};1H"));
        text
    }
}

fn put(text: &mut String, words: Arguments<'_>) {
    text.write_fmt(words).expect("writing to a String cannot fail");
}

/// Lines of at most `width` characters, broken at spaces where there are some.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split(' ') {
        let mut word: Vec<char> = word.chars().collect();
        loop {
            let space = usize::from(used > 0);
            let line = lines.last_mut().expect("there is always one");
            if used + space + word.len() <= width {
                line.extend(std::iter::repeat_n(' ', space).chain(word.iter().copied()));
                used += space + word.len();
                break;
            }
            if used == 0 {
                let rest = word.split_off(width);
                line.extend(word);
                word = rest;
            }
            lines.push(String::new());
            used = 0;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::Failure;

    fn status() -> Status {
        Status {
            name: "rack-7".into(),
            release: "minimal/2".into(),
            address: "10.77.0.10/24 on eth0".into(),
            server: "https://10.77.0.1:8443".into(),
            stage: None,
            code: None,
            page: None,
            protection: String::new(),
        }
    }

    /// The screen's characters, by row, as a terminal would show them.
    fn drawn(page: &str) -> Vec<Vec<char>> {
        let mut screen = vec![vec![' '; COLUMNS]; ROWS];
        let (mut x, mut y, mut chars) = (0, 0, page.chars().peekable());
        while let Some(c) = chars.next() {
            if c != '\u{1b}' {
                screen[y][x] = c;
                x += 1;
                continue;
            }
            assert_eq!(chars.next(), Some('['));
            let numbers: String = std::iter::from_fn(|| chars.next_if(|c| !c.is_ascii_alphabetic())).collect();
            if chars.next() == Some('H') {
                let (row, column) = numbers.split_once(';').unwrap_or(("1", "1"));
                (y, x) = (row.parse::<usize>().unwrap() - 1, column.parse::<usize>().unwrap() - 1);
            }
        }
        screen
    }

    #[test]
    fn words_and_code_have_room_beside_each_other() {
        let page = "http://192.168.100.100:8080/m/4c4c4544-0042-3510-8052-b4c04f4b3332";
        let reason =
            "nobody has approved it: run `kiln machine approve 4c4c4544-0042-3510-8052-b4c04f4b3332 --role ROLE`";
        let waiting = Status {
            name: "4c4c4544-0042-3510-8052-b4c04f4b3332".into(),
            stage: Some((Stage::Assignment, StageState::Waiting { reason: reason.into() })),
            code: Some("ABCD2345".parse().unwrap()),
            page: Some(page.into()),
            ..status()
        };
        let screen = drawn(&waiting.page());
        let text: Vec<String> = screen.iter().map(|row| row.iter().collect()).collect();
        for words in ["WAITING", "ABCD-2345", "minimal/2", "10.77.0.10/24", "to do"] {
            assert!(text.iter().any(|line| line.contains(words)), "{words} is not on\n{}", text.join("\n"));
        }
        let code = qr::encode(page).unwrap().half_blocks(4);
        for (row, line) in code.iter().enumerate() {
            let right: String = screen[row][COLUMNS - 1 - line.chars().count()..COLUMNS - 1].iter().collect();
            assert_eq!(right, *line, "row {row}");
        }
        let block = waiting.block(true);
        assert!(block.contains("| code     ABCD-2345") && block.contains(&qr::encode(page).unwrap().blocks(4)[9]));
        assert!(!waiting.block(false).contains('█'));
        // The longest page there is a code for.
        let longest = Status { page: Some(format!("http://{}", "x".repeat(127))), ..waiting };
        assert_eq!(drawn(&longest.page()).len(), ROWS);
    }

    #[test]
    fn every_wait_has_a_reason_a_deadline_and_something_to_do() {
        let failure = |retry_in_ms| {
            let (kind, message) = ("network-no-offer".to_owned(), "no DHCP offer\x1b[2J\non eth0".to_owned());
            StageState::Failed(Failure { kind, message, attempt: 2, retry_in_ms })
        };
        let failing = Status { stage: Some((Stage::Network, failure(Some(3_200)))), ..status() };
        let block = failing.block(false);
        assert!(block.contains("TRYING AGAIN") && block.contains("try 2 failed, the next in 4 s"), "{block}");
        assert!(block.contains("check the cable") && !block.contains('\u{1b}'), "{block}");
        assert!(block.lines().all(|line| line.chars().count() <= WIDTH));
        let over = Status { stage: Some((Stage::Root, failure(None))), ..status() };
        assert!(over.block(false).contains("RESTARTING") && over.why().contains("the machine restarts"));
        assert_ne!(failing.news(), over.news());
        let again = Status { stage: Some((Stage::Network, failure(Some(9_000)))), ..status() };
        assert_eq!(failing.news(), again.news(), "the next try of the same is no news");
        let proven = Status { protection: "attested, by kexec\x1b[2J".into(), ..failing.clone() };
        let block = proven.block(false);
        assert!(block.contains("| class    attested, by kexec\\u{1b}[2J\r\n") && !block.contains('\x1b'), "{block}");
        assert_ne!(failing.news(), proven.news());
        let drawn = drawn(&proven.page());
        assert!(drawn.iter().any(|row| row.iter().collect::<String>().starts_with("class    attested, by kexec")));
        let healthy = Status { stage: Some((Stage::Healthy, StageState::Done)), ..status() };
        assert_eq!((healthy.mood(), healthy.why().as_str()), (Mood::Healthy, ""));
    }

    #[test]
    fn long_words_are_broken() {
        assert_eq!(wrap("ab cd efghijk l", 5), ["ab cd", "efghi", "jk l"]);
        assert_eq!(wrap("", 5), [""]);
    }
}
