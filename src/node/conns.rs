//! The connections of a node, by number.

use std::collections::HashMap;

use crate::protocol::messages::Message;
use crate::protocol::primary::ConnId;
use crate::wire::link::{LinkHandle, LinkWriter};

/// The writing ends a driver holds. A connection's reading end belongs to its own thread.
#[derive(Default)]
pub struct Conns {
    open: HashMap<ConnId, Conn>,
}

struct Conn {
    /// Absent once a sender thread has it.
    writer: Option<LinkWriter>,
    handle: LinkHandle,
}

impl Conns {
    /// A connection stands.
    pub fn insert(&mut self, conn: ConnId, writer: LinkWriter) {
        let handle = writer.handle();
        self.open.insert(conn, Conn { writer: Some(writer), handle });
    }

    /// Hands the writing end to someone else.
    pub fn take(&mut self, conn: ConnId) -> Option<LinkWriter> {
        self.open.get_mut(&conn)?.writer.take()
    }

    /// Sends a message; the reason if it could not be.
    pub fn send(&mut self, conn: ConnId, message: &Message) -> Option<String> {
        let writer = self.open.get_mut(&conn)?.writer.as_mut()?;
        writer.send(message).err().map(|error| error.to_string())
    }

    /// Forgets a connection that is gone.
    pub fn remove(&mut self, conn: ConnId) {
        self.open.remove(&conn);
    }

    /// Closes a connection; what was written before still leaves.
    pub fn close(&mut self, conn: ConnId) {
        if let Some(conn) = self.open.remove(&conn) {
            conn.handle.shutdown();
        }
    }

    /// Closes all connections.
    pub fn close_all(&mut self) {
        for (_, conn) in self.open.drain() {
            conn.handle.shutdown();
        }
    }
}
