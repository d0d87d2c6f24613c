//! What is kept once, however often it is said: flags, the newest of what only the newest matters
//! of, and what a machine said.

use std::mem;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use parking_lot::Mutex;

use super::Flag;
use crate::node::events::NodeEvent;
use crate::protocol::command::Command;
use crate::protocol::guest_event::GuestEvent;
use crate::protocol::messages::Message;
use crate::protocol::types::{ConnId, EpochId};

// The bits of what is raised, in the order in which they are delivered.
const QUIT: u32 = 1;
const QUIT_AGAIN: u32 = 1 << 1;
const GUEST_END: u32 = 1 << 2;
const OUTPUT_FULL: u32 = 1 << 3;
const JOURNAL_FULL: u32 = 1 << 4;
const OUTPUT_WAITING: u32 = 1 << 5;
const WRITTEN: u32 = 1 << 6;
const DISKS_HAVE_ROOM: u32 = 1 << 7;
const STORAGE_FAULT: u32 = 1 << 8;
const BOOTED: u32 = 1 << 9;
const PANIC: u32 = 1 << 10;
const DEVICE_BROKEN: u32 = 1 << 11;

/// Connections whose heartbeats are kept.
const HEARTBEATS_MAX: usize = 8;

/// An event that is kept once for each machine.
#[derive(Default)]
enum Once {
    #[default]
    Never,
    Waiting(GuestEvent),
    Delivered,
}

impl Once {
    /// Keeps the first event. False if there was one already.
    fn keep(&mut self, event: GuestEvent) -> bool {
        let is_first = matches!(self, Once::Never);
        if is_first {
            *self = Once::Waiting(event);
        }
        is_first
    }

    fn take(&mut self) -> Option<GuestEvent> {
        match mem::replace(self, Once::Delivered) {
            Once::Waiting(event) => Some(event),
            other => {
                *self = other;
                None
            }
        }
    }
}

#[derive(Default)]
struct Kept {
    written: Option<EpochId>,
    storage_fault: Option<Option<String>>,
    /// The machine whose events count.
    machine: u64,
    booted: Once,
    panic: Once,
    end: Once,
    device_broken: Option<GuestEvent>,
    /// The newest heartbeat of each connection.
    heartbeats: Vec<(ConnId, Message)>,
}

#[derive(Default)]
pub(super) struct Latches {
    raised: AtomicU32,
    has_heartbeat: AtomicBool,
    /// Never locked by a vCPU or device thread.
    kept: Mutex<Kept>,
}

impl Latches {
    pub(super) fn raise(&self, flag: Flag) {
        self.set(match flag {
            Flag::OutputWaiting => OUTPUT_WAITING,
            Flag::OutputFull => OUTPUT_FULL,
            Flag::JournalFull => JOURNAL_FULL,
            Flag::DisksHaveRoom => DISKS_HAVE_ROOM,
        });
    }

    fn set(&self, bit: u32) {
        self.raised.fetch_or(bit, Ordering::AcqRel);
    }

    pub(super) fn quit(&self) {
        let raised = self.raised.load(Ordering::Acquire);
        self.set(if raised & QUIT == 0 { QUIT } else { QUIT_AGAIN });
    }

    pub(super) fn written(&self, through: EpochId) {
        self.kept.lock().written = Some(through);
        self.set(WRITTEN);
    }

    pub(super) fn storage_fault(&self, why: Option<String>) {
        self.kept.lock().storage_fault = Some(why);
        self.set(STORAGE_FAULT);
    }

    pub(super) fn heartbeat(&self, conn: ConnId, message: Message) {
        let mut kept = self.kept.lock();
        if let Some(kept) = kept.heartbeats.iter_mut().find(|(of, _)| *of == conn) {
            kept.1 = message;
        } else if kept.heartbeats.len() < HEARTBEATS_MAX {
            kept.heartbeats.push((conn, message));
        }
        // Under the lock: who takes the last one clears it.
        self.has_heartbeat.store(true, Ordering::Release);
    }

    pub(super) fn take_heartbeat(&self) -> Option<NodeEvent> {
        if !self.has_heartbeat.load(Ordering::Acquire) {
            return None;
        }
        let mut kept = self.kept.lock();
        let taken = kept.heartbeats.pop().map(|(conn, message)| NodeEvent::Message { conn, message });
        self.has_heartbeat.store(!kept.heartbeats.is_empty(), Ordering::Release);
        taken
    }

    /// The number of a new machine, whose events are the only ones that count from now on.
    pub(super) fn new_machine(&self) -> u64 {
        let mut kept = self.kept.lock();
        kept.machine += 1;
        (kept.booted, kept.panic, kept.end, kept.device_broken) = Default::default();
        kept.machine
    }

    pub(super) fn machine(&self, machine: u64, event: GuestEvent) {
        let mut kept = self.kept.lock();
        if machine != kept.machine {
            return;
        }
        let (is_news, bit) = match &event {
            GuestEvent::Booted => (kept.booted.keep(event), BOOTED),
            GuestEvent::Panicked => (kept.panic.keep(event), PANIC),
            GuestEvent::Shutdown | GuestEvent::Reset | GuestEvent::VcpuFailed { .. } => {
                (kept.end.keep(event), GUEST_END)
            }
            GuestEvent::DeviceBroken { .. } => {
                kept.device_broken = Some(event);
                (true, DEVICE_BROKEN)
            }
        };
        if is_news {
            self.set(bit);
        }
    }

    /// What was raised since the last time.
    pub(super) fn take_raised(&self) -> u32 {
        // Usually nothing is, and a look does not take the cache line from the threads that raise.
        match self.raised.load(Ordering::Acquire) {
            0 => 0,
            _ => self.raised.swap(0, Ordering::AcqRel),
        }
    }

    /// The event of one bit that was raised.
    pub(super) fn take(&self, bit: u32) -> Option<NodeEvent> {
        match bit {
            QUIT | QUIT_AGAIN => Some(NodeEvent::Command { command: Command::Quit, reply: None }),
            OUTPUT_FULL => Some(NodeEvent::OutputFull),
            JOURNAL_FULL => Some(NodeEvent::JournalFull),
            OUTPUT_WAITING => Some(NodeEvent::OutputWaiting),
            DISKS_HAVE_ROOM => Some(NodeEvent::DisksHaveRoom),
            WRITTEN => self.kept.lock().written.take().map(|through| NodeEvent::Written { through }),
            STORAGE_FAULT => self.kept.lock().storage_fault.take().map(NodeEvent::StorageFault),
            GUEST_END => self.kept.lock().end.take().map(NodeEvent::Machine),
            BOOTED => self.kept.lock().booted.take().map(NodeEvent::Machine),
            PANIC => self.kept.lock().panic.take().map(NodeEvent::Machine),
            DEVICE_BROKEN => self.kept.lock().device_broken.take().map(NodeEvent::Machine),
            _ => None,
        }
    }
}
