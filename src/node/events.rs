//! What reaches a driver: everything that happens to a node arrives in its
//! [`Inbox`](super::inbox::Inbox).

use std::collections::HashMap;
use std::path::PathBuf;

use crossbeam::channel::Sender;
use serde_json::Value;

use super::error::NodeError;
use super::secondary::Promoted;
use crate::checkpoint::snapshot::{SnapshotError, Written};
use crate::checkpoint::stage::StagedEpoch;
use crate::machine::MachineError;
use crate::protocol::arbitration::ArbiterAnswer;
use crate::protocol::block_hashes::BlockHash;
use crate::protocol::command::{Command, CommandRefused};
use crate::protocol::guest_event::GuestEvent;
use crate::protocol::messages::{Hello, Message};
use crate::protocol::pages::PageSet;
use crate::protocol::types::ConnId;
use crate::protocol::types::{EpochId, InstanceId, Instant};
use crate::wire::{LinkCloser, LinkWriter};

/// Where the result of a command goes.
pub(crate) type Reply = Sender<Result<Value, String>>;

/// The clients that wait for the protocol's answers, by the tickets of their commands.
#[derive(Default)]
pub(crate) struct Replies {
    newest: u64,
    waiting: HashMap<u64, Reply>,
}

impl Replies {
    /// A ticket for a command, whose answer goes to `reply` if somebody waits for it.
    pub(crate) fn ticket(&mut self, reply: Option<Reply>) -> u64 {
        self.newest += 1;
        self.waiting.extend(reply.map(|reply| (self.newest, reply)));
        self.newest
    }

    /// Answers a command.
    pub(crate) fn answer(&mut self, ticket: u64, result: Result<(), CommandRefused>) {
        if let Some(reply) = self.waiting.remove(&ticket) {
            // The client may have given up waiting.
            let _ = reply.send(result.map(|()| serde_json::json!({})).map_err(|refused| refused.to_string()));
        }
    }
}

/// A snapshot that an operator asks for.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotRequest {
    /// The file.
    pub path: PathBuf,
    /// The guest stops for good with it.
    pub stop: bool,
}

/// An epoch that was captured.
pub(super) struct Captured {
    /// The epoch.
    pub id: EpochId,
    /// When its capture began, on the monotonic clock.
    pub started_us: u64,
    /// How long the guest was paused.
    pub pause_us: u64,
    /// Pages and blocks it holds.
    pub dirty_pages: u64,
    /// What travels in it, if the resync ledger wants to know: pages of memory, and blocks of disks
    /// by their index.
    pub travelled: Option<(PageSet, Vec<u64>)>,
}

