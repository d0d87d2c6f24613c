//! What a primary's engine does about each action: at once what is short, and an order to another
//! thread for what may take long.

use crate::checkpoint::epoch_buffers::{Cut, RoomAgain};
use crate::checkpoint::output::ReleaseEnd;
use crate::checkpoint::packing::Packing;
use crate::checkpoint::sender::{Sender, SenderJob, SenderReport};
use crate::control::metrics::EpochSample;
use crate::node::config::Compress;
use crate::node::error::NodeError;
use crate::node::events::NodeEvent;
use crate::node::primary::machine_thread::CaptureOrder;
use crate::node::primary::{InFlight, PrimaryNode};
use crate::node::{clock, priority};
use crate::protocol::messages::{Heartbeat, Message, features};
use crate::protocol::primary::{Action, Input, OutputCut, Phase};
use crate::protocol::types::{ConnId, EpochId, Instant};

impl PrimaryNode {
    pub(super) fn act(&mut self) -> Result<(), NodeError> {
        while let Some(action) = self.protocol.poll_action() {
            match action {
                Action::Send { conn, message } => self.send(conn, message),
                Action::Heartbeat { conn, beat, until } => self.feed_heartbeats(conn, beat, until),
                Action::Close { conn } => self.close(conn),
                Action::StartTracking { conn } => self.start_tracking(conn)?,
                Action::StopTracking => self.stop_tracking(),
                Action::Capture { id, completes_resync, output } => self.capture(id, completes_resync, output),
                Action::Push { pages } => self.job(SenderJob::Push(pages)),
                Action::Preserve { run } => self.disks.journal().copy_before_write().preserve(run),
                Action::HashBlocks { ticket, run, as_of } => {
                    self.block_hasher.iter().for_each(|hasher| hasher.hash_blocks(ticket, run.clone(), as_of));
                }
                Action::FindHoles { ticket, run } => {
                    self.block_hasher.iter().for_each(|hasher| hasher.find_holes(ticket, run.clone()));
                }
                Action::Committed { id } => self.committed(id),
                Action::Release { through, before } => self.release(through, before),
                Action::WriteThrough { through } => self.buffers.write_through(through),
                Action::ReleaseAll => {
                    let decision = self.buffers.decide();
                    self.buffers.pass_output(decision);
                    self.machine.iter().for_each(|machine| machine.pass_disks(decision));
                }
                Action::Run(run) => self.machine.iter().for_each(|machine| machine.run(run)),
                Action::Snapshot => self.begin_snapshot(),
                Action::NoSnapshot { why } => self.snapshot_refused(why),
                Action::Announce(series) => self.announce(series),
                Action::Ask(call) => self.context.arbiter.ask(call),
                Action::Fence => self.fence(),
                Action::Answer { ticket, result } => self.replies.answer(ticket, result),
                Action::Exit(end) => self.end = Some(end),
                Action::Tell(event) => self.context.tell(&event),
            }
        }
        Ok(())
    }

    fn send(&mut self, conn: ConnId, message: Message) {
        if self.sender_is(conn) {
            self.job(SenderJob::Message(message));
        } else if let Some(why) = self.connections.send(conn, &message) {
            self.context.link_failed(conn, why);
        }
    }

    fn feed_heartbeats(&mut self, conn: ConnId, beat: Heartbeat, until: Instant) {
        if self.heartbeats.conn() == Some(conn) {
            self.heartbeats.feed(beat, until);
        } else if let Some((writer, _)) = self.connections.take(conn) {
            self.heartbeats.open(conn, writer, self.context.config.heartbeat.interval, beat, until);
        }
    }

    fn job(&mut self, job: SenderJob) {
        if let Some(sender) = &self.sender {
            sender.submit(job);
        }
    }

    fn close(&mut self, conn: ConnId) {
        self.heartbeats.close(conn);
        match self.sender.take_if(|sender| sender.conn() == conn) {
            // A planned goodbye leaves with what was handed over before it.
            Some(sender) if self.protocol.phase() == Phase::Stopping => return self.leaving.push(sender),
            Some(sender) => give_up(sender),
            None => {}
        }
        self.connections.close(conn);
    }

    pub(super) fn kick(&self, room: RoomAgain) {
        self.machine.iter().for_each(|machine| machine.kick(room));
    }

    pub(super) fn kick_disks(&self) {
        self.kick(RoomAgain { net: false, disks: true });
    }

