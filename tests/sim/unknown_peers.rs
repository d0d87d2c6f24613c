//! Connections of programs that are no node of the pair: silent ones, hellos for another guest or
//! on the wrong port, newcomers that never finish, many of them at once. And who is admitted: the
//! real rules of the acceptor.

use std::time::Duration;

use mcd::protocol::admission::{Admission, AdmissionConfig, Arrival, Overdue};
use mcd::protocol::cpu::HostCpu;
use mcd::protocol::messages::{Activity, Channel, Heartbeat, Hello, Message, PROTOCOL_VERSION};
use mcd::protocol::types::{ConnId, Generation, GuestName, InstanceId};

use crate::net::{Conn, End, Item, ProcId};
use crate::plan::{CPU, Plan};
use crate::world::{Event, World};

/// The other end of such a connection; no process of the world.
pub const UNKNOWN: ProcId = ProcId::MAX - 1;

/// Accepted connections are numbered from here.
const ACCEPTED_FROM: ConnId = 1 << 32;

/// Data connections that newcomers may hold open at one primary, and those of its peer and of a
/// newcomer that has joined a moment ago.
const NEWCOMERS_MAX: usize = 8 + 2;

/// What an unknown peer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    Nothing,
    /// A hello for another guest.
    OtherGuest,
    /// A hello that belongs on the other port.
    WrongPort,
    /// A hello on the heartbeat port, from a newcomer without a data connection.
    HeartbeatFirst,
    /// A newcomer's hello, and nothing after it.
    DataOnly,
    /// Both hellos, and no heartbeat.
    BothAndNothing,
    /// Both hellos, and heartbeats of a machine that is being built for ever.
    BuildsForEver,
}

const ALL: [Says; 7] = [
    Says::Nothing,
    Says::OtherGuest,
    Says::WrongPort,
    Says::HeartbeatFirst,
    Says::DataOnly,
    Says::BothAndNothing,
    Says::BuildsForEver,
];

/// An unknown peer, at one connection.
#[derive(Clone, Copy, Debug)]
pub struct UnknownPeer {
    pub says: Says,
    /// Its network address; hosts have theirs from 0 on.
    pub address: u16,
    instance: InstanceId,
}

impl Plan {
    /// The acceptor's bounds, with times of this world.
    pub fn admission(&self) -> Admission<u16> {
        let config = AdmissionConfig {
            silent_max: 32,
            silent_per_address_max: 8,
            greeted_max: 32,
            greeted_per_address_max: 8,
            hello_timeout: Duration::from_micros(self.hello_timeout_us),
            report_interval: Duration::from_micros(self.hello_timeout_us),
        };
        Admission::new(config, ACCEPTED_FROM)
    }
}

impl World {
    // ---- the acceptor ----

    /// A connection arrives at a primary: its number there, if it may stay.
    pub fn admit(&mut self, listener: ProcId, conn: usize) -> Option<ConnId> {
        let address = match &self.conns[conn].unknown {
            Some(unknown) => unknown.address,
            None => self.conns[conn].ends[0].slot as u16,
        };
        let node = &mut self.procs[listener];
        let now = node.clock.local(self.now);
        let Arrival::Admit { conn, close } = node.admission.arrived(now, address) else { return None };
        let due = node.admission.poll_timeout().map(|at| node.clock.true_us(at));
        if let Some(at) = due {
            self.at(at.max(self.now), Event::Admission(listener));
        }
        if let Some(silent) = close {
            self.close(listener, silent);
        }
        Some(conn)
    }

    /// Time has passed for the acceptor of a process.
    pub fn poll_admission(&mut self, proc: ProcId) {
        if !self.procs[proc].alive {
            return;
        }
        let now = self.procs[proc].clock.local(self.now);
        while let Some(overdue) = self.procs[proc].admission.poll(now) {
            if let Overdue::Close(conn) = overdue {
                self.close(proc, conn);
            }
        }
        let node = &self.procs[proc];
        if let Some(at) = node.admission.poll_timeout().map(|at| node.clock.true_us(at)) {
            self.at(at.max(self.now + 1_000), Event::Admission(proc));
        }
    }

    /// A hello arrived at a primary; false if the connection is closed for it.
    pub fn admits_hello(&mut self, conn: usize, local: ConnId, hello: &Hello) -> bool {
        let proc = self.conns[conn].ends[1].proc;
        let right_port = hello.channel == self.conns[conn].channel;
        let admitted = right_port && self.procs[proc].admission.said_hello(local).is_ok();
        if !admitted {
            self.close(proc, local);
        }
        admitted
    }

    /// Nobody makes a primary keep more newcomers than its bound.
    pub fn check_newcomers(&mut self) {
        for slot in 0..self.slots.len() {
            let Some(proc) = self.slots[slot] else { continue };
            let node = &self.procs[proc];
            if self.now < node.idle_until || !node.inbox.is_empty() || !node.unread.is_empty() {
                // Its engine has hellos before it.
                continue;
            }
            let held = |conn: &&(ConnId, usize)| {
                let conn = &self.conns[conn.1];
                conn.channel == Channel::Data && conn.ends[1].proc == proc && conn.ends[1].greeted
            };
            let count = self.procs[proc].conns.iter().filter(held).count();
            if count > NEWCOMERS_MAX {
                self.violate(format!("n{slot} holds {count} connections of newcomers open"));
            }
        }
    }

