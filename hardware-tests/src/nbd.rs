//! A disk that a test holds in its hand: an NBD server (the NBD project's doc/proto.md: fixed newstyle, `NBD_OPT_GO`,
//! simple replies) on a file. It keeps a record of every write and flush, says when a given write comes, so that the
//! power can be cut there, and answers reads or writes with I/O errors, or never. One machine at a time.

use crate::error::{AtPath, LabError};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
/// Has flags, takes flushes.
const FLAGS: u16 = 1 | 1 << 2;
/// The longest request: more than any client's.
const LONGEST: u32 = 64 << 20;
const EIO: u32 = 5;

/// What came, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Bytes at an offset.
    Write(u64, Vec<u8>),
    /// All before it is on the disk.
    Flush,
}

/// What the disk does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Every read is an error.
    Reads,
    /// Every read of the byte here is an error.
    ReadsAt(u64),
    /// Every write is an error.
    Writes,
    /// Reads are never answered; writes are done.
    HoldReads,
    /// Writes and flushes are never done and never answered; reads are.
    HoldWrites,
    /// The write of this number, from 0, and all that follows is never done and never answered.
    Hold(usize),
}

impl Fault {
    /// Whether a read of so many bytes here is one.
    fn is_error(self, at: u64, length: usize) -> bool {
        match self {
            Self::Reads => true,
            Self::ReadsAt(byte) => (at..at + length as u64).contains(&byte),
            Self::None | Self::Writes | Self::HoldReads | Self::HoldWrites | Self::Hold(_) => false,
        }
    }
}

#[derive(Debug)]
struct State {
    steps: Vec<Step>,
    keep: bool,
    writes: usize,
    fault: Fault,
    held: bool,
    /// What has no answer: whom to tell, and what it is known by.
    waiting: Vec<(Arc<Mutex<UnixStream>>, [u8; 8])>,
}

/// The disk.
#[derive(Debug)]
pub struct Nbd {
    socket: PathBuf,
    shared: Arc<(Mutex<State>, Condvar)>,
}

