//! What waits for room: a receiver whose staging memory is used up and that reads no more, a window
//! that is closed, a sender thread that cannot write. Bytes wait then, in order, and nothing else
//! does.

use mcd::protocol::messages::Channel;
use mcd::protocol::primary;

use crate::net::{Item, ProcId};
use crate::node::AnyPhase;
use crate::world::{Event, World};

/// Items that a kernel takes for a process that does not read.
const SOCKET_ITEMS_MAX: usize = 4;
/// Items that a kernel takes from a process whose peer takes none.
const UNSENT_ITEMS_MAX: usize = 6;

impl World {
    // ---- the receiving end ----

    /// What arrived is read at once, or lies in the socket behind what has no room.
    pub fn take_or_leave(&mut self, conn: usize, to: usize, item: Item) {
        if self.conns[conn].ends[to].unread.is_empty() && self.has_room(conn, to, &item) {
            self.take_item(conn, to, item);
        } else {
            self.conns[conn].ends[to].unread.push_back(item);
        }
    }

    /// True if reading this does not wait for staging memory.
    fn has_room(&mut self, conn: usize, to: usize, item: &Item) -> bool {
        let Item::Bulk { bytes, .. } = item else { return true };
        let end = &mut self.conns[conn].ends[to];
        let budget = &self.procs[end.proc].budget;
        let needed =
            end.receiver.as_mut().map_or(bytes.len() as u64, |receiver| receiver.staged_bytes_max(bytes.len()));
        budget.used() + needed <= budget.bytes_max()
    }

    /// Staging memory was given back: the process reads on.
    pub fn read_what_has_room(&mut self, proc: ProcId) {
        for (_, conn) in self.procs[proc].conns.clone() {
            let Some(to) = self.conns[conn].ends.iter().position(|end| end.proc == proc) else { continue };
            while let Some(item) = self.conns[conn].ends[to].unread.pop_front() {
                if !self.has_room(conn, to, &item) {
                    self.conns[conn].ends[to].unread.push_front(item);
                    break;
                }
                self.take_item(conn, to, item);
            }
        }
    }

    /// True while this end's kernel takes nothing more.
    pub fn window_is_closed(&self, conn: usize, to: usize) -> bool {
        let end = &self.conns[conn].ends[to];
        !end.closed && !end.silent && (self.now < end.window_closed_until || end.unread.len() >= SOCKET_ITEMS_MAX)
    }

    /// True if what waits at this end waits only for its peer's window: the peer's kernel answers
    /// probes.
    pub fn answers_window_probes(&self, conn: usize, end: usize) -> bool {
        let [here, there] = [&self.conns[conn].ends[end], &self.conns[conn].ends[1 - end]];
        let blocked_until = self.weather.blocked_until(self.conns[conn].channel, here.slot, there.slot);
        blocked_until <= self.now && self.window_is_closed(conn, 1 - end)
    }

    /// The data connections of a process take nothing until then.
    pub fn close_window(&mut self, proc: ProcId, until: u64) {
        for (_, conn) in self.procs[proc].conns.clone() {
            let Some(end) = self.conns[conn].ends.iter().position(|end| end.proc == proc) else { continue };
            if self.conns[conn].channel == Channel::Data {
                self.conns[conn].ends[end].window_closed_until = until;
            }
        }
        let us = until - self.now;
        self.note(proc, || format!("the window of its data connection is CLOSED for {} ms", us / 1000));
    }

    pub fn open_windows(&mut self) {
        for conn in &mut self.conns {
            conn.ends.iter_mut().for_each(|end| end.window_closed_until = 0);
        }
    }

    // ---- the sending end ----

    /// How long the sender thread waits before it tries again, if it cannot write now.
    pub fn sender_waits_us(&self, proc: ProcId) -> Option<u64> {
        let node = &self.procs[proc];
        let blocked_until = node.frozen_until.max(node.sender_blocked_until);
        if self.now < blocked_until {
            return Some((blocked_until - self.now).min(1_000));
        }
        let conn = node.conn(node.sender.as_ref()?.conn)?;
        let from = self.conns[conn].ends.iter().position(|end| end.proc == proc)?;
        let is_full = self.conns[conn].ends[from].queue.len() >= UNSENT_ITEMS_MAX;
        (is_full && self.window_is_closed(conn, 1 - from)).then_some(500)
    }

    /// The sender's connection is given up. What the thread has not written yet is lost, unless it
    /// is the goodbye of a node that stops, which leaves in order.
    pub fn give_up_sender(&mut self, proc: ProcId) {
        let stopping = self.procs[proc].phase_now() == AnyPhase::Primary(primary::Phase::Stopping);
        let lost = !stopping && (self.sender_waits_us(proc).is_some() || self.rng.chance(500));
        if let Some(sender) = self.procs[proc].sender.as_mut().filter(|_| lost) {
            sender.jobs.clear();
        }
        self.drop_sender(proc);
    }

    /// What is due waits for the peer's window, and is tried again.
    pub fn deliver_when_open(&mut self, conn: usize, from: usize) {
        let us = self.rng.range(100, 1_000);
        self.after(us, Event::Deliver { conn, from });
    }
}
