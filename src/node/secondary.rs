//! The driver of the node that holds the guest's image. It holds no rule.

use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::RecvTimeoutError;

use super::acceptor;
use super::config::SecondaryStart;
use super::connections::{Connections, LinkNews};
use super::context::{Context, new_machine, open_gate};
use super::disks::{self, NodeDisks};
use super::error::NodeError;
use super::events::NodeEvent;
use super::meter::Meter;
use super::{clock, priority};
use crate::checkpoint::apply::{Applier, ApplyNews};
use crate::checkpoint::output::OutputGate;
use crate::checkpoint::stage::{StagedEpoch, StagingBudget};
use crate::checkpoint::stamp::StampState;
use crate::control::status::TakeoverReport;
use crate::machine::{Machine, MachineError};
use crate::protocol::guest_clock;
use crate::protocol::messages::{Channel, Message, RefuseReason, Welcome};
use crate::protocol::primary::Command;
use crate::protocol::record::Record;
use crate::protocol::secondary::{Action, Ending, Input, Secondary, SecondaryConfig};
use crate::protocol::types::ConnId;
use crate::protocol::types::StorageFault;
use crate::protocol::types::{EpochId, Instant};

/// How a secondary's life ended.
pub enum SecondaryEnd {
    /// It runs the guest now: restored, still paused.
    Promoted(Box<Promoted>),
    /// It has to begin anew, as a newcomer, after this long.
    Rejoin(Duration),
    /// The process ends.
    Over(Ending),
}

/// What a takeover hands to the primary's driver.
pub struct Promoted {
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
struct Image {
    machine: Machine,
    gate: Arc<OutputGate>,
    disks: NodeDisks,
    welcome: Welcome,
    applier: Applier,
    /// An epoch was committed with which it is whole.
    is_whole: bool,
}

/// When the stages of a takeover were reached, on the monotonic clock.
#[derive(Default)]
struct Stages {
    heard_us: u64,
    suspected_us: u64,
    decided_us: u64,
}

/// The driver, for one instance id.
pub struct SecondaryNode<'a> {
    context: &'a Context,
    start: &'a SecondaryStart,
    protocol: Secondary,
    connections: Connections,
    budget: Arc<StagingBudget>,
    image: Option<Image>,
    staged: Option<Box<StagedEpoch>>,
    stages: Stages,
    meter: Meter,
    end: Option<SecondaryEnd>,
}

