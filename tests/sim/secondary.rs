//! What a secondary's engine does about each action.

use mcd::protocol::secondary;

use crate::applier::ApplyJob;
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
            Action::HashBlocks { run } => self.submit_apply(proc, ApplyJob::Hash(run)),
            Action::SendHashes { conn, first, hashes } => self.send(proc, conn, Item::Hashes { first, hashes }),
            Action::TakePages => {
                if let Some((pages, staged_bytes)) = self.procs[proc].background.take() {
                    self.submit_apply(proc, ApplyJob::Background { pages, staged_bytes });
                }
            }
            Action::Commit { id } => self.commit(proc, id),
            Action::Forget { through } => self.submit_apply(proc, ApplyJob::Forget(through)),
            Action::TakeStorage => self.take_storage(proc),
            Action::WriteKept => self.submit_apply(proc, ApplyJob::WriteKept),
            Action::Ask(call) => self.ask_arbiter(proc, call),
            Action::Promote { record, epoch, cause, .. } => {
                self.note(proc, || format!("TAKES OVER {} from epoch {epoch}: {cause}", record.generation));
                let node = &mut self.procs[proc];
                if let Role::Secondary(machine) = std::mem::replace(&mut node.role, Role::Waiting) {
                    node.role = Role::Restoring(record, machine);
                }
                node.phase = AnyPhase::None;
                self.begin_restore(proc, epoch);
            }
            Action::Rejoin { after } => {
                self.check_loss_told(proc);
                self.apply_rest(proc);
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
                self.check_loss_told(proc);
                self.note(proc, || format!("exits: {ending:?}"));
                let us = self.rng.range(1_000, 100_000);
                self.start_later(self.procs[proc].slot, us);
                self.end(proc);
            }
            Action::Tell(event) => {
                self.procs[proc].loss_told |= matches!(event, mcd::protocol::event::Event::GuestLost { .. });
                self.mind_suspicion(proc, &event);
                self.note(proc, || format!("* {event}"));
            }
        }
    }
}