/// Something that happened.
pub(super) enum NodeEvent {
    /// Dirty pages are tracked for the newcomer on this connection, or cannot be.
    Tracking {
        /// The connection.
        conn: ConnId,
        /// Why not.
        result: Result<(), String>,
    },
    /// An epoch was captured and is on its way to the sender.
    Captured(Box<Captured>),
    /// An epoch was not captured.
    CaptureFailed {
        /// The epoch.
        id: EpochId,
        /// Why.
        why: String,
    },
    /// The guest runs, or is stopped, or could not be.
    RunDone {
        /// What was ordered.
        run: bool,
        /// Why it could not be done.
        result: Result<(), String>,
    },
    /// The stopped guest's state.
    StateSaved(Result<Vec<u8>, Box<MachineError>>),
    /// The machine failed for good; why.
    MachineLost(String),
    /// The machine of the newcomer of this instance id has so many bytes of its memory.
    BuildProgress {
        /// Whose.
        instance: InstanceId,
        /// Bytes so far.
        done_bytes: u64,
    },
    /// The machine of the newcomer of this instance id is built, or cannot be.
    Built {
        /// Whose.
        instance: InstanceId,
        /// Why not.
        result: Result<(), String>,
    },
    /// Shared storage has what the secondary of this instance id kept, or does not take it; why.
    KeptWritten {
        /// Whose.
        instance: InstanceId,
        /// Why not.
        result: Result<(), String>,
    },
    /// The guest was restored from its newest committed epoch.
    Restored(Result<Box<Promoted>, Box<NodeError>>),
    /// A peer connected to us and said hello.
    Accepted {
        /// The connection.
        conn: ConnId,
        /// Its hello.
        hello: Hello,
        /// The way back.
        writer: LinkWriter,
        /// Ends it.
        closer: LinkCloser,
    },
    /// A connection that this node opened is established.
    Connected {
        /// The connection.
        conn: ConnId,
        /// The way there.
        writer: LinkWriter,
        /// Ends it.
        closer: LinkCloser,
    },
    /// A message arrived.
    Message {
        /// The connection.
        conn: ConnId,
        /// The message.
        message: Message,
    },
    /// A connection is gone.
    Closed {
        /// The connection.
        conn: ConnId,
        /// Why, in words.
        why: String,
    },
    /// Whoever answered where we connected does not speak this protocol; the connection is gone.
    Foreign {
        /// The connection.
        conn: ConnId,
        /// What it spoke, in words.
        why: String,
    },
    /// A whole epoch was staged and verified.
    Staged {
        /// The connection.
        conn: ConnId,
        /// The epoch.
        epoch: Box<StagedEpoch>,
        /// When it began to arrive.
        began: Instant,
    },
    /// Background pages arrived.
    Background {
        /// The connection.
        conn: ConnId,
        /// Encoded pages, verified.
        payload: Vec<u8>,
    },
    /// A push was read and handed to the link.
    Pushed {
        /// The connection.
        conn: ConnId,
        /// Bytes it took.
        bytes: u64,
    },
    /// A secondary's hashes of blocks arrived.
    PeerHashes {
        /// The connection.
        conn: ConnId,
        /// The index of the first block.
        first: u64,
        /// The hashes.
        hashes: Vec<BlockHash>,
    },
    /// The hashes a primary asked itself for.
    OwnHashes {
        /// The question's ticket.
        ticket: u64,
        /// The hashes, or in words why there are none.
        hashes: Result<Vec<BlockHash>, String>,
    },
    /// The secondary of this instance id has hashed blocks.
    BlocksHashed {
        /// Whose.
        instance: InstanceId,
        /// The index of the first block.
        first: u64,
        /// The hashes.
        hashes: Vec<BlockHash>,
    },
    /// The open epoch has output.
    OutputWaiting,
    /// The output buffer is full.
    OutputFull,
    /// The disks' journal is full.
    JournalFull,
    /// Shared images have the writes of every epoch up to this one.
    Written {
        /// The epoch.
        through: EpochId,
    },
    /// Shared images have what was written before the newcomer on this connection was tracked for.
    StorageSynced {
        /// The connection.
        conn: ConnId,
    },
    /// Shared storage does not take writes (why), or takes them again.
    StorageFault(Option<String>),
    /// Disks whose writes found no room may find some now.
    DisksHaveRoom,
    /// The image of the newcomer or secondary of this instance id is spoilt.
    ImageFailed {
        /// Whose.
        instance: InstanceId,
        /// Why, in words.
        why: String,
    },
    /// The arbiter answered.
    Answer {
        /// The question's ticket.
        ticket: u64,
        /// The answer.
        answer: ArbiterAnswer,
    },
    /// Holes of this node's own image, which were asked for.
    Holes {
        /// The question's ticket.
        ticket: u64,
        /// The first block that was not looked at.
        through: u64,
        /// The holes before that.
        holes: Vec<std::ops::Range<u64>>,
    },
    /// An event of the machine.
    Machine(GuestEvent),
    /// A snapshot is wanted.
    Snapshot {
        /// What of it.
        request: SnapshotRequest,
        /// Where the result goes.
        reply: Reply,
    },
    /// A snapshot was written, or could not be.
    SnapshotWritten(Result<Written, SnapshotError>),
    /// A command from the control socket.
    Command {
        /// The command.
        command: Command,
        /// Where the result goes once the command took effect.
        reply: Option<Reply>,
    },
}

impl NodeEvent {
    /// The connection it is of, if it is of one.
    pub(super) fn conn(&self) -> Option<ConnId> {
        match self {
            NodeEvent::Accepted { conn, .. }
            | NodeEvent::Connected { conn, .. }
            | NodeEvent::Message { conn, .. }
            | NodeEvent::Closed { conn, .. }
            | NodeEvent::Foreign { conn, .. }
            | NodeEvent::Staged { conn, .. }
            | NodeEvent::Background { conn, .. }
            | NodeEvent::Pushed { conn, .. }
            | NodeEvent::PeerHashes { conn, .. }
            | NodeEvent::StorageSynced { conn } => Some(*conn),
            _ => None,
        }
    }

    /// Bytes that it holds and nobody else counts: a staged epoch is in the staging budget.
    pub(super) fn payload_bytes(&self) -> usize {
        match self {
            NodeEvent::Background { payload, .. } => payload.len(),
            NodeEvent::Holes { holes, .. } => size_of_val(holes.as_slice()),
            NodeEvent::PeerHashes { hashes, .. } => size_of_val(hashes.as_slice()),
            _ => 0,
        }
    }

    /// True for what a control client sent.
    pub(super) fn is_command(&self) -> bool {
        matches!(self, NodeEvent::Command { .. } | NodeEvent::Snapshot { .. })
    }
}
