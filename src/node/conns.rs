//! The connections of a node, by number.

use std::collections::HashMap;
use std::time::Duration;

use super::clock;
use crate::protocol::messages::Message;
use crate::protocol::primary::ConnId;
use crate::wire::{LinkCloser, LinkWatch, LinkWriter};

/// The writing ends a driver holds. A connection's reading end belongs to its own thread.
#[derive(Default)]
pub struct Conns {
    open: HashMap<ConnId, Conn>,
    /// Absent until it is known how long the peer's silence may last.
    unacknowledged_max: Option<Duration>,
}

struct Conn {
    /// Absent once a sender thread has it.
    writer: Option<LinkWriter>,
    closer: LinkCloser,
    watch: Option<LinkWatch>,
}

impl Conns {
    /// A connection stands.
    pub fn insert(&mut self, conn: ConnId, writer: LinkWriter, closer: LinkCloser) {
        let watch = self.unacknowledged_max.map(|time| LinkWatch::new(closer.clone(), time));
        self.open.insert(conn, Conn { writer: Some(writer), closer, watch });
    }

    /// Hands the writing end to someone else.
    pub fn take(&mut self, conn: ConnId) -> Option<(LinkWriter, LinkCloser)> {
        let conn = self.open.get_mut(&conn)?;
        Some((conn.writer.take()?, conn.closer.clone()))
    }

    /// From now on a connection is given up when sent bytes stay unacknowledged for longer than this.
    pub fn set_unacknowledged_max(&mut self, time: Duration) {
        self.unacknowledged_max = Some(time);
        for conn in self.open.values_mut() {
            conn.watch = Some(LinkWatch::new(conn.closer.clone(), time));
        }
    }

    /// Gives up a connection on which nothing arrives any more, and tells why. To be called often: it looks only when it is time.
    pub fn give_up_stuck(&mut self) -> Option<(ConnId, String)> {
        let now_us = clock::monotonic_us();
        let (conn, stuck_us) =
            self.open.iter_mut().find_map(|(id, conn)| Some((*id, conn.watch.as_mut()?.look(now_us)?)))?;
        self.close(conn);
        Some((conn, format!("nothing sent to it has arrived for {} ms", stuck_us / 1000)))
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
