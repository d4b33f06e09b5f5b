//! What the agent says, on its way to the console: in its order, by a thread that may wait for the console where the agent must not.

use super::note;
use crate::console::Writer;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Lines under way, of [`super::SAID`] bytes and a little more at most; what comes behind them is passed over.
const ROOM: usize = 256;
/// The last lines have so long.
const LAST: Duration = Duration::from_secs(2);

/// None before [`begin`], and in a program that ends by itself: that waits for its console.
static OUT: OnceLock<Out> = OnceLock::new();

struct Out {
    writer: Writer,
    /// Lines that the console had no room for, and does not know of.
    missed: AtomicUsize,
}

impl Out {
    fn new(writer: Writer) -> Self {
        Self { writer, missed: AtomicUsize::new(0) }
    }

    fn say(&self, line: &str) {
        let missed = self.missed.load(Ordering::Relaxed);
        if missed > 0
            && self.writer.put(format!("kiln-agent: {missed} lines are missing here: this console took none\n"))
        {
            self.missed.fetch_sub(missed, Ordering::Relaxed);
        }
        if !self.writer.put(format!("{line}\n")) && self.missed.fetch_add(1, Ordering::Relaxed) == 0 {
            // For the server alone, and once until the console takes something again.
            note(4, "kiln-agent: the console takes nothing: it misses what is said from here on");
        }
    }
}

/// From here on nobody in this process waits for the console.
pub fn begin() {
    let stdout = std::io::stdout().as_fd().try_clone_to_owned().ok();
    let Some(writer) = stdout.and_then(|fd| Writer::new(fd.into(), ROOM)) else { return };
    // Once in a process.
    let _ = OUT.set(Out::new(writer));
    // It takes no lock: whoever panics may have one.
    std::panic::set_hook(Box::new(|panic| {
        if let Some(out) = OUT.get() {
            out.writer.put(format!("kiln-agent: {panic}\n"));
        }
        flush();
    }));
}

/// One line for the console alone.
pub fn show(warns: bool, line: &str) {
    match OUT.get() {
        Some(out) => out.say(line),
        None if warns => std::eprintln!("{line}"),
        None => std::println!("{line}"),
    }
}

/// Before the machine, or this program, ends: waits for a moment until the console has all that was said.
pub fn flush() {
    if let Some(out) = OUT.get() {
        out.writer.drain(LAST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::fd::OwnedFd;
    use std::time::Instant;

    #[test]
    fn a_console_that_takes_nothing_holds_up_nobody_and_is_told_what_it_missed() {
        let (reader, pipe) = std::io::pipe().unwrap();
        let out = Out::new(Writer::new(OwnedFd::from(pipe).into(), ROOM).unwrap());
        out.say("first");
        out.writer.drain(Duration::from_secs(20));
        assert_eq!(out.writer.waiting(), 0, "what has room is written at once");
        // Until the pipe holds no more, and the thread waits for it with one in its hand.
        let line = |number: usize| format!("{number:>999}");
        let mut filled = 0;
        while out.writer.waiting() == 0 {
            out.say(&line(filled));
            filled += 1;
            // Longer than any host keeps the thread from writing.
            out.writer.drain(Duration::from_secs(5));
        }
        let begun = Instant::now();
        for number in filled..filled + 1000 {
            out.say(&line(number));
        }
        let missed = out.missed.load(Ordering::Relaxed);
        assert_eq!(missed, 1000 - ROOM);
        out.writer.drain(Duration::from_millis(20));
        assert!(
            out.writer.waiting() > 0 && begun.elapsed() < Duration::from_secs(20),
            "the last are not waited for for ever"
        );

        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        assert_eq!(lines.next().unwrap(), "first");
        for number in 0..filled + ROOM {
            assert_eq!(lines.next().unwrap(), line(number), "in their order");
        }
        out.say("it takes something again");
        let told = lines.next().unwrap();
        assert_eq!(told, format!("kiln-agent: {missed} lines are missing here: this console took none"));
        assert_eq!(lines.next().unwrap(), "it takes something again");
        out.say("and all of it");
        assert_eq!(lines.next().unwrap(), "and all of it");
        out.writer.drain(Duration::from_secs(20));
        assert_eq!((out.writer.waiting(), out.missed.load(Ordering::Relaxed)), (0, 0));
    }
}
