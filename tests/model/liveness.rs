//! What becomes of a world when nothing more goes wrong: every message arrives, the arbiter
//! answers, timers fire.

use mcd::protocol::secondary::Phase;
use mcd::protocol::types::InstanceId;

use crate::transitions::Transition;
use crate::world::{Role, World};

/// Rounds after which a world that is not at rest counts as stuck. Each lets every timer fire once.
const ROUNDS_MAX: usize = 40;

impl World {
    /// True if somebody has the guest who may run it, or may ask to.
    fn is_alive(&self) -> bool {
        let record = self.oracle.record;
        self.nodes.iter().any(|node| match &node.role {
            Role::Primary(_) => node.has_guest() && record.owner == node.me,
            Role::Secondary(machine) => machine.phase() != Phase::Done && self.is_new_primary(node.me),
            Role::Absent => false,
        })
    }

    /// True if `who` has a whole image that it may take over with.
    pub fn is_new_primary(&self, who: InstanceId) -> bool {
        let record = self.oracle.record;
        record.owner != who && self.oracle.holds(who) && self.oracle.may_take_over(who, record)
    }

    /// True if exactly one node runs the guest, and what it sent has left.
    fn is_well(&self) -> bool {
        let mut running = self.nodes.iter().filter(|node| node.guest.as_ref().is_some_and(|guest| guest.runs));
        match (running.next(), running.next()) {
            (Some(node), None) => node.output.is_empty() && self.oracle.record.owner == node.me,
            _ => false,
        }
    }

    /// I6: if somebody has the guest, it runs and is heard, as soon as nothing more goes wrong;
    /// what was given up is lost.
    pub fn comes_to_rest(&self) -> bool {
        if self.broken.is_some() || self.accepted_loss || !self.is_alive() || self.is_well() {
            return true;
        }
        let mut world = self.clone();
        world.late.clear();
        world.bounds = crate::bounds::Bounds { connects: 0, ..crate::bounds::Bounds::NONE };
        for _ in 0..ROUNDS_MAX {
            world.deliver_all();
            if world.is_well() {
                return true;
            }
            for node in 0..2 {
                world.advance(Transition::Timeout { node, split: false });
            }
        }
        false
    }

    fn advance(&mut self, step: Transition) {
        let mut transitions = Vec::new();
        self.transitions(&mut transitions);
        if transitions.contains(&step)
            && let Some(next) = self.after(step)
        {
            *self = next;
        }
    }

    /// Everything arrives that is on its way, and what follows from it, but no time passes.
    pub fn deliver_all(&mut self) {
        let mut transitions = Vec::new();
        loop {
            transitions.clear();
            self.transitions(&mut transitions);
            let now =
                transitions.iter().find(|step| !matches!(step, Transition::Timeout { .. } | Transition::Late { .. }));
            let Some(next) = now.and_then(|step| self.after(*step)) else { return };
            *self = next;
        }
    }

    /// Lets time pass with nothing going wrong, until `done`.
    pub fn until(mut self, done: impl Fn(&World) -> bool) -> World {
        for _ in 0..ROUNDS_MAX {
            self.deliver_all();
            if done(&self) {
                return self;
            }
            for node in 0..2 {
                self.advance(Transition::Timeout { node, split: false });
            }
        }
        panic!("nothing went wrong, and still: {self:#?}");
    }
}
