//! The arbiter `file:`: a directory that both nodes see (of one machine, or shared storage).
//!
//! Each guest has two files there: `GUEST.record`, a few lines of text that a person can read, and
//! `GUEST.lock`, which a node locks while it swaps. A swap is: lock → read → compare → write a
//! temporary file → fsync → rename → fsync of the directory → unlock. A crash at any point leaves
//! the old record or the new one, whole.
//!
//! Storage can hang. So a thread of the arbiter's own does the work, and a caller waits for it no
//! longer than its timeout; then the answer is [`ArbiterError::Unreachable`], and a swap that is
//! found to be late when its turn comes is not carried out.
//!
//! Shared storage must have working `fcntl` locks and must show a rename at once to every host that
//! opens the file: NFS version 4 and the cluster filesystems do.

mod store;

use super::{Arbiter, ArbiterError, Swap};
use crate::protocol::record::Record;
use crate::protocol::types::GuestName;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use store::Store;

/// How long a call waits for the storage by default.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(2);

/// A question to the working thread.
enum Question {
    Read,
    Swap { expected: Option<Record>, new: Record },
}

/// Its answer.
enum Answer {
    Record(Option<Record>),
    Swap(Swap),
}

type Outcome = Result<Answer, ArbiterError>;

/// A question under way.
struct Job {
    question: Question,
    deadline: Instant,
    reply: Sender<Outcome>,
}

/// The arbiter `file:` for one guest.
pub struct FileArbiter {
    directory: PathBuf,
    guest: GuestName,
    timeout: Duration,
    /// The queue of the working thread, which starts at the first request.
    jobs: Option<Sender<Job>>,
    /// The reply to a request that timed out: while it is outstanding the thread
    /// is stuck.
    late: Option<Receiver<Outcome>>,
}

impl FileArbiter {
    /// The arbiter of `guest` in `directory`. Touches nothing yet; the directory must exist when it
    /// is asked.
    pub fn new(directory: impl AsRef<Path>, guest: &GuestName) -> FileArbiter {
        FileArbiter::with_timeout(directory, guest, TIMEOUT_DEFAULT)
    }

    /// The same, with the longest time a call may wait for the storage.
    pub fn with_timeout(directory: impl AsRef<Path>, guest: &GuestName, timeout: Duration) -> FileArbiter {
        let directory = directory.as_ref().to_owned();
        FileArbiter { directory, guest: guest.clone(), timeout, jobs: None, late: None }
    }

    /// The file that holds the record.
    pub fn record_path(&self) -> PathBuf {
        Store::new(&self.directory, &self.guest).record_path().to_owned()
    }

    fn ask(&mut self, question: Question) -> Outcome {
        let deadline = Instant::now() + self.timeout;
        if let Some(late) = &self.late {
            // Nothing is queued behind a question that is stuck: it would only be late too.
            if let Err(RecvTimeoutError::Timeout) = late.recv_deadline(deadline) {
                return Err(self.no_answer());
            }
            self.late = None;
        }
        let (reply, answer) = bounded(1);
        let mut job = Job { question, deadline, reply };
        if let Some(jobs) = &self.jobs {
            match jobs.send(job) {
                Ok(()) => return self.wait(answer, deadline),
                // The thread is gone; a new one is started below.
                Err(unsent) => job = unsent.0,
            }
        }
        let jobs = self.start_thread()?;
        if jobs.send(job).is_err() {
            return Err(self.unreachable("its thread ended; restart mcd".to_owned()));
        }
        self.jobs = Some(jobs);
        self.wait(answer, deadline)
    }

    fn wait(&mut self, answer: Receiver<Outcome>, deadline: Instant) -> Outcome {
        match answer.recv_deadline(deadline) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => {
                self.late = Some(answer);
                Err(self.no_answer())
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.jobs = None;
                Err(self.unreachable("its thread ended; the next question starts another".to_owned()))
            }
        }
    }

    fn start_thread(&self) -> Result<Sender<Job>, ArbiterError> {
        // One place is enough: a question is sent only when the thread has answered the one before.
        let (jobs, questions) = bounded::<Job>(1);
        let store = Store::new(&self.directory, &self.guest);
        let work = move || {
            for job in questions {
                // Whoever asked may have lost timeout.
                let _ = job.reply.send(carry_out(&store, &job));
            }
        };
        // Never joined: it may hang in the kernel for as long as the storage does.
        std::thread::Builder::new()
            .name("mcd-arbiter-file".to_owned())
            .spawn(work)
            .map(|_| jobs)
            .map_err(|error| self.unreachable(format!("no thread for it: {error}")))
    }

    fn no_answer(&self) -> ArbiterError {
        self.unreachable(format!(
            "no answer for {} ms; check the storage, and that no stopped process holds {}",
            self.timeout.as_millis(),
            Store::new(&self.directory, &self.guest).lock_path().display()
        ))
    }

    fn unreachable(&self, why: String) -> ArbiterError {
        ArbiterError::Unreachable { arbiter: self.describe(), why }
    }
}

fn carry_out(store: &Store, job: &Job) -> Outcome {
    match &job.question {
        Question::Read => store.read().map(Answer::Record),
        Question::Swap { expected, new } => store.swap(expected.as_ref(), new, job.deadline).map(Answer::Swap),
    }
}

impl Arbiter for FileArbiter {
    fn read(&mut self) -> Result<Option<Record>, ArbiterError> {
        match self.ask(Question::Read)? {
            Answer::Record(record) => Ok(record),
            Answer::Swap(_) => Err(self.unreachable("it answered another question".to_owned())),
        }
    }

    fn swap(&mut self, expected: Option<&Record>, new: &Record) -> Result<Swap, ArbiterError> {
        match self.ask(Question::Swap { expected: expected.copied(), new: *new })? {
            Answer::Swap(swap) => Ok(swap),
            Answer::Record(_) => Err(self.unreachable("it answered another question".to_owned())),
        }
    }

    fn describe(&self) -> String {
        format!("file:{}", self.directory.display())
    }
}

#[cfg(test)]
mod tests;
