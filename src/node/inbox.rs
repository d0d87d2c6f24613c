//! The driver's inbox: the one place where everything that happens to a node waits for its driver.
//!
//! ```text
//!  vCPU and device threads ─ flags, newest only ─┐
//!  machine ─ events, the guest's end ────────────┤ 1. latches
//!  signals ─ quit ───────────────────────────────┘
//!  worker threads ─ reports ─┐
//!  control socket ─ commands ┴──────────────────── 2. internal lane
//!  link readers ─ messages, epochs, pages ──────── 3. link lane
//! ```
//!
//! Everything here has a bound, and a rule for what happens there:
//!
//! | what | bound | at the bound |
//! |---|---|---|
//! | flags of vCPU and device threads | one of each kind | they are one already |
//! | machine events | one of each kind and machine | the first end of a guest stays, of others the newest |
//! | commands | [`COMMANDS_MAX`] | the client gets an error |
//! | reports of worker threads | the jobs that the driver gave out | none is lost: past [`REPORTS_MAX`] the node ends |
//! | events of a connection | [`LINK_EVENTS_MAX`], [`LINK_BYTES_MAX`] | its reader waits, and so does its peer |
//! | connections found broken | one event of each, behind those | it is one already |
//!
//! The newest heartbeat of a connection comes before a timer that is due, that before latches,
//! latches before the internal lane, that before the link lane. None of them starves another: an
//! event comes between two timers, every latch comes at most once between two queued events, and a
//! link event after at most [`INTERNAL_RUN_MAX`] internal ones.

mod lanes;
mod latches;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crossbeam::sync::{Parker, Unparker};
use thiserror::Error;

use self::lanes::{InternalLane, LinkLane};
use self::latches::Latches;
use super::clock;
use super::events::NodeEvent;
use crate::machine::MachineEvent;
use crate::protocol::messages::Message;
use crate::protocol::types::{ConnId, EpochId, Instant};

/// Commands that may wait: as many as there can be control clients.
const COMMANDS_MAX: usize = 64;
/// Reports that may wait. The driver gives out a handful of jobs at a time, so more than this are a
/// mistake in mcd.
const REPORTS_MAX: usize = 1024;
/// Events of one connection that may wait.
const LINK_EVENTS_MAX: usize = 64;
/// Bytes that the events of one connection may hold, unless it is one event.
const LINK_BYTES_MAX: usize = 8 << 20;
/// Internal events in a row while a link event waits.
const INTERNAL_RUN_MAX: u32 = 16;

/// The driver is gone: the node is ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("this node is ending")]
pub(super) struct InboxGone;

/// Why a command was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum CommandNotTaken {
    /// The node is ending.
    #[error("this node is ending")]
    Gone,
    /// Too many wait already.
    #[error("{COMMANDS_MAX} commands wait to be carried out; try again later")]
    Full,
}

/// What threads that must not wait have to say. One that is raised again before the driver has
/// taken it is the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flag {
    /// [`NodeEvent::OutputWaiting`].
    OutputWaiting,
    /// [`NodeEvent::OutputFull`].
    OutputFull,
    /// [`NodeEvent::JournalFull`].
    JournalFull,
    /// [`NodeEvent::DisksHaveRoom`].
    DisksHaveRoom,
}

/// What comes next.
pub(super) enum Next {
    /// Something happened.
    Event(NodeEvent),
    /// It is time.
    Due,
    /// Nothing will happen any more, or something would have been lost.
    Gone,
}

struct Shared {
    latches: Latches,
    internal: InternalLane,
    link: LinkLane,
    wake: Unparker,
    senders: AtomicUsize,
    /// A report found no room: rather than wait for it in vain, the node ends.
    overflowed: AtomicBool,
}

/// A new inbox and the way into it.
pub(super) fn inbox() -> (InboxSender, Inbox) {
    let wait = Parker::new();
    let shared = Arc::new(Shared {
        latches: Latches::default(),
        internal: InternalLane::default(),
        link: LinkLane::default(),
        wake: wait.unparker().clone(),
        senders: AtomicUsize::new(1),
        overflowed: AtomicBool::new(false),
    });
    (InboxSender { shared: Arc::clone(&shared) }, Inbox { shared, wait, turn: Cell::default() })
}

