//! Who the primary's peer is: hellos, its two connections, and whether it is alive.

use std::hash::{Hash, Hasher};

use super::types::Action;
use super::{Phase, Primary};
use crate::protocol::event::Event;
use crate::protocol::failure_detector::{FailureDetector, HeartbeatConfig, HeartbeatTimer};
use crate::protocol::messages::{Channel, Heartbeat, Hello, Message, PROTOCOL_VERSION, RefuseReason, Welcome};
use crate::protocol::mutant;
use crate::protocol::types::{ConnId, EpochId, Generation, InstanceId, Instant};

/// The secondary, or the newcomer that becomes it.
#[derive(Clone, Debug)]
pub struct Peer {
    pub instance: InstanceId,
    pub data: ConnId,
    pub heartbeat: Option<ConnId>,
    /// What both sides can do.
    pub features: u64,
    /// Its host runs the guest's TSC at another speed than its own.
    pub scales_tsc: bool,
    life: Option<(HeartbeatTimer, FailureDetector)>,
    join_by: Instant,
}

impl Peer {
    fn new(instance: InstanceId, data: ConnId, features: u64, scales_tsc: bool, join_by: Instant) -> Peer {
        Peer { instance, data, heartbeat: None, features, scales_tsc, life: None, join_by }
    }

    fn join(&mut self, conn: ConnId, config: HeartbeatConfig, now: Instant) {
        self.heartbeat = Some(conn);
        self.life = Some((HeartbeatTimer::new(config.interval, now), FailureDetector::new(config.timeout, now)));
    }

    pub fn channel_of(&self, conn: ConnId) -> Option<Channel> {
        if conn == self.data {
            Some(Channel::Data)
        } else {
            (self.heartbeat == Some(conn)).then_some(Channel::Heartbeat)
        }
    }

    pub fn heard(&mut self, now: Instant) {
        if let Some((_, detector)) = &mut self.life {
            detector.heard(now);
        }
    }

    /// We slept ourselves: the silence proves nothing.
    pub fn forgive(&mut self, now: Instant) {
        self.heard(now);
    }

    /// The heartbeat to send now, if one is due.
    pub fn beat(
        &mut self,
        now: Instant,
        me: InstanceId,
        generation: Generation,
        committed: Option<EpochId>,
    ) -> Option<(ConnId, Heartbeat)> {
        let conn = self.heartbeat?;
        let (timer, _) = self.life.as_mut()?;
        let sequence = timer.beat(now)?;
        Some((conn, Heartbeat { instance: me, generation, sequence, committed }))
    }

    /// Why the peer is suspect, if it is.
    pub fn suspicion(&self, now: Instant, phase: Phase) -> Option<String> {
        match &self.life {
            Some((_, detector)) => {
                detector.suspects(now).map(|silence| format!("no heartbeat for {} ms", silence.as_millis()))
            }
            None if phase == Phase::Joining && now >= self.join_by => {
                Some("it did not open its heartbeat connection in time".into())
            }
            None => None,
        }
    }

    /// Tells a checker the state (see [`Primary::digest`](super::Primary::digest)).
    pub fn digest<H: Hasher>(&self, now: Instant, into: &mut H) {
        let Peer { instance, data, heartbeat, features, scales_tsc: _, life, join_by } = self;
        (instance, data, heartbeat, features, life.is_some()).hash(into);
        match life {
            Some((timer, detector)) => {
                timer.digest(now, into);
                detector.digest(now, into);
            }
            None => join_by.since(now).hash(into),
        }
    }

    /// When the peer next needs attention.
    pub fn due(&self, phase: Phase) -> Option<Instant> {
        match &self.life {
            Some((timer, detector)) => Some(timer.due().min(detector.deadline())),
            None => (phase == Phase::Joining).then_some(self.join_by),
        }
    }
}

impl Primary {
    /// Takes a heartbeat. The newcomer's first one says that it has heard our welcome on both
    /// connections: an epoch that arrived before that would find it unprepared.
    pub(super) fn heartbeat(&mut self, now: Instant) {
        let Some(peer) = &mut self.peer else { return };
        peer.heard(now);
        let data = peer.data;
        if self.phase == Phase::Joining {
            self.start_resync(now, data);
        }
    }

