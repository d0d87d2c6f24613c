//! The engine of the node that holds the guest's image. It holds no rule, and waits for nothing but
//! its inbox: a machine is built and restored by threads of their own, the applier writes the
//! image, and heartbeats have a thread too.

mod build;
mod restore;

use std::sync::Arc;
use std::time::Duration;

use self::build::BuildSlot;
use super::config::SecondaryStart;
use super::connections::{Connections, LinkNews};
use super::context::Context;
use super::disks::NodeDisks;
use super::error::NodeError;
use super::events::{NodeEvent, Replies};
use super::heartbeats::HeartbeatThread;
use super::inbox::Next;
use super::meter::Meter;
use super::{clock, connector, priority};
use crate::checkpoint::apply::Applier;
use crate::checkpoint::output::OutputGate;
use crate::checkpoint::stage::{StagedEpoch, StagingBudget};
use crate::checkpoint::stamp::StampState;
use crate::control::status::TakeoverReport;
use crate::machine::Machine;
use crate::protocol::command::CommandRefused;
use crate::protocol::messages::{Channel, Heartbeat, Message, RefuseReason, Welcome};
use crate::protocol::peer_loss::PeerFault;
use crate::protocol::record::Record;
use crate::protocol::secondary::{Action, Ending, Input, Secondary};
use crate::protocol::types::ConnId;
use crate::protocol::types::StorageFault;
use crate::protocol::types::{EpochId, Instant};

/// How a secondary's life ended.
pub(super) enum SecondaryEnd {
    /// It runs the guest now: restored, still paused.
    Promoted(Box<Promoted>),
    /// It has to begin anew, as a newcomer, after this long.
    Rejoin(Duration),
    /// The process ends.
    Over(Ending),
}

/// What a takeover hands to the primary's driver.
pub(super) struct Promoted {
    /// The restored machine.
    pub machine: Machine,
    /// Its way out, still closed.
    pub gate: Arc<OutputGate>,
    /// Its disks, still closed.
    pub disks: NodeDisks,
    /// The record that won.
    pub record: Record,
    /// The primary's word about the guest (its shape above all).
    pub welcome: Welcome,
    /// What the takeover took so far.
    pub report: TakeoverReport,
}

/// The image in the making.
pub(super) struct Image {
    machine: Machine,
    gate: Arc<OutputGate>,
    disks: NodeDisks,
    welcome: Welcome,
    applier: Applier,
    /// For each disk whether its image was made just now.
    made: Vec<bool>,
}

/// When the stages of a takeover were reached, on the monotonic clock.
#[derive(Default)]
struct Stages {
    heard_us: u64,
    suspected_us: u64,
    decided_us: u64,
}

/// The driver, for one instance id.
pub(super) struct SecondaryNode<'a> {
    context: &'a Context,
    start: &'a SecondaryStart,
    protocol: Secondary,
    connections: Connections,
    budget: Arc<StagingBudget>,
    heartbeats: HeartbeatThread,
    build_slot: Arc<BuildSlot>,
    image: Option<Image>,
    staged: Option<Box<StagedEpoch>>,
    stages: Stages,
    meter: Meter,
    replies: Replies,
    end: Option<SecondaryEnd>,
}

