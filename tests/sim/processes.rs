//! Processes come and go: starts, takeovers, rejoins, crashes.

use mcd::protocol::mutant;
use mcd::protocol::primary::Primary;
use mcd::protocol::secondary::Secondary;
use mcd::protocol::types::InstanceId;

use crate::guest::{Guest, Output};
use crate::losses::Loss;
use crate::net::ProcId;
use crate::node::{Clock, Proc, Role};
use crate::plan::Plan;
use crate::world::{Event, World};

impl World {
    pub fn instance(&mut self, slot: usize) -> InstanceId {
        if mutant::is("old-id-kept")
            && let Some(old) = self.procs.iter().rev().find(|proc| proc.slot == slot)
        {
            return old.me;
        }
        self.instances += 1;
        InstanceId(((0xa + slot as u128) << 12 | u128::from(self.instances)) << 96)
    }

    pub fn new_proc(&mut self, slot: usize, role: impl FnOnce(&Plan, InstanceId, Clock) -> Role) -> ProcId {
        let me = self.instance(slot);
        let span = self.plan.clock_ppm;
        let clock = Clock { origin_us: self.rng.below(1 << 40), rate: 1_000_000 - span + self.rng.below(2 * span + 1) };
        let role = role(&self.plan, me, clock);
        let proc = self.procs.len();
        self.procs.push(Proc::new(slot, me, clock, role, &self.plan));
        let check = self.model.lives(me);
        self.check(check);
        self.slots[slot] = Some(proc);
        self.host_is_back(slot);
        proc
    }

    /// A process starts as a newcomer.
    pub fn start(&mut self, slot: usize) {
        self.starting[slot] = false;
        if self.slots[slot].is_some_and(|proc| self.procs[proc].alive) {
            return;
        }
        let proc = self.new_proc(slot, |plan, me, _| {
            Role::Secondary(Box::new(Secondary::new(
                plan.secondary(slot),
                me,
                0,
                mcd::protocol::types::Instant::default(),
            )))
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

    pub fn rejoin(&mut self, proc: ProcId) {
        if !self.procs[proc].alive || !matches!(self.procs[proc].role, Role::Waiting) {
            return;
        }
        let slot = self.procs[proc].slot;
        let me = self.instance(slot);
        let secondary = Secondary::new(self.plan.secondary(slot), me, 0, mcd::protocol::types::Instant::default());
        self.drop_disk(proc, true);
        let node = &mut self.procs[proc];
        node.forget();
        node.me = me;
        let check = self.model.lives(me);
        let node = &mut self.procs[proc];
        node.role = Role::Secondary(Box::new(secondary));
        self.check(check);
        self.note(proc, || format!("joins again as {me:?}"));
        self.drive(proc);
    }

    pub fn restored(&mut self, proc: ProcId) {
        let node = &mut self.procs[proc];
        let Role::Restoring(record, _) = node.role else { return };
        if !node.alive {
            return;
        }
        if self.now < node.idle_until {
            let at = node.idle_until;
            self.at(at, Event::Restored(proc));
            return;
        }
        if std::mem::take(&mut node.restore_fails) {
            return self.restore_failed(proc);
        }
        let pages = std::mem::take(&mut node.image);
        let (mut counter, life) = node.image_state;
        if mutant::is("output-again-after-takeover") {
            counter = counter.saturating_sub(1);
        }
        node.forget();
        node.guest = Some(Guest::restored(pages, counter, life));
        let output = Output::new(self.plan.output_cap);
        output.pass();
        node.output = Some(output);
        let now = node.clock.local(self.now);
        node.role = Role::Primary(Box::new(Primary::new(self.plan.primary(node.slot), node.me, record, now)));
        self.mount_disk(proc);
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
        self.apply_rest(proc);
        self.drop_disk(proc, true);
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
        self.accept_loss(Loss::Crash);
        self.procs[proc].sender = None;
        self.drop_disk(proc, !host);
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
        if host {
            self.spoil_disks(slot);
        }
        self.bury(proc);
        let us = self.rng.range(1_000, 300_000);
        self.start_later(slot, us);
    }
}
