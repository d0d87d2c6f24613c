//! The heartbeat thread of a simulated process.

use mcd::protocol::messages::{Heartbeat, Message};
use mcd::protocol::mutant;
use mcd::protocol::types::{ConnId, Instant};

use crate::net::{Item, ProcId};
use crate::node::Heartbeats;
use crate::world::{Event, World};

impl World {
    /// The protocol feeds the heartbeat thread: it sends this one at once, and again every
    /// interval.
    pub fn feed_heartbeats(&mut self, proc: ProcId, conn: ConnId, beat: Heartbeat, until: Instant) {
        self.tokens += 1;
        let token = self.tokens;
        self.procs[proc].heartbeats = Some(Heartbeats { conn, beat, until, token });
        self.beat(proc, token);
    }

    /// The heartbeat thread's timer: it works while the engine is busy, and not while the process
    /// is frozen.
    pub fn beat(&mut self, proc: ProcId, token: u64) {
        let node = &self.procs[proc];
        let Some(beats) = node.heartbeats.filter(|beats| node.alive && beats.token == token) else { return };
        if self.now < node.frozen_until {
            return self.at(node.frozen_until, Event::Beat { proc, token });
        }
        if node.clock.local(self.now) >= beats.until {
            return;
        }
        // By a clock that may be slow, and fed anew as soon as the engine wakes.
        let hung_us = self.now - node.fed_at;
        if hung_us > self.plan.stall_max_us * 11 / 10 + self.plan.heartbeat_us * 2 {
            let (slot, ms) = (node.slot, hung_us / 1000);
            return self.violate(format!("n{slot} is vouched for, but its engine has hung for {ms} ms"));
        }
        if mutant::is("heartbeats-wait-for-the-sender") && self.sender_waits_us(proc).is_some() {
            return self.after(self.plan.heartbeat_us, Event::Beat { proc, token });
        }
        self.send(proc, beats.conn, Item::Message(Message::Heartbeat(beats.beat)));
        self.after(self.plan.heartbeat_us, Event::Beat { proc, token });
    }
}