/// The way into an inbox, for any thread.
pub(super) struct InboxSender {
    shared: Arc<Shared>,
}

impl Clone for InboxSender {
    fn clone(&self) -> InboxSender {
        self.shared.senders.fetch_add(1, Ordering::Relaxed);
        InboxSender { shared: Arc::clone(&self.shared) }
    }
}

impl Drop for InboxSender {
    fn drop(&mut self) {
        if self.shared.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.shared.wake.unpark();
        }
    }
}

impl InboxSender {
    /// Raises a flag. Waits for nothing: vCPU and device threads may call it under their locks.
    pub(super) fn raise(&self, flag: Flag) {
        self.shared.latches.raise(flag);
        self.shared.wake.unpark();
    }

    /// The process is asked to end. The second time is a second `quit`; more change nothing.
    pub(super) fn quit(&self) {
        self.shared.latches.quit();
        self.shared.wake.unpark();
    }

    /// Shared images have the writes of every epoch up to this one. Only the newest is kept.
    pub(super) fn written(&self, through: EpochId) {
        self.shared.latches.written(through);
        self.shared.wake.unpark();
    }

    /// Shared storage does not take writes (why), or takes them again. Only the newest is kept.
    pub(super) fn storage_fault(&self, why: Option<String>) {
        self.shared.latches.storage_fault(why);
        self.shared.wake.unpark();
    }

    /// The way in for the events of a machine that was just built. Those of machines before it
    /// count no more.
    pub(super) fn of_new_machine(&self) -> MachineSender {
        MachineSender { machine: self.shared.latches.new_machine(), inbox: self.clone() }
    }

    /// A command from the control socket.
    ///
    /// # Errors
    /// [`CommandNotTaken`]; it did not wait.
    pub(super) fn command(&self, command: NodeEvent) -> Result<(), CommandNotTaken> {
        self.shared.internal.command(command)?;
        self.shared.wake.unpark();
        Ok(())
    }

    /// A worker thread's report on a job that the driver gave out. Never waits, since the driver
    /// may be waiting for that thread.
    ///
    /// # Errors
    /// [`InboxGone`].
    pub(super) fn report(&self, report: NodeEvent) -> Result<(), InboxGone> {
        let taken = self.report_later(report);
        self.shared.wake.unpark();
        taken
    }

    /// The same, without waking the engine: it takes the report with whatever wakes it next, and
    /// before that. For a report that changes nothing until then, on a way where each wake-up
    /// counts.
    ///
    /// # Errors
    /// [`InboxGone`].
    pub(super) fn report_later(&self, report: NodeEvent) -> Result<(), InboxGone> {
        let taken = self.shared.internal.report(report);
        if taken == Err(lanes::ReportNotTaken::Full) && !self.shared.overflowed.swap(true, Ordering::AcqRel) {
            tracing::error!("{REPORTS_MAX} reports of worker threads wait for the driver; this node ends");
        }
        taken.map_err(|_| InboxGone)
    }

    /// The peer's newest heartbeat on a connection. It comes before any timer, so that nobody is
    /// suspected for what was not read yet; an older one that was not taken is forgotten.
    pub(super) fn heartbeat(&self, conn: ConnId, message: Message) {
        self.shared.latches.heartbeat(conn, message);
        self.shared.wake.unpark();
    }

    /// An event of a connection, from the thread that reads it. Waits while too many events of this
    /// connection wait for the driver; other connections do not notice.
    ///
    /// # Errors
    /// [`InboxGone`].
    pub(super) fn link_event(&self, event: NodeEvent) -> Result<(), InboxGone> {
        self.shared.link.push(event)?;
        self.shared.wake.unpark();
        Ok(())
    }

    /// A connection is found broken by who writes to it, or watches it. It is delivered as closed
    /// behind what its reader has delivered: were it to overtake the peer's goodbye or hand-over,
    /// a guest that was shut down could be taken for one whose primary died. Never waits.
    ///
    /// # Errors
    /// [`InboxGone`].
    pub(super) fn link_failed(&self, conn: ConnId, why: String) -> Result<(), InboxGone> {
        self.shared.link.fail(conn, why)?;
        self.shared.wake.unpark();
        Ok(())
    }
}

