//! The rules of the node that holds the guest's image.
//!
//! ```text
//!  Connecting ─▶ Greeting ─▶ Joining ─▶ Building ─▶ Syncing ─▶ Standby ─▶ Paired
//!      ▲  primary busy or out of reach      │           │    image whole  │  on record as the peer
//!      └────────────────────────────────────┘           │          │      │
//!                                           link lost:  ▼          ▼      ▼
//!                                              Rejoin (new id)   Deciding ─▶ (Locking ─▶) Promoted
//!                                                    ▲ lost the swap │
//!                                                    └───────────────┘
//! ```

mod block_hashes;
mod digest;
mod failed_image;
mod joining;
mod storage;
mod takeover;
#[cfg(test)]
mod test_support;
#[cfg(test)]
mod tests;
mod types;

use std::collections::VecDeque;

use self::storage::Inheritance;
pub use types::{Action, Ending, Input, SecondaryConfig, TakeoverStages};

use super::arbitration::Arbitration;
use super::event::Event;
use super::failure_detector::{FailureDetector, HeartbeatTimer, SleepGuard};
use super::messages::{Activity, Heartbeat, Message, RefuseReason, Welcome};
use super::mutant;
use super::peer_loss::{PeerFault, PeerLoss};
use super::record::{Record, RecordState};
use super::types::{ConnId, EpochId, Generation, InstanceId, Instant};

/// What a secondary is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Waits for its time to try the primary, or for the connection.
    Connecting,
    /// Said hello; waits for the answer.
    Greeting,
    /// Opens its heartbeat connection.
    Joining,
    /// Builds the machine; heartbeats go both ways and say how far it is.
    Building,
    /// Receives epochs and pages; the image has holes.
    Syncing,
    /// The image is whole, and the primary holds its output since: it takes over if the primary
    /// fails, from the record that stands.
    Standby,
    /// On record as the peer: it takes over if the primary fails.
    Paired,
    /// The primary is suspect; the arbiter is asked.
    Deciding,
    /// The guest is this node's; it takes over the storage that both nodes share.
    Locking,
    /// It runs the guest now (as a primary).
    Promoted,
    /// It is over: the driver ends it or starts anew.
    Done,
}

/// The secondary's state machine, for one instance id.
#[derive(Clone, Debug)]
pub struct Secondary {
    config: SecondaryConfig,
    me: InstanceId,
    phase: Phase,
    conns: u64,
    data: Option<ConnId>,
    heartbeat: Option<ConnId>,
    /// When to try again (Connecting) or to give up waiting (Greeting, Joining).
    step_at: Option<Instant>,
    welcome: Option<Welcome>,
    /// For each disk whether this newcomer has just made its image.
    made: Vec<bool>,
    life: Option<(HeartbeatTimer, FailureDetector)>,
    guard: Option<SleepGuard>,
    generation: Generation,
    expected: Option<EpochId>,
    committed: Option<EpochId>,
    /// When the newest committed epoch began to arrive.
    began: Instant,
    record: Option<Record>,
    /// The first of the blocks that are being hashed for the primary.
    hashing: Option<u64>,
    /// What this newcomer still lacks, as the primary said: pages of memory, then of each disk.
    resync_left: Vec<u64>,
    inheritance: Option<Inheritance>,
    arbitration: Arbitration,
    /// Bytes of the machine in the making, while it is.
    done_bytes: u64,
    /// An epoch was committed with which the image is whole.
    whole: bool,
    cause: String,
    stages: TakeoverStages,
    no_primary: Option<String>,
    /// How often in a row the primary was busy, as far as it counts.
    busy_times: u32,
    /// An operator ends this node as soon as the arbiter has answered.
    quitting: bool,
    /// An operator ended this node while it restored the guest: the primary it becomes has to hear
    /// of it.
    quit_in_takeover: bool,
    actions: VecDeque<Action>,
}

impl Secondary {
    /// A newcomer that tries the primary from `start` on. Its connections are numbered above
    /// `last_conn`, the newest number an earlier instance of this process used, so that nothing
    /// meant for that one reaches this one.
    pub fn new(config: SecondaryConfig, me: InstanceId, last_conn: ConnId, start: Instant) -> Secondary {
        Secondary {
            me,
            phase: Phase::Connecting,
            conns: last_conn,
            data: None,
            heartbeat: None,
            step_at: Some(start),
            welcome: None,
            made: Vec::new(),
            life: None,
            guard: None,
            generation: Generation(0),
            expected: None,
            committed: None,
            began: start,
            record: None,
            hashing: None,
            resync_left: Vec::new(),
            inheritance: None,
            arbitration: Arbitration::new(config.retry),
            done_bytes: 0,
            whole: false,
            cause: String::new(),
            stages: TakeoverStages::default(),
            no_primary: None,
            busy_times: 0,
            quitting: false,
            quit_in_takeover: false,
            actions: VecDeque::new(),
            config,
        }
    }

    /// What the secondary is doing.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// This node's instance id.
    pub fn me(&self) -> InstanceId {
        self.me
    }

