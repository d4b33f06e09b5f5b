//! `kiln machine log`: one boot's lines and stages, in the order of time.

use super::At;
use super::client::Client;
use super::error::CliError;
use super::output::{pretty, print, segment};
use crate::view::{BootView, LogEntry, LogView, MachineView};

/// Prints a boot: how many back, with `-held` what came while its machine was quarantined. With `follow` goes on until it is
/// interrupted.
pub(super) async fn log(machine: &str, boot: &str, follow: bool, at: &At, json: bool) -> Result<(), CliError> {
    let client = Client::new(at)?;
    let name = segment(machine);
    let mut view: LogView = client.get(&format!("machines/{name}/log?boot={boot}")).await?;
    let boot_id = view.boot_id.clone();
    // Whole: long logs come in pieces.
    while let Some(last) = view.entries.last() {
        let more = more(&client, &name, &boot_id, Some(last.number), false).await?;
        if more.is_empty() {
            break;
        }
        view.entries.extend(more);
    }
    if json {
        return print(&pretty(&view)?);
    }
    let (mut shown, mut last) = (Shown::default(), None);
    let mut entries = view.entries;
    loop {
        last = entries.last().map_or(last, |entry| Some(entry.number));
        let machine: MachineView = client.get(&format!("machines/{name}")).await?;
        let staged = boot_id.strip_suffix("-held").unwrap_or(&boot_id);
        let boot = machine.boots.iter().find(|b| b.boot_id == staged);
        print(&shown.lines(boot, &entries))?;
        if !follow {
            return Ok(());
        }
        // Stages that came meanwhile are looked at when the server answers, with a line or without.
        entries = more(&client, &name, &boot_id, last, true).await?;
    }
}

/// The lines behind a number; with `wait` the server waits for one, for a while.
async fn more(
    client: &Client,
    name: &str,
    boot_id: &str,
    after: Option<u64>,
    wait: bool,
) -> Result<Vec<LogEntry>, CliError> {
    let after = after.map_or_else(String::new, |number| format!("&after={number}"));
    let path = format!("machines/{name}/log?boot={boot_id}&wait={wait}{after}");
    let next: LogView = client.get_slowly(&path).await?;
    Ok(next.entries)
}

/// What was printed of a boot already.
#[derive(Default)]
struct Shown {
    stages: usize,
}

impl Shown {
    /// Lines, and the stages between them that were not printed yet.
    fn lines(&mut self, boot: Option<&BootView>, entries: &[LogEntry]) -> String {
        let stages = boot.map_or(&[][..], |b| &b.stages);
        let mut rows: Vec<(i64, String)> =
            entries.iter().map(|e| (e.at_ms, row(e.at_ms, &e.source, &e.text))).collect();
        let new: Vec<_> = stages.iter().skip(self.stages).collect();
        self.stages += new.len();
        for s in new {
            let words = [s.kind.as_ref().map(|k| format!("[{k}]")), s.message.clone()];
            let words: Vec<String> = words.into_iter().flatten().collect();
            let text = format!("{} {} {}", s.stage.label(), s.state, words.join(" "));
            rows.push((s.at_ms, row(s.at_ms, "=====", text.trim_end())));
        }
        // A later answer goes behind what is on the screen, whatever its times say.
        rows.sort_by_key(|r| r.0);
        rows.into_iter().map(|(_, row)| row).collect()
    }
}

fn row(at_ms: i64, source: &str, text: &str) -> String {
    let ms = at_ms.rem_euclid(86_400_000);
    let (s, ms) = (ms / 1000, ms % 1000);
    format!("{:02}:{:02}:{:02}.{ms:03}  {source:<7}  {text}\n", s / 3600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::StageView;
    use kiln_protocol::{Stage, Via};

    #[test]
    fn lines_and_stages_are_one_story() {
        let entry = |number, at_ms, text: &str| LogEntry {
            number,
            at_ms,
            source: "kernel".into(),
            level: 6,
            text: text.into(),
        };
        let stage =
            |stage, at_ms| StageView { stage, state: "done".into(), at_ms, agent_ms: None, kind: None, message: None };
        let boot = BootView {
            boot_id: "b".into(),
            via: Via::Cold,
            image: None,
            release: None,
            started_ms: 0,
            stages: vec![stage(Stage::Dhcp, 500), stage(Stage::Start, 2_000), stage(Stage::Modules, 3_000)],
        };
        let entries = [entry(0, 1_000, "Linux version"), entry(1, 2_500, "virtio_net")];
        let mut shown = Shown::default();
        let expected = "00:00:00.500  =====    Asks for an address done\n\
                        00:00:01.000  kernel   Linux version\n\
                        00:00:02.000  =====    Agent starts done\n\
                        00:00:02.500  kernel   virtio_net\n\
                        00:00:03.000  =====    Loads drivers done\n";
        assert_eq!(shown.lines(Some(&boot), &entries), expected);
        assert_eq!(shown.lines(Some(&boot), &[entry(2, 9_000, "late")]), "00:00:09.000  kernel   late\n");
        assert_eq!(shown.lines(None, &[]), "");
    }
}
