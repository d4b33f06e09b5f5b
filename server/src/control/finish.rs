//! What a step leaves to be done: its commits are awaited, and only then others are told.

use super::{Control, Pending, Told};
use crate::error::ControlError;
use crate::view::MachineView;
use kiln_protocol::MachineId;
use std::sync::Arc;

/// What others are to hear once it is stored. They hear it too when whoever waits for that goes, because its connection
/// breaks: the step is taken, and the store keeps the order, so that no answer overtakes it.
struct Untold<'a> {
    control: &'a Control,
    pending: Pending,
}

impl Drop for Untold<'_> {
    fn drop(&mut self) {
        self.control.tell(std::mem::take(&mut self.pending));
    }
}

impl Control {
    /// Waits for the commits, then tells everybody. Where one fails, memory has what the database has when this returns.
    pub(crate) async fn finish(&self, pending: Pending) -> Result<(), ControlError> {
        let mut untold = Untold { control: self, pending };
        let mut failed = None;
        for commit in std::mem::take(&mut untold.pending.commits) {
            if let Err(error) = commit.wait().await {
                failed.get_or_insert(error);
            }
        }
        let Some(error) = failed else { return Ok(()) };
        let Pending { touched, gone, wake, .. } = std::mem::take(&mut untold.pending);
        self.restore().await;
        // What was said of it is not so; what others see of these machines is what they are now.
        let gone: Vec<MachineId> = {
            let inner = self.look();
            gone.into_iter().filter(|id| !inner.machines.contains_key(id)).collect()
        };
        untold.pending = Pending { touched, gone, wake, ..Pending::default() };
        Err(error.into())
    }

    pub(super) fn tell(&self, pending: Pending) {
        if !pending.gone.is_empty() {
            let (logs, gone) = (Arc::clone(&self.logs), pending.gone.clone());
            tokio::task::spawn_blocking(move || gone.iter().for_each(|id| logs.forget(id)));
        }
        for line in pending.lines {
            if line.warn {
                tracing::warn!(machine = line.machine, stage = line.stage, "{}", line.text);
            } else {
                tracing::info!(machine = line.machine, stage = line.stage, "{}", line.text);
            }
        }
        if self.told.receiver_count() > 0 {
            for id in &pending.touched {
                // Under the lock: nobody is told of an older view behind a newer one.
                let inner = self.look();
                if let Some(machine) = inner.machines.get(id) {
                    let _ = self.told.send(Told::Machine(Arc::new(MachineView::of(machine))));
                }
            }
            for id in pending.gone {
                // Likewise: one that has come again meanwhile is there.
                let inner = self.look();
                if !inner.machines.contains_key(&id) {
                    let _ = self.told.send(Told::Gone(id));
                }
            }
        }
        if pending.wake {
            self.wake();
        }
    }
}
