//! The world: events in order of time, and what each of them does.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use mcd::protocol::arbitration::{ArbiterAnswer, ArbiterCall};
use mcd::protocol::claim::claim;
use mcd::protocol::primary::{self, Command, Primary};
use mcd::protocol::record::{Record, RecordState};
use mcd::protocol::secondary::{self, Secondary};
use mcd::protocol::types::InstanceId;

use crate::arbiter::Arbiter;
use crate::guest::{Guest, Output};
use crate::model::Model;
use crate::net::{Conn, ProcId, Weather};
use crate::node::{AnyPhase, Clock, In, Proc, Role};
use crate::plan::{FaultKind, Plan};
use crate::rng::Rng;
use crate::trace::Trace;

/// What can happen.
#[derive(Clone, Debug)]
pub enum Event {
    Wake(ProcId),
    Deliver { conn: usize, from: usize },
    UserTimeout { conn: usize, end: usize, since: u64 },
    Connect(usize),
    ConnectFails(usize),
    Reset { conn: usize, end: usize, why: &'static str },
    SenderStep { proc: ProcId, token: u64 },
    GuestStep(ProcId),
    ArbiterHears { proc: ProcId, call: ArbiterCall },
    ArbiterAnswers { proc: ProcId, ticket: u64, answer: ArbiterAnswer },
    ArbiterSilent { proc: ProcId, ticket: u64 },
    Rejoin(ProcId),
    Restored(ProcId),
    Start(usize),
    Command(ProcId, Command),
    Fault,
    FaultAt(FaultKind, usize),
    Operator,
    Calm,
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
    pub lost_guests: u64,
    pub epochs: u64,
}

pub struct World {
    pub rng: Rng,
    pub plan: Plan,
    pub now: u64,
    queue: BinaryHeap<Reverse<Entry>>,
    seq: u64,
    pub procs: Vec<Proc>,
    pub slots: Vec<Option<ProcId>>,
    starting: Vec<bool>,
    pub conns: Vec<Conn>,
    pub weather: Weather,
    pub arbiter: Arbiter,
    pub model: Model,
    pub trace: Trace,
    pub violation: Option<String>,
    pub stats: Stats,
    pub calm_since: Option<u64>,
    /// The guest is gone for reasons nobody could have helped.
    lost: bool,
    /// The guest was lost, and is not any more, because an old question reached the arbiter late.
    by_luck: bool,
    /// A crash just happened: what is lost by it is excused.
    pub excused: bool,
    instances: u64,
    pub scratch: Vec<u8>,
    pub versions: u64,
    pub tokens: u64,
    protected_since: Option<(u64, u64)>,
}

impl World {
    pub fn new(seed: u64, traced: bool) -> World {
        let mut rng = Rng::new(seed);
        let plan = Plan::draw(&mut rng);
        let slots = plan.slots;
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
            model: Model::default(),
            trace: Trace::new(traced),
            violation: None,
            stats: Stats::default(),
            calm_since: None,
            lost: false,
            by_luck: false,
            excused: false,
            instances: 0,
            scratch: Vec::new(),
            versions: 0,
            tokens: 0,
            protected_since: None,
        };
        world.model.late_us_max = world.plan.late_us_max();
        world.begin();
        world
    }

    fn begin(&mut self) {
        if self.trace.on {
            let text = format!("{:?}", self.plan);
            self.trace.across(0, &text);
        }
        self.boot(0, false);
        for slot in 1..self.plan.slots {
            let at = self.rng.range(0, 60_000 * slot as u64);
            self.start_later(slot, at);
        }
        let first = self.rng.range(0, self.plan.fault_gap_us * 2);
        self.after(first, Event::Fault);
        self.after(self.plan.faults_until_us, Event::Calm);
        self.after(10_000, Event::Operator);
    }

