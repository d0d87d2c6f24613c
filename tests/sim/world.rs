//! The world: events in order of time, and what each of them does.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use mcd::protocol::arbitration::{ArbiterAnswer, ArbiterCall};
use mcd::protocol::block_hashes::BlockHash;
use mcd::protocol::command::Command;
use mcd::protocol::types::{ConnId, InstanceId};

use crate::arbiter::Arbiter;
use crate::disks::{HostDisks, Question};
use crate::losses::{LOSSES, Loss};
use crate::model::Model;
use crate::net::{Conn, ProcId, Weather};
use crate::node::{Capture, In, Proc};
use crate::plan::{FaultKind, Plan};
use crate::rng::Rng;
use crate::storage::Storage;
use crate::stream::Encoder;
use crate::trace::Trace;
use crate::unknown_peers::Says;

/// What can happen.
#[derive(Clone, Debug)]
pub enum Event {
    Wake(ProcId),
    Deliver {
        conn: usize,
        from: usize,
    },
    UserTimeout {
        conn: usize,
        end: usize,
        since: u64,
    },
    Connect(usize),
    ConnectFails(usize),
    Reset {
        conn: usize,
        end: usize,
        why: &'static str,
    },
    SenderStep {
        proc: ProcId,
        token: u64,
    },
    GuestStep(ProcId),
    ArbiterHears {
        proc: ProcId,
        call: ArbiterCall,
    },
    ArbiterAnswers {
        proc: ProcId,
        ticket: u64,
        answer: ArbiterAnswer,
    },
    ArbiterSilent {
        proc: ProcId,
        ticket: u64,
    },
    Rejoin(ProcId),
    Restored(ProcId),
    /// The applying thread has done what it had in hand.
    Apply {
        proc: ProcId,
        instance: InstanceId,
    },
    /// The moment of a capture's cut.
    Cut(Capture),
    Tracking {
        proc: ProcId,
        conn: ConnId,
        fails: bool,
    },
    /// The threads of a process that was frozen read what lies in its sockets.
    ReadsOn(ProcId),
    /// The heartbeat thread's timer.
    Beat {
        proc: ProcId,
        token: u64,
    },
    /// A newcomer's machine is there.
    Built {
        proc: ProcId,
        instance: InstanceId,
        made: Vec<bool>,
    },
    DiskWritten(ProcId),
    HashesRead(ProcId, Question),
    OwnHashes {
        proc: ProcId,
        ticket: u64,
        hashes: Result<Vec<BlockHash>, String>,
    },
    Holes {
        proc: ProcId,
        ticket: u64,
        through: u64,
        holes: Vec<std::ops::Range<u64>>,
    },
    BlocksHashed {
        proc: ProcId,
        instance: InstanceId,
        run: std::ops::Range<u64>,
        hashes: Vec<BlockHash>,
    },
    Start(usize),
    /// An operator starts the guest here, unless something runs.
    Boot(usize),
    UnknownPeer {
        slot: usize,
        says: Says,
        address: u16,
    },
    UnknownBeats(usize),
    /// One more of many that come all the time.
    Flood,
    /// A process's acceptor has waited long enough for a hello.
    Admission(ProcId),
    Command(ProcId, Command),
    SnapshotEnds {
        proc: ProcId,
        stop: bool,
        written: bool,
    },
    Fault,
    FaultAt(FaultKind, usize),
    Operator,
    FaultsEnd,
}

struct Entry {
    at: u64,
    seq: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        (self.at, self.seq) == (other.at, other.seq)
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Entry) -> std::cmp::Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}

/// What a run saw.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub simulated_us: u64,
    pub events: u64,
    pub faults: u64,
    pub packets: u64,
    pub takeovers: u64,
    pub late_releases: u64,
    /// By [`Loss`].
    pub lost_guests: [u64; LOSSES],
    pub epochs: u64,
    pub blocks_compared: u64,
    pub blocks_same: u64,
    pub verifies: u64,
    pub handovers: u64,
}

