//! What goes into a primary and what comes out.

use std::ops::Range;
use std::time::Duration;

use crate::protocol::arbitration::{ArbiterAnswer, ArbiterCall};
use crate::protocol::block_hashes::BlockHash;
use crate::protocol::command::{AnnounceSeries, Command, CommandRefused};
use crate::protocol::cpu::GuestCpu;
use crate::protocol::event::Event;
use crate::protocol::failure_detector::HeartbeatConfig;
use crate::protocol::guest_event::GuestEvent;
use crate::protocol::machine_shape::MachineShape;
use crate::protocol::messages::{Heartbeat, Hello, Message};
use crate::protocol::types::{ConnId, EpochId, GuestName, Instant};

/// How a primary behaves.
#[derive(Clone, Debug)]
pub struct PrimaryConfig {
    /// The guest it runs.
    pub guest: GuestName,
    /// The guest's machine, told to newcomers.
    pub shape: MachineShape,
    /// The CPU the guest sees.
    pub cpu: GuestCpu,
    /// Features this build offers.
    pub features: u64,
    /// The longest an epoch may last.
    pub interval: Duration,
    /// The least time from one capture to the next.
    pub interval_min: Duration,
    /// Cut an epoch as soon as output waits and no commit is on its way.
    pub commit_on_output: bool,
    /// Heartbeats.
    pub heartbeat: HeartbeatConfig,
    /// Time between two questions to an arbiter out of reach.
    pub arbiter_retry: Duration,
    /// How long a newcomer may take from its hello to its heartbeat connection.
    pub join_timeout: Duration,
    /// How long a newcomer that builds its machine may make no progress.
    pub build_silence_max: Duration,
    /// How long this node vouches for a guest that cannot be captured, and how long its heartbeats
    /// outlast an engine that hangs. Longer than the heartbeat timeout.
    pub stall_max: Duration,
    /// How long the secondary may take to take over a guest that was handed over, before this node
    /// asks for it again.
    pub handover_timeout: Duration,
    /// How long shared storage may take for the last writes of a guest that is over.
    pub drain_timeout: Duration,
    /// Most pages in one background push.
    pub push_pages_max: usize,
}

#[cfg(test)]
impl PrimaryConfig {
    /// Of a small guest without disks, whose epochs last a millisecond and whose peer may be silent
    /// for long.
    pub(in crate::protocol) fn for_tests() -> PrimaryConfig {
        PrimaryConfig {
            guest: GuestName::new("web").expect("a name"),
            shape: MachineShape::bare(4 * 4096, 1, [2, 0, 0, 0, 0, 1]),
            cpu: GuestCpu { digest: 7, tsc_khz: 1000 },
            features: 0,
            interval: Duration::from_millis(1),
            interval_min: Duration::ZERO,
            commit_on_output: true,
            heartbeat: HeartbeatConfig { interval: Duration::from_secs(10), timeout: Duration::from_secs(1000) },
            arbiter_retry: Duration::from_secs(1),
            join_timeout: Duration::from_secs(1),
            build_silence_max: Duration::from_secs(1),
            stall_max: Duration::from_secs(2000),
            handover_timeout: Duration::from_secs(1),
            drain_timeout: Duration::from_secs(1),
            push_pages_max: 100,
        }
    }
}

/// Why a primary's process ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// The guest is over, on record: its last writes are the disks' newest.
    GuestOver {
        /// It asked for a reset: whoever starts nodes starts it again.
        restart: bool,
    },
    /// An operator ends this node; the guest goes on at the secondary, if that is on record.
    Quit,
    /// Another node runs the guest.
    Fenced,
    /// A vCPU cannot go on; why, in words. The secondary takes over, if there is one.
    GuestFailed(String),
}

/// What happened, told to the primary.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time passed.
    Tick,
    /// A hello arrived on a new connection.
    Hello {
        /// The connection.
        conn: ConnId,
        /// What it said.
        hello: Hello,
    },
    /// A message arrived.
    Message {
        /// The connection.
        conn: ConnId,
        /// The message.
        message: Message,
    },
    /// A connection is gone, or what came over it made no sense.
    Closed {
        /// The connection.
        conn: ConnId,
        /// Why, in words.
        why: String,
    },
    /// The first packet of an epoch is held.
    OutputWaiting {
        /// Packets that the running epoch holds now: none if that epoch was cut meanwhile.
        open_packets: u64,
    },
    /// The output buffer is full.
    OutputFull,
    /// The disks' journal is full.
    JournalFull,
    /// The epoch asked for was captured and handed to the link.
    Captured {
        /// The epoch.
        id: EpochId,
    },
    /// The capture failed, and nothing of the epoch was lost: it is in the next one.
    CaptureFailed {
        /// The epoch.
        id: EpochId,
        /// Why, in words.
        why: String,
    },
    /// Dirty pages are tracked since now, for the newcomer on this connection; or they cannot be.
    Tracking {
        /// The connection.
        conn: ConnId,
        /// Why not, in words.
        result: Result<(), String>,
    },
    /// The vCPUs run or are stopped, as `Run` asked; or they could not be stopped.
    RunDone {
        /// What was asked for.
        run: bool,
        /// Why it could not be done, in words.
        result: Result<(), String>,
    },
    /// The background push asked for was read and handed to the link.
    Pushed,
    /// The peer's hashes of blocks.
    PeerHashes {
        /// The connection.
        conn: ConnId,
        /// The index of the first block.
        first: u64,
        /// The hashes; none if the newcomer's image is not worth a comparison.
        hashes: Vec<BlockHash>,
    },
    /// The hashes asked for, of this node's blocks.
    OwnHashes {
        /// The question's ticket.
        ticket: u64,
        /// The hashes, or in words why there are none.
        hashes: Result<Vec<BlockHash>, String>,
    },
    /// The storage shared with the newcomer on this connection has everything written before
    /// `StartTracking`, for good.
    StorageSynced {
        /// The connection.
        conn: ConnId,
    },
    /// The shared storage has the writes of every epoch up to this one, for good.
    Written {
        /// The epoch.
        through: EpochId,
    },
    /// The release asked for was not finished before its deadline.
    ReleaseExpired,
    /// The arbiter answered.
    Answer {
        /// The question's ticket.
        ticket: u64,
        /// The answer.
        answer: ArbiterAnswer,
    },
    /// An operator asks for something; `Answer` says what came of it.
    Command {
        /// Names the request in the answer.
        ticket: u64,
        /// What is asked for.
        command: Command,
    },
    /// The guest's machine reports an event.
    Guest(GuestEvent),
    /// These are holes: what `FindHoles` asked for.
    Holes {
        /// The question's ticket.
        ticket: u64,
        /// The first block that was not looked at.
        through: u64,
        /// The holes before that, rising; no error: what is not known to be a hole is pushed.
        holes: Vec<Range<u64>>,
    },
    /// An operator wants a snapshot of the guest. Answered at once, by `Snapshot` or `NoSnapshot`.
    Snapshot {
        /// The guest is to stop for good with it.
        stop: bool,
    },
    /// The snapshot is over.
    SnapshotEnded {
        /// It is written; if not, it failed.
        written: bool,
    },
}

