//! What operators and the guest itself ask of a primary: stop, go on, checkpoint, a snapshot, end.

use super::{Action, End, Phase, Primary};
use crate::protocol::arbitration::ArbiterRequest;
use crate::protocol::command::{Command, CommandRefused};
use crate::protocol::event::Event;
use crate::protocol::messages::Message;
use crate::protocol::mutant;
use crate::protocol::types::EpochId;

/// A snapshot of the guest, for which it is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Snapshot {
    /// It is being written.
    Writing {
        /// The guest stops with it.
        stop: bool,
    },
    /// It is written and the guest stopped with it: it never runs again.
    Stopped,
}

/// Commands that wait for what they ask for, by their tickets.
#[derive(Clone, Debug, Default, Hash)]
pub(super) struct Pending {
    /// `checkpoint`: until the epoch is committed, once one was begun for it.
    checkpoints: Vec<(u64, Option<EpochId>)>,
    /// `stop` and `cont`: until the vCPUs are as asked.
    runs: Vec<u64>,
    /// Orders to the vCPUs that are not carried out yet.
    orders: u32,
}

impl Primary {
    pub(super) fn command(&mut self, ticket: u64, command: Command) {
        let refused = match (command, self.phase) {
            (Command::Quit, _) => {
                self.answer(ticket, Ok(()));
                return self.quit();
            }
            (_, Phase::Fenced) => Err(CommandRefused::Fenced),
            (_, Phase::Stopping) => Err(CommandRefused::Stopping),
            (Command::Stop | Command::Cont, _) => {
                self.stopped_by_operator = command == Command::Stop;
                self.pending.runs.push(ticket);
                self.sync_run();
                return self.answer_runs(Ok(()));
            }
            (Command::AnnounceSelf(series), _) => {
                self.actions.push_back(Action::Announce(series));
                Ok(())
            }
            (Command::Checkpoint, _) if self.peer.is_none() => Err(CommandRefused::NoSecondary),
            (Command::Checkpoint, _) => {
                self.epochs.press();
                return self.pending.checkpoints.push((ticket, None));
            }
            (Command::VerifyDisks(choice), _) => self.verify_disks(choice).map_err(CommandRefused::Verify),
        };
        self.answer(ticket, refused);
    }

    pub(super) fn answer(&mut self, ticket: u64, result: Result<(), CommandRefused>) {
        self.actions.push_back(Action::Answer { ticket, result });
    }

    /// The vCPUs run or are stopped as the oldest order asked, or could not be stopped.
    pub(super) fn run_done(&mut self, run: bool, result: Result<(), String>) {
        self.pending.orders = self.pending.orders.saturating_sub(1);
        let result = result.map_err(CommandRefused::NotStopped);
        if result.is_err() && !run && !mutant::is("failed-stop-believed") {
            // It runs on, so an operator's `stop` had no effect, nor had a full output buffer. That
            // stops it with the next packet that finds no room.
            (self.stopped_by_operator, self.stopped_by_full_output) = (false, false);
        }
        self.answer_runs(result);
    }

    fn answer_runs(&mut self, result: Result<(), CommandRefused>) {
        if self.pending.orders == 0 || result.is_err() {
            for ticket in std::mem::take(&mut self.pending.runs) {
                self.answer(ticket, result.clone());
            }
        }
    }

    /// An epoch was begun: it is the one that earlier `checkpoint` commands wait for.
    pub(super) fn checkpoint_begun(&mut self, id: EpochId) {
        self.pending.checkpoints.iter_mut().for_each(|(_, epoch)| *epoch = epoch.or(Some(id)));
    }

    pub(super) fn checkpoint_committed(&mut self, id: EpochId) {
        let done = |(_, epoch): &mut (u64, Option<EpochId>)| epoch.is_some_and(|epoch| epoch <= id);
        let tickets: Vec<_> = self.pending.checkpoints.extract_if(.., done).map(|(ticket, _)| ticket).collect();
        tickets.into_iter().for_each(|ticket| self.answer(ticket, Ok(())));
    }

    pub(super) fn checkpoints_lost(&mut self) {
        for (ticket, _) in std::mem::take(&mut self.pending.checkpoints) {
            self.answer(ticket, Err(CommandRefused::SecondaryLost));
        }
    }

    /// Ends this node: the guest goes on at the secondary if that is on record, and is shut down if
    /// not. While the arbiter is asked which of the two it is, nobody knows; so the answer is
    /// waited for, unless the operator asks twice.
    pub(super) fn quit(&mut self) {
        let twice = std::mem::replace(&mut self.quitting, true);
        match self.phase {
            Phase::Fenced => self.actions.push_back(Action::Exit(End::Fenced)),
            _ if twice => self.actions.push_back(Action::Exit(End::Quit)),
            Phase::Protected => self.actions.push_back(Action::Exit(End::Quit)),
            _ if mutant::is("quit-at-once") => self.actions.push_back(Action::Exit(End::Quit)),
            Phase::Pairing | Phase::Deciding | Phase::Stopping => {}
            _ => self.shut_down(),
        }
    }

