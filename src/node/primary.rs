//! The driver of the node that runs the guest: turns events into inputs, and actions into effects.
//! It holds no rule.

mod snapshot;

use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::RecvTimeoutError;
use serde_json::Value;

use self::snapshot::Snapshots;
use super::announce::Announcer;
use super::block_hasher::{BlockHasher, VerifyWatch};
use super::config::Compress;
use super::connections::{Connections, LinkNews};
use super::context::Context;
use super::disks::NodeDisks;
use super::error::NodeError;
use super::events::NodeEvent;
use super::meter::Meter;
use super::{clock, priority};
use crate::checkpoint::capture_pool::CapturePool;
use crate::checkpoint::epoch_buffers::{Cut, EpochBuffers, RoomAgain};
use crate::checkpoint::output::{OutputGate, ReleaseEnd};
use crate::checkpoint::packing::Packing;
use crate::checkpoint::sender::{Sender, SenderJob, SenderReport};
use crate::control::metrics::EpochSample;
use crate::control::status::TakeoverReport;
use crate::machine::{Machine, MachineEvent};
use crate::protocol::messages::{Channel, Message, features};
use crate::protocol::primary::{Action, Command, Input, OutputCut, Phase, Primary};
use crate::protocol::types::ConnId;
use crate::protocol::types::EpochId;

/// How long the end of a guest waits for shared storage to take its last writes.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// How a primary's life ended.
#[derive(Debug, PartialEq, Eq)]
pub enum PrimaryEnd {
    /// As it should: an operator or the guest ended it.
    Quit,
    /// The guest asked to be started again.
    Restart,
    /// Another node runs the guest.
    Fenced,
}

/// The epoch on its way, for the figures.
#[derive(Clone, Copy)]
struct OnItsWay {
    started_us: u64,
    pause_us: u64,
    dirty_pages: u64,
}

/// The driver.
pub struct PrimaryNode {
    context: Context,
    machine: Machine,
    buffers: EpochBuffers,
    disks: NodeDisks,
    protocol: Primary,
    connections: Connections,
    sender: Option<Sender>,
    /// There is one as long as the driver runs.
    block_hasher: Option<BlockHasher>,
    verifying: VerifyWatch,
    meter: Meter,
    pool: CapturePool,
    on_its_way: Option<OnItsWay>,
    announcer: Announcer,
    replies: Vec<crossbeam::channel::Sender<Result<Value, String>>>,
    snapshots: Snapshots,
    /// The guest asked for a reset.
    restart: bool,
    end: Option<PrimaryEnd>,
}

impl PrimaryNode {
    /// A driver for a machine that is booted or restored, and still paused.
    pub fn new(
        context: Context,
        machine: Machine,
        gate: Arc<OutputGate>,
        disks: NodeDisks,
        protocol: Primary,
    ) -> PrimaryNode {
        let pages = machine.memory().pages();
        let buffers = EpochBuffers::new(pages, gate, Arc::clone(disks.journal()), disks.shared().map(Arc::clone));
        let pool = context.captures.clone();
        tracing::info!(bytes_max = CapturePool::bytes_max(pages), "buffers for captures are bounded");
        let announcer = Announcer::new(protocol.mac(), context.guest_ip, clock::now());
        PrimaryNode {
            context,
            machine,
            buffers,
            disks,
            protocol,
            connections: Connections::default(),
            sender: None,
            block_hasher: None,
            verifying: VerifyWatch::default(),
            meter: Meter::default(),
            pool,
            on_its_way: None,
            announcer,
            replies: Vec::new(),
            snapshots: Snapshots::default(),
            restart: false,
            end: None,
        }
    }