pub struct World {
    pub rng: Rng,
    pub plan: Plan,
    pub now: u64,
    queue: BinaryHeap<Reverse<Entry>>,
    seq: u64,
    pub procs: Vec<Proc>,
    pub slots: Vec<Option<ProcId>>,
    pub starting: Vec<bool>,
    pub conns: Vec<Conn>,
    pub weather: Weather,
    pub arbiter: Arbiter,
    pub storage: Storage,
    /// Per host.
    pub disks: Vec<HostDisks>,
    pub model: Model,
    pub trace: Trace,
    pub violation: Option<String>,
    pub stats: Stats,
    pub faults_over_since: Option<u64>,
    /// The guest is gone for reasons nobody could have helped.
    pub lost: bool,
    /// What just happened that may cost the guest.
    pub accepted_loss: Option<Loss>,
    pub instances: u64,
    pub scratch: Vec<u8>,
    pub encoder: Encoder,
    pub versions: u64,
    pub tokens: u64,
    pub tickets: u64,
    pub protected_since: Option<(u64, u64)>,
}

impl World {
    pub fn new(seed: u64, traced: bool) -> World {
        let mut rng = Rng::new(seed);
        let plan = Plan::draw(&mut rng);
        let (slots, storage) = (plan.slots, Storage::new(plan.blocks, plan.slots, plan.device));
        let disks = (0..slots).map(|_| HostDisks::draw(&plan, &mut rng)).collect();
        let mut world = World {
            rng,
            plan,
            now: 0,
            queue: BinaryHeap::new(),
            seq: 0,
            procs: Vec::new(),
            slots: vec![None; slots],
            starting: vec![false; slots],
            conns: Vec::new(),
            weather: Weather::default(),
            arbiter: Arbiter::default(),
            storage,
            disks,
            model: Model::default(),
            trace: Trace::new(traced),
            violation: None,
            stats: Stats::default(),
            faults_over_since: None,
            lost: false,
            accepted_loss: None,
            instances: 0,
            scratch: Vec::new(),
            encoder: Encoder::new(),
            // What the hosts' disks begin with is below.
            versions: 100,
            tokens: 0,
            tickets: 0,
            protected_since: None,
        };
        world.model.late_us_max = world.plan.late_us_max();
        world.model.recordless = world.plan.recordless;
        world.begin();
        world
    }

    fn begin(&mut self) {
        if self.trace.on {
            let text = format!("{:?}", self.plan);
            self.trace.across(0, &text);
        }
        if self.plan.kinds.contains(&FaultKind::ArbiterCut) && self.rng.chance(200) {
            // The first start may get no answer.
            let until = self.rng.below(self.plan.arbiter_timeout_us * 6);
            self.cut_arbiter(0, until);
        }
        self.boot(0, false);
        if !self.plan.recordless && self.rng.chance(100) {
            let us = self.rng.below(self.plan.arbiter_us.1 * 2);
            self.after(us, Event::Boot(1));
        }
        for slot in 1..self.plan.slots {
            let at = self.rng.range(0, 60_000 * slot as u64);
            // Behind those that are there already.
            let at = at + if self.plan.only_unknown { 100_000 } else { 0 };
            self.start_later(slot, at);
        }
        if self.plan.only_unknown {
            self.after(0, Event::Flood);
        }
        let first = self.rng.range(0, self.plan.fault_gap_us * 2);
        self.after(first, Event::Fault);
        self.after(self.plan.faults_until_us, Event::FaultsEnd);
        self.after(10_000, Event::Operator);
    }

    /// Runs to the end: the violation found, or none.
    pub fn run(&mut self) -> Option<String> {
        while self.violation.is_none() {
            let Some(Reverse(Entry { at, event, .. })) = self.queue.pop() else {
                self.violate("nothing happens any more".into());
                break;
            };
            self.now = at;
            self.stats.events += 1;
            let done = self.step(event);
            self.check_holders();
            if done {
                break;
            }
        }
        self.stats.simulated_us = self.now;
        self.stats.packets = self.model.packets;
        self.stats.takeovers = self.model.takeovers;
        self.stats.late_releases = self.model.late_releases;
        self.violation.take()
    }

    pub fn after(&mut self, us: u64, event: Event) {
        self.at(self.now + us, event);
    }

    pub fn at(&mut self, at: u64, event: Event) {
        self.seq += 1;
        self.queue.push(Reverse(Entry { at, seq: self.seq, event }));
    }

    pub fn violate(&mut self, why: String) {
        if self.violation.is_none() {
            self.trace.across(self.now, &format!("VIOLATION: {why}"));
            self.violation = Some(why);
        }
    }

    pub fn check(&mut self, check: Result<(), String>) {
        if let Err(why) = check {
            self.violate(why);
        }
    }