impl<'a> SecondaryNode<'a> {
    /// A newcomer under a new instance id.
    pub fn new(
        context: &'a Context,
        start: &'a SecondaryStart,
        config: SecondaryConfig,
        protocol: Secondary,
    ) -> SecondaryNode<'a> {
        SecondaryNode {
            context,
            start,
            protocol,
            connections: Connections::default(),
            budget: StagingBudget::new(config.staging_bytes_max),
            image: None,
            staged: None,
            stages: Stages::default(),
            meter: Meter::default(),
            end: None,
        }
    }

    /// Drives the secondary until its life as this instance ends; also the newest connection number
    /// it used.
    ///
    /// # Errors
    /// What this node cannot go on after.
    pub fn run(mut self) -> Result<(SecondaryEnd, ConnId), NodeError> {
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
        if image.is_whole {
            image.applier.finish(committed)?;
            image.disks.stamper().stamp(committed, StampState::Whole);
        }
        Ok(())
    }

    fn next_input(&mut self) -> Result<Option<Input>, NodeError> {
        if let Some(news) = self.link_news() {
            return Ok(Some(news));
        }
        let event = match self.protocol.poll_timeout() {
            None => self.context.inbox.recv().map_err(|_| NodeError::Gone)?,
            Some(at) => match self.context.inbox.recv_timeout(clock::until(at)) {
                Ok(event) => event,
                // What arrived while we waited counts before the time does.
                Err(RecvTimeoutError::Timeout) => return Ok(Some(self.link_news().unwrap_or(Input::Tick))),
                Err(RecvTimeoutError::Disconnected) => return Err(NodeError::Gone),
            },
        };
        self.translate(event)
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
                _ => Some(Input::Closed { conn, why: "it sent pages out of turn".into() }),
            },
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
            NodeEvent::Command { command: Command::Quit, reply } => {
                answer(reply, Ok(serde_json::json!({})));
                Some(Input::Quit)
            }
            NodeEvent::Command { reply, .. } => {
                answer(reply, Err("this node is a secondary: it does not run the guest; ask the primary".into()));
                None
            }
            NodeEvent::Snapshot { reply, .. } => {
                answer(Some(reply), Err("this node is a secondary: it does not run the guest; ask the primary".into()));
                None
            }
            // What a primary hears of, and of an image that is gone already.
            NodeEvent::Machine(_)
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
                    self.connections.close(conn);
                }
                Action::BuildMachine(welcome) => self.build(welcome),
                Action::Commit { id } => self.commit(id)?,
                Action::Sum { run } => self.image.iter().for_each(|image| image.applier.sum(run.clone())),
                Action::SendHashes { conn, first, hashes } => {
                    if let Some(why) = self.connections.send_hashes(conn, first, &hashes) {
                        self.protocol.handle(clock::now(), Input::Closed { conn, why });
                    }
                }
                Action::Forget { through } => {
                    self.image.iter().for_each(|image| image.applier.forget(through));
                }
                Action::TakeStorage => self.take_storage(),
                Action::WriteKept => self.write_kept(),
                Action::Ask(call) => self.context.arbiter.ask(call),
                Action::Promote { record, epoch, began, cause } => self.promote(record, epoch, began, cause)?,
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
        acceptor::connect(conn, address, self.budget.clone(), self.context.events.clone())?;
        Ok(())
    }

    fn build(&mut self, welcome: Welcome) {
        let input = match self.build_image(welcome) {
            Ok((image, made)) => {
                self.image = Some(image);
                Input::MachineReady { made }
            }
            Err(error) => Input::MachineFailed { why: error.to_string() },
        };
        self.protocol.handle(clock::now(), input);
    }

    /// The image, and for each disk whether this node has just made it.
    fn build_image(&self, welcome: Welcome) -> Result<(Image, Vec<bool>), NodeError> {
        let gate = open_gate(&self.context.config, &self.context.events)?;
        let config = &self.context.config;
        let (images, made) = disks::open_for(config, &welcome.shape)?;
        let disks = NodeDisks::new(config, &welcome.shape, images, &self.context.events)?;
        let mut machine =
            new_machine(&welcome.shape, config.cpu, gate.clone(), &disks, &self.context.console, &self.context.events)?;
        // A host that cannot restore such a machine must say so before anybody counts on it.
        machine.rehearse(welcome.tsc_khz)?;
        // Ahead of time, so that neither applying nor the guest after a takeover waits for the host
        // to find memory.
        machine.memory().prefault(crate::machine::prefault_threads(), |_| {}).map_err(MachineError::from)?;
        disks.begin_filling(welcome.generation)?;
        let image = disks.image(machine.memory().clone());
        let (stamper, instance, events) = (disks.stamper(), self.protocol.me(), self.context.events.clone());
        let tell = move |news| {
            let event = match news {
                ApplyNews::Whole(id) => return stamper.stamp(id, StampState::Applying),
                ApplyNews::BlocksHashed { first, hashes } => NodeEvent::BlocksHashed { instance, first, hashes },
                ApplyNews::Failed(why) => NodeEvent::ImageFailed { instance, why },
            };
            // A node that is ending does not mind.
            let _ = events.send(event);
        };
        let applier = Applier::start(image, self.budget.clone(), tell)?;
        Ok((Image { machine, gate, disks, welcome, applier, is_whole: false }, made))
    }

    /// Keeps a committed epoch. Its ack follows this action, so an epoch that is not there must end
    /// the node instead.
    fn commit(&mut self, id: EpochId) -> Result<(), NodeError> {
        match (&mut self.image, self.staged.take_if(|epoch| epoch.id == id)) {
            (Some(image), Some(epoch)) => {
                image.is_whole |= epoch.completes_resync;
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

    fn write_kept(&mut self) {
        let written = self.image.as_ref().map_or(Ok(()), |image| image.applier.write_kept());
        let input = match written {
            Ok(()) => Input::KeptWritten,
            Err(error) => Input::StorageRefused(StorageFault::Failing(error.to_string())),
        };
        self.protocol.handle(clock::now(), input);
    }

    fn promote(&mut self, record: Record, epoch: EpochId, began: Instant, cause: String) -> Result<(), NodeError> {
        let Some(Image { mut machine, gate, disks, welcome, applier, .. }) = self.image.take() else {
            return Err(NodeError::GuestFailed("there is no image to take over with".into()));
        };
        let state = applier.finish(epoch)?;
        let applied_us = clock::monotonic_us();
        let clocks = guest_clock::step(self.context.config.guest_clock, began, clock::now());
        machine.restore_later(&state, clocks.forward)?;
        gate.drain_input();
        let restored_us = clock::monotonic_us();
        let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1000.0;
        let Stages { heard_us, suspected_us, decided_us } = self.stages;
        let report = TakeoverReport {
            cause,
            detect_ms: ms(heard_us, suspected_us),
            arbitrate_ms: ms(suspected_us, decided_us),
            apply_ms: ms(decided_us, applied_us),
            restore_ms: ms(applied_us, restored_us),
            // Known once the guest runs: until then, when that began.
            resume_ms: 0.0,
            first_packet_ms: None,
            started_monotonic_us: suspected_us,
            first_packet_monotonic_us: None,
            clock_forward_ms: clocks.forward.as_secs_f64() * 1000.0,
            clock_behind_ms: clocks.behind.as_secs_f64() * 1000.0,
        };
        self.end = Some(SecondaryEnd::Promoted(Box::new(Promoted { machine, gate, disks, record, welcome, report })));
        Ok(())
    }
}

fn answer(
    reply: Option<crossbeam::channel::Sender<Result<serde_json::Value, String>>>,
    result: Result<serde_json::Value, String>,
) {
    if let Some(reply) = reply {
        // The client may have given up waiting.
        let _ = reply.send(result);
    }
}