    /// Answers a hello on a new connection.
    pub(super) fn hello(&mut self, now: Instant, conn: ConnId, hello: Hello) {
        if let Err((reason, detail)) = self.check_hello(&hello) {
            return self.refuse(conn, reason, detail);
        }
        self.actions.push_back(Action::Send { conn, message: Message::Welcome(self.welcome(&hello)) });
        match (hello.channel, &mut self.peer) {
            (Channel::Data, _) => {
                let features = self.config.features & hello.features;
                let scales_tsc = hello.cpu.takes(self.config.cpu) == Ok(true);
                let join_by = now + self.config.join_timeout;
                self.peer = Some(Peer::new(hello.instance, conn, features, scales_tsc, join_by));
                self.phase = Phase::Joining;
            }
            (Channel::Heartbeat, Some(peer)) => {
                peer.join(conn, self.config.heartbeat, now);
                if mutant::is("resync-before-the-first-heartbeat") {
                    let data = peer.data;
                    self.start_resync(now, data);
                }
            }
            (Channel::Heartbeat, None) => {}
        }
    }

    /// Turns a newcomer away, and says why to it and to people.
    pub(super) fn refuse(&mut self, conn: ConnId, reason: RefuseReason, detail: String) {
        self.tell(Event::Refused { reason, detail: detail.clone() });
        self.actions.push_back(Action::Send { conn, message: Message::Refuse { reason, detail } });
        self.actions.push_back(Action::Close { conn });
    }

    fn welcome(&self, hello: &Hello) -> Welcome {
        let us = |d: std::time::Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        Welcome {
            instance: self.me,
            generation: self.record.generation,
            shape: self.config.shape.clone(),
            tsc_khz: self.config.cpu.tsc_khz,
            features: self.config.features & hello.features,
            interval_us: us(self.config.interval),
            heartbeat_interval_us: us(self.config.heartbeat.interval),
            heartbeat_timeout_us: us(self.config.heartbeat.timeout),
        }
    }

    fn check_hello(&self, hello: &Hello) -> Result<(), (RefuseReason, String)> {
        let config = &self.config;
        let no = |reason, detail: String| Err((reason, detail));
        if hello.version != PROTOCOL_VERSION {
            let detail = format!(
                "the newcomer speaks protocol version {}, this primary {PROTOCOL_VERSION}; run the same mcd on both hosts",
                hello.version
            );
            return no(RefuseReason::Version, detail);
        }
        if hello.guest != config.guest {
            let detail = format!(
                "this primary runs guest '{}', not '{}'; check --guest and --peer of the secondary",
                config.guest, hello.guest
            );
            return no(RefuseReason::Guest, detail);
        }
        if let Err(unfit) = hello.cpu.takes(config.cpu) {
            return no(RefuseReason::Cpu, format!("the newcomer's host {unfit}"));
        }
        if hello.staging_bytes_max < config.shape.epoch_bytes_max() {
            let detail = format!(
                "the newcomer stages at most {} MiB, but an epoch of this guest may hold {} MiB; raise its --staging-max",
                hello.staging_bytes_max >> 20,
                config.shape.epoch_bytes_max().div_ceil(1 << 20)
            );
            return no(RefuseReason::Staging, detail);
        }
        match (hello.channel, &self.peer, self.phase) {
            (Channel::Data, None, Phase::Solo) => Ok(()),
            (Channel::Heartbeat, Some(peer), Phase::Joining)
                if peer.instance == hello.instance && peer.heartbeat.is_none() =>
            {
                Ok(())
            }
            (Channel::Data, ..) => {
                no(RefuseReason::Busy, "this primary has a secondary, or is deciding about one; try again later".into())
            }
            (Channel::Heartbeat, ..) => no(
                RefuseReason::Malformed,
                "a heartbeat connection comes second, from the newcomer that said hello".into(),
            ),
        }
    }
}
