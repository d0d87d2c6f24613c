//! What nodes say to each other. `wire/` gives these a byte form; nothing here knows of sockets.

use super::cpu::HostCpu;
use super::machine_shape::MachineShape;
use super::record::Record;
use super::types::{EpochId, Generation, GuestName, InstanceId};

/// The protocol version this build speaks. A peer of another version is refused with both numbers.
pub const PROTOCOL_VERSION: u16 = 3;

/// Which of the two connections of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// Epochs, pages and acks.
    Data,
    /// Heartbeats only, so that bulk never delays them.
    Heartbeat,
}

/// What a newcomer says first on each connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hello {
    /// The connection this hello opens.
    pub channel: Channel,
    /// The protocol version the newcomer speaks.
    pub version: u16,
    /// The guest it wants to hold.
    pub guest: GuestName,
    /// Its instance id, the same on both connections.
    pub instance: InstanceId,
    /// Feature bits it offers (see [`features`]).
    pub features: u64,
    /// Most bytes of staging memory it will spend on epochs that are not applied yet; `u64::MAX` if
    /// it spends what this guest needs.
    pub staging_bytes_max: u64,
    /// The CPU its host can give a guest; the primary refuses a host on which the guest could not
    /// go on.
    pub cpu: HostCpu,
}

/// Feature bits of a hello.
pub mod features {
    /// Pages may arrive compressed with lz4.
    pub const LZ4: u64 = 1 << 0;
    /// A secondary hashes blocks of its disks when it is asked to, and is told how far its resync
    /// is.
    pub const DISK_HASHES: u64 = 1 << 1;
}

/// The primary's answer to a hello it accepts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Welcome {
    /// The primary's instance id.
    pub instance: InstanceId,
    /// The generation the primary runs in.
    pub generation: Generation,
    /// The machine to build.
    pub shape: MachineShape,
    /// How fast its TSC runs, in kHz.
    pub tsc_khz: u32,
    /// Features both sides have.
    pub features: u64,
    /// Longest epoch, in microseconds.
    pub interval_us: u64,
    /// Time between heartbeats, in microseconds.
    pub heartbeat_interval_us: u64,
    /// Silence after which a peer is suspected, in microseconds.
    pub heartbeat_timeout_us: u64,
}

/// Why a hello was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefuseReason {
    /// The versions differ.
    Version,
    /// This node runs another guest.
    Guest,
    /// The hosts' CPUs differ in what the guest can see.
    Cpu,
    /// The primary has a secondary already.
    Busy,
    /// This node does not run the guest (it is a secondary, or fenced).
    NotPrimary,
    /// The staging budget is too small for this guest.
    Staging,
    /// The hello made no sense where it came.
    Malformed,
}

/// What a node is in the middle of, beside being alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activity {
    /// Nothing long.
    Ready,
    /// A newcomer builds its machine and touches its memory: bytes done so far. It takes no epochs
    /// yet.
    Building {
        /// They go up as long as the work goes on.
        done_bytes: u64,
    },
    /// A primary captures an epoch.
    Capturing,
}

/// The newest epoch a node has committed, and what it is doing: sent as the heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Heartbeat {
    /// The sender.
    pub instance: InstanceId,
    /// The sender's generation.
    pub generation: Generation,
    /// Goes up by one with each heartbeat of this connection.
    pub sequence: u64,
    /// Newest epoch the sender knows to be committed, if any.
    pub committed: Option<EpochId>,
    /// What the sender is in the middle of.
    pub activity: Activity,
}

impl Heartbeat {
    /// The same without its number, which changes nothing: for a checker that compares states.
    pub fn unnumbered(self) -> Heartbeat {
        Heartbeat { sequence: 0, ..self }
    }
}

/// A message between two nodes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// Newcomer → primary, first on each connection.
    Hello(Hello),
    /// Primary → newcomer: go on.
    Welcome(Welcome),
    /// Primary → newcomer: not with you; the connection closes.
    Refuse {
        /// Why.
        reason: RefuseReason,
        /// The sentence a person reads; at most 512 bytes.
        detail: String,
    },
    /// Primary → secondary: the frames of an epoch follow.
    EpochBegin {
        /// The epoch.
        id: EpochId,
        /// With this epoch the image is complete: from its commit on it can be activated.
        completes_resync: bool,
    },
    /// Primary → secondary: the epoch is over; it is whole if these figures agree.
    EpochEnd {
        /// The epoch.
        id: EpochId,
        /// Pages it held.
        pages: u64,
        /// Bytes of machine state it held.
        state_bytes: u64,
        /// CRC32C over the payloads of its page and state frames, in order.
        digest: u32,
    },
    /// Secondary → primary: the epoch is committed.
    Ack {
        /// The epoch.
        id: EpochId,
        /// Staging bytes in use on the secondary.
        staged_bytes: u64,
    },
    /// Primary → secondary: the pair is on record at the arbiter.
    Paired {
        /// The record that won.
        record: Record,
    },
    /// Primary → secondary: send the hashes of these blocks, as they are with every epoch before
    /// this message and none behind it.
    HashBlocks {
        /// The index of the first, in the [image's row](super::layout).
        first: u64,
        /// How many, all of one disk; at most
        /// [`HASH_BLOCKS_MAX`](super::block_hashes::HASH_BLOCKS_MAX).
        count: u32,
    },
    /// Primary → newcomer: pages it still lacks, of memory and then of each disk; at most one
    /// number more than [`DISKS_MAX`](super::machine_shape::DISKS_MAX).
    ResyncLeft {
        /// The numbers.
        left: Vec<u64>,
    },
    /// Primary → secondary: the storage that both share has the writes of every epoch up to this
    /// one, for good.
    Written {
        /// The epoch.
        through: EpochId,
    },
    /// Either way, on the heartbeat connection.
    Heartbeat(Heartbeat),
    /// Primary → secondary: the guest cannot go on here, or cannot be captured any more: ask the
    /// arbiter for it.
    HandOver {
        /// The sentence a person reads; at most 512 bytes.
        reason: String,
    },
    /// Either way: the sender ends on purpose; nothing is to be taken over.
    Bye {
        /// The sentence a person reads; at most 512 bytes.
        reason: String,
    },
}

impl Message {
    /// What kind of message this is, for people.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Hello(_) => "hello",
            Message::Welcome(_) => "welcome",
            Message::Refuse { .. } => "refuse",
            Message::EpochBegin { .. } => "epoch-begin",
            Message::EpochEnd { .. } => "epoch-end",
            Message::Ack { .. } => "ack",
            Message::Paired { .. } => "paired",
            Message::HashBlocks { .. } => "hash-blocks",
            Message::ResyncLeft { .. } => "resync-left",
            Message::Written { .. } => "written",
            Message::Heartbeat(_) => "heartbeat",
            Message::HandOver { .. } => "hand-over",
            Message::Bye { .. } => "bye",
        }
    }
}