    fn start_tracking(&mut self, conn: ConnId) -> Result<(), NodeError> {
        let (Some(machine), Some(link)) = (&self.machine, self.connections.take(conn)) else {
            let result = Err("its connection is gone".to_owned());
            self.protocol.handle(clock::now(), Input::Tracking { conn, result });
            return Ok(());
        };
        machine.track(conn, self.buffers.decide());
        let events = self.context.events.clone();
        let report = move |report: SenderReport| {
            // An engine that is ending needs no more events.
            let _ = match report {
                SenderReport::Pushed(bytes) => events.report(NodeEvent::Pushed { conn, bytes }),
                SenderReport::Failed(why) => events.link_failed(conn, why),
            };
        };
        let image = self.disks.image(self.memory.clone());
        let packing = match self.context.config.compress {
            _ if self.protocol.peer_features() & features::LZ4 == 0 => Packing::Uncompressed,
            Compress::None => Packing::Uncompressed,
            Compress::Lz4 => Packing::Lz4,
            Compress::Auto => Packing::BySpeed,
        };
        let pool = self.pool.clone();
        self.sender = Some(Sender::start(conn, link, image, packing, pool, priority::raise, report)?);
        Ok(())
    }

    fn stop_tracking(&mut self) {
        self.sender.take().into_iter().for_each(give_up);
        if self.in_flight.take().is_some() {
            self.context.status.aborted();
        }
        let decision = self.buffers.decide();
        self.machine.iter().for_each(|machine| machine.untrack(decision));
    }

    fn capture(&mut self, id: EpochId, completes_resync: bool, output: OutputCut) {
        let sender = self.sender.as_ref().and_then(Sender::queue);
        let (Some(machine), Some(sender)) = (&self.machine, sender) else {
            let why = "its connection is gone".to_owned();
            return self.protocol.handle(clock::now(), Input::CaptureFailed { id, why });
        };
        let cut = Cut { decision: self.buffers.decide(), id, output };
        let for_ledger = self.protocol.resync().is_some();
        machine.capture(CaptureOrder { cut, completes_resync, for_ledger, sender });
    }

    fn release(&mut self, through: u64, before: Instant) {
        let (end, room) = self.buffers.release(through, || clock::now() < before);
        if end == ReleaseEnd::Expired {
            self.protocol.handle(clock::now(), Input::ReleaseExpired);
        }
        self.kick(room);
    }

    /// The epoch in flight is committed: what it held is safe and its figures are complete.
    fn committed(&mut self, id: EpochId) {
        let room = self.buffers.committed(id);
        self.kick(room);
        let Some(InFlight { started_us, pause_us, dirty_pages }) = self.in_flight.take() else { return };
        let sample = EpochSample {
            index: 0, // the log numbers them
            pause_us,
            commit_us: clock::monotonic_us().saturating_sub(started_us),
            dirty_pages,
            wire_bytes: self.sender.as_ref().map_or(0, Sender::last_epoch_bytes),
            hold_us: self.buffers.output().last_hold_us(),
        };
        self.context.status.committed(sample);
    }

    fn fence(&mut self) {
        self.buffers.close_output();
        self.machine.iter().for_each(|machine| machine.stop());
        self.running = false;
        self.cancel_snapshot();
        self.sender.take().into_iter().for_each(give_up);
        self.connections.close_all();
    }

    pub(super) fn publish(&mut self) {
        let resync = self.protocol.resync().map(|ledger| ledger.parts().collect());
        let resync = self.meter.look(clock::monotonic_us(), resync);
        let (held, journal) = (self.buffers.output().figures(), self.disks.journal().figures());
        let held_disk_bytes = self.disks.shared().map_or(0, |shared| shared.used_bytes());
        self.context.status.primary(&self.protocol, self.running, resync, held, journal, held_disk_bytes);
        if let Some(report) = self.verifying.news(self.protocol.verify()) {
            self.context.status.verified(report);
        }
    }
}

/// Ends a sender's connection now. Its thread may be reading a disk that does not answer, so a
/// thread of its own waits for it.
fn give_up(sender: Sender) {
    let waiting = std::thread::Builder::new().name("mcd-send-end".into()).spawn(move || drop(sender));
    if let Err(error) = waiting {
        tracing::warn!(%error, "a sending thread could not be waited for");
    }
}
