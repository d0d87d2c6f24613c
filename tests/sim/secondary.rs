//! What a secondary's engine does about each action.

use mcd::protocol::secondary;

use crate::net::{Item, ProcId};
use crate::node::{AnyPhase, Role};
use crate::world::{Event, World};

impl World {
    pub fn execute_secondary(&mut self, proc: ProcId, action: secondary::Action) {
        use secondary::Action;
        match action {
            Action::Connect { conn, channel } => self.connect(proc, conn, channel),
            Action::Send { conn, message } => self.send(proc, conn, Item::Message(message)),
            Action::Close { conn } => self.close(proc, conn),
            Action::Heartbeat { conn, beat, until } => self.feed_heartbeats(proc, conn, beat, until),
            Action::Answer { ticket, result } => self.answered(proc, ticket, result),
            Action::BuildMachine(_) => self.build_image(proc),
            Action::HashBlocks { run } => self.sum_image(proc, run),
            Action::SendHashes { conn, first, hashes } => self.send(proc, conn, Item::Hashes { first, hashes }),
            Action::TakePages => {
                let pages = std::mem::take(&mut self.procs[proc].background);
                self.apply(proc, &pages);
            }
            Action::Commit { id } => self.commit(proc, id),
            Action::Forget { through } => drop(self.procs[proc].disk.kept.forget(through).count()),
            Action::TakeStorage => self.take_storage(proc),
            Action::WriteKept => self.write_kept(proc),
            Action::Ask(call) => self.ask_arbiter(proc, call),
            Action::Promote { record, epoch, cause, .. } => {
                self.note(proc, || format!("TAKES OVER {} from epoch {epoch}: {cause}", record.generation));
                let node = &mut self.procs[proc];
                let (counter, _) = node.image_state;
                let check = self.model.activated(node.me, epoch, (&node.image, &self.storage.blocks), counter);
                node.role = Role::Restoring(record);
                node.phase = AnyPhase::None;
                self.check(check);
                let us = self.takes(self.plan.restore_us);
                self.after(us, Event::Restored(proc));
            }
            Action::Rejoin { after } => {
                let node = &mut self.procs[proc];
                if let Role::Secondary(machine) = &node.role {
                    node.last_conn = machine.last_conn();
                }
                node.role = Role::Waiting;
                node.forget();
                for (conn, _) in node.conns.clone() {
                    self.close(proc, conn);
                }
                self.after(after.as_micros() as u64, Event::Rejoin(proc));
            }
            Action::Exit { ending, .. } => {
                self.note(proc, || format!("exits: {ending:?}"));
                let us = self.rng.range(1_000, 100_000);
                self.start_later(self.procs[proc].slot, us);
                self.end(proc);
            }
            Action::Tell(event) => {
                self.mind_suspicion(proc, &event);
                self.note(proc, || format!("* {event}"));
            }
        }
    }
}
