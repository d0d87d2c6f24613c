//! The two queues of an inbox, each with its bound.

use std::collections::{BTreeMap, VecDeque};
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use super::{COMMANDS_MAX, CommandNotTaken, InboxGone, LINK_BYTES_MAX, LINK_EVENTS_MAX, REPORTS_MAX};
use crate::node::events::NodeEvent;
use crate::protocol::types::ConnId;

/// Why a report was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReportNotTaken {
    Gone,
    Full,
}

/// Commands of clients and reports of worker threads, in the order in which they came.
#[derive(Default)]
pub(super) struct InternalLane {
    queue: Mutex<InternalQueue>,
}

#[derive(Default)]
struct InternalQueue {
    events: VecDeque<NodeEvent>,
    commands: usize,
    closed: bool,
}

impl InternalLane {
    pub(super) fn command(&self, command: NodeEvent) -> Result<(), CommandNotTaken> {
        let mut queue = self.queue.lock();
        if queue.closed {
            return Err(CommandNotTaken::Gone);
        }
        if queue.commands >= COMMANDS_MAX {
            return Err(CommandNotTaken::Full);
        }
        queue.commands += 1;
        queue.events.push_back(command);
        Ok(())
    }

    pub(super) fn report(&self, report: NodeEvent) -> Result<(), ReportNotTaken> {
        let mut queue = self.queue.lock();
        if queue.closed {
            return Err(ReportNotTaken::Gone);
        }
        if queue.events.len() - queue.commands >= REPORTS_MAX {
            return Err(ReportNotTaken::Full);
        }
        queue.events.push_back(report);
        Ok(())
    }

    pub(super) fn pop(&self) -> Option<NodeEvent> {
        let mut queue = self.queue.lock();
        let event = queue.events.pop_front()?;
        if event.is_command() {
            queue.commands -= 1;
        }
        Some(event)
    }

    /// Takes nothing more, and drops what is there.
    pub(super) fn close(&self) {
        let mut queue = self.queue.lock();
        queue.closed = true;
        let dropped = std::mem::take(&mut queue.events);
        queue.commands = 0;
        drop(queue);
        drop(dropped);
    }
}

/// Events of connections, in the order in which they came.
#[derive(Default)]
pub(super) struct LinkLane {
    queue: Mutex<LinkQueue>,
    /// Some connection has room again, or the inbox is gone.
    has_room: Condvar,
    has_waiters: AtomicBool,
}

#[derive(Default)]
struct LinkQueue {
    events: VecDeque<(ConnId, usize, NodeEvent)>,
    loads: BTreeMap<ConnId, Load>,
    closed: bool,
}

/// What of one connection waits.
#[derive(Clone, Copy, Default)]
struct Load {
    events: usize,
    bytes: usize,
    /// Its end, as its writer found it, is among them.
    has_failed: bool,
}

impl LinkQueue {
    fn has_room(&self, conn: ConnId, bytes: usize) -> bool {
        self.loads
            .get(&conn)
            .is_none_or(|load| load.events < LINK_EVENTS_MAX && load.bytes.saturating_add(bytes) <= LINK_BYTES_MAX)
    }
}

impl LinkLane {
    pub(super) fn push(&self, event: NodeEvent) -> Result<(), InboxGone> {
        let (conn, bytes) = (event.conn().unwrap_or_default(), event.payload_bytes());
        let mut queue = self.queue.lock();
        while !queue.closed && !queue.has_room(conn, bytes) {
            self.has_waiters.store(true, Ordering::Relaxed);
            self.has_room.wait(&mut queue);
        }
        if queue.closed {
            return Err(InboxGone);
        }
        let load = queue.loads.entry(conn).or_default();
        load.events += 1;
        load.bytes = load.bytes.saturating_add(bytes);
        queue.events.push_back((conn, bytes, event));
        Ok(())
    }

    /// A connection is found broken by who writes to it. That comes behind what its reader has
    /// delivered, which may be the peer's goodbye, and takes no room, so that nobody waits: there
    /// is one of each connection.
    pub(super) fn fail(&self, conn: ConnId, why: String) -> Result<(), InboxGone> {
        let mut queue = self.queue.lock();
        if queue.closed {
            return Err(InboxGone);
        }
        let load = queue.loads.entry(conn).or_default();
        if !mem::replace(&mut load.has_failed, true) {
            load.events += 1;
            queue.events.push_back((conn, 0, NodeEvent::Closed { conn, why }));
        }
        Ok(())
    }

    pub(super) fn pop(&self) -> Option<NodeEvent> {
        let mut queue = self.queue.lock();
        let (conn, bytes, event) = queue.events.pop_front()?;
        if let Some(load) = queue.loads.get_mut(&conn) {
            load.events -= 1;
            load.bytes -= bytes;
            if load.events == 0 {
                queue.loads.remove(&conn);
            }
        }
        // Written under the lock only.
        if self.has_waiters.swap(false, Ordering::Relaxed) {
            self.has_room.notify_all();
        }
        Some(event)
    }

    /// Takes nothing more, and drops what is there.
    pub(super) fn close(&self) {
        let mut queue = self.queue.lock();
        queue.closed = true;
        let dropped = std::mem::take(&mut queue.events);
        queue.loads.clear();
        self.has_room.notify_all();
        drop(queue);
        drop(dropped);
    }
}