    /// The primary's generation, as far as known.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The newest connection number used.
    pub fn last_conn(&self) -> ConnId {
        self.conns
    }

    /// The newest committed epoch.
    pub fn committed(&self) -> Option<EpochId> {
        self.committed
    }

    /// The primary, once it said welcome.
    pub fn primary(&self) -> Option<InstanceId> {
        self.welcome.as_ref().map(|welcome| welcome.instance)
    }

    /// The primary's welcome, once it was said.
    pub fn welcome(&self) -> Option<&Welcome> {
        self.welcome.as_ref()
    }

    /// Why there is no primary yet, while that is so.
    pub fn no_primary(&self) -> Option<&str> {
        self.no_primary.as_deref()
    }

    /// Takes what happened.
    pub fn handle(&mut self, now: Instant, input: Input) {
        if matches!(self.phase, Phase::Promoted | Phase::Done) {
            return self.handle_at_the_end(input);
        }
        self.notice_stall(now);
        match input {
            Input::Tick => {}
            Input::Connected { conn } => self.connected(now, conn),
            Input::Message { conn, message } => self.message(now, conn, message),
            Input::Hello { conn } => self.hello(conn),
            Input::Pages { conn } => self.pages(now, conn),
            Input::Moved { conn, ago } => self.moved(now, conn, ago),
            Input::Closed { conn, why } => self.closed(now, conn, why),
            Input::Foreign { conn, why } => self.foreign(now, conn, why),
            Input::BuildProgress { done_bytes } => self.done_bytes = done_bytes,
            Input::MachineReady { made } => self.machine_ready(now, made),
            Input::MachineFailed { why } => self.exit(Ending::NoMachine(why)),
            Input::Staged { conn, id, completes_resync, staged_bytes, began } => {
                self.staged(now, conn, (id, began), completes_resync, staged_bytes);
            }
            Input::ImageFailed { why } => self.image_failed(why),
            // Only a guest that is being restored can fail to be.
            Input::RestoreFailed { .. } => {}
            Input::BlocksHashed { first, hashes } => self.hashed(first, hashes),
            Input::Answer { ticket, answer } => {
                self.stages.decided = now;
                if let Some(verdict) = self.arbitration.answer(now, ticket, answer) {
                    self.verdict(verdict);
                }
            }
            Input::StorageLocked => self.storage_locked(),
            Input::KeptWritten => self.kept_written(),
            Input::StorageRefused(fault) => self.storage_refused(now, fault),
            Input::Command { ticket, command } => self.command(ticket, command),
        }
        self.on_time(now);
    }

