//! What a node tells people: events for the log and the control socket.

use std::fmt;
use std::time::Duration;

use thiserror::Error;

use super::guest_event::GuestEvent;
use super::messages::RefuseReason;
use super::peer_loss::PeerLoss;
use super::types::{EpochId, Generation, InstanceId};

/// Something an operator may want to know.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A newcomer was accepted and is being filled.
    ResyncStarted {
        /// The newcomer.
        newcomer: InstanceId,
        /// Its host has a TSC of another speed and runs the guest's by scaling.
        scales_tsc: bool,
    },
    /// A newcomer was turned away.
    Refused {
        /// Why.
        reason: RefuseReason,
        /// In words.
        detail: String,
    },
    /// The newcomer went away before it was of use.
    NewcomerLost {
        /// Why.
        why: PeerLoss,
    },
    /// The guest has a committed copy elsewhere, and the arbiter knows.
    Protected {
        /// The generation of the pair.
        generation: Generation,
        /// The node that holds the copy.
        peer: InstanceId,
    },
    /// The guest has no copy any more.
    Unprotected {
        /// Why.
        why: String,
    },
    /// The peer may be dead; the arbiter is asked.
    Suspected {
        /// Why.
        why: PeerLoss,
    },
    /// The guest cannot be captured for now; past `stall_max` it is handed over.
    GuestStuck {
        /// How long the capture has lasted.
        stuck: Duration,
        /// For how long this node goes on vouching for the guest.
        stall_max: Duration,
    },
    /// Something is wrong with the guest itself.
    GuestAlarm {
        /// What.
        alarm: GuestEvent,
    },
    /// The guest could not be captured for too long: the secondary is asked to take over.
    HandedOver {
        /// Why.
        why: String,
    },
    /// This node takes over the guest.
    Takeover {
        /// The generation it won.
        generation: Generation,
        /// The epoch the guest goes on from.
        epoch: EpochId,
    },
    /// This node may no longer run the guest.
    Fenced {
        /// Why.
        why: String,
    },
    /// This node was asleep for too long and asks the arbiter before it releases anything.
    Stalled {
        /// For how long.
        stall: Duration,
    },
    /// The arbiter is out of reach. What that means depends on what the node is doing.
    ArbiterLost {
        /// Why.
        why: String,
    },
    /// The arbiter answers again.
    ArbiterBack,
    /// The guest's network card is joined to nothing: its frames are lost.
    TapLost {
        /// Why.
        why: String,
    },
    /// The tap is there again.
    TapBack {
        /// How many frames of the guest were lost since the guest runs here.
        lost_frames: u64,
    },
    /// The newcomer's disks were compared with this node's.
    DisksCompared {
        /// How many blocks.
        blocks: u64,
        /// How many of them it has already.
        same: u64,
    },
    /// The disks of the pair were verified.
    DisksVerified {
        /// How many blocks.
        blocks: u64,
        /// How many of them differ.
        different: u64,
    },
    /// The disks of the pair could not be verified.
    DisksNotVerified {
        /// Why.
        why: String,
    },
    /// There is no primary to join at the moment; it is tried again.
    NoPrimary {
        /// Why.
        why: String,
    },
    /// The guest is this node's, and another one still has the lock of its disk: the takeover
    /// waits.
    DiskLocked {
        /// Which disk, and what the system said.
        why: String,
    },
    /// The guest is this node's, and the storage of its disk does not take what was kept of it: the
    /// takeover waits.
    DiskFailing {
        /// Which disk, and what the system said.
        why: String,
    },
    /// The guest is this node's, on record, and cannot be run here: nobody has it any more.
    GuestLost {
        /// The generation this node won.
        generation: Generation,
        /// The newest committed epoch, which could not be restored.
        epoch: EpochId,
        /// Why.
        why: String,
    },
    /// The secondary lost its place; it joins again as a newcomer.
    Rejoining {
        /// Why.
        why: RejoinReason,
    },
}

/// Why a secondary drops its image and joins again.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Error)]
pub enum RejoinReason {
    /// The primary was lost before the image was of use.
    #[error("the primary was lost: {0}")]
    Lost(PeerLoss),
    /// Another node won the guest.
    #[error("the arbiter gave the guest to another node")]
    GuestElsewhere,
    /// Another node won the guest while this one waited for a shared disk.
    #[error("the guest was given to another node while this one waited for its disk")]
    GuestElsewhereMeanwhile,
    /// The arbiter does not know the guest.
    #[error("the arbiter has no record of this guest")]
    NoRecord,
}

/// Defines the names of all events from one table: a variant without a name does not compile, so
/// the list of names is complete.
macro_rules! event_names {
    ($($variant:pat => $name:literal,)*) => {
        impl Event {
            /// The names of all events. `docs/operating/reference.md` has an entry for each.
            pub const NAMES: &[&str] = &[$($name,)*];

            /// The name the control socket uses.
            pub fn name(&self) -> &'static str {
                match self {
                    $($variant => $name,)*
                }
            }
        }
    };
}

