//! The engine of the node that runs the guest: turns events into inputs, and actions into effects.
//! It holds no rule, and waits for nothing but its inbox: what takes long is ordered of the machine
//! thread, the sender, the block hasher or the arbiter's thread, and heartbeats have a thread of
//! their own.

mod effects;
mod machine_thread;
mod snapshot;

use std::sync::Arc;
use std::time::Duration;

use self::machine_thread::MachineThread;
use self::snapshot::Snapshots;
use super::announce::Announcer;
use super::block_hasher::{BlockHasher, VerifyWatch};
use super::connections::{Connections, LinkNews};
use super::context::Context;
use super::disks::NodeDisks;
use super::engine::{self, Engine, Step};
use super::error::NodeError;
use super::events::{Captured, NodeEvent, Replies};
use super::heartbeats::HeartbeatThread;
use super::inbox::{Inbox, Next, Queues};
use super::meter::Meter;
use super::{clock, priority};
use crate::checkpoint::capture_pool::CapturePool;
use crate::checkpoint::epoch_buffers::EpochBuffers;
use crate::checkpoint::output::OutputGate;
use crate::checkpoint::sender::Sender;
use crate::control::status::TakeoverReport;
use crate::machine::{GuestRam, Machine};
use crate::protocol::command::AnnounceSeries;
use crate::protocol::messages::Channel;
use crate::protocol::primary::{End, Input, LastWrites, Primary};
use crate::protocol::types::ConnId;

/// The epoch in flight, for the figures.
#[derive(Clone, Copy)]
struct InFlight {
    started_us: u64,
    pause_us: u64,
    dirty_pages: u64,
}

/// The engine.
pub(super) struct PrimaryNode {
    context: Arc<Context>,
    /// There is one as long as the engine runs.
    machine: Option<MachineThread>,
    memory: GuestRam,
    tsc_khz: u32,
    /// The vCPUs run, captures aside.
    running: bool,
    buffers: Arc<EpochBuffers>,
    disks: NodeDisks,
    protocol: Primary,
    connections: Connections,
    heartbeats: HeartbeatThread,
    sender: Option<Sender>,
    /// Senders whose connections end once what was handed over is out.
    leaving: Vec<Sender>,
    /// There is one as long as the engine runs.
    block_hasher: Option<BlockHasher>,
    verifying: VerifyWatch,
    meter: Meter,
    pool: CapturePool,
    in_flight: Option<InFlight>,
    announcer: Announcer,
    replies: Replies,
    snapshots: Snapshots,
    end: Option<End>,
}

impl PrimaryNode {
    /// Opens the output of a machine that is booted or restored and still paused, lets the guest
    /// run, and drives it until it ends here; how it ended.
    ///
    /// # Errors
    /// What this node cannot go on after: the machine failed.
    pub(super) fn run(
        context: Arc<Context>,
        inbox: &Inbox,
        mut machine: Machine,
        gate: Arc<OutputGate>,
        disks: NodeDisks,
        protocol: Primary,
        takeover: Option<TakeoverReport>,
    ) -> Result<End, NodeError> {
        clock::sharpen_timers();
        priority::raise();
        let memory = machine.memory().clone();
        let pages = memory.pages();
        let buffers = EpochBuffers::new(pages, gate, Arc::clone(disks.journal()), disks.shared().map(Arc::clone));
        let buffers = Arc::new(buffers);
        tracing::info!(bytes_max = CapturePool::bytes_max(pages), "buffers for captures are bounded");
        let resuming_us = clock::monotonic_us();
        // Whatever waits for room is kicked by the resume.
        let _ = buffers.alone();
        machine.resume()?;
        let resume_us = clock::monotonic_us().saturating_sub(resuming_us);
        context.status.guest_runs(machine.driver_looks());
        let announcer = Announcer::new(protocol.mac(), context.guest_ip, AnnounceSeries::DEFAULT, clock::now());
        // Not only after a takeover: a guest that is started anew on another host is where the
        // switches do not look for it.
        announcer.frames().iter().for_each(|frame| buffers.output().send(frame));
        if let Some(mut report) = takeover {
            report.resume_ms = resume_us as f64 / 1000.0;
            context.status.takeover(report);
        }
        let (journal, events) = (Arc::clone(disks.journal()), context.events.clone());
        let block_hasher = BlockHasher::start(disks.image(memory.clone()), journal, events.clone())?;
        let (pool, tsc_khz) = (context.captures.clone(), machine.tsc_khz());
        let pause_max = context.config.stall_max * 2;
        let heartbeats = HeartbeatThread::start(events.clone())?;
        let machine = MachineThread::start(machine, Arc::clone(&buffers), pool.clone(), pause_max, events)?;
        let node = PrimaryNode {
            context,
            machine: Some(machine),
            memory,
            tsc_khz,
            running: true,
            buffers,
            disks,
            protocol,
            connections: Connections::default(),
            heartbeats,
            sender: None,
            leaving: Vec::new(),
            block_hasher: Some(block_hasher),
            verifying: VerifyWatch::default(),
            meter: Meter::default(),
            pool,
            in_flight: None,
            announcer,
            replies: Replies::default(),
            snapshots: Snapshots::default(),
            end: None,
        };
        let mut node = engine::run(node, inbox)?;
        match node.end.take() {
            Some(end) => node.finish(end),
            None => Err(NodeError::Gone),
        }
    }

