//! The connections of a node, by number.

use std::collections::HashMap;

use crate::protocol::messages::Message;
use crate::protocol::primary::ConnId;
use crate::wire::{LinkCloser, LinkWriter};

/// The writing ends a driver holds. A connection's reading end belongs to its own thread.
#[derive(Default)]
pub struct Conns {
    open: HashMap<ConnId, Conn>,
}

struct Conn {
    /// Absent once a sender thread has it.
    writer: Option<LinkWriter>,
    closer: LinkCloser,
}

impl Conns {
    /// A connection stands.
    pub fn insert(&mut self, conn: ConnId, writer: LinkWriter, closer: LinkCloser) {
        self.open.insert(conn, Conn { writer: Some(writer), closer });
    }

    /// Hands the writing end to someone else.
    pub fn take(&mut self, conn: ConnId) -> Option<(LinkWriter, LinkCloser)> {
        let conn = self.open.get_mut(&conn)?;
        Some((conn.writer.take()?, conn.closer.clone()))
    }

    /// Sends a message; the reason if it could not be.
    pub fn send(&mut self, conn: ConnId, message: &Message) -> Option<String> {
        let writer = self.open.get_mut(&conn)?.writer.as_mut()?;
        writer.write_message(message).err().map(|error| error.to_string())
    }

    /// Forgets a connection that is gone.
    pub fn remove(&mut self, conn: ConnId) {
        self.open.remove(&conn);
    }

    /// Closes a connection; what was written before still leaves.
    pub fn close(&mut self, conn: ConnId) {
        if let Some(conn) = self.open.remove(&conn) {
            conn.closer.shutdown();
        }
    }

    /// Closes all connections.
    pub fn close_all(&mut self) {
        for (_, conn) in self.open.drain() {
            conn.closer.shutdown();
        }
    }
}
