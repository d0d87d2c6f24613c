//! An engine's inbox: the one place where everything that happens to a node waits for its engine,
//! whichever thread drives that (`node/engine`). A reader drives it with what it puts in; waiting
//! output wakes the machine thread, which does; all else wakes the engine's own thread.
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
//! | reports of worker threads | the jobs that the engine gave out | none is lost: past [`REPORTS_MAX`] the node ends |
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

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use crossbeam::sync::{Parker, Unparker};
use parking_lot::{Mutex, RwLock};
use thiserror::Error;

use self::lanes::{InternalLane, LinkLane};
use self::latches::Latches;
use super::clock;
use super::events::NodeEvent;
use crate::protocol::guest_event::GuestEvent;
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

/// What may drive the engine from a thread that has an event for it.
pub(super) trait Driver: Send + Sync {
    /// Drives the engine, unless another thread does. False if its own thread has to.
    fn try_drive(&self) -> bool;
}

/// Wakes the thread that cuts epochs; false if there is none.
type WakeCutter = Box<dyn Fn() -> bool + Send + Sync>;

struct Shared {
    latches: Latches,
    internal: InternalLane,
    link: LinkLane,
    /// Only who drives the engine has it, so nobody waits for this lock.
    turn: Mutex<Turn>,
    driver: RwLock<Option<Weak<dyn Driver>>>,
    cutter: RwLock<Option<WakeCutter>>,
    wake: Unparker,
    senders: AtomicUsize,
    /// A report found no room: rather than wait for it in vain, the node ends.
    overflowed: AtomicBool,
}

impl Shared {
    /// The thread that has an event drives the engine with it, or the engine's own thread does.
    fn drive(&self) {
        let driver = self.driver.read().as_ref().and_then(Weak::upgrade);
        if !driver.is_some_and(|driver| driver.try_drive()) {
            self.wake.unpark();
        }
    }
}

/// A new inbox and the way into it.
pub(super) fn inbox() -> (InboxSender, Inbox) {
    let wait = Parker::new();
    let shared = Arc::new(Shared {
        latches: Latches::default(),
        internal: InternalLane::default(),
        link: LinkLane::default(),
        turn: Mutex::default(),
        driver: RwLock::default(),
        cutter: RwLock::default(),
        wake: wait.unparker().clone(),
        senders: AtomicUsize::new(1),
        overflowed: AtomicBool::new(false),
    });
    let queues = Queues { shared: Arc::clone(&shared) };
    (InboxSender { shared }, Inbox { queues, wait })
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
        // The engine would only order the cut of that thread.
        let woken = flag == Flag::OutputWaiting && self.shared.cutter.read().as_ref().is_some_and(|wake| wake());
        if !woken {
            self.shared.wake.unpark();
        }
    }

    /// Output that waits wakes the thread that cuts epochs, which then drives the engine itself.
    /// `wake` waits for nothing.
    pub(super) fn wake_cutter_on_output(&self, wake: impl Fn() -> bool + Send + Sync + 'static) {
        *self.shared.cutter.write() = Some(Box::new(wake));
    }

    /// Output that waits wakes the engine's own thread.
    pub(super) fn no_cutter(&self) {
        *self.shared.cutter.write() = None;
    }

    /// Drives the engine with what waits for it, or wakes who does.
    pub(super) fn drive(&self) {
        self.shared.drive();
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
        self.shared.drive();
    }

    /// An event of a connection, from the thread that reads it. Waits while too many events of this
    /// connection wait for the driver; other connections do not notice.
    ///
    /// # Errors
    /// [`InboxGone`].
    pub(super) fn link_event(&self, event: NodeEvent) -> Result<(), InboxGone> {
        self.shared.link.push(event)?;
        self.shared.drive();
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
    pub(super) fn send(&self, event: GuestEvent) {
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

/// What waits, for whoever drives the engine. Clones share it.
#[derive(Clone)]
pub(super) struct Queues {
    shared: Arc<Shared>,
}

/// The receiving end: an engine's, or one engine's after the other.
pub(super) struct Inbox {
    queues: Queues,
    wait: Parker,
}

impl Inbox {
    /// What waits, for whoever drives the engine.
    pub(super) fn queues(&self) -> &Queues {
        &self.queues
    }

    /// Waits until something comes or `until` passed.
    pub(super) fn wait(&self, until: Option<Instant>) {
        match until {
            // An event that came after the look into the queues has left a token with the parker,
            // so this returns at once.
            None => self.wait.park(),
            Some(until) => self.wait.park_timeout(clock::until(until)),
        }
    }

    /// Threads with an event may drive the engine with it.
    pub(super) fn set_driver(&self, driver: Option<Weak<dyn Driver>>) {
        *self.queues.shared.driver.write() = driver;
    }

    /// Waits for what comes next.
    #[cfg(test)]
    pub(super) fn next(&self, until: Option<Instant>) -> Next {
        loop {
            match self.queues.next(until) {
                Some(next) => return next,
                None => self.wait(until),
            }
        }
    }
}

impl Queues {
    /// What comes next, if anything waits or `until` passed.
    pub(super) fn next(&self, until: Option<Instant>) -> Option<Next> {
        self.next_at(until, clock::now)
    }

    /// The same, by another clock.
    fn next_at(&self, until: Option<Instant>, now: impl Fn() -> Instant) -> Option<Next> {
        let mut turn = self.shared.turn.lock();
        loop {
            // At most once between two other turns, so that no peer starves timers.
            if !turn.heartbeat
                && let Some(event) = self.shared.latches.take_heartbeat()
            {
                turn.heartbeat = true;
                return Some(Next::Event(event));
            }
            turn.heartbeat = false;
            let is_due = until.is_some_and(|until| until <= now());
            if is_due && !turn.due {
                turn.due = true;
                return Some(Next::Due);
            }
            // Read before the queues: whatever a last sender put in is there by then.
            let has_senders = self.shared.senders.load(Ordering::Acquire) > 0;
            if self.shared.overflowed.load(Ordering::Acquire) {
                return Some(Next::Gone);
            }
            let event = self.try_take(&mut turn);
            turn.due = false;
            match event {
                Some(event) => return Some(Next::Event(event)),
                // Nothing waits, so it is the timer's turn again.
                None if is_due => continue,
                None if !has_senders => return Some(Next::Gone),
                None => return None,
            }
        }
    }

    fn try_take(&self, turn: &mut Turn) -> Option<NodeEvent> {
        let event = self.take_latched(turn).or_else(|| self.take_queued(turn));
        if event.is_some() || !turn.latches_done {
            return event;
        }
        // The queues are empty: the latches' turn again.
        turn.latches_done = false;
        self.take_latched(turn)
    }

    fn take_latched(&self, turn: &mut Turn) -> Option<NodeEvent> {
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
        event
    }

    fn take_queued(&self, turn: &mut Turn) -> Option<NodeEvent> {
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
        event
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.queues.shared.internal.close();
        self.queues.shared.link.close();
    }
}