    /// Opens the output, lets the guest run, and drives it until it ends here.
    ///
    /// # Errors
    /// What this node cannot go on after: the machine failed.
    pub fn run(mut self, takeover: Option<TakeoverReport>) -> Result<PrimaryEnd, NodeError> {
        clock::sharpen_timers();
        priority::raise();
        let resuming_us = clock::monotonic_us();
        let room = self.buffers.alone();
        self.kick(room);
        self.machine.resume()?;
        let resume_us = clock::monotonic_us().saturating_sub(resuming_us);
        // Not only after a takeover: a guest that is started anew on another host is where the
        // switches do not look for it.
        self.announcer.frames().iter().for_each(|frame| self.buffers.output().send_now(frame));
        if let Some(mut report) = takeover {
            report.resume_ms = resume_us as f64 / 1000.0;
            self.context.status.takeover(report);
        }
        let image = self.disks.image(self.machine.memory().clone());
        let (journal, events) = (Arc::clone(self.disks.journal()), self.context.events.clone());
        self.block_hasher = Some(BlockHasher::start(image, journal, events)?);
        loop {
            self.act()?;
            self.disks.runs_in(self.protocol.generation());
            self.publish();
            for reply in self.replies.drain(..) {
                // The client may have given up waiting.
                let _ = reply.send(Ok(serde_json::json!({})));
            }
            if let Some(end) = self.end.take() {
                if !self.drain_shared_disks()? {
                    // The images are not what it says of them.
                    self.cancel_snapshot();
                }
                self.stamp_disks_at_end(&end)?;
                return Ok(end);
            }
            if self.announcer.take_due(clock::now()) {
                self.announcer.frames().iter().for_each(|frame| self.buffers.output().send_if_passing(frame));
            }
            let input = self.next_input()?;
            if let Some(input) = input {
                self.protocol.handle(clock::now(), input);
            }
        }
    }

    /// A guest that ended here leaves nothing held; one that goes on elsewhere is that node's to
    /// write for. False if its last writes are lost.
    fn drain_shared_disks(&mut self) -> Result<bool, NodeError> {
        let Some(shared) = self.disks.shared().filter(|_| self.protocol.phase() == Phase::Stopping) else {
            return Ok(true);
        };
        self.machine.pause()?;
        let drained = shared.drain(DRAIN_TIMEOUT);
        if !drained {
            let bytes = shared.used_bytes();
            tracing::error!(
                bytes,
                "shared storage did not take the guest's last writes; they are lost as in a loss of power"
            );
        }
        Ok(drained)
    }

    /// The guest's last word to its disks is in their stamps; a fenced node's are outdated already.
    fn stamp_disks_at_end(&mut self, end: &PrimaryEnd) -> Result<(), NodeError> {
        let snapshot = self.end_snapshot(end);
        if *end == PrimaryEnd::Quit {
            self.machine.pause()?;
            let at = EpochId { generation: self.protocol.generation(), ..self.protocol.running_epoch() };
            self.disks.stamper().stamp_last(at, snapshot);
        }
        Ok(())
    }

