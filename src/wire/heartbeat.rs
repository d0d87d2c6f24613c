//! What may travel on a heartbeat connection: heartbeats, and from the primary first its answer to
//! the hello.
//!
//! Everything else belongs on the data connection. A peer that could send bulk frames here would
//! delay its own heartbeats, and have this node read megabytes in the place of a few bytes.

use thiserror::Error;

use super::error::WireError;
use super::frame::{Frame, FrameKind};
use crate::protocol::messages::Message;

/// Whose frames are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeartbeatPeer {
    /// A newcomer's or secondary's, after its hello.
    Secondary,
    /// A primary's: it welcomes or refuses first.
    Primary,
}

/// Why a heartbeat connection is of no more use.
#[derive(Debug, Error)]
pub enum HeartbeatError {
    /// A frame or a message breaks the format.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A frame that is no message.
    #[error("it sent a {0} frame, which does not belong on a heartbeat connection")]
    Frame(FrameKind),
    /// A message that is no heartbeat.
    #[error("it sent what does not belong on a heartbeat connection ({0})")]
    Message(&'static str),
}

impl HeartbeatError {
    /// True if the peer does not speak this version of the protocol: connecting to it again would
    /// not help.
    pub fn is_foreign(&self) -> bool {
        matches!(self, HeartbeatError::Wire(error) if error.is_foreign())
    }
}

/// The message in a frame that `peer` sent over its heartbeat connection.
///
/// # Errors
/// [`HeartbeatError`] for everything that does not belong there.
pub fn heartbeat_message(peer: HeartbeatPeer, frame: Frame<'_>) -> Result<Message, HeartbeatError> {
    if frame.kind != FrameKind::Message {
        return Err(HeartbeatError::Frame(frame.kind));
    }
    match (frame.message()?, peer) {
        (message @ Message::Heartbeat(_), _) => Ok(message),
        (message @ (Message::Welcome(_) | Message::Refuse { .. }), HeartbeatPeer::Primary) => Ok(message),
        (message, _) => Err(HeartbeatError::Message(message.name())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::messages::{Heartbeat, RefuseReason};
    use crate::protocol::types::{Generation, InstanceId};
    use crate::wire::{FrameBatch, FrameReader};

    fn read(peer: HeartbeatPeer, batch: &FrameBatch) -> Result<Message, HeartbeatError> {
        heartbeat_message(peer, FrameReader::new(batch.as_bytes()).read().unwrap())
    }

    fn message(peer: HeartbeatPeer, message: &Message) -> Result<Message, HeartbeatError> {
        let mut batch = FrameBatch::new();
        batch.push_message(message).unwrap();
        read(peer, &batch)
    }

    #[test]
    fn only_heartbeats_and_the_answer_to_a_hello_pass() {
        let beat = Heartbeat {
            instance: InstanceId(1),
            generation: Generation(2),
            sequence: 3,
            committed: None,
            activity: crate::protocol::messages::Activity::Ready,
        };
        let refuse = Message::Refuse { reason: RefuseReason::Busy, detail: "one is enough".into() };
        for peer in [HeartbeatPeer::Primary, HeartbeatPeer::Secondary] {
            assert_eq!(message(peer, &Message::Heartbeat(beat)).unwrap(), Message::Heartbeat(beat));
            let bye = message(peer, &Message::Bye { reason: "over".into() });
            assert!(matches!(bye, Err(HeartbeatError::Message("bye"))));
        }
        assert!(message(HeartbeatPeer::Primary, &refuse).is_ok());
        assert!(matches!(message(HeartbeatPeer::Secondary, &refuse), Err(HeartbeatError::Message("refuse"))));
    }

    #[test]
    fn no_other_frame_passes() {
        for kind in FrameKind::ALL.into_iter().filter(|kind| *kind != FrameKind::Message) {
            let mut batch = FrameBatch::new();
            batch.push(kind, &[]).unwrap();
            for peer in [HeartbeatPeer::Primary, HeartbeatPeer::Secondary] {
                assert!(matches!(read(peer, &batch), Err(HeartbeatError::Frame(found)) if found == kind));
            }
        }
        let mut batch = FrameBatch::new();
        batch.push(FrameKind::Message, &[255]).unwrap();
        assert!(read(HeartbeatPeer::Primary, &batch).unwrap_err().is_foreign());
    }
}