impl<'a> SecondaryNode<'a> {
    /// A newcomer under a new instance id.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub(super) fn new(
        context: &'a Context,
        start: &'a SecondaryStart,
        protocol: Secondary,
    ) -> Result<SecondaryNode<'a>, NodeError> {
        Ok(SecondaryNode {
            context,
            start,
            protocol,
            connections: Connections::default(),
            budget: context.config.staging_bytes_max.map_or_else(StagingBudget::following, StagingBudget::new),
            heartbeats: HeartbeatThread::start(context.events.clone())?,
            build_slot: Arc::default(),
            image: None,
            staged: None,
            stages: Stages::default(),
            meter: Meter::default(),
            replies: Replies::default(),
            end: None,
        })
    }

    /// Drives the secondary until its life as this instance ends; also the newest connection number
    /// it used.
    ///
    /// # Errors
    /// What this node cannot go on after.
    pub(super) fn run(mut self) -> Result<(SecondaryEnd, ConnId), NodeError> {
        clock::sharpen_timers();
        priority::raise();
        loop {
            self.act()?;
            let resync = self.meter.look(clock::monotonic_us(), self.protocol.resync());
            self.context.status.secondary(&self.protocol, resync);
            if let Some(end) = self.end.take() {
                self.connections.close_all();
                self.budget.close();
                if matches!(end, SecondaryEnd::Over(_)) {
                    self.put_away()?;
                }
                return Ok((end, self.protocol.last_conn()));
            }
            if let Some(input) = self.next_input()? {
                self.protocol.handle(clock::now(), input);
            }
        }
    }

    /// Ends in order: the disks are at the newest committed epoch, and their stamps say so.
    fn put_away(&mut self) -> Result<(), NodeError> {
        let (Some(image), Some(committed)) = (&self.image, self.protocol.committed()) else { return Ok(()) };
        if self.protocol.has_whole_image() {
            image.applier.finish(committed)?;
            image.disks.stamper().stamp(committed, StampState::Whole);
        }
        Ok(())
    }

    fn next_input(&mut self) -> Result<Option<Input>, NodeError> {
        if let Some(news) = self.link_news() {
            return Ok(Some(news));
        }
        match self.context.inbox.next(self.protocol.poll_timeout()) {
            Next::Event(event) => self.translate(event),
            // What arrived while we waited counts before the time does.
            Next::Due => Ok(Some(self.link_news().unwrap_or(Input::Tick))),
            Next::Gone => Err(NodeError::Gone),
        }
    }

    fn link_news(&mut self) -> Option<Input> {
        Some(match self.connections.news(clock::now(), |_| {})? {
            (conn, LinkNews::Stuck(why)) => Input::Closed { conn, why },
            (conn, LinkNews::Received(ago)) => Input::Moved { conn, ago },
        })
    }

    fn translate(&mut self, event: NodeEvent) -> Result<Option<Input>, NodeError> {
        Ok(match event {
            NodeEvent::Connected { conn, writer, closer } => {
                self.connections.insert(conn, writer, closer);
                Some(Input::Connected { conn })
            }
            NodeEvent::Message { conn, message } => {
                self.stages.heard_us = clock::monotonic_us();
                if let Message::Welcome(welcome) = &message
                    && self.protocol.is_data(conn)
                {
                    self.connections.watch(conn, Duration::from_micros(welcome.heartbeat_timeout_us));
                }
                Some(Input::Message { conn, message })
            }
            NodeEvent::Closed { conn, why } => {
                self.heartbeats.close(conn);
                self.connections.remove(conn);
                Some(Input::Closed { conn, why })
            }
            NodeEvent::Foreign { conn, why } => {
                self.connections.remove(conn);
                Some(Input::Foreign { conn, why })
            }
            NodeEvent::Staged { conn, epoch, began } => {
                self.stages.heard_us = clock::monotonic_us();
                let (id, completes_resync) = (epoch.id, epoch.completes_resync);
                self.staged = Some(epoch);
                Some(Input::Staged { conn, id, completes_resync, staged_bytes: self.budget.used(), began })
            }
            NodeEvent::Background { conn, payload } => match &self.image {
                Some(image) if self.protocol.takes_pages(conn) => {
                    image.applier.background(payload);
                    None
                }
                // Late ones of a connection given up must not spoil the image of the next, and the
                // others have no place to go.
                _ => Some(Input::Closed { conn, why: PeerFault::PagesOutOfTurn.to_string() }),
            },
            NodeEvent::BuildProgress { instance, done_bytes } if instance == self.protocol.me() => {
                Some(Input::BuildProgress { done_bytes })
            }
            NodeEvent::Built { instance, result } if instance == self.protocol.me() => Some(self.built(result)),
            NodeEvent::KeptWritten { instance, result } if instance == self.protocol.me() => Some(match result {
                Ok(()) => Input::KeptWritten,
                Err(why) => Input::StorageRefused(StorageFault::Failing(why)),
            }),
            NodeEvent::Restored(restored) => {
                if self.protocol.quit_in_takeover() {
                    self.context.events.quit();
                }
                self.end = Some(SecondaryEnd::Promoted(restored.map_err(|error| *error)?));
                None
            }
            NodeEvent::ImageFailed { instance, why } if instance == self.protocol.me() => {
                return Err(NodeError::ImageFailed(why));
            }
            NodeEvent::BlocksHashed { instance, first, hashes } if instance == self.protocol.me() => {
                Some(Input::BlocksHashed { first, hashes })
            }
            NodeEvent::Answer { ticket, answer } => {
                self.stages.decided_us = clock::monotonic_us();
                Some(Input::Answer { ticket, answer })
            }
            NodeEvent::Accepted { mut writer, closer, .. } => {
                let detail = "this node is a secondary: it does not run the guest; name the primary with --peer".into();
                // Whether the unknown peer hears it is the unknown peer's business.
                let _ = writer.write_message(&Message::Refuse { reason: RefuseReason::NotPrimary, detail });
                closer.shutdown();
                None
            }
            NodeEvent::Command { command, reply } => {
                Some(Input::Command { ticket: self.replies.ticket(reply), command })
            }
            NodeEvent::Snapshot { reply, .. } => {
                // The client may have given up waiting.
                let _ = reply.send(Err(CommandRefused::Secondary.to_string()));
                None
            }
            // What a primary hears of, and of an image that is gone already.
            NodeEvent::Machine(_)
            | NodeEvent::MachineLost(_)
            | NodeEvent::Tracking { .. }
            | NodeEvent::Captured(_)
            | NodeEvent::CaptureFailed { .. }
            | NodeEvent::RunDone { .. }
            | NodeEvent::StateSaved(_)
            | NodeEvent::BuildProgress { .. }
            | NodeEvent::Built { .. }
            | NodeEvent::KeptWritten { .. }
            | NodeEvent::OutputWaiting
            | NodeEvent::OutputFull
            | NodeEvent::JournalFull
            | NodeEvent::Written { .. }
            | NodeEvent::StorageSynced { .. }
            | NodeEvent::StorageFault(_)
            | NodeEvent::DisksHaveRoom
            | NodeEvent::SnapshotWritten(_)
            | NodeEvent::ImageFailed { .. }
            | NodeEvent::BlocksHashed { .. }
            | NodeEvent::PeerHashes { .. }
            | NodeEvent::OwnHashes { .. }
            | NodeEvent::Holes { .. }
            | NodeEvent::Pushed { .. } => None,
        })
    }

    fn act(&mut self) -> Result<(), NodeError> {
        while let Some(action) = self.protocol.poll_action() {
            match action {
                Action::Connect { conn, channel } => self.connect(conn, channel)?,
                Action::Send { conn, message } => {
                    if let Some(why) = self.connections.send(conn, &message) {
                        self.protocol.handle(clock::now(), Input::Closed { conn, why });
                    }
                }
                Action::Close { conn } => {
                    self.stages.suspected_us = clock::monotonic_us();
                    self.heartbeats.close(conn);
                    self.connections.close(conn);
                }
                Action::Heartbeat { conn, beat, until } => self.feed_heartbeats(conn, beat, until),
                Action::Answer { ticket, result } => self.replies.answer(ticket, result),
                Action::BuildMachine(welcome) => self.begin_build(welcome)?,
                Action::Commit { id } => self.commit(id)?,
                Action::HashBlocks { run } => {
                    self.image.iter().for_each(|image| image.applier.hash_blocks(run.clone()))
                }
                Action::SendHashes { conn, first, hashes } => {
                    if let Some(why) = self.connections.send_hashes(conn, first, &hashes) {
                        self.protocol.handle(clock::now(), Input::Closed { conn, why });
                    }
                }
                Action::Forget { through } => {
                    self.image.iter().for_each(|image| image.applier.forget(through));
                }
                Action::TakeStorage => self.take_storage(),
                Action::WriteKept => self.begin_write_kept(),
                Action::Ask(call) => self.context.arbiter.ask(call),
                Action::Promote { record, epoch, began, cause } => self.begin_restore(record, epoch, began, cause)?,
                Action::Rejoin { after } => self.end = Some(SecondaryEnd::Rejoin(after)),
                Action::Exit(ending) => self.end = Some(SecondaryEnd::Over(ending)),
                Action::Tell(event) => self.context.tell(&event),
            }
        }
        Ok(())
    }

    fn connect(&self, conn: ConnId, channel: Channel) -> Result<(), NodeError> {
        let address = match channel {
            Channel::Data => self.start.peer,
            Channel::Heartbeat => self.start.peer_heartbeat,
        };
        connector::connect(conn, (address, channel), self.budget.clone(), self.context.events.clone())?;
        Ok(())
    }

    fn feed_heartbeats(&mut self, conn: ConnId, beat: Heartbeat, until: Instant) {
        if self.heartbeats.conn() == Some(conn) {
            self.heartbeats.feed(beat, until);
        } else if let (Some((writer, _)), Some(interval)) = (self.connections.take(conn), self.beat_interval()) {
            self.heartbeats.open(conn, writer, interval, beat, until);
        }
    }

    fn beat_interval(&self) -> Option<Duration> {
        self.protocol.welcome().map(|welcome| Duration::from_micros(welcome.heartbeat_interval_us))
    }

    fn begin_build(&self, welcome: Welcome) -> Result<(), NodeError> {
        let slot = Arc::clone(&self.build_slot);
        build::begin(self.context, self.protocol.me(), welcome, Arc::clone(&self.budget), slot)
    }

    fn built(&mut self, result: Result<(), String>) -> Input {
        match result.map(|()| self.build_slot.take()) {
            Ok(Some(image)) => {
                let made = image.made.clone();
                self.image = Some(*image);
                Input::MachineReady { made }
            }
            Ok(None) => Input::MachineFailed { why: "its machine was built and is not there".into() },
            Err(why) => Input::MachineFailed { why },
        }
    }

    /// Keeps a committed epoch. Its ack follows this action, so an epoch that is not there must end
    /// the node instead.
    fn commit(&mut self, id: EpochId) -> Result<(), NodeError> {
        match (&mut self.image, self.staged.take_if(|epoch| epoch.id == id)) {
            (Some(image), Some(epoch)) => {
                image.applier.epoch(epoch);
                Ok(())
            }
            _ => Err(NodeError::NotStaged(id)),
        }
    }

    fn take_storage(&mut self) {
        let taken = self.image.as_ref().map_or(Ok(()), |image| image.disks.take_shared());
        self.protocol.handle(clock::now(), taken.map_or_else(Input::StorageRefused, |()| Input::StorageLocked));
    }

    fn begin_write_kept(&mut self) {
        let Some(image) = &self.image else { return self.protocol.handle(clock::now(), Input::KeptWritten) };
        let (instance, events) = (self.protocol.me(), self.context.events.clone());
        image.applier.write_kept(move |written| {
            let result = written.map_err(|error| error.to_string());
            // A node that is ending needs no more events.
            let _ = events.report(NodeEvent::KeptWritten { instance, result });
        });
    }

    fn begin_restore(
        &mut self,
        record: Record,
        epoch: EpochId,
        began: Instant,
        cause: String,
    ) -> Result<(), NodeError> {
        let image = self.image.take().ok_or(NodeError::GuestFailed("there is no image to take over with".into()))?;
        let stages = std::mem::take(&mut self.stages);
        restore::begin(self.context, image, restore::Takeover { record, epoch, began, cause, stages })
    }
}

impl Drop for SecondaryNode<'_> {
    fn drop(&mut self) {
        self.build_slot.close();
    }
}
