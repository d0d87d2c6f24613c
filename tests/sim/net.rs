//! The network: connections with order, delay, partitions, resets, and hosts that fall silent.

use std::collections::VecDeque;

use mcd::protocol::block_hashes::BlockHash;
use mcd::protocol::messages::{Channel, Message};
use mcd::protocol::stall_detector::StallDetector;
use mcd::protocol::types::ConnId;
use mcd::protocol::types::EpochId;

use crate::stream::Receiver;
use crate::unknown_peers::UnknownPeer;

/// A process of the simulated world, numbered for all time.
pub type ProcId = usize;

/// What travels.
#[derive(Clone, Debug)]
pub enum Item {
    Message(Message),
    /// Bytes of an epoch, or of pages outside of one; they may be cut anywhere.
    Bulk {
        bytes: Vec<u8>,
        pages: usize,
        what: Bulk,
    },
    /// A secondary's hashes of blocks.
    Hashes {
        first: u64,
        hashes: Vec<BlockHash>,
    },
    /// The sender closed.
    Fin,
}

impl Item {
    /// Pages it carries: what makes it long.
    pub fn pages(&self) -> usize {
        match self {
            Item::Bulk { pages, .. } => *pages,
            Item::Message(_) | Item::Hashes { .. } | Item::Fin => 0,
        }
    }

    pub fn name(&self) -> String {
        match self {
            Item::Message(Message::Ack { id, .. }) => format!("ack {id}"),
            Item::Message(Message::Paired { record }) => format!("paired {}", record.generation),
            Item::Message(Message::Heartbeat(beat)) => format!("heartbeat #{}", beat.sequence),
            Item::Message(message) => message.name().into(),
            Item::Bulk { pages, what: Bulk::Background, .. } => format!("background {pages} pages"),
            Item::Bulk { what: Bulk::Epoch(id, part), .. } => format!("epoch {id}, {part}"),
            Item::Hashes { first, hashes } => format!("hashes of {} blocks from {first} on", hashes.len()),
            Item::Fin => "fin".into(),
        }
    }
}

/// Whose bytes travel.
#[derive(Clone, Copy, Debug)]
pub enum Bulk {
    /// A part of this epoch.
    Epoch(EpochId, &'static str),
    Background,
}

/// One end of a connection.
pub struct End {
    pub proc: ProcId,
    pub slot: usize,
    /// The number the process knows the connection by.
    pub local: ConnId,
    /// The process closed it or knows that it is gone.
    pub closed: bool,
    /// The host died: nothing is received, nothing answered.
    pub silent: bool,
    /// What is sent from here gets lost: the connection is broken, but nobody knows yet.
    pub broken: bool,
    /// The oldest item not yet acknowledged was sent then.
    pub unacked_since: Option<u64>,
    /// Items on their way from this end: when sent, when due, what.
    pub queue: VecDeque<(u64, u64, Item)>,
    /// Items that arrived here and that the process does not read, because it has no room for them.
    pub unread: VecDeque<Item>,
    /// This host's kernel takes nothing before.
    pub window_closed_until: u64,
    /// The accepting process has heard a hello over it.
    pub greeted: bool,
    /// Reads epochs out of the bytes that arrive.
    pub receiver: Option<Box<Receiver>>,
    /// When bytes of the other end last arrived in this host's kernel.
    pub received_at: u64,
    /// When the other end's kernel last acknowledged anything.
    pub echoed_at: u64,
    /// Detects that bytes do not arrive any more, once the driver has it do so.
    pub detector: Option<StallDetector>,
}

impl End {
    pub fn new(proc: ProcId, slot: usize, local: ConnId) -> End {
        End {
            proc,
            slot,
            local,
            closed: false,
            silent: false,
            broken: false,
            unacked_since: None,
            queue: VecDeque::new(),
            unread: VecDeque::new(),
            window_closed_until: 0,
            greeted: false,
            receiver: None,
            received_at: 0,
            echoed_at: 0,
            detector: None,
        }
    }
}

/// A connection: end 0 asked for it, end 1 accepted it.
pub struct Conn {
    pub channel: Channel,
    pub ends: [End; 2],
    pub established: bool,
    /// Whose it is, if it is no node's.
    pub unknown: Option<UnknownPeer>,
}

/// Until when what is blocked.
#[derive(Debug, Default)]
pub struct Weather {
    /// `[channel][from][to]`
    blocked: [[[u64; 3]; 3]; 2],
    /// `[channel]`: every delivery takes this much longer, until then.
    pub slow: [(u64, u64); 2],
    /// `[from][to]`: until when the wire carries little, and the time each page takes then.
    pub narrow: [[(u64, u64); 3]; 3],
    /// `[from][to]`: when all that was sent before will have left the queue before the narrow wire.
    queue_ends: [[u64; 3]; 3],
    pub arbiter_deaf_until: [u64; 3],
    pub arbiter_mute_until: [u64; 3],
}

fn index(channel: Channel) -> usize {
    match channel {
        Channel::Data => 0,
        Channel::Heartbeat => 1,
    }
}

impl Weather {
    pub fn block(&mut self, channel: Channel, from: usize, to: usize, until: u64) {
        let cell = &mut self.blocked[index(channel)][from][to];
        *cell = (*cell).max(until);
    }

    /// Until when nothing passes; a time in the past if something does.
    pub fn blocked_until(&self, channel: Channel, from: usize, to: usize) -> u64 {
        self.blocked[index(channel)][from][to]
    }

    pub fn extra_us(&self, channel: Channel, now: u64) -> u64 {
        let (until, extra) = self.slow[index(channel)];
        if now < until { extra } else { 0 }
    }

    /// When `pages` sent now are through the wire, on which all connections of two hosts share one
    /// queue.
    pub fn through(&mut self, from: usize, to: usize, now: u64, pages: usize) -> u64 {
        let (until, page_us) = self.narrow[from][to];
        let cost = if now < until { page_us * pages as u64 } else { 0 };
        let ends = &mut self.queue_ends[from][to];
        *ends = (*ends).max(now) + cost;
        *ends
    }

    /// Ends all weather; what is in a queue still takes its time.
    pub fn clear(&mut self) {
        *self = Weather { queue_ends: self.queue_ends, ..Weather::default() };
    }
}