    /// Ends in order: the last messages leave, what the guest wrote is where it belongs, and the
    /// disks' stamps say so.
    fn finish(mut self, end: End) -> Result<End, NodeError> {
        let leave_max = self.protocol.goodbye_timeout();
        for sender in self.sender.take().into_iter().chain(self.leaving.drain(..)) {
            if !sender.finish_within(leave_max) {
                tracing::warn!("the peer took nothing for the heartbeat timeout; it was not told why this node ends");
            }
        }
        let Some(Ok(mut machine)) = self.machine.take().map(MachineThread::finish) else {
            return Err(NodeError::GuestFailed("the thread of its machine ended by itself".into()));
        };
        let stopped = machine.pause_within(self.context.config.stall_max);
        if let Err(error) = &stopped {
            tracing::warn!(%error, "the guest's vCPUs or devices did not stop; its last writes may be lost");
        }
        let drained = self.protocol.drain_timeout(&end).is_none_or(|timeout| self.drain_shared_disks(timeout));
        let writes = LastWrites { guest_stopped: stopped.is_ok(), drained };
        let stamp = self.protocol.last_stamp(&end, writes);
        let snapshot = self.end_snapshot(stamp.with_snapshot);
        if let Some(at) = stamp.at {
            self.disks.stamper().stamp_last(at, snapshot);
        }
        // The machine waits for its disks' threads, and one of these may wait for a flush.
        self.disks.end();
        drop(machine);
        match end {
            End::GuestFailed(why) => Err(NodeError::GuestFailed(why)),
            end => Ok(end),
        }
    }

    /// Waits until shared storage has what is held. False if that is lost.
    fn drain_shared_disks(&self, timeout: Duration) -> bool {
        let Some(shared) = self.disks.shared() else { return true };
        let drained = shared.drain(timeout);
        if !drained {
            let bytes = shared.used_bytes();
            tracing::error!(
                bytes,
                "shared storage did not take the guest's last writes; they are lost as in a loss of power"
            );
        }
        drained
    }

