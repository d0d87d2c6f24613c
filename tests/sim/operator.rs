//! Whoever looks after the world: starts what is down, and says when a run is over.

use mcd::protocol::command::Command;
use mcd::protocol::command::CommandRefused;
use mcd::protocol::primary;
use mcd::protocol::record::{Record, RecordState};
use mcd::protocol::secondary;

use crate::net::ProcId;
use crate::node::{AnyPhase, In, Proc, Role};
use crate::plan::FaultKind;
use crate::world::{Event, World};

impl World {
    /// Looks after the world every few milliseconds; true when the run is over.
    pub fn operator(&mut self) -> bool {
        self.after(10_000, Event::Operator);
        let stopped = self.arbiter.record.is_some_and(|record| record.state == RecordState::Stopped);
        let owner = self.arbiter.record.map(|record| record.owner);
        let owner_lives = self.procs.iter().any(|proc| proc.alive && Some(proc.me) == owner);
        let idle = stopped && !owner_lives || self.arbiter.record.is_none();
        if (self.lost || idle) && !self.is_claimed() && (self.faults_over_since.is_some() || self.rng.chance(100)) {
            let slot = self.rng.below(self.slots.len() as u64) as usize;
            self.boot(slot, self.lost);
            if !self.lost && !self.plan.recordless && self.rng.chance(300) {
                // Somebody else does the same.
                let (us, other) = (self.rng.below(self.plan.arbiter_us.1 * 2), self.another(slot));
                self.after(us, Event::Boot(other));
            }
        }
        for slot in 0..self.slots.len() {
            if self.slots[slot].is_none() {
                let us = self.rng.range(1_000, 30_000);
                self.start_later(slot, us);
            }
        }
        self.verify_now_and_then();
        self.check_solo_output();
        self.check_stopped();
        self.check_newcomers();
        self.faults_over_since.is_some_and(|since| self.is_well(since))
    }

    /// Nobody is there whom the output of a guest that runs alone would wait for.
    fn check_solo_output(&mut self) {
        let holds = |proc: &Proc| {
            let settled = proc.alive && proc.pending.is_none() && self.now >= proc.idle_until;
            let solo = proc.phase_now() == AnyPhase::Primary(primary::Phase::Solo);
            settled && solo && proc.output.as_ref().is_some_and(|output| output.has_open())
        };
        if let Some(proc) = self.procs.iter().find(|proc| holds(proc)) {
            self.violate(format!("n{} runs the guest alone and holds its output", proc.slot));
        }
    }

    /// A guest that could not be stopped is not reported as stopped.
    fn check_stopped(&mut self) {
        let wrong = |proc: &Proc| {
            let settled = proc.alive && proc.pending.is_none() && self.now >= proc.idle_until && proc.inbox.is_empty();
            let runs = proc.guest.as_ref().is_some_and(|guest| guest.runs);
            let Role::Primary(machine) = &proc.role else { return false };
            let steady = matches!(machine.phase(), primary::Phase::Solo | primary::Phase::Protected);
            settled && steady && runs && !machine.guest_runs() && proc.unread.is_empty()
        };
        if let Some(proc) = self.procs.iter().find(|proc| wrong(proc)) {
            self.violate(format!("n{} believes that its guest is stopped, and it runs", proc.slot));
        }
    }

