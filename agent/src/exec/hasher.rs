//! The guard's second thread: reads the files that it is given and hashes them, a slice of each in turn, so that a long
//! one holds up no short one, and a slow disk only the answers, never the guard's sign of life.

use super::ANSWER_MS;
use super::rules::Hash;
use crate::sys;
use nix::errno::Errno;
use ring::digest::{Context, SHA256};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{PipeWriter, Write};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

/// How much of a file is read before the next one has its turn.
const SLICE: usize = 128 << 10;
/// A file that is written for longer than this was answered for long ago.
const PATIENCE: Duration = Duration::from_millis(2 * ANSWER_MS);
/// Pause before a file that somebody has open for writing is looked at again.
const WRITERS: Duration = Duration::from_millis(2);

/// A file to hash. The descriptor shares the lease with the guard's own.
pub struct Job {
    pub id: u32,
    pub file: File,
}

/// What [`run`] writes to the guard: a number, a [`Told`] and a hash.
pub const RECORD: usize = 4 + 1 + 32;

/// What became of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    Hashed,
    /// It cannot be read.
    Unreadable,
    /// Somebody has it open for writing; it is looked at again until the answer is due.
    Written,
}

impl Told {
    pub fn of(byte: u8) -> Option<Self> {
        [Self::Hashed, Self::Unreadable, Self::Written].into_iter().find(|told| *told as u8 == byte)
    }
}

struct Work {
    job: Job,
    since: Instant,
    /// That somebody writes it was told.
    told: bool,
    /// None: the lease is not ours yet.
    begun: Option<(Context, u64)>,
}

/// Runs until the guard ends.
pub fn run(jobs: &Receiver<Job>, mut out: PipeWriter) {
    let mut work: VecDeque<Work> = VecDeque::new();
    let mut slice = vec![0; SLICE];
    let mut idle = 0;
    loop {
        let next = if work.is_empty() { jobs.recv().map_err(|_| TryRecvError::Disconnected) } else { jobs.try_recv() };
        match next {
            Ok(job) => {
                work.push_back(Work { job, since: Instant::now(), told: false, begun: None });
                idle = 0;
                continue;
            }
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => {}
        }
        if idle >= work.len() {
            std::thread::sleep(WRITERS);
            idle = 0;
        }
        let Some(mut first) = work.pop_front() else { continue };
        let mut tell = |told: Told, hash: &Hash| {
            let mut record = [0; RECORD];
            record[..4].copy_from_slice(&first.job.id.to_ne_bytes());
            record[4] = told as u8;
            record[5..].copy_from_slice(hash);
            out.write_all(&record).is_ok()
        };
        let (goes_on, heard) = match advance(&first.job, &mut first.begun, &mut slice) {
            Step::Hashed(hash) => (false, tell(Told::Hashed, &hash)),
            Step::Unreadable => (false, tell(Told::Unreadable, &[0; 32])),
            Step::More => (true, true),
            Step::Written if first.since.elapsed() > PATIENCE => (false, tell(Told::Unreadable, &[0; 32])),
            Step::Written => (true, std::mem::replace(&mut first.told, true) || tell(Told::Written, &[0; 32])),
        };
        if !heard {
            return;
        }
        idle = if first.begun.is_none() { idle + 1 } else { 0 };
        if goes_on {
            work.push_back(first);
        }
    }
}

enum Step {
    Hashed(Hash),
    More,
    /// Somebody has it open for writing.
    Written,
    Unreadable,
}

fn advance(job: &Job, begun: &mut Option<(Context, u64)>, slice: &mut [u8]) -> Step {
    let Some((context, at)) = begun else {
        return match sys::lease(&job.file, true) {
            Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => Step::Written,
            // A file system without leases: its times have to do.
            Ok(()) | Err(_) => {
                *begun = Some((Context::new(&SHA256), 0));
                Step::More
            }
        };
    };
    match job.file.read_at(slice, *at) {
        Ok(0) => {
            let digest = context.clone().finish();
            Step::Hashed(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
        }
        Ok(length) => {
            context.update(&slice[..length]);
            *at += length as u64;
            Step::More
        }
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Step::More,
        Err(_) => Step::Unreadable,
    }
}