    fn next_input(&mut self) -> Result<Option<Input>, NodeError> {
        let sender = self.sender.as_ref();
        let probe = |conn| sender.filter(|sender| sender.conn() == conn).into_iter().for_each(Sender::probe);
        if let Some((conn, LinkNews::Stuck(why))) = self.connections.news(clock::now(), probe) {
            return Ok(Some(Input::Closed { conn, why }));
        }
        let event = match self.protocol.poll_timeout().into_iter().chain(self.announcer.due()).min() {
            None => self.context.inbox.recv().map_err(|_| NodeError::Gone)?,
            Some(at) => match self.context.inbox.recv_timeout(clock::until(at)) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => return Ok(Some(Input::Tick)),
                Err(RecvTimeoutError::Disconnected) => return Err(NodeError::Gone),
            },
        };
        self.translate(event)
    }

    fn translate(&mut self, event: NodeEvent) -> Result<Option<Input>, NodeError> {
        Ok(match event {
            NodeEvent::Accepted { conn, hello, writer, closer } => {
                self.connections.insert(conn, writer, closer);
                if hello.channel == Channel::Data {
                    self.connections.watch(conn, self.context.config.heartbeat.timeout);
                }
                Some(Input::Hello { conn, hello })
            }
            NodeEvent::Message { conn, message } => Some(Input::Message { conn, message }),
            NodeEvent::Closed { conn, why } => {
                self.connections.remove(conn);
                Some(Input::Closed { conn, why })
            }
            NodeEvent::Pushed { conn, bytes } => {
                self.context.status.add_wire_bytes(bytes);
                self.sender_is(conn).then_some(Input::Pushed)
            }
            NodeEvent::PeerHashes { conn, first, hashes } => Some(Input::PeerHashes { conn, first, hashes }),
            NodeEvent::OwnHashes { ticket, hashes } => Some(Input::OwnHashes { ticket, hashes }),
            NodeEvent::OutputWaiting => self.buffers.output().open_packets().gt(&0).then_some(Input::OutputWaiting),
            NodeEvent::OutputFull => Some(Input::OutputFull),
            NodeEvent::JournalFull => Some(Input::JournalFull),
            NodeEvent::Written { through } => Some(Input::Written { through }),
            NodeEvent::StorageSynced { conn } => Some(Input::StorageSynced { conn }),
            NodeEvent::StorageFault(why) => {
                self.context.status.storage_noticed(why);
                None
            }
            NodeEvent::DisksHaveRoom => {
                self.machine.kick_disks();
                None
            }
            NodeEvent::Answer { ticket, answer } => Some(Input::Answer { ticket, answer }),
            NodeEvent::Machine(event) => self.machine_event(event)?,
            NodeEvent::Command { command: Command::VerifyDisks(choice), reply }
                if let Err(why) = self.protocol.may_verify(choice) =>
            {
                // The client may have given up waiting.
                reply.into_iter().for_each(|reply| drop(reply.send(Err(why.to_string()))));
                None
            }
            NodeEvent::Command { command, reply } => {
                self.replies.extend(reply);
                Some(Input::Command(command))
            }
            NodeEvent::Snapshot { request, reply } => self.snapshot_asked(request, reply),
            NodeEvent::SnapshotWritten(result) => self.snapshot_written(result),
            // What a secondary hears of; a late one may still be in the channel after a takeover.
            NodeEvent::Connected { .. }
            | NodeEvent::Foreign { .. }
            | NodeEvent::ImageFailed { .. }
            | NodeEvent::BlocksHashed { .. }
            | NodeEvent::Staged { .. }
            | NodeEvent::Background { .. } => None,
        })
    }

    fn sender_is(&self, conn: ConnId) -> bool {
        self.sender.as_ref().is_some_and(|sender| sender.conn() == conn)
    }

    fn machine_event(&mut self, event: MachineEvent) -> Result<Option<Input>, NodeError> {
        tracing::info!(?event, "guest");
        match event {
            MachineEvent::Shutdown => return Ok(Some(Input::GuestShutdown)),
            MachineEvent::VcpuFailed { .. } => return Err(NodeError::GuestFailed(format!("{event:?}"))),
            MachineEvent::GuestPanic | MachineEvent::DeviceBroken { .. } => {
                self.context.status.guest_alarm(format!("the guest is in trouble: {event:?}"));
            }
            MachineEvent::Reset => {
                // Its kernel is known to the node that started it, which may not be this one:
                // whoever starts nodes starts it again.
                self.restart = true;
                return Ok(Some(Input::GuestShutdown));
            }
            MachineEvent::Booted => {}
        }
        Ok(None)
    }

    // ---- effects ----

    fn act(&mut self) -> Result<(), NodeError> {
        while let Some(action) = self.protocol.poll_action() {
            match action {
                Action::Send { conn, message } => self.send(conn, message),
                Action::Close { conn } => self.close(conn),
                Action::StartTracking { conn } => self.start_tracking(conn)?,
                Action::StopTracking => self.stop_tracking()?,
                Action::Capture { id, completes_resync, output } => self.capture(id, completes_resync, output)?,
                Action::Push { pages } => self.job(SenderJob::Push(pages)),
                Action::Preserve { run } => self.disks.journal().copy_before_write().preserve(run),
                Action::Sum { ticket, run, as_of } => {
                    self.block_hasher.iter().for_each(|block_hasher| block_hasher.sum(ticket, run.clone(), as_of))
                }
                Action::Committed { id } => self.committed(id),
                Action::Release { through, before } => self.release(through, before),
                Action::WriteThrough { through } => self.buffers.write_through(through),
                Action::ReleaseAll => {
                    let room = self.buffers.alone();
                    self.kick(room);
                }
                Action::Run(run) => self.run_guest(run)?,
                Action::Snapshot => self.begin_snapshot(),
                Action::NoSnapshot { why } => self.snapshot_refused(why),
                Action::Ask(call) => self.context.arbiter.ask(call),
                Action::Fence => self.fence()?,
                Action::Exit => {
                    self.end = Some(match self.protocol.phase() {
                        Phase::Fenced => PrimaryEnd::Fenced,
                        _ if self.restart => PrimaryEnd::Restart,
                        _ => PrimaryEnd::Quit,
                    });
                }
                Action::Tell(event) => self.context.tell(&event),
            }
        }
        Ok(())
    }

    fn send(&mut self, conn: ConnId, message: Message) {
        if self.sender_is(conn) {
            self.job(SenderJob::Message(message));
        } else if let Some(why) = self.connections.send(conn, &message) {
            self.protocol.handle(clock::now(), Input::Closed { conn, why });
        }
    }

    fn job(&mut self, job: SenderJob) {
        if let Some(sender) = &self.sender {
            sender.submit(job);
        }
    }

    fn close(&mut self, conn: ConnId) {
        match self.sender.take_if(|sender| sender.conn() == conn) {
            // A peer that is given up on must not hold us up; a planned goodbye leaves with what
            // was handed over before it.
            Some(sender) if self.protocol.phase() != Phase::Stopping => sender.abort(),
            Some(sender) => drop(sender),
            None => {}
        }
        self.connections.close(conn);
    }

    fn kick(&self, room: RoomAgain) {
        if room.net {
            self.machine.kick_net();
        }
        if room.disks {
            self.machine.kick_disks();
        }
    }

    fn start_tracking(&mut self, conn: ConnId) -> Result<(), NodeError> {
        let Some((writer, closer)) = self.connections.take(conn) else { return Ok(()) };
        let decision = self.buffers.decide();
        self.machine.track_dirty(true)?;
        let room = self.buffers.track(decision, conn);
        self.kick(room);
        let events = self.context.events.clone();
        let report = move |report: SenderReport| {
            let event = match report {
                SenderReport::Pushed(bytes) => NodeEvent::Pushed { conn, bytes },
                SenderReport::Failed(why) => NodeEvent::Closed { conn, why },
            };
            // The driver is gone: nobody needs to know.
            let _ = events.send(event);
        };
        let image = self.disks.image(self.machine.memory().clone());
        let packing = match self.context.config.compress {
            _ if self.protocol.peer_features() & features::LZ4 == 0 => Packing::Uncompressed,
            Compress::None => Packing::Uncompressed,
            Compress::Lz4 => Packing::Lz4,
            Compress::Auto => Packing::BySpeed,
        };
        let (pool, link) = (self.pool.clone(), (writer, closer));
        self.sender = Some(Sender::start(conn, link, image, packing, pool, priority::raise, report)?);
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), NodeError> {
        self.sender = None;
        if self.on_its_way.take().is_some() {
            self.context.status.aborted();
        }
        let room = self.buffers.untrack(self.buffers.decide());
        self.kick(room);
        self.machine.track_dirty(false)?;
        Ok(())
    }

    fn capture(&mut self, id: EpochId, completes_resync: bool, output: OutputCut) -> Result<(), NodeError> {
        let decision = self.buffers.decide();
        let was_running = self.machine.is_running();
        let mut buffer = self.pool.get();
        if let Err(error) = self.buffers.prepare(clock::now(), &mut self.machine, &mut buffer) {
            // The cut meets it too, and then it counts.
            tracing::warn!(%error, "the dirty log could not be read ahead of a pause");
        }
        let started_us = clock::monotonic_us();
        self.machine.pause()?;
        let cut = Cut { decision, id, output };
        let taken = self.buffers.cut(clock::now(), cut, &mut self.machine, &mut buffer);
        if was_running {
            self.machine.resume()?;
        }
        let pause_us = clock::monotonic_us().saturating_sub(started_us);
        let input = match taken {
            Ok(()) => {
                self.buffers.with_dirty_pages(|pages| self.protocol.note_dirty_pages(pages));
                self.protocol.note_blocks(buffer.blocks.iter().flat_map(|blocks| blocks.indexes()));
                let dirty_pages = buffer.pages_total();
                buffer.completes_resync = completes_resync;
                self.on_its_way = Some(OnItsWay { started_us, pause_us, dirty_pages });
                self.job(SenderJob::Epoch(buffer));
                Input::Captured { id }
            }
            Err(error) => {
                self.buffers.put_back(decision);
                self.pool.put(buffer);
                Input::CaptureFailed { why: error.to_string() }
            }
        };
        self.protocol.handle(clock::now(), input);
        Ok(())
    }

    fn release(&mut self, through: u64, before: crate::protocol::types::Instant) {
        let (end, room) = self.buffers.release(through, || clock::now() < before);
        if end == ReleaseEnd::Expired {
            self.protocol.handle(clock::now(), Input::ReleaseExpired);
        }
        self.kick(room);
    }

    /// The epoch on its way is committed: what it held is safe and its figures are complete.
    fn committed(&mut self, id: EpochId) {
        let room = self.buffers.committed(id);
        self.kick(room);
        let Some(way) = self.on_its_way.take() else { return };
        let sample = EpochSample {
            index: 0, // the log numbers them
            pause_us: way.pause_us,
            commit_us: clock::monotonic_us().saturating_sub(way.started_us),
            dirty_pages: way.dirty_pages,
            wire_bytes: self.sender.as_ref().map_or(0, Sender::last_epoch_bytes),
            hold_us: self.buffers.output().last_hold_us(),
        };
        self.context.status.committed(sample);
    }

    fn run_guest(&mut self, run: bool) -> Result<(), NodeError> {
        if run {
            self.machine.resume()?
        } else {
            self.machine.pause()?
        }
        Ok(())
    }

    fn fence(&mut self) -> Result<(), NodeError> {
        self.buffers.fence();
        self.machine.pause()?;
        self.cancel_snapshot();
        self.sender = None;
        self.connections.close_all();
        Ok(())
    }

    fn publish(&mut self) {
        let resync = self.protocol.resync().map(|ledger| ledger.parts().collect());
        let resync = self.meter.look(clock::monotonic_us(), resync);
        let (held, journal) = (self.buffers.output().figures(), self.disks.journal().figures());
        let held_disk_bytes = self.disks.shared().map_or(0, |shared| shared.used_bytes());
        let running = self.machine.is_running();
        self.context.status.primary(&self.protocol, running, resync, held, journal, held_disk_bytes);
        if let Some(report) = self.verifying.news(self.protocol.verify()) {
            self.context.status.verified(report);
        }
    }
}

impl Drop for PrimaryNode {
    fn drop(&mut self) {
        // The machine, which goes next, waits for its disks' threads, and one of these may wait for
        // a flush.
        self.disks.end();
    }
}