    /// With all faults over: is the guest running and protected again, and does its output leave?
    fn is_well(&mut self, since: u64) -> bool {
        let well = self.is_protected();
        match (well, self.protected_since) {
            (false, _) => self.protected_since = None,
            (true, None) => self.protected_since = Some((self.now, self.model.packets)),
            (true, Some((at, packets))) => {
                if self.now >= at + 30_000 && self.model.packets > packets + 1 && !self.is_verifying() {
                    return true;
                }
            }
        }
        if self.now > since + self.plan.recovery_us_max {
            let phases: Vec<_> =
                self.procs.iter().filter(|proc| proc.alive).map(|proc| (proc.slot, proc.phase_now())).collect();
            let record = self.arbiter.record;
            let lacks = if well { "a verify does not end" } else { "the guest is not protected" };
            self.violate(format!("liveness: faults are over, but {lacks}: {phases:?}, {record:?}"));
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

    pub fn end_faults(&mut self) {
        self.trace.across(self.now, "faults are over");
        self.faults_over_since = Some(self.now);
        self.weather.clear();
        self.open_windows();
        self.plan.triggers.clear();
        self.plan.tail_per_mille = 0;
        self.plan.apply_us = self.plan.apply_us.min(200);
        for proc in 0..self.procs.len() {
            let node = &mut self.procs[proc];
            node.crash_in = None;
            node.stall_in = None;
            node.capture_fails = false;
            node.capture_hangs_until = 0;
            node.tracking_hangs_until = 0;
            (node.tracking_fails, node.stop_fails) = (false, false);
            node.end_blocks();
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
        self.tickets += 1;
        let ticket = self.tickets;
        match node.role {
            Role::Primary(_) => self.arrive(proc, In::Primary(primary::Input::Command { ticket, command })),
            Role::Secondary(_) => self.arrive(proc, In::Secondary(secondary::Input::Command { ticket, command })),
            _ => return,
        }
        self.procs[proc].unanswered.push(ticket);
        self.note(proc, || format!("operator: {command:?}"));
        self.drive(proc);
    }

    /// Each command is answered once.
    pub fn answered(&mut self, proc: ProcId, ticket: u64, result: Result<(), CommandRefused>) {
        let waiting = &mut self.procs[proc].unanswered;
        match waiting.iter().position(|waits| *waits == ticket) {
            Some(at) => drop(waiting.remove(at)),
            None => self.violate(format!("n{}: command {ticket} is answered twice", self.procs[proc].slot)),
        }
        self.note(proc, || format!("answer: {result:?}"));
    }

    /// An operator wants a snapshot, if one may be taken now.
    pub fn take_snapshot(&mut self, proc: ProcId) {
        let stop = self.rng.chance(500);
        let node = &mut self.procs[proc];
        if node.alive && node.is_primary() {
            node.stop_wishes.push_back(stop);
            self.arrive(proc, In::Primary(primary::Input::Snapshot { stop }));
            self.note(proc, || format!("operator: snapshot, stop {stop}"));
            if self.rng.chance(600) {
                // And that is all that was wanted of this node.
                let us = self.rng.below(self.plan.fault_len_us);
                self.after(us, Event::Command(proc, Command::Quit));
            }
            self.drive(proc);
        }
    }

    /// The answer to the oldest wish for a snapshot.
    pub fn no_snapshot(&mut self, proc: ProcId, why: &'static str) {
        self.procs[proc].stop_wishes.pop_front();
        self.note(proc, || format!("no snapshot: {why}"));
    }

    /// The guest is paused: it is written for a while, or cannot be.
    pub fn write_snapshot(&mut self, proc: ProcId) {
        let runs = self.procs[proc].guest.as_ref().is_some_and(|guest| guest.runs);
        if runs && self.procs[proc].stop_failed {
            // As the machine thread does, which finds the guest running.
            self.procs[proc].stop_wishes.pop_front();
            self.procs[proc].urgent.push_back(In::Primary(primary::Input::SnapshotEnded { written: false }));
            return;
        }
        if runs {
            self.violate(format!("n{} writes a snapshot of a guest that runs", self.procs[proc].slot));
        }
        let (slot, has_disk) = (self.procs[proc].slot, self.plan.blocks > 0 || !self.plan.own.is_empty());
        let Some(stop) = self.procs[proc].stop_wishes.pop_front() else {
            return self.violate(format!("n{slot} writes a snapshot that nobody asked for"));
        };
        if self.procs[proc].saving {
            self.violate(format!("n{slot} writes two snapshots at once"));
        }
        if has_disk && !stop {
            self.violate(format!("n{slot} writes a snapshot of a guest that goes on writing to its disk"));
        }
        self.procs[proc].saving = true;
        let us = self.rng.below(self.plan.fault_len_us);
        if stop && self.plan.kinds.contains(&FaultKind::Break) && self.rng.chance(300) {
            // The peer is lost shortly before the snapshot is there: the moment in which nobody
            // knows yet whose guest it is that stops is short, and has rules of its own.
            let before = us.saturating_sub(self.rng.below(5_000));
            self.after(before, Event::FaultAt(FaultKind::Break, slot));
        }
        let written = self.rng.chance(800);
        self.after(us, Event::SnapshotEnds { proc, stop, written });
    }

    pub fn snapshot_ends(&mut self, proc: ProcId, stop: bool, written: bool) {
        let node = &mut self.procs[proc];
        if node.alive && node.is_primary() {
            // What is stopped with its snapshot never runs again.
            node.saving = stop && written;
            self.arrive(proc, In::Primary(primary::Input::SnapshotEnded { written }));
            self.note(proc, || format!("snapshot over, written {written}, stop {stop}"));
            if stop && written && self.rng.chance(500) {
                // A quit comes while the guest is being given up.
                let us = self.rng.below(5_000);
                self.after(us, Event::Command(proc, Command::Quit));
            }
            self.drive(proc);
        }
    }
}