fn lock(shared: &(Mutex<State>, Condvar)) -> MutexGuard<'_, State> {
    shared.0.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Nbd {
    /// Serves the file at a socket, until the process ends.
    pub fn serve(file: &Path, socket: &Path) -> Result<Self, LabError> {
        let listener = UnixListener::bind(socket).at(socket)?;
        let file = Arc::new(File::options().read(true).write(true).open(file).at(file)?);
        let (steps, waiting) = (Vec::new(), Vec::new());
        let state = State { steps, keep: false, writes: 0, fault: Fault::None, held: false, waiting };
        let shared = Arc::new((Mutex::new(state), Condvar::new()));
        let theirs = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (file, shared) = (Arc::clone(&file), Arc::clone(&theirs));
                // A connection ends as its machine does: without a word.
                std::thread::spawn(move || drop(talk(stream, &file, &shared)));
            }
        });
        Ok(Self { socket: socket.to_owned(), shared })
    }

    /// Where QEMU finds it.
    pub fn url(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// From now on it does this.
    pub fn set_fault(&self, fault: Fault) {
        let mut state = lock(&self.shared);
        (state.fault, state.held, state.writes) = (fault, false, 0);
    }

    /// Answers everything that is held with an error. Before it resets a device, QEMU waits for what is under way; a real
    /// controller that is reset forgets it.
    pub fn give_up_reads(&self) {
        let waiting = std::mem::take(&mut lock(&self.shared).waiting);
        for (stream, cookie) in waiting {
            // Its machine may be off by now.
            let _ = answer(&stream, EIO, cookie, &[]);
        }
    }

    /// Keeps a record from now on.
    pub fn record(&self) {
        let mut state = lock(&self.shared);
        (state.keep, state.steps) = (true, Vec::new());
    }

    /// The record so far; it ends.
    pub fn recorded(&self) -> Vec<Step> {
        let mut state = lock(&self.shared);
        state.keep = false;
        std::mem::take(&mut state.steps)
    }

    /// How many steps the record has.
    pub fn count(&self) -> usize {
        lock(&self.shared).steps.len()
    }

    /// Waits until the write of [`Fault::Hold`] has come: the machine's power is to be cut now. Likewise for the first read
    /// that [`Fault::HoldReads`] holds, and the first write or flush that [`Fault::HoldWrites`] does.
    pub fn wait_held(&self, limit: Duration) -> Result<(), LabError> {
        let deadline = Instant::now() + limit;
        let mut state = lock(&self.shared);
        while !state.held {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let what = format!("what {:?} holds; {} writes came", state.fault, state.writes);
                return Err(LabError::TooLong { who: self.url(), what, limit });
            }
            state = self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

fn u32_of(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn u64_of(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}

/// An answer in one piece, whoever else has one.
fn answer(stream: &Mutex<UnixStream>, error: u32, cookie: [u8; 8], bytes: &[u8]) -> io::Result<()> {
    let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
    stream.write_all(&[&REPLY.to_be_bytes()[..], &error.to_be_bytes(), &cookie].concat())?;
    stream.write_all(bytes)
}

fn talk(mut stream: UnixStream, file: &File, shared: &(Mutex<State>, Condvar)) -> io::Result<()> {
    greet(&mut stream, file.metadata()?.len())?;
    let answers = Arc::new(Mutex::new(stream.try_clone()?));
    loop {
        let mut head = [0; 28];
        stream.read_exact(&mut head)?;
        let (kind, at, length) = (u32_of(&head[4..]) & 0xffff, u64_of(&head[16..]), u32_of(&head[24..]));
        let cookie: [u8; 8] = head[8..16].try_into().expect("eight bytes");
        if u32_of(&head) != REQUEST || length > LONGEST {
            return Err(io::Error::other("not a request"));
        }
        let mut bytes = vec![0; length as usize];
        if kind == 1 {
            stream.read_exact(&mut bytes)?;
        }
        if is_held(shared, kind, &answers, cookie) {
            continue;
        }
        let mut error = 0;
        match kind {
            0 if lock(shared).fault.is_error(at, bytes.len()) => error = EIO,
            0 => file.read_exact_at(&mut bytes, at)?,
            1 => {
                match write(file, shared, at, &bytes)? {
                    Done::Written => {}
                    Done::Refused => error = EIO,
                    // Never answered: the machine waits until its power is cut.
                    Done::Held => return io::copy(&mut stream, &mut io::sink()).map(drop),
                }
            }
            2 => return Ok(()),
            3 => {
                let mut state = lock(shared);
                if state.keep {
                    state.steps.push(Step::Flush);
                }
            }
            _ => error = 22,
        }
        let payload: &[u8] = if kind == 0 && error == 0 { &bytes } else { &[] };
        answer(&answers, error, cookie, payload)?;
    }
}

/// Keeps what the fault of now never answers.
fn is_held(shared: &(Mutex<State>, Condvar), kind: u32, answers: &Arc<Mutex<UnixStream>>, cookie: [u8; 8]) -> bool {
    let mut state = lock(shared);
    let holds = match state.fault {
        Fault::HoldReads => kind == 0,
        Fault::HoldWrites => matches!(kind, 1 | 3),
        Fault::None | Fault::Reads | Fault::ReadsAt(_) | Fault::Writes | Fault::Hold(_) => false,
    };
    if holds {
        state.waiting.push((Arc::clone(answers), cookie));
        state.held = true;
        shared.1.notify_all();
    }
    holds
}

enum Done {
    Written,
    Refused,
    Held,
}

fn write(file: &File, shared: &(Mutex<State>, Condvar), at: u64, bytes: &[u8]) -> io::Result<Done> {
    let mut state = lock(shared);
    match state.fault {
        Fault::Writes => return Ok(Done::Refused),
        Fault::Hold(number) if state.writes >= number => {
            state.held = true;
            shared.1.notify_all();
            return Ok(Done::Held);
        }
        Fault::None | Fault::Reads | Fault::ReadsAt(_) | Fault::HoldReads | Fault::HoldWrites | Fault::Hold(_) => {}
    }
    state.writes += 1;
    if state.keep {
        state.steps.push(Step::Write(at, bytes.to_vec()));
    }
    // Under the lock: the file and the record have one order.
    file.write_all_at(bytes, at)?;
    Ok(Done::Written)
}

/// Up to the transmission phase.
fn greet(stream: &mut UnixStream, size: u64) -> io::Result<()> {
    stream.write_all(&[&MAGIC.to_be_bytes()[..], &OPTION.to_be_bytes(), &3_u16.to_be_bytes()].concat())?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let (option, length) = (u32_of(&head[8..]), u32_of(&head[12..]));
        if u64_of(&head) != OPTION || length > 4096 {
            return Err(io::Error::other("not an option"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let length = u32::try_from(data.len()).expect("a few bytes").to_be_bytes();
            let head = [&OPTION_REPLY.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length];
            stream.write_all(&[&head.concat(), data].concat())
        };
        match option {
            // INFO and GO: the export's size and flags, whatever its name.
            6 | 7 => {
                reply(3, &[&0_u16.to_be_bytes()[..], &size.to_be_bytes(), &FLAGS.to_be_bytes()].concat())?;
                reply(1, &[])?;
                if option == 7 {
                    return Ok(());
                }
            }
            2 => return Err(io::Error::other("it goes")),
            _ => reply(1 | 1 << 31, &[])?,
        }
    }
}
