//! How the world moves what travels: connections made, items delivered in order, timeouts, resets.

use std::time::Duration;

use mcd::protocol::messages::{Channel, Message};
use mcd::protocol::mutant;
use mcd::protocol::primary;
use mcd::protocol::secondary;
use mcd::protocol::stall_detector::{StallDetector, TcpInfo};
use mcd::protocol::types::ConnId;
use mcd::wire::codec::{decode_message, encode_message};

use crate::net::{Conn, End, Item, ProcId};
use crate::node::{In, Role};
use crate::stream::{Arrived, Receiver, sums_over_the_wire};
use crate::unknown_peers::UNKNOWN;
use crate::world::{Event, World};

impl World {
    fn delay(&mut self, channel: Channel) -> u64 {
        let (low, high) = self.plan.delay_us;
        let tail = if self.rng.chance(self.plan.tail_per_mille) { self.rng.below(self.plan.tail_us) } else { 0 };
        self.rng.range(low, high) + tail + self.weather.extra_us(channel, self.now)
    }

    /// A secondary asks for a connection.
    pub fn connect(&mut self, proc: ProcId, local: ConnId, channel: Channel) {
        let slot = self.procs[proc].slot;
        if channel == Channel::Data {
            let others = self.slots.len() as u64 - 1;
            let step = 1 + self.rng.below(others) as usize;
            self.procs[proc].target = (slot + step) % self.slots.len();
        }
        let target = self.procs[proc].target;
        let conn = self.conns.len();
        let nobody = ProcId::MAX;
        let ends = [End::new(proc, slot, local), End::new(nobody, target, 0)];
        self.conns.push(Conn { channel, ends, established: false, unknown: None });
        self.procs[proc].conns.push((local, conn));
        let blocked = self.weather.blocked_until(channel, slot, target) > self.now
            || self.weather.blocked_until(channel, target, slot) > self.now;
        if blocked {
            self.after(self.plan.join_timeout_us / 2, Event::ConnectFails(conn));
        } else {
            let us = self.delay(channel) + self.delay(channel);
            self.after(us, Event::Connect(conn));
        }
    }

    /// The connection reaches the other host.
    pub fn accept(&mut self, conn: usize) {
        let target = self.conns[conn].ends[1].slot;
        if self.conns[conn].ends[0].closed {
            return;
        }
        let listener = self.slots[target].filter(|proc| self.procs[*proc].is_primary());
        let Some(listener) = listener else {
            self.end_is_gone(conn, 0, "connection refused");
            return;
        };
        let Some(local) = self.admit(listener, conn) else {
            self.end_is_gone(conn, 0, "turned away");
            return;
        };
        self.procs[listener].conns.push((local, conn));
        self.conns[conn].ends[1] = End::new(listener, target, local);
        self.conns[conn].established = true;
        if self.conns[conn].unknown.is_some() {
            return self.unknown_connected(conn);
        }
        let End { proc, local, .. } = self.conns[conn].ends[0];
        self.arrive(proc, In::Secondary(secondary::Input::Connected { conn: local }));
        self.drive(proc);
    }

    /// What arrives of an item that is sent: a message goes through its byte form, and so do
    /// hashes.
    fn over_the_wire(&mut self, item: Item) -> Option<Item> {
        let message = match item {
            Item::Message(message) => message,
            Item::Hashes { first, hashes } => match sums_over_the_wire(first, &hashes) {
                Ok((first, hashes)) => return Some(Item::Hashes { first, hashes }),
                Err(why) => {
                    self.violate(format!("the wire spoils hashes: {why}"));
                    return None;
                }
            },
            other => return Some(other),
        };
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        encode_message(&message, &mut bytes);
        let decoded = decode_message(&bytes);
        self.scratch = bytes;
        match decoded {
            Ok(message) => Some(Item::Message(message)),
            Err(error) => {
                self.violate(format!("the wire does not know a {}: {error}", message.name()));
                None
            }
        }
    }

    /// Sends over the connection a process knows as `local`.
    pub fn send(&mut self, proc: ProcId, local: ConnId, item: Item) {
        let Some(item) = self.over_the_wire(item) else { return };
        let Some(conn) = self.procs[proc].conn(local) else { return };
        let Some(from) = self.end_of(conn, proc) else { return };
        let end = &self.conns[conn].ends[from];
        if !self.conns[conn].established || end.closed || end.broken {
            return;
        }
        if self.trace.on && !matches!(item, Item::Message(Message::Heartbeat(_))) {
            let to = self.conns[conn].ends[1 - from].slot;
            self.note(proc, || format!("──▶ n{to}: {}", item.name()));
        }
        self.enqueue(conn, from, item);
    }

