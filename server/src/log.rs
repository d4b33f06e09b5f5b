//! Log lines: for a person on a terminal, JSON elsewhere.
//!
//! A person's line is: time, machine, stage, words, then other fields as `name=value`.

use clap::ValueEnum;
use kiln_protocol::printable;
use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For a person.
    Text,
    /// One JSON object a line.
    Json,
}

/// Sends log lines to standard error. A second call changes nothing.
pub(crate) fn start(format: Option<LogFormat>) {
    let terminal = io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json });
    let filter = EnvFilter::try_from_env("KILN_LOG").unwrap_or_else(|_| EnvFilter::new("info,sqlx=warn"));
    // A line that cannot be written (a full disk) is lost: to say so on standard error would end the task that wrote it.
    let builder = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false).with_writer(io::stderr);
    let _ = match format {
        LogFormat::Text => builder.with_ansi(terminal).event_format(Lines { terminal }).try_init(),
        LogFormat::Json => builder.with_writer(|| TameJson(io::stderr())).json().flatten_event(true).try_init(),
    };
}

/// JSON keeps C1 controls and marks that turn text round as they are; here they are escaped as JSON may.
struct TameJson<W>(W);

impl<W: io::Write> io::Write for TameJson<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A line comes whole.
        self.0.write_all(crate::cli::tame(&String::from_utf8_lossy(bytes)).as_bytes())?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

struct Lines {
    terminal: bool,
}

#[derive(Default)]
struct Words {
    machine: String,
    stage: String,
    message: String,
    rest: String,
}

impl Words {
    fn put(&mut self, field: &Field, text: &str) {
        match field.name() {
            "machine" => text.clone_into(&mut self.machine),
            "stage" => text.clone_into(&mut self.stage),
            "message" => text.clone_into(&mut self.message),
            "error" => {
                let _ = write!(self.rest, ": {text}");
            }
            name => {
                let _ = write!(self.rest, " {name}={text}");
            }
        }
    }
}

impl Visit for Words {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, &format!("{value:?}"));
    }
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut words = Words::default();
        event.record(&mut words);
        let time =
            jiff::Timestamp::now().to_zoned_datetime(jiff::tz::TimeZone::system()).strftime("%H:%M:%S").to_string();
        writeln!(writer, "{}", line(&time, *event.metadata().level(), self.terminal, &words))
    }
}

fn line(time: &str, level: Level, colour: bool, words: &Words) -> String {
    let mark = match level {
        Level::ERROR => "error ",
        Level::WARN => "! ",
        Level::INFO | Level::DEBUG | Level::TRACE => "",
    };
    let (on, off) = match level {
        Level::ERROR if colour => ("\x1b[31m", "\x1b[0m"),
        Level::WARN if colour => ("\x1b[33m", "\x1b[0m"),
        _ => ("", ""),
    };
    let subject = if words.machine.is_empty() { "kiln" } else { &words.machine };
    let stage = match (words.stage.is_empty(), words.message.is_empty()) {
        (true, _) => String::new(),
        (false, true) => words.stage.clone(),
        (false, false) => format!("{}: ", words.stage),
    };
    // What others say goes to a terminal: nothing that it would obey, or show in another order.
    let spaced = |text: &str| text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
    let text = printable(&spaced(&format!("{mark}{stage}{}{}", words.message, words.rest)));
    let subject = printable(&spaced(subject));
    format!("{time}  {on}{subject:<12}  {text}{off}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_as_sentences() {
        let words = |machine: &str, stage: &str, message: &str, rest: &str| Words {
            machine: machine.into(),
            stage: stage.into(),
            message: message.into(),
            rest: rest.into(),
        };
        let info = |w: &Words| line("12:00:00", Level::INFO, false, w);
        assert_eq!(info(&words("", "", "listens", " port=1")), "12:00:00  kiln          listens port=1");
        assert_eq!(info(&words("rack-1", "Agent starts", "", "")), "12:00:00  rack-1        Agent starts");
        let bad = words("rack-1", "Finds its boot server", "no\x1b[2J answer", "");
        assert_eq!(
            line("12:00:00", Level::WARN, false, &bad),
            "12:00:00  rack-1        ! Finds its boot server: no [2J answer"
        );
    }
}
