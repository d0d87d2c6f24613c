//! The applying thread of a simulated secondary: what is committed goes into the image in order,
//! behind the acks. It may be slow, and it may fail.

use std::collections::VecDeque;
use std::ops::Range;

use mcd::protocol::mutant;
use mcd::protocol::secondary;
use mcd::protocol::types::{EpochId, InstanceId};

use crate::losses::Loss;
use crate::net::ProcId;
use crate::node::{In, Role, Staged};
use crate::world::{Event, World};

/// What the thread has to do, in this order.
#[derive(Debug)]
pub enum ApplyJob {
    Background {
        pages: Vec<(u64, u64)>,
        staged_bytes: u64,
    },
    Epoch(Staged),
    Hash(Range<u64>),
    Forget(EpochId),
    WriteKept,
    /// The guest is this node's: the image is wanted as of this epoch.
    Finish(EpochId),
}

/// The thread, for one life of a secondary.
#[derive(Debug, Default)]
pub struct Applier {
    pub jobs: VecDeque<ApplyJob>,
    /// Nothing is applied before.
    pub slow_until: u64,
    /// The next pages cannot be applied.
    pub fails: bool,
    /// The image lacks what could not be applied.
    pub is_spoilt: bool,
    /// The engine has heard of it.
    pub told: bool,
}

impl World {
    pub fn submit_apply(&mut self, proc: ProcId, job: ApplyJob) {
        let jobs = &mut self.procs[proc].applier.jobs;
        jobs.push_back(job);
        if jobs.len() == 1 {
            self.next_apply(proc);
        }
    }

    fn next_apply(&mut self, proc: ProcId) {
        let us = match self.procs[proc].applier.jobs.front() {
            Some(ApplyJob::Background { .. } | ApplyJob::Epoch(_)) => self.takes(self.plan.apply_us),
            _ => 0,
        };
        let instance = self.procs[proc].me;
        self.after(us, Event::Apply { proc, instance });
    }

    /// The thread has done what it had in hand.
    pub fn apply_step(&mut self, proc: ProcId, instance: InstanceId) {
        let node = &mut self.procs[proc];
        let holds_image = matches!(node.role, Role::Secondary(_) | Role::Restoring(..));
        if !node.alive || node.me != instance || !holds_image {
            return;
        }
        let until = node.applier.slow_until.max(node.frozen_until);
        if self.now < until {
            return self.at(self.now + (until - self.now).min(1_000), Event::Apply { proc, instance });
        }
        let Some(job) = node.applier.jobs.pop_front() else { return };
        self.carry_out(proc, job);
        let node = &self.procs[proc];
        if node.alive && node.me == instance && !node.applier.jobs.is_empty() {
            self.next_apply(proc);
        }
    }

    fn carry_out(&mut self, proc: ProcId, job: ApplyJob) {
        match job {
            ApplyJob::Background { pages, staged_bytes } => {
                self.apply_or_fail(proc, staged_bytes, |world| world.apply(proc, &pages));
            }
            ApplyJob::Epoch(staged) => {
                self.apply_or_fail(proc, staged.staged_bytes, |world| world.apply_epoch(proc, staged));
            }
            ApplyJob::Hash(run) => self.sum_image(proc, run),
            ApplyJob::Forget(through) => drop(self.procs[proc].disk.kept.forget(through).count()),
            ApplyJob::WriteKept => {
                self.write_kept(proc);
                self.drive(proc);
            }
            ApplyJob::Finish(epoch) => self.finish_image(proc, epoch),
        }
    }

    fn apply_or_fail(&mut self, proc: ProcId, staged_bytes: u64, apply: impl FnOnce(&mut World)) {
        let applier = &mut self.procs[proc].applier;
        if std::mem::take(&mut applier.fails) {
            applier.is_spoilt = true;
            let instance = self.procs[proc].me;
            // An ack comes before applying: what it promised may turn out not to be so.
            self.accept_loss(Loss::SpoiltImage);
            self.note(proc, || "APPLYING FAILS: the image is spoilt".into());
            self.arrive(proc, In::ImageFailed { instance });
        } else if !applier.is_spoilt {
            apply(self);
        }
        self.procs[proc].budget.give_back(staged_bytes);
        self.read_what_has_room(proc);
        self.drive(proc);
    }

    fn apply_epoch(&mut self, proc: ProcId, staged: Staged) {
        let node = &mut self.procs[proc];
        let pages = node.disk.keep(staged.id, staged.pages, self.plan.pages);
        node.image_state = (staged.counter, staged.life);
        self.apply(proc, &pages);
    }

    /// A life ends, and not by a crash: the thread does what it has before its disks are closed.
    pub fn apply_rest(&mut self, proc: ProcId) {
        let applier = &mut self.procs[proc].applier;
        let (jobs, is_spoilt) = (std::mem::take(&mut applier.jobs), applier.is_spoilt);
        for job in jobs.into_iter().filter(|_| !is_spoilt) {
            match job {
                ApplyJob::Background { pages, .. } => self.apply(proc, &pages),
                ApplyJob::Epoch(staged) => self.apply_epoch(proc, staged),
                _ => {}
            }
        }
    }

    // ---- takeover ----

    /// The guest is this node's: it is restored when the thread has applied all that is committed.
    pub fn begin_restore(&mut self, proc: ProcId, epoch: EpochId) {
        if mutant::is("takeover-before-applied") {
            self.procs[proc].applier.jobs.clear();
            return self.finish_image(proc, epoch);
        }
        self.submit_apply(proc, ApplyJob::Finish(epoch));
    }

    /// All that is committed is in the image.
    fn finish_image(&mut self, proc: ProcId, epoch: EpochId) {
        let node = &mut self.procs[proc];
        if node.applier.is_spoilt {
            return self.restore_failed(proc);
        }
        let (counter, _) = node.image_state;
        let check = self.model.activated(node.me, epoch, (&node.image, &self.storage.blocks), counter);
        self.check(check);
        let us = self.takes(self.plan.restore_us);
        self.after(us, Event::Restored(proc));
    }

    /// The guest is this node's, and cannot be restored: nobody has it any more.
    pub fn restore_failed(&mut self, proc: ProcId) {
        self.note(proc, || "RESTORING FAILS".into());
        let node = &mut self.procs[proc];
        match std::mem::replace(&mut node.role, Role::Waiting) {
            Role::Restoring(_, machine) => node.role = Role::Secondary(machine),
            other => node.role = other,
        }
        node.not_restored = true;
        self.accept_loss(Loss::NotRestored);
        self.arrive(proc, In::Secondary(secondary::Input::RestoreFailed { why: "no room in the kernel".into() }));
        self.drive(proc);
    }
}