    pub fn enqueue(&mut self, conn: usize, from: usize, item: Item) {
        let channel = self.conns[conn].channel;
        let (near, far) = (self.conns[conn].ends[from].slot, self.conns[conn].ends[1 - from].slot);
        let now = self.now;
        let due = self.weather.through(near, far, now, item.pages()) + self.delay(channel);
        let end = &mut self.conns[conn].ends[from];
        let due = end.queue.back().map_or(due, |(_, last, _)| due.max(*last));
        end.queue.push_back((now, due, item));
        self.at(due, Event::Deliver { conn, from });
        if self.conns[conn].ends[from].unacked_since.is_none() {
            self.unacked(conn, from, now);
        }
    }

    fn unacked(&mut self, conn: usize, end: usize, since: u64) {
        self.conns[conn].ends[end].unacked_since = Some(since);
        // The kernel is patient. Data connections are suspected for their drivers before it gives
        // up; heartbeats may wait behind pages.
        let timeout = self.plan.user_timeout_us.max(self.plan.timeout_us * 12);
        self.at(self.now.max(since + timeout), Event::UserTimeout { conn, end, since });
    }

    /// From now on a driver looks whether what it sends over a data connection arrives.
    fn detector(&mut self, conn: usize, end: usize) {
        if self.conns[conn].channel == Channel::Data {
            self.conns[conn].ends[end].detector = Some(StallDetector::new(Duration::from_micros(self.plan.timeout_us)));
        }
    }

    fn path_blocked_until(&self, conn: usize, from: usize) -> u64 {
        let conn = &self.conns[conn];
        self.weather.blocked_until(conn.channel, conn.ends[from].slot, conn.ends[1 - from].slot)
    }

    pub fn deliver_due(&mut self, conn: usize, from: usize) {
        while let Some((_, due, _)) = self.conns[conn].ends[from].queue.front() {
            if *due > self.now {
                let due = *due;
                self.at(due, Event::Deliver { conn, from });
                return;
            }
            let blocked_until = self.path_blocked_until(conn, from);
            if blocked_until > self.now {
                let again = blocked_until + self.rng.range(200, 20_000);
                if let Some(head) = self.conns[conn].ends[from].queue.front_mut() {
                    head.1 = again;
                }
                self.at(again, Event::Deliver { conn, from });
                return;
            }
            if self.window_is_closed(conn, 1 - from) {
                return self.deliver_when_open(conn, from);
            }
            let Some((_, _, item)) = self.conns[conn].ends[from].queue.pop_front() else { return };
            self.deliver(conn, from, item);
        }
    }

    fn deliver(&mut self, conn: usize, from: usize, item: Item) {
        let to = 1 - from;
        if self.conns[conn].ends[to].silent {
            return;
        }
        let back_open = self.path_blocked_until(conn, to) <= self.now;
        if self.conns[conn].ends[to].closed {
            if back_open && !self.conns[conn].ends[from].closed {
                let us = self.delay(self.conns[conn].channel);
                self.after(us, Event::Reset { conn, end: from, why: "connection reset" });
            }
            return;
        }
        if back_open {
            self.conns[conn].ends[from].echoed_at = self.now;
            match self.conns[conn].ends[from].queue.front() {
                None => self.conns[conn].ends[from].unacked_since = None,
                // A link that moves is never given up, however long its queue is.
                Some(_) => self.unacked(conn, from, self.now),
            }
        }
        self.conns[conn].ends[to].received_at = self.now;
        if self.conns[conn].ends[to].proc == UNKNOWN {
            return self.unknown_hears(conn, &item);
        }
        self.take_or_leave(conn, to, item);
    }

    /// The thread that reads a connection takes what arrived.
    pub fn take_item(&mut self, conn: usize, to: usize, item: Item) {
        if let Item::Fin = item {
            self.end_is_gone(conn, to, "closed by the peer");
        } else {
            self.receive(conn, to, item);
        }
    }

