//! What goes into a secondary and what comes out.

use std::ops::Range;
use std::time::Duration;

use crate::protocol::arbitration::{ArbiterAnswer, ArbiterCall};
use crate::protocol::block_hashes::BlockHash;
use crate::protocol::command::{Command, CommandRefused};
use crate::protocol::cpu::HostCpu;
use crate::protocol::event::Event;
use crate::protocol::messages::{Channel, Heartbeat, Message, RefuseReason, Welcome};
use crate::protocol::record::Record;
use crate::protocol::types::{ConnId, EpochId, GuestName, Instant, StorageFault};

/// How a secondary behaves.
#[derive(Clone, Debug)]
pub struct SecondaryConfig {
    /// The guest it wants to hold.
    pub guest: GuestName,
    /// The CPU its host can give a guest.
    pub cpu: HostCpu,
    /// Features this build offers.
    pub features: u64,
    /// Most bytes of staging memory.
    pub staging_bytes_max: u64,
    /// Time between two tries to reach a primary, or an arbiter out of reach.
    pub retry: Duration,
    /// How long a primary may take to answer a hello.
    pub answer_timeout: Duration,
    /// How long this node's heartbeats outlast an engine that hangs.
    pub stall_max: Duration,
}

/// When the stages of a takeover were reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TakeoverStages {
    /// The primary was last heard of.
    pub heard: Instant,
    /// It was suspected.
    pub suspected: Instant,
    /// The arbiter gave its last answer.
    pub decided: Instant,
}

/// What happened, told to the secondary.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time passed.
    Tick,
    /// The connection asked for stands.
    Connected {
        /// The connection.
        conn: ConnId,
    },
    /// A message arrived.
    Message {
        /// The connection.
        conn: ConnId,
        /// The message.
        message: Message,
    },
    /// Somebody connected to this node and said hello.
    Hello {
        /// The connection.
        conn: ConnId,
    },
    /// Pages that travel behind the epochs arrived, verified.
    Pages {
        /// The connection they came over.
        conn: ConnId,
    },
    /// Bytes of the primary arrived on a connection, the newest of them so long ago.
    Moved {
        /// The connection.
        conn: ConnId,
        /// How long ago.
        ago: Duration,
    },
    /// A connection could not be made, is gone, or carried what made no sense.
    Closed {
        /// The connection.
        conn: ConnId,
        /// Why, in words.
        why: String,
    },
    /// What answers there does not speak this protocol, or another version of it.
    Foreign {
        /// The connection.
        conn: ConnId,
        /// What it spoke, in words.
        why: String,
    },
    /// The machine asked for is being built.
    BuildProgress {
        /// Bytes of it that are there.
        done_bytes: u64,
    },
    /// The machine asked for is built.
    MachineReady {
        /// For each disk of its shape whether its image was made just now: nothing there is worth a
        /// comparison.
        made: Vec<bool>,
    },
    /// The machine asked for cannot be built on this host.
    MachineFailed {
        /// Why, in words.
        why: String,
    },
    /// A whole epoch is in staging memory, verified.
    Staged {
        /// The connection it came over.
        conn: ConnId,
        /// The epoch.
        id: EpochId,
        /// The image is whole with it.
        completes_resync: bool,
        /// Staging bytes in use.
        staged_bytes: u64,
        /// When it began to arrive.
        began: Instant,
    },
    /// The image is spoilt: what is committed could not be put into it, or not be read there.
    ImageFailed {
        /// Why, in words.
        why: String,
    },
    /// The guest could not be restored from the newest committed epoch, as `Promote` asked.
    RestoreFailed {
        /// Why, in words.
        why: String,
    },
    /// The hashes asked for.
    BlocksHashed {
        /// The index of the first block.
        first: u64,
        /// The hashes.
        hashes: Vec<BlockHash>,
    },
    /// The arbiter answered.
    Answer {
        /// The question's ticket.
        ticket: u64,
        /// The answer.
        answer: ArbiterAnswer,
    },
    /// The lock of shared storage is ours.
    StorageLocked,
    /// Shared storage has what was kept of committed epochs, for good.
    KeptWritten,
    /// Shared storage cannot be had.
    StorageRefused(StorageFault),
    /// An operator asks for something; `Answer` says what came of it. While this node asks the
    /// arbiter for the guest, or waits for its disk, only the second `quit` counts.
    Command {
        /// Names the request in the answer.
        ticket: u64,
        /// What is asked for.
        command: Command,
    },
}

