//! A simulated process: the real state machine, and beside it what a driver has: a clock, an inbox,
//! a guest or an image, a sender.

use std::collections::VecDeque;
use std::sync::Arc;

use mcd::checkpoint::stage::StagingBudget;
use mcd::protocol::admission::Admission;
use mcd::protocol::arbitration::{ArbiterAnswer, ArbiterCall};
use mcd::protocol::block_hashes::BlockHash;
use mcd::protocol::claim::{Claim, ClaimAction, ClaimInput};
use mcd::protocol::local_record::LocalRecord;
use mcd::protocol::messages::Heartbeat;
use mcd::protocol::primary::{self, Primary};
use mcd::protocol::record::Record;
use mcd::protocol::secondary::{self, Secondary};
use mcd::protocol::types::ConnId;
use mcd::protocol::types::{EpochId, InstanceId, Instant};

use crate::applier::Applier;
use crate::disks::Frozen;
use crate::guest::{Guest, Output};
use crate::plan::Plan;
use crate::storage::Disk;

/// A page of an image that never arrived.
pub const HOLE: u64 = u64::MAX >> 1;

/// A node's own idea of time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    pub origin_us: u64,
    /// Local microseconds per true second.
    pub rate: u64,
}

impl Clock {
    pub fn local(&self, now_us: u64) -> Instant {
        Instant::from_us(self.origin_us + now_us * self.rate / 1_000_000)
    }

    /// The first true time at which the clock shows `at` or more.
    pub fn true_us(&self, at: Instant) -> u64 {
        (at.us.saturating_sub(self.origin_us)).saturating_mul(1_000_000).div_ceil(self.rate)
    }
}

/// What a process is.
#[derive(Debug)]
pub enum Role {
    /// Claims the guest, to start it.
    Claiming(Box<Claim>),
    Secondary(Box<Secondary>),
    Primary(Box<Primary>),
    /// Between two lives as a newcomer.
    Waiting,
    /// Won; the image is finished, and the machine restored.
    Restoring(Record, Box<Secondary>),
}

/// What waits in a driver's inbox.
#[derive(Clone, Debug)]
pub enum In {
    Claim(ClaimInput),
    Primary(primary::Input),
    Secondary(secondary::Input),
    Background {
        conn: ConnId,
        pages: Vec<(u64, u64)>,
        staged_bytes: u64,
    },
    Epoch {
        conn: ConnId,
        staged: Staged,
        began: Instant,
    },
    Answer {
        ticket: u64,
        answer: ArbiterAnswer,
    },
    /// The image of this life as a newcomer is spoilt.
    ImageFailed {
        instance: InstanceId,
    },
    /// Hashes that a life as a newcomer asked for, and those of another must not be told.
    BlocksHashed {
        instance: InstanceId,
        first: u64,
        hashes: Vec<BlockHash>,
    },
}

/// A polled action of either machine.
#[derive(Clone, Debug)]
pub enum Act {
    Claim(ClaimAction),
    Primary(primary::Action),
    Secondary(secondary::Action),
}

/// What a sender thread has to do.
#[derive(Clone, Debug)]
pub enum Job {
    Push(Vec<u64>),
    Message(mcd::protocol::messages::Message),
    Epoch { id: EpochId, completes: bool, pages: Vec<(u64, u64)>, counter: u64, life: u64 },
}

/// A capture that was begun.
#[derive(Clone, Copy, Debug)]
pub struct Capture {
    pub proc: usize,
    pub id: EpochId,
    pub completes: bool,
    pub output: primary::OutputCut,
    /// Names the tracking it was begun under.
    pub token: u64,
    /// When it was begun, and for how long the engine had been frozen by then.
    pub begun_at: u64,
    pub stalled_us: u64,
}

/// What the heartbeat thread repeats.
#[derive(Clone, Copy, Debug)]
pub struct Heartbeats {
    pub conn: ConnId,
    pub beat: Heartbeat,
    /// By the node's own clock.
    pub until: Instant,
    /// Only the newest timer counts.
    pub token: u64,
}

/// The thread that owns the data connection's writing end.
#[derive(Debug)]
pub struct Sender {
    pub conn: ConnId,
    pub token: u64,
    pub jobs: VecDeque<Job>,
}