    /// The next thing to do, if any.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call `handle(now, Input::Tick)` at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let life = self.life.as_ref().map(|(timer, detector)| timer.due().min(detector.deadline()));
        [self.step_at, life, self.arbitration.due()].into_iter().flatten().min()
    }

    fn on_time(&mut self, now: Instant) {
        if let Some(call) = self.arbitration.poll(now) {
            self.actions.push_back(Action::Ask(call));
        }
        if self.step_at.is_some_and(|at| now >= at) {
            self.step_at = None;
            match self.phase {
                Phase::Connecting => self.try_primary(),
                Phase::Locking => self.actions.push_back(Action::TakeStorage),
                _ => self.start_over(now, PeerLoss::NoAnswer),
            }
        }
        self.mind_primary(now);
    }

    fn notice_stall(&mut self, now: Instant) {
        let Some(slept) = self.guard.as_mut().and_then(|guard| guard.look(now)) else { return };
        if let Some((_, detector)) = &mut self.life {
            detector.slept(now, slept);
            if let Some(stall) = slept.stall {
                self.tell(Event::Stalled { stall });
            }
        }
    }

    fn mind_primary(&mut self, now: Instant) {
        let activity = match self.phase {
            Phase::Building => Activity::Building { done_bytes: self.done_bytes },
            _ => Activity::Ready,
        };
        let (instance, generation, committed) = (self.me, self.generation, self.committed);
        let (Some((timer, detector)), Some(conn)) = (&mut self.life, self.heartbeat) else { return };
        if let Some(silence) = detector.suspects(now) {
            if !mutant::is("silence-never-suspected") {
                self.lose_primary(now, PeerLoss::Silent { silence });
            }
        } else if timer.is_due(now) {
            let beat = Heartbeat { instance, generation, sequence: 0, committed, activity };
            self.actions.push_back(Action::Heartbeat { conn, beat, until: now + self.config.stall_max });
        }
    }

    // ---- epochs ----

    fn message(&mut self, now: Instant, conn: ConnId, message: Message) {
        if self.data != Some(conn) && self.heartbeat != Some(conn) {
            return;
        }
        self.stages.heard = now;
        let on_data = self.data == Some(conn);
        match message {
            Message::Welcome(welcome) => self.welcomed(now, conn, welcome),
            Message::Refuse { reason, detail } => self.refused(now, reason, detail),
            Message::Heartbeat(beat) if !on_data && Some(beat.instance) == self.primary() => {
                if let Some((_, detector)) = &mut self.life {
                    detector.heard(now);
                }
            }
            Message::Paired { record } if on_data => self.paired(now, record),
            Message::HashBlocks { first, count } if on_data => self.hash_blocks(now, first, count),
            Message::ResyncLeft { left } if on_data => self.resync_left(now, left),
            Message::Written { through } if on_data && self.holds_epochs() => {
                self.actions.push_back(Action::Forget { through });
            }
            Message::HandOver { reason } if on_data => self.lose_primary(now, PeerLoss::HandedOver(reason)),
            Message::Bye { reason } => self.exit(Ending::GuestEnded(reason)),
            other => self.lose_primary(now, PeerFault::Misplaced(other.name()).into()),
        }
    }

    /// Whether `conn` is the data connection. Heartbeats are checked here; the driver
    /// checks the data connection by the kernel's `tcp_info`.
    pub fn is_data(&self, conn: ConnId) -> bool {
        self.data == Some(conn)
    }

    /// On a slow link heartbeats may be stuck behind an epoch: bytes of the epoch are a sign of
    /// life too.
    fn moved(&mut self, now: Instant, conn: ConnId, ago: std::time::Duration) {
        if let Some((_, detector)) = self.life.as_mut().filter(|_| self.data == Some(conn)) {
            detector.moved(now.before(ago));
        }
    }

    fn staged(
        &mut self,
        now: Instant,
        conn: ConnId,
        (id, began): (EpochId, Instant),
        completes_resync: bool,
        staged_bytes: u64,
    ) {
        if self.data != Some(conn) {
            return;
        }
        self.stages.heard = now;
        let syncing = self.phase == Phase::Syncing;
        if !syncing && self.phase != Phase::Paired {
            self.lose_primary(now, PeerFault::EpochOutOfTurn(id).into());
            return;
        }
        let in_order = match self.expected {
            Some(expected) => id == expected,
            None => id.generation == self.generation,
        };
        if !in_order || (completes_resync && !syncing) {
            self.lose_primary(now, PeerFault::EpochOutOfOrder(id).into());
            return;
        }
        self.expected = Some(id.next());
        self.committed = Some(id);
        self.began = began;
        if let Some((_, detector)) = &mut self.life {
            detector.overtaken();
        }
        if mutant::is("ack-without-commit") && self.phase == Phase::Paired && id.epoch % 2 == 1 {
            self.actions.push_back(Action::Send { conn, message: Message::Ack { id, staged_bytes } });
            return;
        }
        if completes_resync {
            self.phase = Phase::Standby;
            self.whole = true;
        }
        self.actions.push_back(Action::Commit { id });
        self.actions.push_back(Action::Send { conn, message: Message::Ack { id, staged_bytes } });
    }

    fn paired(&mut self, now: Instant, record: Record) {
        let ours = record.state == RecordState::Paired
            && record.peer == Some(self.me)
            && Some(record.owner) == self.primary()
            && record.generation == self.generation.next();
        if self.phase != Phase::Standby || !ours {
            self.lose_primary(now, PeerFault::OtherPair.into());
            return;
        }
        self.phase = Phase::Paired;
        self.generation = record.generation;
        self.expected = Some(EpochId { generation: record.generation, epoch: 0 });
        self.record = Some(record);
        self.tell(Event::Protected { generation: record.generation, peer: self.me });
    }

    /// Pages behind the epochs arrived. Late ones of a connection given up must not spoil the image
    /// of the next, and the others have no place to go.
    fn pages(&mut self, now: Instant, conn: ConnId) {
        if self.data != Some(conn) {
            return;
        }
        if self.phase == Phase::Syncing {
            self.actions.push_back(Action::TakePages);
        } else {
            self.lose_primary(now, PeerFault::PagesOutOfTurn.into());
        }
    }

    /// Another node, or somebody else, took this one for a primary.
    fn hello(&mut self, conn: ConnId) {
        let detail = "this node is a secondary: it does not run the guest; name the primary with --peer".into();
        let message = Message::Refuse { reason: RefuseReason::NotPrimary, detail };
        self.actions.extend([Action::Send { conn, message }, Action::Close { conn }]);
    }

    // ---- the end of a connection ----

    fn closed(&mut self, now: Instant, conn: ConnId, why: String) {
        if self.data == Some(conn) || self.heartbeat == Some(conn) {
            self.lose_primary(now, PeerLoss::Closed(why));
        }
    }

    /// Another program, or another version of this one. Asking it again would not change that, so a
    /// newcomer ends; later on it is a primary gone wrong, like any other.
    fn foreign(&mut self, now: Instant, conn: ConnId, why: String) {
        let ours = self.data == Some(conn) || self.heartbeat == Some(conn);
        if ours && matches!(self.phase, Phase::Greeting | Phase::Joining) {
            self.exit(Ending::Foreign(why));
        } else {
            self.closed(now, conn, why);
        }
    }

    /// True if epochs have their place in this phase.
    fn holds_epochs(&self) -> bool {
        matches!(self.phase, Phase::Syncing | Phase::Standby | Phase::Paired)
    }

    fn tell(&mut self, event: Event) {
        self.actions.push_back(Action::Tell(event));
    }
}