/// The way into an inbox for one machine's events.
pub(super) struct MachineSender {
    machine: u64,
    inbox: InboxSender,
}

impl MachineSender {
    /// Keeps an event until the driver takes it; never waits. The first end of the guest stays and
    /// is delivered once.
    pub(super) fn send(&self, event: MachineEvent) {
        self.inbox.shared.latches.machine(self.machine, event);
        self.inbox.shared.wake.unpark();
    }
}

/// What was delivered last, as far as it decides what may be next.
#[derive(Clone, Copy, Default)]
struct Turn {
    /// A heartbeat had the last turn.
    heartbeat: bool,
    /// The timer had the last turn.
    due: bool,
    /// Latches that were taken and not delivered yet.
    latched: u32,
    /// The latches had their turn since the last queued event.
    latches_done: bool,
    /// Internal events since the last link event.
    internal_run: u32,
}

/// The receiving end: a driver's, or one driver's after the other.
pub(super) struct Inbox {
    shared: Arc<Shared>,
    wait: Parker,
    turn: Cell<Turn>,
}

impl Inbox {
    /// Waits for what comes next, or until `until`.
    pub(super) fn next(&self, until: Option<Instant>) -> Next {
        self.next_by(until, clock::now)
    }

    /// The same, by another clock.
    fn next_by(&self, until: Option<Instant>, now: impl Fn() -> Instant) -> Next {
        loop {
            // At most once between two other turns, so that no peer starves timers.
            if !self.turn.get().heartbeat
                && let Some(event) = self.shared.latches.take_heartbeat()
            {
                self.turn.set(Turn { heartbeat: true, ..self.turn.get() });
                return Next::Event(event);
            }
            self.turn.set(Turn { heartbeat: false, ..self.turn.get() });
            let left = until.map(|until| until.since(now()));
            let is_due = left.is_some_and(|left| left.is_zero());
            if is_due && !self.turn.get().due {
                self.turn.set(Turn { due: true, ..self.turn.get() });
                return Next::Due;
            }
            // Read before the queues: whatever a last sender put in is there by then.
            let has_senders = self.shared.senders.load(Ordering::Acquire) > 0;
            if self.shared.overflowed.load(Ordering::Acquire) {
                return Next::Gone;
            }
            let event = self.try_take();
            self.turn.set(Turn { due: false, ..self.turn.get() });
            match (event, left) {
                (Some(event), _) => return Next::Event(event),
                // Nothing waits, so it is the timer's turn again.
                (None, _) if is_due => continue,
                (None, _) if !has_senders => return Next::Gone,
                // An event that came after the look into the queues has left a token with the
                // parker, so this returns at once.
                (None, None) => self.wait.park(),
                (None, Some(left)) => self.wait.park_timeout(left),
            }
        }
    }

    fn try_take(&self) -> Option<NodeEvent> {
        let event = self.take_latched().or_else(|| self.take_queued());
        if event.is_some() || !self.turn.get().latches_done {
            return event;
        }
        // The queues are empty: the latches' turn again.
        self.turn.set(Turn { latches_done: false, ..self.turn.get() });
        self.take_latched()
    }

    fn take_latched(&self) -> Option<NodeEvent> {
        let mut turn = self.turn.get();
        if turn.latched == 0 && !turn.latches_done {
            turn.latched = self.shared.latches.take_raised();
            turn.latches_done = true;
        }
        let mut event = None;
        while event.is_none() && turn.latched != 0 {
            let bit = turn.latched & turn.latched.wrapping_neg();
            turn.latched &= !bit;
            event = self.shared.latches.take(bit);
        }
        self.turn.set(turn);
        event
    }

    fn take_queued(&self) -> Option<NodeEvent> {
        let mut turn = self.turn.get();
        let event = if turn.internal_run < INTERNAL_RUN_MAX {
            self.shared
                .internal
                .pop()
                .inspect(|_| turn.internal_run += 1)
                .or_else(|| self.shared.link.pop().inspect(|_| turn.internal_run = 0))
        } else {
            turn.internal_run = 0;
            self.shared.link.pop().or_else(|| self.shared.internal.pop())
        };
        turn.latches_done &= event.is_none();
        self.turn.set(turn);
        event
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.shared.internal.close();
        self.shared.link.close();
    }
}