/// Why a secondary's process ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// An operator asked for it.
    Quit,
    /// The guest was shut down: there is nothing to protect any more.
    GuestEnded(String),
    /// The primary turned this node away for good.
    Refused {
        /// Why.
        reason: RefuseReason,
        /// In words.
        detail: String,
    },
    /// Whoever answers at the primary's address is no primary this node can understand.
    Foreign(String),
    /// The machine cannot be built here.
    NoMachine(String),
    /// The image is spoilt: no guest can be taken over with it.
    ImageFailed(String),
    /// The guest is this node's, on record, and cannot be run here: it is lost.
    NotRestored {
        /// The record that won.
        record: Record,
        /// The newest committed epoch.
        epoch: EpochId,
        /// Why, in words.
        why: String,
    },
}

/// What the driver has to do, in this order.
#[derive(Clone, Debug, PartialEq, Hash)]
pub enum Action {
    /// Open a connection to the primary, then say `Connected` or `Closed`.
    Connect {
        /// Its name.
        conn: ConnId,
        /// Which one.
        channel: Channel,
    },
    /// Send a message.
    Send {
        /// The connection.
        conn: ConnId,
        /// The message.
        message: Message,
    },
    /// Close a connection.
    Close {
        /// The connection.
        conn: ConnId,
    },
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
    /// Begin to build the machine, say `BuildProgress` now and then, and `MachineReady` or
    /// `MachineFailed` when it is done.
    BuildMachine(Welcome),
    /// This staged epoch is committed: keep it, and apply it in order.
    Commit {
        /// The epoch.
        id: EpochId,
    },
    /// Write the pages that `Pages` announced into the image.
    TakePages,
    /// Hash these blocks of a disk once every committed epoch is in the image and before the next
    /// one is, then say `BlocksHashed`.
    HashBlocks {
        /// Their indexes.
        run: Range<u64>,
    },
    /// Send hashes of blocks.
    SendHashes {
        /// The connection.
        conn: ConnId,
        /// The index of the first block.
        first: u64,
        /// The hashes; none if the image is not worth a comparison.
        hashes: Vec<BlockHash>,
    },
    /// Shared storage has the writes of every epoch up to `through`: forget those.
    Forget {
        /// The newest such epoch.
        through: EpochId,
    },
    /// Try to take the lock of shared storage, then say `StorageLocked` or `StorageRefused`.
    TakeStorage,
    /// Write what was kept of committed epochs to shared storage and sync it, then say
    /// `KeptWritten` or `StorageRefused`.
    WriteKept,
    /// Ask the arbiter.
    Ask(ArbiterCall),
    /// Throw away what is staged but not committed; finish applying; restore; run the guest under
    /// `record`. If that fails, say `RestoreFailed`.
    Promote {
        /// The record that won.
        record: Record,
        /// The newest committed epoch.
        epoch: EpochId,
        /// When it began to arrive: the guest's clocks count from there (see `guest_clock`).
        began: Instant,
        /// When the stages so far were reached.
        stages: TakeoverStages,
        /// What made the primary suspect.
        cause: String,
    },
    /// Drop the image and join again after a while, under a new instance id.
    Rejoin {
        /// How long to wait.
        after: Duration,
    },
    /// End the process.
    Exit {
        /// Why.
        ending: Ending,
        /// Before that, bring the image to this epoch and stamp it as whole. Without one it is not
        /// whole, and keeps its stamp.
        stamp: Option<EpochId>,
    },
    /// Tell people.
    Tell(Event),
}