    /// A connection whose watch finds it stuck has failed.
    fn watch_links(&mut self) {
        let sender = self.sender.as_ref();
        let probe = |conn| sender.filter(|sender| sender.conn() == conn).into_iter().for_each(Sender::probe);
        if let Some((conn, LinkNews::Stuck(why))) = self.connections.news(clock::now(), probe) {
            self.context.link_failed(conn, why);
        }
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
                self.heartbeats.close(conn);
                self.connections.remove(conn);
                Some(Input::Closed { conn, why })
            }
            NodeEvent::Pushed { conn, bytes } => {
                self.context.status.add_wire_bytes(bytes);
                self.sender_is(conn).then_some(Input::Pushed)
            }
            NodeEvent::PeerHashes { conn, first, hashes } => Some(Input::PeerHashes { conn, first, hashes }),
            NodeEvent::OwnHashes { ticket, hashes } => Some(Input::OwnHashes { ticket, hashes }),
            NodeEvent::Holes { ticket, through, holes } => Some(Input::Holes { ticket, through, holes }),
            NodeEvent::OutputWaiting => {
                Some(Input::OutputWaiting { open_packets: self.buffers.output().open_packets() })
            }
            NodeEvent::OutputFull => Some(Input::OutputFull),
            NodeEvent::JournalFull => Some(Input::JournalFull),
            NodeEvent::Written { through } => Some(Input::Written { through }),
            NodeEvent::StorageSynced { conn } => Some(Input::StorageSynced { conn }),
            NodeEvent::StorageFault(why) => {
                self.context.status.storage_noticed(why);
                None
            }
            NodeEvent::DisksHaveRoom => {
                self.kick_disks();
                None
            }
            NodeEvent::Answer { ticket, answer } => Some(Input::Answer { ticket, answer }),
            NodeEvent::Machine(event) => {
                tracing::info!("the guest {event}");
                Some(Input::Guest(event))
            }
            NodeEvent::MachineLost(why) => return Err(NodeError::GuestFailed(why)),
            NodeEvent::Tracking { conn, result } => Some(Input::Tracking { conn, result }),
            NodeEvent::Captured(captured) => Some(self.captured(*captured)),
            NodeEvent::CaptureFailed { id, why } => {
                tracing::warn!(%id, "an epoch was not captured: {why}");
                Some(Input::CaptureFailed { id, why })
            }
            NodeEvent::RunDone { run, result } => {
                if result.is_ok() {
                    self.running = run;
                }
                Some(Input::RunDone { run, result })
            }
            NodeEvent::StateSaved(saved) => self.state_saved(saved),
            NodeEvent::Command { command, reply } => {
                Some(Input::Command { ticket: self.replies.ticket(reply), command })
            }
            NodeEvent::Snapshot { request, reply } => self.snapshot_asked(request, reply),
            NodeEvent::SnapshotWritten(result) => self.snapshot_written(result),
            // What a secondary hears of; a late one may still be in the inbox after a takeover.
            NodeEvent::Connected { .. }
            | NodeEvent::Foreign { .. }
            | NodeEvent::ImageFailed { .. }
            | NodeEvent::BlocksHashed { .. }
            | NodeEvent::BuildProgress { .. }
            | NodeEvent::Built { .. }
            | NodeEvent::KeptWritten { .. }
            | NodeEvent::Restored(_)
            | NodeEvent::Staged { .. }
            | NodeEvent::Background { .. } => None,
        })
    }

    /// Tells the network where the guest is, in a new series.
    fn announce(&mut self, series: AnnounceSeries) {
        self.announcer = Announcer::new(self.protocol.mac(), self.context.guest_ip, series, clock::now());
        self.announcer.frames().iter().for_each(|frame| self.buffers.output().send(frame));
    }

    fn sender_is(&self, conn: ConnId) -> bool {
        self.sender.as_ref().is_some_and(|sender| sender.conn() == conn)
    }

    fn captured(&mut self, captured: Captured) -> Input {
        let Captured { id, started_us, pause_us, dirty_pages, travelled } = captured;
        self.in_flight = Some(InFlight { started_us, pause_us, dirty_pages });
        if let Some((pages, blocks)) = travelled {
            self.protocol.note_dirty_pages(&pages);
            self.protocol.note_blocks(blocks.into_iter());
        }
        Input::Captured { id }
    }
}

impl Engine for PrimaryNode {
    fn step(&mut self, queues: &Queues) -> Result<Step, NodeError> {
        self.act()?;
        self.disks.runs_in(self.protocol.generation());
        self.publish();
        if self.end.is_some() {
            return Ok(Step::Ended);
        }
        if self.announcer.take_due(clock::now()) {
            self.announcer.frames().iter().for_each(|frame| self.buffers.output().send(frame));
        }
        let until = self.protocol.poll_timeout().into_iter().chain(self.announcer.due()).min();
        self.watch_links();
        let input = match queues.next(until) {
            Some(Next::Event(event)) => self.translate(event)?,
            Some(Next::Due) => Some(Input::Tick),
            Some(Next::Gone) => return Err(NodeError::Gone),
            None => return Ok(Step::Idle(until)),
        };
        if let Some(input) = input {
            self.protocol.handle(clock::now(), input);
        }
        Ok(Step::Busy)
    }
}

impl Drop for PrimaryNode {
    fn drop(&mut self) {
        // The machine waits for its disks' threads, and one of these may wait for a flush.
        self.disks.end();
        drop(self.machine.take().map(MachineThread::finish));
    }
}