    // ---- the peers ----

    /// Some of them turn to a host, from one address or from many.
    pub fn unknown_peers_come(&mut self, slot: usize) {
        let count = self.rng.range(1, 40);
        let (one_kind, one_address) = (self.rng.chance(500), self.rng.chance(500));
        let (mut says, mut address) = (*self.rng.pick(&ALL), self.rng.range(100, 999) as u16);
        let span = *self.rng.pick(&[500, 5_000, 50_000]);
        for _ in 0..count {
            if !one_kind {
                says = *self.rng.pick(&ALL);
            }
            if !one_address {
                address = self.rng.range(100, 999) as u16;
            }
            let us = self.rng.below(span);
            self.after(us, Event::UnknownPeer { slot, says, address });
        }
        self.trace.across(self.now, &format!("{count} UNKNOWN PEERS at n{slot}, one of them says {says:?}"));
    }

    /// They come all the time, whatever the run is about, but for those that hold what they got.
    pub fn flood(&mut self) {
        let runs = |slot: &usize| self.slots[*slot].is_some_and(|proc| self.procs[proc].is_primary());
        let slot = (0..self.slots.len()).find(runs).unwrap_or(0);
        let says = self.plan.flood.unwrap_or(ALL[self.rng.below(5) as usize]);
        let address = self.rng.range(100, 999) as u16;
        self.unknown_peer(slot, says, address);
        // A newcomer has to get both its hellos through before eight others say theirs.
        let us = if says == Says::Nothing { self.rng.range(100, 800) } else { self.rng.range(200, 4_000) };
        self.after(us, Event::Flood);
    }

    pub fn unknown_peer(&mut self, slot: usize, says: Says, address: u16) {
        self.instances += 1;
        let unknown = UnknownPeer { says, address, instance: InstanceId(u128::from(self.instances)) };
        let channel = match says {
            Says::HeartbeatFirst => Channel::Heartbeat,
            Says::Nothing | Says::WrongPort if self.rng.chance(500) => Channel::Heartbeat,
            _ => Channel::Data,
        };
        self.unknown_connects(slot, unknown, channel);
    }

    fn unknown_connects(&mut self, slot: usize, unknown: UnknownPeer, channel: Channel) {
        let conn = self.conns.len();
        let ends = [End::new(UNKNOWN, slot, 0), End::new(ProcId::MAX, slot, 0)];
        self.conns.push(Conn { channel, ends, established: false, unknown: Some(unknown) });
        let us = self.rng.range(40, 2_000);
        self.after(us, Event::Connect(conn));
    }

    /// Its connection stands.
    pub fn unknown_connected(&mut self, conn: usize) {
        let Some(UnknownPeer { says, instance, .. }) = self.conns[conn].unknown else { return };
        let port = self.conns[conn].channel;
        let other = if port == Channel::Data { Channel::Heartbeat } else { Channel::Data };
        let hello = Hello {
            channel: if says == Says::WrongPort { other } else { port },
            version: PROTOCOL_VERSION,
            guest: if says == Says::OtherGuest { other_guest() } else { Plan::guest_name() },
            instance,
            features: 0,
            staging_bytes_max: 1 << 30,
            cpu: HostCpu { ..CPU },
        };
        if says != Says::Nothing {
            self.enqueue(conn, 0, Item::Message(Message::Hello(hello)));
        }
    }

    /// It hears what a primary says.
    pub fn unknown_hears(&mut self, conn: usize, item: &Item) {
        let Some(unknown) = self.conns[conn].unknown else { return };
        let channel = self.conns[conn].channel;
        match (unknown.says, item) {
            (Says::BothAndNothing | Says::BuildsForEver, Item::Message(Message::Welcome(_))) => {
                if channel == Channel::Data {
                    let slot = self.conns[conn].ends[1].slot;
                    self.unknown_connects(slot, unknown, Channel::Heartbeat);
                } else if unknown.says == Says::BuildsForEver {
                    self.unknown_beats(conn);
                }
            }
            (Says::DataOnly, Item::Message(Message::Welcome(_))) => {}
            (says, Item::Message(Message::Welcome(_))) => {
                self.violate(format!("n{} welcomes a peer that says {says:?}", self.conns[conn].ends[1].slot));
            }
            (_, Item::Fin | Item::Message(Message::Refuse { .. })) => self.conns[conn].ends[0].closed = true,
            _ => {}
        }
    }

    pub fn unknown_beats(&mut self, conn: usize) {
        let Some(UnknownPeer { instance, .. }) = self.conns[conn].unknown else { return };
        if self.conns[conn].ends[0].closed {
            return;
        }
        let (generation, activity) = (Generation(0), Activity::Building { done_bytes: 0 });
        let beat = Heartbeat { instance, generation, sequence: 0, committed: None, activity };
        self.enqueue(conn, 0, Item::Message(Message::Heartbeat(beat)));
        self.after(self.plan.heartbeat_us / 2, Event::UnknownBeats(conn));
    }
}

fn other_guest() -> GuestName {
    GuestName::new("other").expect("a good name")
}
