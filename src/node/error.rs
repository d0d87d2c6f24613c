//! Why a node cannot start or go on, in one line each.

use thiserror::Error;

use super::disks::DiskError;
use crate::arbiter::ArbiterError;
use crate::checkpoint::apply::ApplyError;
use crate::checkpoint::snapshot::SnapshotError;
use crate::control::ControlError;
use crate::control::console::ConsoleError;
use crate::machine::MachineError;
use crate::protocol::types::{EpochId, Generation};
use crate::wire::LinkError;

/// Why a node cannot start or go on.
#[derive(Debug, Error)]
pub enum NodeError {
    /// The host cannot run the machine, or the machine failed.
    #[error("{0}")]
    Machine(#[from] MachineError),
    /// The tap cannot be used.
    #[error("{0}")]
    Tap(#[from] netbuf::TapError),
    /// The arbiter cannot be asked at the start.
    #[error("{0}")]
    Arbiter(#[from] ArbiterError),
    /// The control socket cannot be opened.
    #[error("{0}")]
    Control(#[from] ControlError),
    /// The console cannot be opened.
    #[error("{0}")]
    Console(#[from] ConsoleError),
    /// An epoch was committed that is not in staging memory.
    #[error(
        "epoch {0} was committed and is not staged; this node ends rather than acknowledge it, \
            please report this with the log"
    )]
    NotStaged(EpochId),
    /// A port cannot be listened on.
    #[error("{0}")]
    Listen(#[from] LinkError),
    /// A committed epoch could not be applied.
    #[error("{0}")]
    Apply(#[from] ApplyError),
    /// The arbiter knows the guest as running elsewhere.
    #[error(
        "guest '{guest}' is on record as running elsewhere ({record}); start this node with `mcd secondary`, or, if \
            no node of it runs any more, use `mcd cold-start`"
    )]
    RunsElsewhere {
        /// The guest.
        guest: String,
        /// The record, in words.
        record: String,
    },
    /// The arbiter did not say whether this node may start the guest.
    #[error(
        "the arbiter did not answer whether this node may start guest '{guest}' ({why}); start it again once the \
            arbiter answers; if that says that it runs elsewhere and no node runs it, use `mcd cold-start`"
    )]
    Unclaimed {
        /// The guest.
        guest: String,
        /// Why there is no answer.
        why: String,
    },
    /// The primary turned this node away.
    #[error("the primary refused this node: {0}")]
    Refused(String),
    /// Something else than a primary of this release answers at the primary's address.
    #[error("there is no primary to join at --peer: {0}")]
    NotAPrimary(String),
    /// This secondary cannot build the guest's machine.
    #[error("this host cannot hold the guest: {0}")]
    NoMachine(String),
    /// The guest cannot go on.
    #[error("the guest failed: {0}; its secondary, if it has one, takes over")]
    GuestFailed(String),
    /// A thread could not be started.
    #[error("the host gives no more threads ({0}); lower its load or raise its limits")]
    Thread(#[from] std::io::Error),
    /// A secondary without a primary to go to.
    #[error("a secondary needs --peer, the address where its primary listens")]
    NoPeer,
    /// The snapshot cannot be used.
    #[error("{0}")]
    Snapshot(#[from] SnapshotError),
    /// The disks cannot be used.
    #[error("{0}")]
    Disk(#[from] DiskError),
    /// A secondary that cannot hold what it has committed.
    #[error(
        "this secondary ends because its image is spoilt: {0}; \
            the primary goes on alone until this node is mended and started again"
    )]
    ImageFailed(String),
    /// The guest was given to this node, which cannot run it.
    #[error(
        "guest lost: it was given to this node in {generation} and cannot go on from epoch {epoch}: {why}; no node \
            runs it, so start it anew with `mcd cold-start`"
    )]
    NotRestored {
        /// The generation this node won.
        generation: Generation,
        /// The newest committed epoch.
        epoch: EpochId,
        /// Why it cannot go on.
        why: String,
    },
    /// The parts of the node went away under it.
    #[error("the node's threads ended before it did; this is a bug in mcd, please report it with the log")]
    Gone,
}