    /// Runs to the end: the violation found, or none.
    pub fn run(&mut self) -> Option<String> {
        while self.violation.is_none() {
            let Some(Reverse(Entry { at, event, .. })) = self.queue.pop() else {
                self.violate("the world stands still".into());
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

    /// Writes into the ladder; the text is made only when somebody reads it.
    pub fn note(&mut self, proc: ProcId, text: impl FnOnce() -> String) {
        if self.trace.on {
            let text = text();
            self.trace.at(self.now, self.procs[proc].slot, &text);
        }
    }

    /// A true time that passes while something takes about `us`, now and then much longer.
    pub fn takes(&mut self, us: u64) -> u64 {
        if self.calm_since.is_none() && self.rng.chance(self.plan.slow_per_mille) {
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
            Event::Start(slot) => self.start(slot),
            Event::Command(proc, command) => self.command(proc, command),
            Event::Fault => self.fault(),
            Event::FaultAt(kind, slot) => self.inject(kind, slot),
            Event::Operator => return self.operator(),
            Event::Calm => self.calm(),
        }
        false
    }

    // ---- processes ----

    fn instance(&mut self, slot: usize) -> InstanceId {
        self.instances += 1;
        InstanceId(((0xa + slot as u128) << 12 | u128::from(self.instances)) << 96)
    }

    fn new_proc(&mut self, slot: usize, role: impl FnOnce(&Plan, InstanceId, Clock) -> Role) -> ProcId {
        let me = self.instance(slot);
        let span = self.plan.clock_ppm;
        let clock = Clock { origin_us: self.rng.below(1 << 40), rate: 1_000_000 - span + self.rng.below(2 * span + 1) };
        let role = role(&self.plan, me, clock);
        let proc = self.procs.len();
        self.procs.push(Proc::new(slot, me, clock, role));
        self.slots[slot] = Some(proc);
        self.host_is_back(slot);
        proc
    }

    /// Starts the guest on `slot`, as the first node or after everything ended.
    fn boot(&mut self, slot: usize, cold: bool) {
        self.model.owner_since_us = self.now;
        if let Some(old) = self.slots[slot] {
            self.end(old);
        }
        self.model.life += 1;
        let (now, life) = (self.now, self.model.life);
        let stands = self.arbiter.record;
        let mut record = None;
        let proc = self.new_proc(slot, |plan, me, clock| {
            let claimed = claim(stands, me, cold).unwrap_or_else(|_| Record::first(me));
            record = Some(claimed);
            Role::Primary(Box::new(Primary::new(plan.primary(), me, claimed, clock.local(now))))
        });
        if let Some(record) = record {
            self.arbiter.set(record);
        }
        self.lost = false;
        self.procs[proc].guest = Some(Guest::fresh(self.plan.pages, life));
        let output = Output::new(self.plan.output_cap);
        output.pass();
        self.procs[proc].output = Some(output);
        self.model.runs(self.procs[proc].me, life, 0);
        self.note(proc, || format!("starts the guest (life {life})"));
        self.after(0, Event::GuestStep(proc));
        self.drive(proc);
    }

    /// A process starts as a newcomer.
    fn start(&mut self, slot: usize) {
        self.starting[slot] = false;
        if self.slots[slot].is_some_and(|proc| self.procs[proc].alive) {
            return;
        }
        let proc = self.new_proc(slot, |plan, me, _| {
            Role::Secondary(Box::new(Secondary::new(plan.secondary(), me, 0, mcd::protocol::types::Instant::default())))
        });
        let me = self.procs[proc].me;
        self.note(proc, || format!("starts as newcomer {me:?}"));
        self.drive(proc);
    }

    pub fn start_later(&mut self, slot: usize, us: u64) {
        if !self.starting[slot] {
            self.starting[slot] = true;
            self.after(us, Event::Start(slot));
        }
    }

    fn rejoin(&mut self, proc: ProcId) {
        if !self.procs[proc].alive || !matches!(self.procs[proc].role, Role::Waiting) {
            return;
        }
        let me = self.instance(self.procs[proc].slot);
        let secondary = Secondary::new(self.plan.secondary(), me, 0, mcd::protocol::types::Instant::default());
        let node = &mut self.procs[proc];
        node.forget();
        node.me = me;
        node.role = Role::Secondary(Box::new(secondary));
        self.note(proc, || format!("joins again as {me:?}"));
        self.drive(proc);
    }

    fn restored(&mut self, proc: ProcId) {
        let node = &mut self.procs[proc];
        let Role::Restoring(record) = node.role else { return };
        if !node.alive {
            return;
        }
        if self.now < node.idle_until {
            let at = node.idle_until;
            self.at(at, Event::Restored(proc));
            return;
        }
        let pages = std::mem::take(&mut node.image);
        let (counter, life) = node.image_state;
        node.forget();
        node.guest = Some(Guest::restored(pages, counter, life));
        let output = Output::new(self.plan.output_cap);
        output.pass();
        node.output = Some(output);
        let now = node.clock.local(self.now);
        node.role = Role::Primary(Box::new(Primary::new(self.plan.primary(), node.me, record, now)));
        self.note(proc, || format!("runs the guest from packet {counter}"));
        self.after(0, Event::GuestStep(proc));
        self.drive(proc);
    }

    /// The process is over, in whatever way; its sockets are dealt with by the caller.
    pub fn end(&mut self, proc: ProcId) {
        if !self.procs[proc].alive {
            return;
        }
        self.drop_sender(proc);
        let conns = std::mem::take(&mut self.procs[proc].conns);
        for (_, conn) in conns {
            self.close_end_of(conn, proc);
        }
        self.bury(proc);
    }

    fn bury(&mut self, proc: ProcId) {
        let node = &mut self.procs[proc];
        node.alive = false;
        node.guest = None;
        node.forget();
        let slot = node.slot;
        self.slots[slot] = None;
    }

    pub fn crash(&mut self, proc: ProcId, host: bool) {
        if !self.procs[proc].alive {
            return;
        }
        self.stats.faults += 1;
        self.note(proc, || (if host { "HOST CRASHES" } else { "CRASHES" }).into());
        self.excused = true;
        self.procs[proc].sender = None;
        let conns = std::mem::take(&mut self.procs[proc].conns);
        for (_, conn) in conns {
            if host {
                self.silence_end_of(conn, proc);
            } else {
                if self.rng.chance(500) {
                    self.abort_end_of(conn, proc);
                }
                self.close_end_of(conn, proc);
            }
        }
        let slot = self.procs[proc].slot;
        self.bury(proc);
        let us = self.rng.range(1_000, 300_000);
        self.start_later(slot, us);
    }

    // ---- the operator, and the end ----

    /// Looks after the world every few milliseconds; true when the run is over.
    fn operator(&mut self) -> bool {
        self.after(10_000, Event::Operator);
        let stopped = self.arbiter.record.is_some_and(|record| record.state == RecordState::Stopped);
        let owner = self.arbiter.record.map(|record| record.owner);
        let owner_lives = self.procs.iter().any(|proc| proc.alive && Some(proc.me) == owner);
        if (self.lost || (stopped && !owner_lives)) && (self.calm_since.is_some() || self.rng.chance(100)) {
            let slot = self.rng.below(self.slots.len() as u64) as usize;
            self.boot(slot, self.lost);
        }
        for slot in 0..self.slots.len() {
            if self.slots[slot].is_none() {
                let us = self.rng.range(1_000, 30_000);
                self.start_later(slot, us);
            }
        }
        self.calm_since.is_some_and(|since| self.is_well(since))
    }

    /// With all faults over: is the guest running and protected again, and does its output leave?
    fn is_well(&mut self, since: u64) -> bool {
        let well = self.is_protected();
        match (well, self.protected_since) {
            (false, _) => self.protected_since = None,
            (true, None) => self.protected_since = Some((self.now, self.model.packets)),
            (true, Some((at, packets))) => {
                if self.now >= at + 30_000 && self.model.packets > packets + 1 {
                    return true;
                }
            }
        }
        if self.now > since + self.plan.calm_us_max {
            let phases: Vec<_> =
                self.procs.iter().filter(|proc| proc.alive).map(|proc| (proc.slot, proc.phase_now())).collect();
            let record = self.arbiter.record;
            self.violate(format!("liveness: faults are over, but the guest is not protected: {phases:?}, {record:?}"));
        }
        false
    }

    fn is_protected(&self) -> bool {
        let Some(Record { state: RecordState::Paired, owner, peer: Some(peer), .. }) = self.arbiter.record else {
            return false;
        };
        let phase_of = |me| self.procs.iter().find(|proc| proc.alive && proc.me == me).map(Proc::phase_now);
        let runs = self.procs.iter().any(|proc| {
            proc.alive && proc.me == owner && matches!(&proc.role, Role::Primary(machine) if machine.guest_runs())
        });
        runs && phase_of(owner) == Some(AnyPhase::Primary(primary::Phase::Protected))
            && phase_of(peer) == Some(AnyPhase::Secondary(secondary::Phase::Paired))
    }

    fn calm(&mut self) {
        self.trace.across(self.now, "faults are over");
        self.calm_since = Some(self.now);
        self.weather.clear();
        self.plan.triggers.clear();
        self.plan.tail_per_mille = 0;
        for proc in 0..self.procs.len() {
            let node = &mut self.procs[proc];
            node.crash_in = None;
            node.stall_in = None;
            node.capture_fails = false;
            if node.alive && node.is_primary() {
                self.command(proc, Command::Cont);
            }
        }
    }

    pub fn command(&mut self, proc: ProcId, command: Command) {
        let node = &mut self.procs[proc];
        if !node.alive {
            return;
        }
        node.quits += u32::from(command == Command::Quit);
        match node.role {
            Role::Primary(_) => node.inbox.push_back(In::Primary(primary::Input::Command(command))),
            Role::Secondary(_) if command == Command::Quit => {
                node.inbox.push_back(In::Secondary(secondary::Input::Quit));
            }
            _ => return,
        }
        self.note(proc, || format!("operator: {command:?}"));
        self.drive(proc);
    }

    /// I6: somebody has the guest, or it was lost in a way that nobody could have helped.
    fn check_holders(&mut self) {
        let excused = std::mem::take(&mut self.excused);
        let Some(record) = self.arbiter.record else { return };
        if record.state == RecordState::Stopped || self.violation.is_some() {
            return;
        }
        if self.procs.iter().any(|proc| self.has_guest(proc, record)) {
            // A dead node's last question to the arbiter may have put a pair on record. Its peer may have read the record before that
            // and be about to join anew: it had no right to the guest when its primary died.
            self.by_luck = self.lost || (self.by_luck && record.state == RecordState::Paired);
            self.lost = false;
        } else if self.lost {
            // Until somebody starts it anew.
        } else if excused || self.by_luck {
            self.lost = true;
            self.stats.lost_guests += 1;
            self.trace.across(self.now, "the guest is lost: nobody else had it");
        } else {
            self.violate(format!("I6: nobody has the guest any more, and no crash did it; {record:?}"));
        }
    }

    fn has_guest(&self, proc: &Proc, record: Record) -> bool {
        let named = record.owner == proc.me || (record.state == RecordState::Paired && record.peer == Some(proc.me));
        proc.alive
            && named
            && match &proc.role {
                Role::Primary(machine) => machine.phase() != primary::Phase::Fenced && record.owner == proc.me,
                Role::Restoring(_) => true,
                Role::Waiting => false,
                Role::Secondary(machine) => {
                    // One that asked just before the pair was on record is about to give up.
                    let stale = proc.read_served.is_some_and(|read| read < record.generation);
                    !matches!(machine.phase(), secondary::Phase::Done)
                        && !stale
                        && self.model.holdings.get(&proc.me).is_some_and(|holding| holding.whole)
                }
            }
    }
}
