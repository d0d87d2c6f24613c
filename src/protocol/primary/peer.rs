//! Who the primary's peer is: hellos, its two connections, and whether it is alive.

use std::hash::{Hash, Hasher};
use std::time::Duration;

use super::types::Action;
use super::{Phase, Primary};
use crate::protocol::event::Event;
use crate::protocol::failure_detector::{FailureDetector, HeartbeatConfig, HeartbeatTimer, Slept};
use crate::protocol::messages::{Activity, Channel, Hello, Message, PROTOCOL_VERSION, RefuseReason, Welcome};
use crate::protocol::mutant;
use crate::protocol::peer_loss::{PeerFault, PeerLoss};
use crate::protocol::types::{ConnId, InstanceId, Instant};

const BUSY: &str = "this primary has a secondary, or is deciding about one; try again later";

/// Most newcomers that said hello and have not opened their heartbeat connection yet.
pub(super) const CANDIDATES_MAX: usize = 8;

/// A newcomer that said hello on its data connection. It becomes the peer with its heartbeat
/// connection; until then it holds nothing up, whoever it is.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub instance: InstanceId,
    pub data: ConnId,
    features: u64,
    scales_tsc: bool,
    join_by: Instant,
}

impl Candidate {
    /// Tells a checker the state.
    pub(super) fn digest<H: Hasher>(&self, now: Instant, into: &mut H) {
        let Candidate { instance, data, features, scales_tsc: _, join_by } = self;
        (instance, data, features, join_by.since(now)).hash(into);
    }
}

/// The secondary, or the newcomer that becomes it.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub instance: InstanceId,
    pub data: ConnId,
    pub heartbeat: ConnId,
    /// What both sides can do.
    pub features: u64,
    /// Its host runs the guest's TSC at another speed than its own.
    pub scales_tsc: bool,
    timer: HeartbeatTimer,
    detector: FailureDetector,
    /// What it said last of its machine in the making, and when that last went up.
    done_bytes: u64,
    progress_at: Instant,
}

impl Peer {
    fn new(candidate: &Candidate, heartbeat: ConnId, config: HeartbeatConfig, now: Instant) -> Peer {
        Peer {
            instance: candidate.instance,
            data: candidate.data,
            heartbeat,
            features: candidate.features,
            scales_tsc: candidate.scales_tsc,
            timer: HeartbeatTimer::new(config.interval, now),
            detector: FailureDetector::new(config.timeout, now),
            done_bytes: 0,
            progress_at: now,
        }
    }

    pub(super) fn channel_of(&self, conn: ConnId) -> Option<Channel> {
        match conn {
            _ if conn == self.data => Some(Channel::Data),
            _ if conn == self.heartbeat => Some(Channel::Heartbeat),
            _ => None,
        }
    }

    /// This node was asleep for so long: what it did not hear meanwhile proves nothing.
    pub(super) fn slept(&mut self, now: Instant, slept: Slept) {
        self.detector.slept(now, slept);
        self.progress_at = self.progress_at + slept.unheard;
    }

    /// True if the heartbeat thread is to be fed now.
    pub(super) fn is_beat_due(&mut self, now: Instant) -> bool {
        self.timer.is_due(now)
    }

    /// Why the peer is suspect, if it is.
    pub(super) fn suspicion(&self, now: Instant, building_since_max: Option<Duration>) -> Option<PeerLoss> {
        if let Some(silence) = self.detector.suspects(now) {
            return Some(PeerLoss::Silent { silence });
        }
        let silence = now.since(self.progress_at);
        building_since_max.filter(|max| silence >= *max).map(|_| PeerLoss::NoProgress { silence })
    }

    /// Tells a checker the state (see [`Primary::digest`](super::Primary::digest)).
    pub(super) fn digest<H: Hasher>(&self, now: Instant, into: &mut H) {
        let Peer { instance, data, heartbeat, features, scales_tsc: _, timer, detector, done_bytes, progress_at } =
            self;
        (instance, data, heartbeat, features, done_bytes, progress_at.since(now)).hash(into);
        timer.digest(now, into);
        detector.digest(now, into);
    }

    /// When the peer next needs attention.
    pub(super) fn due(&self, building_since_max: Option<Duration>) -> Instant {
        let due = self.timer.due().min(self.detector.deadline());
        building_since_max.map_or(due, |max| due.min(self.progress_at + max))
    }
}

impl Primary {
    /// The features both this node and its peer have; none without a peer.
    pub fn peer_features(&self) -> u64 {
        self.peer.as_ref().map_or(0, |peer| peer.features)
    }

    /// How long the newcomer may make no progress, while it builds its machine.
    pub(super) fn build_silence_max(&self) -> Option<Duration> {
        let joins = self.phase == Phase::Joining && !mutant::is("joining-held-for-ever");
        joins.then_some(self.config.build_silence_max)
    }

