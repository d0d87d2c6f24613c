//! The image of a newcomer: built, filled behind the epochs, and brought from commit to commit.

use mcd::protocol::secondary;
use mcd::protocol::types::{EpochId, InstanceId};

use crate::applier::ApplyJob;
use crate::net::ProcId;
use crate::node::{HOLE, In, Role};
use crate::world::{Event, World};

impl World {
    /// Memory of a new machine has nothing but holes; its disks have what lies there, or are made.
    pub fn build_image(&mut self, proc: ProcId) {
        let us = self.takes(self.plan.build_us);
        let (blocks, made) = self.find_disks(self.procs[proc].slot);
        let node = &mut self.procs[proc];
        node.image = vec![HOLE; self.plan.memory as usize];
        node.image.extend(blocks);
        let instance = node.me;
        self.after(us, Event::Built { proc, instance, made });
    }

    /// The machine of a newcomer is there, if that newcomer still is.
    pub fn built(&mut self, proc: ProcId, instance: InstanceId, made: Vec<bool>) {
        let node = &mut self.procs[proc];
        if node.alive && node.me == instance && matches!(node.role, Role::Secondary(_)) {
            self.arrive(proc, In::Secondary(secondary::Input::MachineReady { made }));
            self.drive(proc);
        }
    }

    pub fn apply(&mut self, proc: ProcId, pages: &[(u64, u64)]) {
        if self.procs[proc].image.is_empty() {
            return;
        }
        for (page, version) in pages {
            self.procs[proc].image[*page as usize] = *version;
            self.store_own(proc, *page, *version);
        }
    }

    pub fn commit(&mut self, proc: ProcId, id: EpochId) {
        let us = self.takes(self.plan.commit_us);
        let node = &mut self.procs[proc];
        node.idle_until = node.idle_until.max(self.now + us);
        let me = node.me;
        let Some(staged) = node.staged.take_if(|staged| staged.id == id) else {
            self.violate(format!("I2: {me:?} commits {id}, which is not staged"));
            return;
        };
        let (completes, told) = (staged.completes, node.applier.told);
        if told {
            self.violate(format!("I2: {me:?} commits {id} to an image that it knows to be spoilt"));
        }
        self.submit_apply(proc, ApplyJob::Epoch(staged));
        let check = self.model.committed(me, id, completes);
        self.check(check);
    }
}
