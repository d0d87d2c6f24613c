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
use super::engine::{self, Engine, Step};
use super::error::NodeError;
use super::events::{NodeEvent, Replies};
use super::heartbeats::HeartbeatThread;
use super::inbox::{Inbox, Next, Queues};
use super::meter::Meter;
use super::{clock, connector, priority};
use crate::checkpoint::apply::Applier;
use crate::checkpoint::output::OutputGate;
use crate::checkpoint::stage::{StagedEpoch, StagingBudget};
use crate::checkpoint::stamp::StampState;
use crate::control::status::TakeoverReport;
use crate::machine::Machine;
use crate::protocol::command::CommandRefused;
use crate::protocol::messages::{Channel, Heartbeat, Message, Welcome};
use crate::protocol::primary::Primary;
use crate::protocol::record::Record;
use crate::protocol::secondary::{Action, Ending, Input, Secondary};
use crate::protocol::types::ConnId;
use crate::protocol::types::StorageFault;
use crate::protocol::types::{EpochId, Instant};

/// How a secondary's life ended.
pub(super) enum SecondaryEnd {
    /// It runs the guest now: restored, still paused.
    Promoted(Box<Promoted>, Box<Primary>),
    /// It has to begin anew, as a newcomer, after this long.
    Rejoin(Duration),
    /// The process ends.
    Over {
        /// Why.
        ending: Ending,
        /// The epoch at which its image is whole, if it is.
        stamp: Option<EpochId>,
    },
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

/// The driver, for one instance id.
pub(super) struct SecondaryNode {
    context: Arc<Context>,
    start: SecondaryStart,
    protocol: Secondary,
    connections: Connections,
    budget: Arc<StagingBudget>,
    heartbeats: HeartbeatThread,
    build_slot: Arc<BuildSlot>,
    image: Option<Image>,
    staged: Option<Box<StagedEpoch>>,
    /// Pages behind the epochs, until the protocol takes them.
    background: Option<Vec<u8>>,
    meter: Meter,
    replies: Replies,
    end: Option<SecondaryEnd>,
}

impl SecondaryNode {
    /// A newcomer under a new instance id.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub(super) fn new(
        context: &Arc<Context>,
        start: &SecondaryStart,
        protocol: Secondary,
    ) -> Result<SecondaryNode, NodeError> {
        Ok(SecondaryNode {
            context: Arc::clone(context),
            start: start.clone(),
            protocol,
            connections: Connections::default(),
            budget: context.config.staging_bytes_max.map_or_else(StagingBudget::following, StagingBudget::new),
            heartbeats: HeartbeatThread::start(context.events.clone())?,
            build_slot: Arc::default(),
            image: None,
            staged: None,
            background: None,
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
    pub(super) fn run(self, inbox: &Inbox) -> Result<(SecondaryEnd, ConnId), NodeError> {
        clock::sharpen_timers();
        priority::raise();
        let mut node = engine::run(self, inbox)?;
        let end = node.end.take().ok_or(NodeError::Gone)?;
        node.connections.close_all();
        node.budget.close();
        if let SecondaryEnd::Over { stamp: Some(at), .. } = end {
            node.stamp_whole(at)?;
        }
        Ok((end, node.protocol.last_conn()))
    }

    /// Ends in order: the disks are brought to this epoch, and their stamps say so.
    fn stamp_whole(&mut self, at: EpochId) -> Result<(), NodeError> {
        if let Some(image) = &self.image {
            image.applier.finish(at)?;
            image.disks.stamper().stamp(at, StampState::Whole);
        }
        Ok(())
    }

    fn link_news(&mut self) -> Option<Input> {
        Some(match self.connections.news(clock::now(), |_| {})? {
            (conn, LinkNews::Stuck(why)) => {
                self.context.link_failed(conn, why);
                return None;
            }
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
                let (id, completes_resync) = (epoch.id, epoch.completes_resync);
                self.staged = Some(epoch);
                Some(Input::Staged { conn, id, completes_resync, staged_bytes: self.budget.used(), began })
            }
            NodeEvent::Background { conn, payload } => {
                self.background = Some(payload);
                Some(Input::Pages { conn })
            }
            NodeEvent::BuildProgress { instance, done_bytes } if instance == self.protocol.me() => {
                Some(Input::BuildProgress { done_bytes })
            }
            NodeEvent::Built { instance, result } if instance == self.protocol.me() => Some(self.built(result)),
            NodeEvent::KeptWritten { instance, result } if instance == self.protocol.me() => Some(match result {
                Ok(()) => Input::KeptWritten,
                Err(why) => Input::StorageRefused(StorageFault::Failing(why)),
            }),
            NodeEvent::Restored(Ok(promoted)) => {
                self.end = Some(self.lead(promoted));
                None
            }
            NodeEvent::Restored(Err(error)) => Some(Input::RestoreFailed { why: error.to_string() }),
            NodeEvent::ImageFailed { instance, why } if instance == self.protocol.me() => {
                Some(Input::ImageFailed { why })
            }
            NodeEvent::BlocksHashed { instance, first, hashes } if instance == self.protocol.me() => {
                Some(Input::BlocksHashed { first, hashes })
            }
            NodeEvent::Answer { ticket, answer } => Some(Input::Answer { ticket, answer }),
            NodeEvent::Accepted { conn, writer, closer, .. } => {
                self.connections.insert(conn, writer, closer);
                Some(Input::Hello { conn })
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
                    let failed = self.connections.send(conn, &message);
                    failed.into_iter().for_each(|why| self.context.link_failed(conn, why));
                }
                Action::Close { conn } => {
                    self.heartbeats.close(conn);
                    self.connections.close(conn);
                }
                Action::Heartbeat { conn, beat, until } => self.feed_heartbeats(conn, beat, until),
                Action::Answer { ticket, result } => self.replies.answer(ticket, result),
                Action::BuildMachine(welcome) => self.begin_build(welcome)?,
                Action::Commit { id } => self.commit(id)?,
                Action::TakePages => self.take_pages(),
                Action::HashBlocks { run } => {
                    self.image.iter().for_each(|image| image.applier.hash_blocks(run.clone()))
                }
                Action::SendHashes { conn, first, hashes } => {
                    let failed = self.connections.send_hashes(conn, first, &hashes);
                    failed.into_iter().for_each(|why| self.context.link_failed(conn, why));
                }
                Action::Forget { through } => {
                    self.image.iter().for_each(|image| image.applier.forget(through));
                }
                Action::TakeStorage => self.take_storage(),
                Action::WriteKept => self.begin_write_kept(),
                Action::Ask(call) => self.context.arbiter.ask(call),
                Action::Promote { record, epoch, began, stages, cause } => {
                    self.begin_restore(restore::Takeover { record, epoch, began, cause, stages })?;
                }
                Action::Rejoin { after } => self.end = Some(SecondaryEnd::Rejoin(after)),
                Action::Exit { ending, stamp } => self.end = Some(SecondaryEnd::Over { ending, stamp }),
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
        build::begin(&self.context, self.protocol.me(), welcome, Arc::clone(&self.budget), slot)
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

    fn take_pages(&mut self) {
        if let (Some(image), Some(payload)) = (&self.image, self.background.take()) {
            image.applier.background(payload);
        }
    }

    fn begin_restore(&mut self, takeover: restore::Takeover) -> Result<(), NodeError> {
        let image = self.image.take().ok_or(NodeError::GuestFailed("there is no image to take over with".into()))?;
        restore::begin(&self.context, image, takeover)
    }

    /// The guest is restored: this node is a primary.
    fn lead(&self, promoted: Box<Promoted>) -> SecondaryEnd {
        let config = self.context.primary_config(promoted.welcome.shape.clone(), promoted.machine.tsc_khz());
        let primary = self.protocol.lead(config, promoted.record, clock::now());
        SecondaryEnd::Promoted(promoted, Box::new(primary))
    }
}

impl Engine for SecondaryNode {
    fn step(&mut self, queues: &Queues) -> Result<Step, NodeError> {
        self.act()?;
        let resync = self.meter.look(clock::monotonic_us(), self.protocol.resync());
        self.context.status.secondary(&self.protocol, resync);
        if self.end.is_some() {
            return Ok(Step::Ended);
        }
        let until = self.protocol.poll_timeout();
        let input = match self.link_news() {
            Some(news) => Some(news),
            None => match queues.next(until) {
                Some(Next::Event(event)) => self.translate(event)?,
                // What arrived while nobody looked counts before the time does.
                Some(Next::Due) => Some(self.link_news().unwrap_or(Input::Tick)),
                Some(Next::Gone) => return Err(NodeError::Gone),
                None => return Ok(Step::Idle(until)),
            },
        };
        if let Some(input) = input {
            self.protocol.handle(clock::now(), input);
        }
        Ok(Step::Busy)
    }
}

impl Drop for SecondaryNode {
    fn drop(&mut self) {
        self.build_slot.close();
    }
}