    /// Takes a heartbeat. The newcomer's first one that says it is ready shows that it has a
    /// machine and has heard our welcome on both connections: an epoch that arrived before would
    /// find it unprepared.
    pub(super) fn heartbeat(&mut self, now: Instant, activity: Activity) {
        let Some(peer) = &mut self.peer else { return };
        peer.detector.heard(now);
        let data = peer.data;
        match activity {
            Activity::Building { done_bytes } => {
                if done_bytes > peer.done_bytes {
                    (peer.done_bytes, peer.progress_at) = (done_bytes, now);
                }
            }
            // What was begun for the newcomer before this one has to end first.
            Activity::Ready | Activity::Capturing if self.phase == Phase::Joining && self.begun.is_none() => {
                self.start_resync(now, data);
            }
            Activity::Ready | Activity::Capturing => {}
        }
    }

    /// Answers a hello on a new connection.
    pub(super) fn hello(&mut self, now: Instant, conn: ConnId, hello: Hello) {
        if let Err((reason, detail)) = self.check_hello(&hello) {
            return self.refuse(conn, reason, detail);
        }
        self.actions.push_back(Action::Send { conn, message: Message::Welcome(self.welcome(&hello)) });
        match hello.channel {
            Channel::Data => self.add_candidate(now, conn, &hello),
            Channel::Heartbeat => self.join_candidate(now, conn, hello.instance),
        }
    }

    fn add_candidate(&mut self, now: Instant, conn: ConnId, hello: &Hello) {
        let again = self.candidates.iter().position(|candidate| candidate.instance == hello.instance);
        let full = self.candidates.len() >= CANDIDATES_MAX && !mutant::is("candidates-without-bound");
        if let Some(old) = again.or(full.then_some(0)) {
            let old = self.candidates.remove(old);
            let detail = "other newcomers said hello and this one did not open its heartbeat connection".into();
            self.refuse(old.data, RefuseReason::Busy, detail);
        }
        self.candidates.push(Candidate {
            instance: hello.instance,
            data: conn,
            features: self.config.features & hello.features,
            scales_tsc: hello.cpu.takes(self.config.cpu) == Ok(true),
            join_by: now + self.config.join_timeout,
        });
    }

    fn join_candidate(&mut self, now: Instant, conn: ConnId, instance: InstanceId) {
        let any = mutant::is("any-heartbeat-connection-joins");
        let its = |candidate: &Candidate| candidate.instance == instance || any;
        let Some(at) = self.candidates.iter().position(its) else { return };
        let candidate = self.candidates.remove(at);
        self.peer = Some(Peer::new(&candidate, conn, self.config.heartbeat, now));
        self.phase = Phase::Joining;
        self.refusals.joined();
        for other in std::mem::take(&mut self.candidates) {
            self.refuse(other.data, RefuseReason::Busy, BUSY.into());
        }
        if mutant::is("resync-before-the-first-heartbeat") {
            self.start_resync(now, candidate.data);
        }
    }

    /// Before it has opened its heartbeat connection a newcomer has nothing to say but goodbye.
    pub(super) fn candidate_said(&mut self, conn: ConnId, message: &Message) {
        self.candidates.retain(|candidate| candidate.data != conn);
        match message {
            Message::Bye { .. } => self.actions.push_back(Action::Close { conn }),
            other => {
                let fault = PeerFault::Misplaced(other.name());
                self.refuse(conn, RefuseReason::Malformed, fault.to_string());
            }
        }
    }

    /// Lets go of newcomers that did not open their heartbeat connection in time.
    pub(super) fn mind_candidates(&mut self, now: Instant) {
        while let Some(late) = self.candidates.iter().position(|candidate| now >= candidate.join_by) {
            let late = self.candidates.remove(late);
            let detail = "it did not open its heartbeat connection in time".into();
            self.refuse(late.data, RefuseReason::Busy, detail);
        }
    }

    /// When the next candidate's time is over.
    pub(super) fn candidates_due(&self) -> Option<Instant> {
        self.candidates.iter().map(|candidate| candidate.join_by).min()
    }

    /// Turns a newcomer away, and says why to it and to people.
    pub(super) fn refuse(&mut self, conn: ConnId, reason: RefuseReason, detail: String) {
        if self.refusals.add(reason, &detail) {
            self.tell(Event::Refused { reason, detail: detail.clone() });
        }
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
                "the newcomer speaks protocol version {}, this primary {PROTOCOL_VERSION}; \
                    run the same mcd on both hosts",
                hello.version
            );
            return no(RefuseReason::Version, detail);
        }
        if hello.guest != config.guest && !mutant::is("another-guests-hello-welcomed") {
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
                "the newcomer stages at most {} MiB, but an epoch of this guest may hold {} MiB; \
                    raise its --staging-max",
                hello.staging_bytes_max >> 20,
                config.shape.epoch_bytes_max().div_ceil(1 << 20)
            );
            return no(RefuseReason::Staging, detail);
        }
        let is_candidate = self.candidates.iter().any(|candidate| candidate.instance == hello.instance);
        match (hello.channel, self.phase) {
            (Channel::Data, Phase::Solo) => Ok(()),
            (Channel::Heartbeat, Phase::Solo) if is_candidate => Ok(()),
            (Channel::Heartbeat, Phase::Solo) if mutant::is("any-heartbeat-connection-joins") => Ok(()),
            (Channel::Data, _) => no(RefuseReason::Busy, BUSY.into()),
            (Channel::Heartbeat, _) => no(
                RefuseReason::Malformed,
                "a heartbeat connection comes second, from the newcomer that said hello".into(),
            ),
        }
    }
}