    fn receive(&mut self, conn: usize, to: usize, item: Item) {
        let End { proc, local, greeted, .. } = self.conns[conn].ends[to];
        let heartbeat = matches!(item, Item::Message(Message::Heartbeat(_)));
        if self.trace.on && !heartbeat {
            let from = self.conns[conn].ends[1 - to].slot;
            self.note(proc, || format!("◀── n{from}: {}", item.name()));
        }
        let input = match (&self.procs[proc].role, item) {
            (Role::Primary(_), Item::Message(Message::Hello(hello))) if !greeted => {
                if !self.admits_hello(conn, local, &hello) {
                    return;
                }
                self.conns[conn].ends[to].greeted = true;
                self.detector(conn, to);
                In::Primary(primary::Input::Hello { conn: local, hello })
            }
            (Role::Primary(_), Item::Message(message)) if greeted => {
                In::Primary(primary::Input::Message { conn: local, message })
            }
            (Role::Primary(_), Item::Hashes { first, hashes }) if greeted => {
                In::Primary(primary::Input::PeerHashes { conn: local, first, hashes })
            }
            (Role::Secondary(_), Item::Message(message)) => {
                if matches!(message, Message::Welcome(_)) {
                    self.detector(conn, to);
                }
                In::Secondary(secondary::Input::Message { conn: local, message })
            }
            (Role::Secondary(_), Item::Bulk { bytes, .. }) => return self.receive_bulk(conn, to, &bytes),
            _ => return,
        };
        self.arrive(proc, input);
        self.drive(proc);
    }

    /// Bytes of epochs and pages become what they were: in the receiving thread, whatever its
    /// driver does.
    fn receive_bulk(&mut self, conn: usize, to: usize, bytes: &[u8]) {
        let pages = self.plan.pages + self.plan.blocks;
        let end = &mut self.conns[conn].ends[to];
        let (proc, local) = (end.proc, end.local);
        let budget = &self.procs[proc].budget;
        let receiver = end.receiver.get_or_insert_with(|| Box::new(Receiver::new(pages, budget.clone())));
        let now = self.procs[proc].clock.local(self.now);
        match receiver.take(now, bytes) {
            Ok(arrived) => {
                for arrived in arrived {
                    let input = match arrived {
                        Arrived::Epoch { staged, began } => In::Epoch { conn: local, staged, began },
                        Arrived::Background { pages, staged_bytes } => {
                            In::Background { conn: local, pages, staged_bytes }
                        }
                    };
                    self.arrive(proc, input);
                }
                self.drive(proc);
            }
            Err(why) => self.violate(format!("the wire spoils an epoch: {why}")),
        }
    }

    /// What the kernel of a node's host knows of its data connections and its driver has not looked
    /// at yet.
    pub fn look_at_links(&mut self, proc: ProcId) -> Option<In> {
        let now = self.procs[proc].clock.local(self.now);
        let is_due = |conn: usize| {
            self.end_of(conn, proc)
                .and_then(|end| self.conns[conn].ends[end].detector.as_ref())
                .is_some_and(|detector| detector.is_due(now))
        };
        let (local, conn) = self.procs[proc].conns.iter().copied().find(|(_, conn)| is_due(*conn))?;
        let end = self.end_of(conn, proc)?;
        let tcp_info = self.tcp_info(conn, end);
        let look = self.conns[conn].ends[end].detector.as_mut()?.look(now, tcp_info);
        if let Some(silence) = look.stuck {
            self.note(proc, || format!("connection {local} is stuck for {} ms", silence.as_millis()));
            // What is written and not sent yet still leaves, if the way opens.
            self.close(proc, local);
            let why = "nothing came back from it".to_owned();
            return Some(if self.procs[proc].is_primary() {
                In::Primary(primary::Input::Closed { conn: local, why })
            } else {
                In::Secondary(secondary::Input::Closed { conn: local, why })
            });
        }
        let ago = look.received.filter(|_| !self.procs[proc].is_primary())?;
        Some(In::Secondary(secondary::Input::Moved { conn: local, ago }))
    }

    /// What a kernel knows of its end of a connection.
    fn tcp_info(&mut self, conn: usize, end: usize) -> TcpInfo {
        self.hear_late_echo(conn, end);
        let End { proc, unacked_since, received_at, echoed_at, .. } = self.conns[conn].ends[end];
        // What waits for a window to open is not on its way.
        let closed = self.window_is_closed(conn, 1 - end);
        let clock = &self.procs[proc].clock;
        let ago = |at: u64| clock.local(self.now).since(clock.local(at));
        TcpInfo {
            on_their_way: unacked_since.is_some() && !closed || closed && mutant::is("zero-window-taken-for-loss"),
            heard_ago: ago(received_at.max(echoed_at)),
            received_ago: ago(received_at),
        }
    }

