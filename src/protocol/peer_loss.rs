//! Why a node gives its peer up: silence, a closed connection, a goodbye, or a fault.

use std::time::Duration;

use thiserror::Error;

use super::types::EpochId;

/// What a peer did against the protocol. No node of this build does any of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
pub enum PeerFault {
    /// A message that has no place where it arrived.
    #[error("it sent what does not belong here ({0})")]
    Misplaced(&'static str),
    /// An epoch while none was expected.
    #[error("it sent epoch {0} out of turn")]
    EpochOutOfTurn(EpochId),
    /// An epoch other than the next one.
    #[error("it sent epoch {0} out of order")]
    EpochOutOfOrder(EpochId),
    /// An ack for an epoch that is not in flight.
    #[error("it acknowledged epoch {0}, which is not in flight")]
    AckNotInFlight(EpochId),
    /// Background pages while none were expected.
    #[error("it sent background pages out of turn")]
    PagesOutOfTurn,
    /// A pair that is not this one.
    #[error("it announced a pair that is not this one")]
    OtherPair,
    /// A second welcome, or a different one.
    #[error("it said welcome out of turn")]
    WelcomeOutOfTurn,
    /// Hashes of blocks while none were asked for.
    #[error("it sent hashes of blocks that nobody asked for")]
    UnaskedHashes,
    /// Hashes of other blocks than were asked for.
    #[error("it sent other hashes of blocks than it was asked for")]
    OtherHashes,
    /// A request for hashes outside a resync or a pair.
    #[error("it asked for hashes of blocks out of turn")]
    HashesOutOfTurn,
    /// A request for hashes while one was not answered yet.
    #[error("it asked for hashes of blocks again before it had them")]
    HashesAgain,
    /// A request for hashes of blocks that no disk has.
    #[error("it asked for hashes of blocks that no disk has")]
    NoSuchBlocks,
    /// A request for hashes from a node that did not offer them, or progress to one that is whole.
    #[error("it told of a resync in words that were not agreed on")]
    FeatureNotAgreed,
}

/// Why a peer is given up. A suspicion only: the arbiter decides what follows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Error)]
pub enum PeerLoss {
    /// No heartbeat for too long.
    #[error("no heartbeat for {} ms", silence.as_millis())]
    Silent {
        /// For how long.
        silence: Duration,
    },
    /// A connection closed or broke, or carried what could not be read.
    #[error("{0}")]
    Closed(String),
    /// It ended on purpose.
    #[error("it left ({0})")]
    Left(String),
    /// The primary cannot go on and asks this node to take over.
    #[error("it hands the guest over: {0}")]
    HandedOver(String),
    /// It broke the protocol.
    #[error(transparent)]
    Fault(#[from] PeerFault),
    /// A newcomer that is building its machine makes no progress.
    #[error("it has made no progress with building its machine for {} s", silence.as_secs())]
    NoProgress {
        /// For how long.
        silence: Duration,
    },
    /// The primary did not answer a hello.
    #[error("the primary did not answer in time")]
    NoAnswer,
    /// An epoch could not be captured, so there is nothing to send it.
    #[error("the guest could not be captured: {0}")]
    CaptureFailed(String),
}