/// An epoch in staging memory, whole.
#[derive(Clone, Debug)]
pub struct Staged {
    pub id: EpochId,
    pub completes: bool,
    pub pages: Vec<(u64, u64)>,
    pub counter: u64,
    pub life: u64,
    /// Staging bytes it takes until it is applied.
    pub staged_bytes: u64,
}

/// A phase of either machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnyPhase {
    Primary(primary::Phase),
    Secondary(secondary::Phase),
    None,
}

pub struct Proc {
    pub slot: usize,
    pub me: InstanceId,
    pub alive: bool,
    pub clock: Clock,
    pub role: Role,
    pub phase: AnyPhase,
    pub inbox: VecDeque<In>,
    /// What came while no thread of the process ran: it lies in sockets until they do.
    pub unread: VecDeque<In>,
    /// Results of an action in hand: handled before the next action.
    pub urgent: VecDeque<In>,
    pub pending: Option<Act>,
    /// The driver does nothing until then.
    pub idle_until: u64,
    /// The guest does nothing until then.
    pub paused_until: u64,
    /// No thread of the process does anything until then.
    pub frozen_until: u64,
    pub heartbeats: Option<Heartbeats>,
    /// Names the tracking for the newcomer or secondary; 0 without.
    pub tracking_token: u64,
    /// Commands that were given and not answered.
    pub unanswered: Vec<u64>,
    pub wake_at: u64,
    /// When the machine was last fed anything, and when it last heard a heartbeat (or slept, which
    /// counts as one).
    pub fed_at: u64,
    pub heard_at: u64,
    /// Whole epochs since then.
    pub epochs_unheard: u32,
    /// Crash after so many more actions; true: the host dies too.
    pub crash_in: Option<(u64, bool)>,
    /// Stall after so many more actions, for how long; true: the guest stalls too.
    pub stall_in: Option<(u64, u64, bool)>,
    pub capture_fails: bool,
    /// No capture gets to its cut before.
    pub capture_hangs_until: u64,
    /// A capture that hangs does so although its newcomer is given up.
    pub hangs_late: bool,
    /// The capture that was begun and is not done.
    pub capturing: Option<EpochId>,
    /// No dirty log can be had, or not before then.
    pub tracking_fails: bool,
    pub tracking_hangs_until: u64,
    /// The next order to stop the vCPUs fails; one has failed.
    pub stop_fails: bool,
    pub stop_failed: bool,
    /// Its guest was handed over.
    pub handed_over: bool,
    /// For how long its engine was frozen, all in all.
    pub stalled_us: u64,
    /// The engine's timer had the last turn.
    pub ticked: bool,
    /// How often an operator told it to end.
    pub quits: u32,
    /// It claims the guest, cold or not, and has not started it.
    pub claims_cold: Option<bool>,
    /// An operator ended it while the guest was protected, or asked twice.
    pub may_exit: bool,
    /// Snapshots that were asked for and not answered yet: whether the guest is to stop with it.
    pub stop_wishes: VecDeque<bool>,
    /// A snapshot of its guest is being written: the guest must not run.
    pub saving: bool,
    /// What it wrote down where the arbiter keeps no record.
    pub local_record: LocalRecord,
    pub conns: Vec<(ConnId, usize)>,
    /// Who is admitted of those that connect to it.
    pub admission: Admission<u16>,
    /// The newest connection number of an earlier life as a newcomer.
    pub last_conn: ConnId,
    pub target: usize,
    pub calls: VecDeque<ArbiterCall>,
    pub calling: Option<ArbiterCall>,
    pub guest: Option<Guest>,
    pub output: Option<Output>,
    pub sender: Option<Sender>,
    pub image: Vec<u64>,
    pub image_state: (u64, u64),
    pub staged: Option<Staged>,
    /// Pages behind the epochs that arrived last, and how much of the staging memory they take.
    pub background: Option<(Vec<(u64, u64)>, u64)>,
    pub applier: Applier,
    /// Staging memory of this life.
    pub budget: Arc<StagingBudget>,
    /// The sender thread cannot write before.
    pub sender_blocked_until: u64,
    /// The next guest cannot be restored; one could not be; that was told.
    pub restore_fails: bool,
    pub not_restored: bool,
    pub loss_told: bool,
    pub disk: Disk,
    /// Blocks of its own disks that a cut froze, or will.
    pub frozen: Option<Frozen>,
}