    /// Writes into the trace; the text is made only when somebody reads it.
    pub fn note(&mut self, proc: ProcId, text: impl FnOnce() -> String) {
        if self.trace.on {
            let text = text();
            self.trace.at(self.now, self.procs[proc].slot, &text);
        }
    }

    /// Another thread of a process has something for its engine. While the process is frozen it
    /// lies in a socket; and afterwards the engine may be the first to run.
    pub fn arrive(&mut self, proc: ProcId, input: In) {
        let node = &mut self.procs[proc];
        if node.unread.is_empty() && self.now >= node.frozen_until {
            return node.inbox.push_back(input);
        }
        let (first, until) = (node.unread.is_empty(), node.frozen_until);
        node.unread.push_back(input);
        if first {
            let us = self.rng.range(0, 500);
            self.at(until + us, Event::ReadsOn(proc));
        }
    }

    fn read_on(&mut self, proc: ProcId) {
        let node = &mut self.procs[proc];
        if self.now < node.frozen_until {
            let at = node.frozen_until;
            return self.at(at, Event::ReadsOn(proc));
        }
        let unread = std::mem::take(&mut node.unread);
        node.inbox.extend(unread);
        self.drive(proc);
    }

    /// A true time that passes while something takes about `us`, now and then much longer.
    pub fn takes(&mut self, us: u64) -> u64 {
        if self.faults_over_since.is_none() && self.rng.chance(self.plan.slow_per_mille) {
            self.rng.range(us, us + self.plan.slow_us)
        } else {
            self.rng.range(us / 4, us)
        }
    }

    fn step(&mut self, event: Event) -> bool {
        match event {
            Event::Wake(proc) => {
                if self.procs[proc].wake_at <= self.now {
                    self.procs[proc].wake_at = u64::MAX;
                    self.drive(proc);
                }
            }
            Event::Deliver { conn, from } => self.deliver_due(conn, from),
            Event::UserTimeout { conn, end, since } => self.user_timeout(conn, end, since),
            Event::Connect(conn) => self.accept(conn),
            Event::ConnectFails(conn) => self.end_is_gone(conn, 0, "connect timed out"),
            Event::Reset { conn, end, why } => self.end_is_gone(conn, end, why),
            Event::SenderStep { proc, token } => self.sender_step(proc, token),
            Event::GuestStep(proc) => self.guest_step(proc),
            Event::ArbiterHears { proc, call } => self.arbiter_hears(proc, call),
            Event::ArbiterAnswers { proc, ticket, answer } => self.arbiter_answers(proc, ticket, answer),
            Event::ArbiterSilent { proc, ticket } => {
                self.arbiter_answers(proc, ticket, ArbiterAnswer::Unreachable("timed out".into()));
            }
            Event::Rejoin(proc) => self.rejoin(proc),
            Event::Restored(proc) => self.restored(proc),
            Event::Apply { proc, instance } => self.apply_step(proc, instance),
            Event::Cut(capture) => self.cut(capture),
            Event::Tracking { proc, conn, fails } => self.tracking(proc, conn, fails),
            Event::ReadsOn(proc) => self.read_on(proc),
            Event::Beat { proc, token } => self.beat(proc, token),
            Event::Built { proc, instance, made } => self.built(proc, instance, made),
            Event::DiskWritten(proc) => self.disk_written(proc),
            Event::HashesRead(proc, question) => self.read_hashes(proc, question),
            Event::OwnHashes { proc, ticket, hashes } => self.own_hashes(proc, ticket, hashes),
            Event::Holes { proc, ticket, through, holes } => self.own_holes(proc, ticket, through, holes),
            Event::BlocksHashed { proc, instance, run, hashes } => self.hashed(proc, instance, run, hashes),
            Event::UnknownPeer { slot, says, address } => self.unknown_peer(slot, says, address),
            Event::UnknownBeats(conn) => self.unknown_beats(conn),
            Event::Flood => self.flood(),
            Event::Admission(proc) => self.poll_admission(proc),
            Event::Start(slot) => self.start(slot),
            Event::Boot(slot) => {
                if self.slots[slot].is_none() {
                    self.boot(slot, false);
                }
            }
            Event::Command(proc, command) => self.command(proc, command),
            Event::SnapshotEnds { proc, stop, written } => self.snapshot_ends(proc, stop, written),
            Event::Fault => self.fault(),
            Event::FaultAt(kind, slot) => self.inject(kind, slot),
            Event::Operator => return self.operator(),
            Event::FaultsEnd => self.end_faults(),
        }
        false
    }
}
