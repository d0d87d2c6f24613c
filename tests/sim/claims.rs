//! Guests are started through the arbiter: with answers that are late or lost, by two nodes at
//! once, and where the guest runs already.

use mcd::protocol::claim::{Claim, ClaimAction, ClaimInput, ClaimRefused};
use mcd::protocol::primary::Primary;
use mcd::protocol::record::{Record, RecordState};

use crate::guest::{Guest, Output};
use crate::losses::Loss;
use crate::net::ProcId;
use crate::node::Role;
use crate::world::{Event, World};

impl World {
    /// An operator starts the guest on `slot`; `cold` is his word that no node runs it.
    pub fn boot(&mut self, slot: usize, cold: bool) {
        for other in 0..self.slots.len() {
            // Who starts a guest cold, where nothing keeps a record, has looked himself that no
            // node of it runs.
            if let Some(old) = self.slots[other].filter(|_| other == slot || self.plan.recordless) {
                self.end(old);
            }
        }
        let retry = std::time::Duration::from_micros(self.plan.retry_us);
        let proc = self.new_proc(slot, |_, me, _| Role::Claiming(Box::new(Claim::new(me, cold, retry))));
        self.procs[proc].claims_cold = Some(cold);
        self.note(proc, || format!("claims the guest{}", if cold { ", cold" } else { "" }));
        if self.plan.recordless {
            // Its script is asked, and answers for as long as the node waits.
            let me = self.procs[proc].me;
            let record = self.arbiter.record.map_or(Record::first(me), |record| record.next_solo(me));
            self.arbiter.set(record);
            return self.start_guest(proc, record);
        }
        self.drive(proc);
    }

    /// True while a node claims the guest.
    pub fn is_claimed(&self) -> bool {
        self.procs.iter().any(|proc| proc.alive && matches!(proc.role, Role::Claiming(_)))
    }

    pub fn execute_claim(&mut self, proc: ProcId, action: ClaimAction) {
        match action {
            ClaimAction::Ask(call) => self.ask_arbiter(proc, call),
            ClaimAction::CheckDisks { .. }
                if self.procs[proc].claims_cold == Some(false) && self.is_locked_out(proc) =>
            {
                // Its old primary has stopped it and not ended yet.
                self.note(proc, || "does not start the guest: its disk is locked".into());
                let us = self.rng.range(1_000, 100_000);
                self.start_later(self.procs[proc].slot, us);
                self.end(proc);
            }
            ClaimAction::CheckDisks { .. } => self.feed_claim(proc, ClaimInput::DisksAllow),
            ClaimAction::Start(record) => self.start_guest(proc, record),
            ClaimAction::Refuse(refused) => {
                self.note(proc, || format!("does not start the guest: {refused:?}"));
                if let ClaimRefused::Unanswered { .. } = refused {
                    // It may be on record as this node's, which never ran it.
                    self.accept_loss(Loss::Unanswered);
                }
                let us = self.rng.range(1_000, 100_000);
                self.start_later(self.procs[proc].slot, us);
                self.end(proc);
            }
        }
    }

    pub fn feed_claim(&mut self, proc: ProcId, input: ClaimInput) {
        let now = self.procs[proc].clock.local(self.now);
        if let Role::Claiming(claim) = &mut self.procs[proc].role {
            claim.handle(now, input);
        }
    }

    /// The arbiter put the record of a start in place.
    pub fn claimed(&mut self, proc: ProcId, before: Option<Record>, record: Record) {
        self.model.owner_since_us = self.now;
        let cold = self.procs[proc].claims_cold == Some(true);
        let stopped = before.is_none_or(|before| before.state == RecordState::Stopped);
        if !stopped && !cold {
            self.violate(format!("I3: n{} claims a guest that runs: {before:?}", self.procs[proc].slot));
        }
        if before.is_some_and(|before| record.generation != before.generation.next()) {
            self.violate(format!("the claim from {before:?} to {record:?} skips"));
        }
    }

    /// The guest is this node's: it boots.
    fn start_guest(&mut self, proc: ProcId, record: Record) {
        self.model.owner_since_us = self.now;
        self.model.life += 1;
        self.lost = false;
        let life = self.model.life;
        let node = &mut self.procs[proc];
        node.claims_cold = None;
        let now = node.clock.local(self.now);
        let primary = Primary::new(self.plan.primary(node.slot), node.me, record, now);
        node.role = Role::Primary(Box::new(primary));
        node.local_record.note(record);
        node.guest = Some(Guest::fresh(self.plan.pages, life));
        self.open_own_disks(proc);
        self.take_disk(proc);
        let output = Output::new(self.plan.output_cap);
        output.pass();
        self.procs[proc].output = Some(output);
        self.model.runs(self.procs[proc].me, life, 0);
        self.note(proc, || format!("starts the guest (life {life})"));
        self.after(0, Event::GuestStep(proc));
        self.drive(proc);
    }
}