impl Proc {
    pub fn new(slot: usize, me: InstanceId, clock: Clock, role: Role, plan: &Plan) -> Proc {
        Proc {
            slot,
            me,
            alive: true,
            clock,
            role,
            phase: AnyPhase::None,
            inbox: VecDeque::new(),
            unread: VecDeque::new(),
            urgent: VecDeque::new(),
            pending: None,
            idle_until: 0,
            paused_until: 0,
            frozen_until: 0,
            heartbeats: None,
            tracking_token: 0,
            unanswered: Vec::new(),
            wake_at: u64::MAX,
            fed_at: 0,
            heard_at: 0,
            epochs_unheard: 0,
            crash_in: None,
            stall_in: None,
            capture_fails: false,
            capture_hangs_until: 0,
            hangs_late: false,
            capturing: None,
            tracking_fails: false,
            tracking_hangs_until: 0,
            stop_fails: false,
            stop_failed: false,
            handed_over: false,
            stalled_us: 0,
            ticked: false,
            quits: 0,
            claims_cold: None,
            may_exit: false,
            stop_wishes: VecDeque::new(),
            saving: false,
            local_record: LocalRecord::default(),
            conns: Vec::new(),
            admission: plan.admission(),
            last_conn: 0,
            target: slot,
            calls: VecDeque::new(),
            calling: None,
            guest: None,
            output: None,
            sender: None,
            image: Vec::new(),
            image_state: (0, 0),
            staged: None,
            background: None,
            applier: Applier::default(),
            budget: StagingBudget::new(plan.staging_bytes_max),
            sender_blocked_until: 0,
            restore_fails: false,
            not_restored: false,
            loss_told: false,
            disk: Disk::default(),
            frozen: None,
        }
    }

    /// Drops what one life as a newcomer leaves behind; what is in the inbox reaches the next one.
    pub fn forget(&mut self) {
        self.urgent.clear();
        self.pending = None;
        self.image.clear();
        self.staged = None;
        self.applier = Applier::default();
        self.budget = StagingBudget::new(self.budget.bytes_max());
    }

    /// What was held up goes on, and what was to fail does not.
    pub fn end_blocks(&mut self) {
        self.sender_blocked_until = 0;
        (self.applier.slow_until, self.applier.fails, self.restore_fails) = (0, false, false);
    }

    /// The heartbeat that has waited longest in the inbox.
    pub fn take_heartbeat(&mut self) -> Option<In> {
        let is_heartbeat = |input: &In| {
            use mcd::protocol::messages::Message::Heartbeat;
            matches!(
                input,
                In::Primary(primary::Input::Message { message: Heartbeat(_), .. })
                    | In::Secondary(secondary::Input::Message { message: Heartbeat(_), .. })
            )
        };
        let at = self.inbox.iter().position(is_heartbeat)?;
        self.inbox.remove(at)
    }

    pub fn conn(&self, local: ConnId) -> Option<usize> {
        self.conns.iter().find(|(mine, _)| *mine == local).map(|(_, conn)| *conn)
    }

    pub fn poll_action(&mut self) -> Option<Act> {
        if let Some(act) = self.pending.take() {
            return Some(act);
        }
        match &mut self.role {
            Role::Claiming(claim) => claim.poll_action().map(Act::Claim),
            Role::Primary(machine) => machine.poll_action().map(Act::Primary),
            Role::Secondary(machine) => machine.poll_action().map(Act::Secondary),
            Role::Waiting | Role::Restoring(..) => None,
        }
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        match &self.role {
            Role::Claiming(claim) => claim.poll_timeout(),
            Role::Primary(machine) => machine.poll_timeout(),
            Role::Secondary(machine) => machine.poll_timeout(),
            Role::Waiting | Role::Restoring(..) => None,
        }
    }

    pub fn phase_now(&self) -> AnyPhase {
        match &self.role {
            Role::Primary(machine) => AnyPhase::Primary(machine.phase()),
            Role::Secondary(machine) => AnyPhase::Secondary(machine.phase()),
            Role::Claiming(_) | Role::Waiting | Role::Restoring(..) => AnyPhase::None,
        }
    }

    pub fn is_primary(&self) -> bool {
        matches!(self.role, Role::Primary(_))
    }
}