    /// An operator ended this node while it took its guest over.
    pub(in crate::protocol) fn quit_from_the_start(&mut self) {
        self.quit();
        self.sync_run();
    }

    /// Whether a snapshot may be taken now; if not, why. While another node may run the guest
    /// already, what this one has may be a life that nobody was told of. And disks are not in a
    /// snapshot: a guest that goes on writes to them, and its memory as of the snapshot would not
    /// know what they hold.
    fn may_snapshot(&self, stop: bool) -> Result<(), &'static str> {
        let writes = self.config.shape.disks.iter().any(|disk| !disk.read_only);
        match self.phase {
            Phase::Fenced => Err("this node is fenced: another node runs the guest; ask that one"),
            Phase::Stopping => Err("the guest is being shut down"),
            _ if self.snapshot.is_some() && !mutant::is("two-snapshots-at-once") => {
                Err("a snapshot of this guest is being written already")
            }
            _ if writes && !stop && !mutant::is("snapshot-without-its-disks") => Err(
                "this guest writes to disks, which would go on without its snapshot: take it with --stop, which ends \
                 the guest and leaves its images as they are at that moment",
            ),
            Phase::Deciding => Err("the peer is suspected and the arbiter has not answered yet; ask again when it has"),
            _ if !self.proven => {
                Err("this node was asleep and asks the arbiter whether it still has the guest; ask again")
            }
            _ => Ok(()),
        }
    }

    /// Stops the guest for a snapshot. Epochs, acks and heartbeats go on: what it said before is
    /// released as ever.
    pub(super) fn take_snapshot(&mut self, stop: bool) {
        if let Err(why) = self.may_snapshot(stop) {
            return self.actions.push_back(Action::NoSnapshot { why });
        }
        self.snapshot = Some(Snapshot::Writing { stop });
        self.sync_run();
        self.actions.push_back(Action::Snapshot);
    }

    /// The snapshot is over; the guest goes on, or stops for good if that was asked for and the
    /// snapshot is there. It must not run meanwhile, or the snapshot would not be of its last
    /// moment.
    pub(super) fn snapshot_ended(&mut self, written: bool) {
        let stop = written && self.snapshot == Some(Snapshot::Writing { stop: true });
        self.snapshot = (stop && !mutant::is("stopped-snapshot-goes-on")).then_some(Snapshot::Stopped);
        match self.phase {
            _ if !stop => {}
            // The answer says whether there is anything left to stop.
            Phase::Deciding => self.quitting |= mutant::is("snapshot-counts-as-quit"),
            _ => self.shut_down(),
        }
    }

    /// True if this node ends with the arbiter's answer: an operator wants that, or the guest has
    /// stopped with its snapshot. Of the two only the operator's word counts as having asked once.
    pub(super) fn ends_with_the_answer(&self) -> bool {
        self.quitting || self.snapshot == Some(Snapshot::Stopped)
    }

    /// The guest is over. The arbiter hears it before the secondary does, so that nobody takes over
    /// a guest that ended.
    pub(super) fn shut_down(&mut self) {
        if mutant::is("shutdown-not-told") {
            return self.end();
        }
        if self.phase != Phase::Stopping {
            self.phase = Phase::Stopping;
            self.ask_to_stop();
        }
    }

    pub(super) fn ask_to_stop(&mut self) {
        self.ask(ArbiterRequest::Swap { expected: Some(self.record), new: self.record.next_stopped() });
    }

    pub(super) fn end(&mut self) {
        self.actions.push_back(Action::ReleaseAll);
        if let Some(peer) = &self.peer {
            let message = Message::Bye { reason: "the guest was shut down".into() };
            self.actions.push_back(Action::Send { conn: peer.data, message });
        }
        self.drop_connections();
        self.actions.push_back(Action::Exit(End::GuestOver { restart: self.restart }));
    }

    pub(super) fn sync_run(&mut self) {
        let may = !matches!(self.phase, Phase::Fenced | Phase::Stopping);
        let preserved = self.snapshot.is_some() && !mutant::is("runs-while-it-is-saved");
        let wanted = may && !self.stopped_by_operator && !self.stopped_by_full_output && !preserved;
        if wanted != self.guest_runs {
            self.guest_runs = wanted;
            self.pending.orders += 1;
            self.actions.push_back(Action::Run(wanted));
        }
    }

    pub(super) fn tell(&mut self, event: Event) {
        self.actions.push_back(Action::Tell(event));
    }
}

#[cfg(test)]
mod tests;