/// What a capture does with the guest's output, while the guest is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutputCut {
    /// Nothing: output passes.
    Pass,
    /// From now on output is held.
    Hold,
    /// What is held since the last cut belongs to this epoch.
    Seal,
}

/// What the driver has to do, in this order.
#[derive(Clone, Debug, PartialEq, Hash)]
pub enum Action {
    /// Send a message.
    Send {
        /// The connection.
        conn: ConnId,
        /// The message.
        message: Message,
    },
    /// Close a connection once what was sent before is out.
    Close {
        /// The connection.
        conn: ConnId,
    },
    /// Begin to track every page the guest or a device writes, and to hold writes to shared
    /// storage; say `Tracking` when it is done, and `StorageSynced` once such storage has all that
    /// was written before.
    StartTracking {
        /// Where epochs and pushes go from now on.
        conn: ConnId,
    },
    /// Stop tracking; forget what is on its way to the newcomer. Writes held for shared storage go
    /// there, all of them.
    StopTracking,
    /// Begin to capture an epoch: pause, save, copy dirty pages, cut output, resume, send. Say
    /// `Captured` or `CaptureFailed` when it is done, however long that takes.
    Capture {
        /// Its name.
        id: EpochId,
        /// The image is whole with this epoch.
        completes_resync: bool,
        /// What becomes of output in the pause.
        output: OutputCut,
    },
    /// Push these pages behind the epochs, then say `Pushed`.
    Push {
        /// Page indexes, rising.
        pages: Vec<u64>,
    },
    /// The next epoch that is cut preserves these blocks of a disk: they can be read as they were
    /// then. Blocks preserved before are released.
    Preserve {
        /// Their indexes.
        run: Range<u64>,
    },
    /// Hash these blocks of a disk, then say `OwnHashes`.
    HashBlocks {
        /// Names the question.
        ticket: u64,
        /// Their indexes.
        run: Range<u64>,
        /// The epoch they were preserved with; as they are, without one.
        as_of: Option<EpochId>,
    },
    /// The epoch is committed on the peer: its dirty pages are safe there.
    Committed {
        /// The epoch.
        id: EpochId,
    },
    /// Let the output of epochs up to `through` go, in order, but not after `before`; say
    /// `ReleaseExpired` if that passed.
    Release {
        /// The newest epoch whose output may go.
        through: u64,
        /// After this the right to release must be proven again.
        before: Instant,
    },
    /// Write what is held of epochs up to `through` to shared storage, once they are committed; say
    /// `Written` as it comes about.
    WriteThrough {
        /// The newest such epoch.
        through: EpochId,
    },
    /// Let all held output go (and held writes to shared storage), and let what follows pass at
    /// once.
    ReleaseAll,
    /// Let the guest run (or not), then say `RunDone`.
    Run(bool),
    /// The guest is paused: save it to the snapshot's file while it does, then say
    /// `SnapshotEnded`.
    Snapshot,
    /// There is no snapshot to be taken now.
    NoSnapshot {
        /// Why, in words.
        why: &'static str,
    },
    /// Find out which of these blocks are holes in this node's image of the disk, and say so with
    /// `Holes`. None of them need be read for that.
    FindHoles {
        /// Goes into `Holes`.
        ticket: u64,
        /// The blocks, of one disk.
        run: Range<u64>,
    },
    /// Tell the network where the guest is, now and then so often. What is announced is held and
    /// released as the guest's own output is.
    Announce(AnnounceSeries),
    /// Ask the arbiter.
    Ask(ArbiterCall),
    /// Stop the guest for good, throw held output and held writes away, close all connections, and
    /// give up the lock of shared storage when no write is under way any more. Only the control
    /// socket stays.
    Fence,
    /// From now on send this heartbeat on the connection every heartbeat interval, the first at
    /// once, and none after `until`.
    Heartbeat {
        /// The connection.
        conn: ConnId,
        /// The heartbeat; whoever sends it gives it its number.
        beat: Heartbeat,
        /// The moment after which this node is not vouched for.
        until: Instant,
    },
    /// The answer to a command.
    Answer {
        /// The command's ticket.
        ticket: u64,
        /// Why it has no effect, if it has none.
        result: Result<(), CommandRefused>,
    },
    /// End the process.
    Exit(End),
    /// Tell people.
    Tell(Event),
}