event_names! {
    Event::ResyncStarted { .. } => "MC_RESYNC",
    Event::Refused { .. } => "MC_REFUSED",
    Event::NewcomerLost { .. } => "MC_NEWCOMER_LOST",
    Event::Protected { .. } => "MC_PROTECTED",
    Event::Unprotected { .. } => "MC_UNPROTECTED",
    Event::Suspected { .. } => "MC_SUSPECTED",
    Event::GuestStuck { .. } => "MC_GUEST_STUCK",
    Event::GuestAlarm { .. } => "MC_GUEST_ALARM",
    Event::HandedOver { .. } => "MC_HANDED_OVER",
    Event::Takeover { .. } => "MC_TAKEOVER",
    Event::Fenced { .. } => "MC_FENCED",
    Event::Stalled { .. } => "MC_STALLED",
    Event::ArbiterLost { .. } => "MC_ARBITER_LOST",
    Event::ArbiterBack => "MC_ARBITER_BACK",
    Event::TapLost { .. } => "MC_TAP_LOST",
    Event::TapBack { .. } => "MC_TAP_BACK",
    Event::DisksCompared { .. } => "MC_DISKS_COMPARED",
    Event::DisksVerified { .. } => "MC_DISKS_VERIFIED",
    Event::DisksNotVerified { .. } => "MC_DISKS_NOT_VERIFIED",
    Event::NoPrimary { .. } => "MC_NO_PRIMARY",
    Event::DiskLocked { .. } => "MC_DISK_LOCKED",
    Event::DiskFailing { .. } => "MC_DISK_FAILING",
    Event::GuestLost { .. } => "MC_GUEST_LOST",
    Event::Rejoining { .. } => "MC_REJOINING",
}

impl Event {
    /// True for what an operator should look at, false for what goes as it should.
    pub fn is_warning(&self) -> bool {
        !matches!(
            self,
            Event::ResyncStarted { .. }
                | Event::Protected { .. }
                | Event::Takeover { .. }
                | Event::ArbiterBack
                | Event::TapBack { .. }
                | Event::DisksCompared { .. }
                | Event::DisksVerified { different: 0, .. }
        )
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Event::ResyncStarted { newcomer, scales_tsc } => {
                let how = if *scales_tsc { "; its host scales the guest's TSC" } else { "" };
                write!(f, "resync started with newcomer {newcomer:?}{how}")
            }
            Event::Refused { detail, .. } => write!(f, "newcomer refused: {detail}"),
            Event::NewcomerLost { why } => write!(f, "newcomer lost: {why}; the guest runs on alone"),
            Event::Protected { generation, peer } => write!(f, "protected in {generation} by {peer:?}"),
            Event::Unprotected { why } => {
                write!(f, "unprotected: {why}; the guest runs alone and waits for a newcomer")
            }
            Event::Suspected { why } => write!(f, "peer suspected: {why}; asking the arbiter"),
            Event::GuestStuck { stuck, stall_max } => write!(
                f,
                "the guest cannot be captured since {} ms; after {} ms it is handed over to the secondary",
                stuck.as_millis(),
                stall_max.as_millis()
            ),
            Event::GuestAlarm { alarm } => write!(f, "the guest {alarm}"),
            Event::HandedOver { why } => write!(f, "guest handed over: {why}; the secondary is asked to run it"),
            Event::Takeover { generation, epoch } => write!(f, "takeover: {generation}, from epoch {epoch}"),
            Event::Fenced { why } => write!(f, "fenced: {why}; the guest is stopped here and nothing is released"),
            Event::Stalled { stall } => {
                write!(
                    f,
                    "this node was asleep for {} ms; asking the arbiter before it releases anything",
                    stall.as_millis()
                )
            }
            Event::ArbiterLost { why } => {
                write!(f, "arbiter out of reach: {why}; it is asked again, and `mcd status` says what waits for it")
            }
            Event::ArbiterBack => write!(f, "arbiter answers again"),
            Event::TapLost { why } => write!(f, "the guest's network is gone: {why}"),
            Event::TapBack { lost_frames } => {
                write!(
                    f,
                    "the guest's network is back; {lost_frames} frames of the guest were lost on this node so far"
                )
            }
            Event::DisksCompared { blocks, same } => {
                write!(f, "the newcomer has {same} of {blocks} blocks of the guest's disks already")
            }
            Event::DisksVerified { blocks, different: 0 } => {
                write!(f, "disks verified: all {blocks} blocks are equal on both nodes")
            }
            Event::DisksVerified { blocks, different } => {
                write!(
                    f,
                    "disks verified: {different} of {blocks} blocks DIFFER on the two nodes; \
                        see docs/operating/disks.md"
                )
            }
            Event::DisksNotVerified { why } => write!(f, "disks not verified: {why}"),
            Event::NoPrimary { why } => write!(f, "no primary to join yet: {why}; trying again"),
            Event::DiskLocked { why } => {
                write!(f, "takeover waits for the disk: {why}; the guest goes on when it is free")
            }
            Event::DiskFailing { why } => write!(f, "takeover waits for the disk: {why}; it is tried again"),
            Event::GuestLost { generation, epoch, why } => write!(
                f,
                "the guest is lost: it was given to this node in {generation} and cannot go on from epoch {epoch}: \
                 {why}; start it anew with `mcd cold-start`"
            ),
            Event::Rejoining { why } => write!(f, "joining again as a newcomer: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_events_have_one_name() {
        for (at, name) in Event::NAMES.iter().enumerate() {
            assert!(name.starts_with("MC_"), "{name}");
            assert!(!Event::NAMES[..at].contains(name), "{name}");
        }
    }

    #[test]
    fn a_lost_arbiter_is_not_said_to_hold_output() {
        // It is asked while nothing is held too: by a primary that runs alone, by a secondary.
        let text = Event::ArbiterLost { why: "no quorum".into() }.to_string();
        assert!(text.contains("out of reach: no quorum") && !text.contains("held"), "{text}");
    }
}