    /// An acknowledgement that was lost comes with a retransmission, once the way back is open
    /// again.
    fn hear_late_echo(&mut self, conn: usize, end: usize) -> bool {
        let back_open = self.path_blocked_until(conn, 1 - end) <= self.now;
        let has_arrived = self.conns[conn].ends[end].queue.is_empty() && !self.conns[conn].ends[1 - end].silent;
        let has_arrived = has_arrived || self.answers_window_probes(conn, end);
        if back_open && has_arrived && self.conns[conn].ends[end].unacked_since.take().is_some() {
            self.conns[conn].ends[end].echoed_at = self.now;
        }
        back_open && has_arrived
    }

    pub fn user_timeout(&mut self, conn: usize, end: usize, since: u64) {
        let mine = &self.conns[conn].ends[end];
        if mine.closed || mine.unacked_since != Some(since) {
            return;
        }
        if self.hear_late_echo(conn, end) {
            return;
        }
        let other = &self.conns[conn].ends[1 - end];
        let other_open = !other.closed && !other.silent;
        self.conns[conn].ends[end].queue.clear();
        if other_open && self.path_blocked_until(conn, end) <= self.now {
            let us = self.delay(self.conns[conn].channel);
            self.after(us, Event::Reset { conn, end: 1 - end, why: "connection reset" });
        }
        self.end_is_gone(conn, end, "user timeout");
    }

    /// One end learns that its connection is gone.
    pub fn end_is_gone(&mut self, conn: usize, end: usize, why: &'static str) {
        let End { proc, local, closed, silent, .. } = self.conns[conn].ends[end];
        if closed || silent || proc == ProcId::MAX {
            return;
        }
        self.conns[conn].ends[end].closed = true;
        self.conns[conn].ends[end].queue.clear();
        self.conns[conn].ends[end].unread.clear();
        if proc == UNKNOWN {
            return;
        }
        let node = &mut self.procs[proc];
        node.admission.gone(local);
        node.conns.retain(|(mine, _)| *mine != local);
        let why_text = why.to_string();
        match node.role {
            Role::Primary(_) => {
                self.arrive(proc, In::Primary(primary::Input::Closed { conn: local, why: why_text }));
            }
            Role::Secondary(_) => {
                self.arrive(proc, In::Secondary(secondary::Input::Closed { conn: local, why: why_text }));
            }
            Role::Claiming(_) | Role::Waiting | Role::Restoring(..) => {}
        }
        let channel = self.conns[conn].channel;
        self.note(proc, || format!("{channel:?} connection {local} gone: {why}"));
        self.drive(proc);
    }

    fn end_of(&self, conn: usize, proc: ProcId) -> Option<usize> {
        self.conns[conn].ends.iter().position(|end| end.proc == proc)
    }

    /// A process closes a connection: what was sent before still leaves.
    pub fn close(&mut self, proc: ProcId, local: ConnId) {
        self.procs[proc].heartbeats.take_if(|beats| beats.conn == local);
        self.procs[proc].admission.gone(local);
        let Some(conn) = self.procs[proc].conn(local) else { return };
        self.procs[proc].conns.retain(|(mine, _)| *mine != local);
        self.close_end_of(conn, proc);
    }

    pub fn close_end_of(&mut self, conn: usize, proc: ProcId) {
        let Some(end) = self.end_of(conn, proc) else { return };
        if self.conns[conn].ends[end].closed {
            return;
        }
        if self.conns[conn].established && !self.conns[conn].ends[end].broken {
            self.enqueue(conn, end, Item::Fin);
        }
        self.conns[conn].ends[end].closed = true;
    }

    /// What is on its way from this end is lost.
    pub fn abort_end_of(&mut self, conn: usize, proc: ProcId) {
        if let Some(end) = self.end_of(conn, proc) {
            self.conns[conn].ends[end].queue.clear();
        }
    }

    pub fn silence_end_of(&mut self, conn: usize, proc: ProcId) {
        if let Some(end) = self.end_of(conn, proc) {
            self.conns[conn].ends[end].silent = true;
        }
    }

    /// A host that had died runs again: it answers old connections with resets.
    pub fn host_is_back(&mut self, slot: usize) {
        for conn in 0..self.conns.len() {
            for end in 0..2 {
                let mine = &mut self.conns[conn].ends[end];
                if mine.slot == slot && mine.silent {
                    mine.silent = false;
                    mine.closed = true;
                    let us = self.rng.range(1_000, 50_000);
                    self.after(us, Event::Reset { conn, end: 1 - end, why: "connection reset" });
                }
            }
        }
    }
}
