//! The next release: what a reply claims is verified, fetched, asked for again and loaded. Nothing of it is believed
//! before.

use super::duty::{Event, Target, Trouble, Wanted};
use super::{Check, Done, Job, Service};
use crate::change::{self, Otherwise, Prefetch};
use crate::error::AgentError;
use crate::plan::{self, Plan};
use crate::verifier::{Answer, Verifier};
use kiln_protocol::{Assignment, Decision, Grant, Nonce, ReleaseId, Reply, RoleSettings, Stage, Via};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An order that was refused is looked at again after so long.
pub(super) const ORDER_PAUSE: Duration = Duration::from_secs(60);

/// What the role selects, by what is signed.
pub(super) type Selects = Pin<Box<dyn Future<Output = Result<RoleSettings, AgentError>>>>;

impl Service {
    /// If the newest reply claims that a wipe is ordered: whether that is true. The same order is not looked at again for
    /// a while after it was refused.
    pub(super) fn check_wipe(&self) -> Option<Check> {
        let (reply, nonce) = self.newest.clone()?;
        let text = reply.desired.order.as_ref()?.order.clone();
        let envelope: serde_json::Value = serde_json::from_str(&text).ok()?;
        let again = self.refused.as_ref().is_some_and(|(old, at)| *old == text && at.elapsed() < ORDER_PAUSE);
        if again || envelope.get("signed")?.get("action")?.as_str() != Some("wipe") {
            return None;
        }
        let (verifier, here) = (Rc::clone(&self.verifier), self.here.clone());
        Some(Box::pin(async move {
            let verifier = &mut *verifier.lock().await;
            let checked = match verifier.verify_metadata(&here).await {
                Ok(verified) => match verifier.check_reply(&verified, reply, &nonce) {
                    Ok(Answer::Wipe(_)) => Ok(()),
                    Ok(Answer::Wait(_) | Answer::Assigned { .. }) => Err(AgentError::Superseded),
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            };
            (text, checked)
        }))
    }

    /// If the newest reply claims that the role selects something else than what is known: whether that is signed. A claim
    /// that did not hold is not looked at again for a while.
    pub(super) fn check_settings(&self) -> Option<Selects> {
        let (reply, nonce) = self.newest.clone()?;
        let again = self.disbelieved.is_some_and(|at| at.elapsed() < ORDER_PAUSE);
        if again || self.claimed.as_ref().is_none_or(|claimed| *claimed == self.settings) {
            return None;
        }
        let (verifier, here) = (Rc::clone(&self.verifier), self.here.clone());
        Some(Box::pin(async move {
            let verifier = &mut *verifier.lock().await;
            let verified = verifier.verify_metadata(&here).await?;
            match verifier.check_reply(&verified, reply, &nonce)? {
                Answer::Assigned { assignment, .. } => Ok(assignment.settings),
                Answer::Wipe(_) | Answer::Wait(_) => Err(AgentError::Superseded),
            }
        }))
    }

    /// What came of it.
    pub(super) fn select(&mut self, checked: Result<RoleSettings, AgentError>) -> Event {
        match checked {
            Ok(settings) => {
                if settings.exec != self.settings.exec && self.exec.is_some() {
                    eprintln!("kiln-agent: the role's choice for the allow-list holds from the next boot on");
                }
                self.settings = settings;
                self.order_boot();
                Event::Time
            }
            // The next reply names something else.
            Err(AgentError::Superseded) => Event::Time,
            Err(error) => {
                self.journal.failed(Stage::Assignment, &error, 1, Some(ORDER_PAUSE));
                self.disbelieved = Some(Instant::now());
                Event::News
            }
        }
    }

    /// Verifies the assignment against current metadata, and fetches and verifies the release.
    pub(super) fn fetch(&mut self, target: Target) -> Job {
        let (verifier, prefetch, newest) = (Rc::clone(&self.verifier), self.prefetch.take(), self.newest.clone());
        let (here, next, meter) = (self.here.clone(), self.next.clone(), Arc::clone(&self.meter));
        let disk = self.disk.clone();
        Box::pin(async move {
            let mut verifier = verifier.lock().await;
            let mut prefetch = match prefetch {
                Some(prefetch) => prefetch,
                None => match believe(&mut verifier, &here, &target, newest).await {
                    // What runs once more.
                    Ok((assignment, ..)) if disk.is_some() && target.release == here => {
                        let Some(disk) = disk else { return Event::Time.into() };
                        let renewal = change::prepare_renewal(&mut verifier, &assignment).await;
                        // Reading a slot back takes minutes.
                        drop(verifier);
                        let renewed = match renewal {
                            Ok(renewal) => change::renew(renewal, &disk, &next, &meter).await,
                            Err(error) => Err(error),
                        };
                        return match renewed {
                            Ok(ready) => {
                                Done { event: Event::Fetched(ready.note.clone()), prefetch: None, ready: Some(ready) }
                            }
                            Err(error) => Event::Failed(trouble(Stage::Prefetch, &error, false)).into(),
                        };
                    }
                    Ok((assignment, via, _)) => {
                        // The TPM gives the data's key to a boot through firmware only.
                        let keeps = verifier.boot.site.disk.as_ref().is_some_and(|disk| disk.data.is_some());
                        let via = if keeps { Via::Cold } else { via };
                        let (disk, via, only_kexec) = match disk {
                            Some(_) if verifier.in_memory_only() => (None, Via::Kexec, true),
                            // Firmware started what runs from an EFI system partition that is made anew only by what runs next,
                            // loader and all.
                            Some(disk) if disk.lacks_esp() => (None, Via::Kexec, true),
                            disk => (disk, via, false),
                        };
                        let order = verifier.memory.order(assignment.sequence);
                        Prefetch::new(&assignment, via, &next, meter).onto(disk, order).by_kexec_only(only_kexec)
                    }
                    Err((stage, error)) => return Event::Failed(trouble(stage, &error, false)).into(),
                },
            };
            let given = prefetch.prepare(&mut verifier).await;
            // An operator's order, settings and lists are not to wait for a long transfer.
            drop(verifier);
            match prefetch.fetch(given).await {
                Ok(()) => {
                    let ready = prefetch.into_ready();
                    let note = ready.as_ref().and_then(|ready| ready.note.clone());
                    Done { event: Event::Fetched(note), prefetch: None, ready }
                }
                Err(error) => {
                    let event = Event::Failed(trouble(Stage::Prefetch, &error, prefetch.moved()));
                    Done { event, prefetch: Some(prefetch), ready: None }
                }
            }
        })
    }

    /// Whether the newest reply lets this machine leave for what is ready, by everything that is known now.
    pub(super) fn ask_whether_to_go(&self, target: Target) -> Job {
        let (verifier, newest, here) = (Rc::clone(&self.verifier), self.newest.clone(), self.here.clone());
        Box::pin(async move {
            let verifier = &mut *verifier.lock().await;
            let event = match believe(verifier, &here, &target, newest).await {
                Ok((_, _, Grant::Go)) => Event::MayGo,
                Ok((_, _, Grant::Hold { .. })) => Event::Failed(trouble(Stage::Grant, &AgentError::Superseded, false)),
                Err((stage, error)) => Event::Failed(trouble(stage, &error, false)),
            };
            event.into()
        })
    }

    pub(super) fn load(&self) -> Job {
        let (ready, hung, has_disk) = (self.ready.clone(), self.hung(), self.has_disk());
        // What its firmware starts from it is known. Of a disk that is not open it is not: there a cold boot is the way to try.
        let is_open = self.disk.is_some();
        Box::pin(async move {
            let Some(ready) = ready else { return Event::Loaded(None).into() };
            let going = |error: &AgentError| trouble(Stage::Going, error, false);
            let told = match change::tell_loader(&ready).await {
                Ok(told) => told,
                Err(error) => return Event::Stuck(going(&error)).into(),
            };
            let otherwise = ready.otherwise(has_disk);
            let loaded = change::load(&ready, told, otherwise, hung).await;
            let event = match (loaded, otherwise) {
                (Err(error), Otherwise::Kexec) if is_open => Event::Stuck(going(&error)),
                (loaded, Otherwise::Cold | Otherwise::Kexec) => Event::Loaded(loaded.err().map(|error| going(&error))),
            };
            event.into()
        })
    }
}

/// Everything that stands between a reply's claim and doing it: current metadata, both signatures, the machine, the
/// sequence, the nonce, floor and expiry.
async fn believe(
    verifier: &mut Verifier,
    here: &ReleaseId,
    target: &Target,
    newest: Option<(Reply, Nonce)>,
) -> Result<(Assignment, Via, Grant), (Stage, AgentError)> {
    let verified = verifier.verify_metadata(here).await.map_err(|error| (Stage::Prefetch, error))?;
    let refused = |error| (Stage::Assignment, error);
    let (reply, nonce) = newest.ok_or(refused(AgentError::Superseded))?;
    let answer = verifier.check_reply(&verified, reply, &nonce).map_err(refused)?;
    let Answer::Assigned { assignment, via, grant } = answer else { return Err(refused(AgentError::Superseded)) };
    match plan::decide(here, &assignment, &verifier.memory, &verifier.currency(&verified)).map_err(refused)? {
        Plan::Change(release) if release == target.release && assignment.sequence == target.sequence => {
            Ok((assignment, via, grant))
        }
        // The same release once more, because the machine was put up so long ago.
        Plan::Stay
            if *here == target.release
                && assignment.sequence == target.sequence
                && assignment.rebuild > verifier.put_up =>
        {
            Ok((assignment, via, grant))
        }
        Plan::Change(_) | Plan::Stay => Err(refused(AgentError::Superseded)),
    }
}

pub(super) fn trouble(stage: Stage, error: &AgentError, moved: bool) -> Trouble {
    Trouble { stage, class: error.class(), kind: error.kind().to_owned(), message: error.to_string(), moved }
}

/// What a reply claims that the role selects, unverified.
pub(super) fn claimed_settings(reply: &Reply) -> Option<RoleSettings> {
    let Decision::Assigned { assignment, .. } = &reply.desired.decision else { return None };
    let envelope: serde_json::Value = serde_json::from_str(assignment).ok()?;
    serde_json::from_value::<Assignment>(envelope.get("signed")?.clone()).ok().map(|named| named.settings)
}

/// What a reply claims to want, unverified: whether it is worth verifying metadata for.
pub(super) fn claimed(reply: &Reply) -> Option<(u64, Wanted)> {
    let Decision::Assigned { assignment, grant, .. } = &reply.desired.decision else { return None };
    let envelope: serde_json::Value = serde_json::from_str(assignment).ok()?;
    let named: Assignment = serde_json::from_value(envelope.get("signed")?.clone()).ok()?;
    let target = Target { release: named.release_id(), sequence: named.sequence };
    Some((named.rebuild, Wanted { target, grant: grant.clone() }))
}
