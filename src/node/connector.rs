//! The connections this node opens: to its primary, each with a thread that reads.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::acceptor::{ENDING, read_heartbeats};
use super::events::NodeEvent;
use super::inbox::InboxSender;
use super::{clock, priority};
use crate::checkpoint::receiver::{EpochReceiver, ReceiveError, Received};
use crate::checkpoint::stage::StagingBudget;
use crate::protocol::messages::Channel;
use crate::protocol::types::ConnId;
use crate::wire::HeartbeatPeer;
use crate::wire::link::{Link, LinkReader};

/// How long a connection to a primary may take to be established.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Connects to a primary's `channel` in a thread of its own, which then reads.
///
/// # Errors
/// If the thread cannot be started.
pub(super) fn connect(
    conn: ConnId,
    (to, channel): (SocketAddr, Channel),
    budget: Arc<StagingBudget>,
    events: InboxSender,
) -> std::io::Result<()> {
    std::thread::Builder::new().name("mcd-receive".into()).spawn(move || {
        let end = match Link::connect(&to.to_string(), CONNECT_TIMEOUT) {
            Ok(link) => {
                let closer = link.closer();
                let (mut reader, writer) = link.split();
                // Whoever has an event drives the engine with it.
                priority::raise();
                if events.link_event(NodeEvent::Connected { conn, writer, closer: closer.clone() }).is_err() {
                    return;
                }
                let end = match channel {
                    Channel::Data => receive(conn, EpochReceiver::new(budget), &mut reader, &events),
                    Channel::Heartbeat => {
                        let error = read_heartbeats(conn, HeartbeatPeer::Primary, &mut reader, &events);
                        ended(conn, error.map(|error| (error.is_foreign(), error.to_string())))
                    }
                };
                closer.shutdown();
                end
            }
            Err(error) => NodeEvent::Closed { conn, why: error.to_string() },
        };
        // A node that is ending needs no more events.
        let _ = events.link_event(end);
    })?;
    Ok(())
}

/// Reads what a primary sends over the data connection until there is no more to read; the event
/// that says why.
fn receive(conn: ConnId, mut receiver: EpochReceiver, reader: &mut LinkReader, events: &InboxSender) -> NodeEvent {
    loop {
        let received = match reader.read().map_err(ReceiveError::from) {
            Ok(frame) => receiver.take(clock::now(), frame),
            Err(error) => Err(error),
        };
        let event = match received {
            Ok(Received::Nothing) => continue,
            Ok(Received::Message(message)) => NodeEvent::Message { conn, message },
            Ok(Received::Epoch { epoch, began }) => NodeEvent::Staged { conn, epoch, began },
            Ok(Received::Background(payload)) => NodeEvent::Background { conn, payload },
            Err(error) => return ended(conn, Some((error.is_foreign(), error.to_string()))),
        };
        if events.link_event(event).is_err() {
            return ended(conn, None);
        }
    }
}

/// The event of a connection that ended: because of a peer that may be foreign, with the reason in
/// words, or because this node ends.
fn ended(conn: ConnId, error: Option<(bool, String)>) -> NodeEvent {
    match error {
        Some((true, why)) => NodeEvent::Foreign { conn, why },
        Some((false, why)) => NodeEvent::Closed { conn, why },
        None => NodeEvent::Closed { conn, why: ENDING.into() },
    }
}
