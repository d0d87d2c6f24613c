//! The connections of a node, by number.

use std::collections::HashMap;
use std::time::Duration;

use crate::protocol::block_hashes::BlockHash;
use crate::protocol::messages::Message;
use crate::protocol::types::ConnId;
use crate::protocol::types::Instant;
use crate::wire::block_hashes::encode_hashes;
use crate::wire::{FrameKind, LinkCloser, LinkWatch, LinkWriter};

/// What a watch has seen of a connection.
pub(crate) enum LinkNews {
    /// It is stuck and was closed; why, in words.
    Stuck(String),
    /// The peer's newest bytes came so long ago.
    Received(Duration),
}

/// The writing ends a driver holds. A connection's reading end belongs to its own thread.
#[derive(Default)]
pub(crate) struct Connections {
    open: HashMap<ConnId, Conn>,
}

struct Conn {
    /// Absent once a sender thread has it.
    writer: Option<LinkWriter>,
    closer: LinkCloser,
    /// Only data connections have one: heartbeats are checked by the protocol.
    watch: Option<LinkWatch>,
}

impl Connections {
    /// Adds an established connection.
    pub(crate) fn insert(&mut self, conn: ConnId, writer: LinkWriter, closer: LinkCloser) {
        self.open.insert(conn, Conn { writer: Some(writer), closer, watch: None });
    }

    /// Hands the writing end to someone else.
    pub(crate) fn take(&mut self, conn: ConnId) -> Option<(LinkWriter, LinkCloser)> {
        let conn = self.open.get_mut(&conn)?;
        Some((conn.writer.take()?, conn.closer.clone()))
    }

    /// Watches a connection from now on: sent bytes may be without an echo for so long.
    pub(crate) fn watch(&mut self, conn: ConnId, silence_max: Duration) {
        if let Some(conn) = self.open.get_mut(&conn) {
            conn.watch = Some(LinkWatch::new(conn.closer.clone(), silence_max));
        }
    }

    /// What the watches see. To be called often: they look only when it is time. A connection that
    /// needs a probe gets it here, or from `probe` if someone else has its writing end.
    pub(crate) fn news(&mut self, now: Instant, mut probe: impl FnMut(ConnId)) -> Option<(ConnId, LinkNews)> {
        let found = self.open.iter_mut().find_map(|(id, conn)| {
            let look = conn.watch.as_mut()?.look(now)?;
            if look.probe {
                match &mut conn.writer {
                    // If it cannot be written, the reading end hears of it.
                    Some(writer) => drop(writer.write(FrameKind::Probe, &[])),
                    None => probe(*id),
                }
            }
            let stuck = look
                .stuck
                .map(|silence| LinkNews::Stuck(format!("nothing came back from it for {} ms", silence.as_millis())));
            Some((*id, stuck.or(look.received.map(LinkNews::Received))?))
        });
        if let Some((conn, LinkNews::Stuck(_))) = &found {
            self.close(*conn);
        }
        found
    }

    /// Sends a message; the reason if it could not be.
    pub(crate) fn send(&mut self, conn: ConnId, message: &Message) -> Option<String> {
        let writer = self.open.get_mut(&conn)?.writer.as_mut()?;
        writer.write_message(message).err().map(|error| error.to_string())
    }

    /// Sends hashes of blocks; the reason if they could not be.
    pub(crate) fn send_hashes(&mut self, conn: ConnId, first: u64, hashes: &[BlockHash]) -> Option<String> {
        let writer = self.open.get_mut(&conn)?.writer.as_mut()?;
        writer.write(FrameKind::Hashes, &encode_hashes(first, hashes)).err().map(|error| error.to_string())
    }

    /// Forgets a connection that is gone.
    pub(crate) fn remove(&mut self, conn: ConnId) {
        self.open.remove(&conn);
    }

    /// Closes a connection; what was written before still leaves.
    pub(crate) fn close(&mut self, conn: ConnId) {
        if let Some(conn) = self.open.remove(&conn) {
            conn.closer.shutdown();
        }
    }

    /// Closes all connections.
    pub(crate) fn close_all(&mut self) {
        for (_, conn) in self.open.drain() {
            conn.closer.shutdown();
        }
    }
}
