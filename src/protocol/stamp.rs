//! Which disk images a guest may start from: what the stamp beside each of them says.

use std::fmt;

use thiserror::Error;

use super::types::{EpochId, Generation, GuestName};

/// What an image is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StampState {
    /// A disk as a guest left it: in the order in which it wrote, as after a loss of power at
    /// worst.
    Whole,
    /// A secondary's: whole, but if its node did not end in order, an epoch may be in it by half.
    Applying,
    /// A newcomer's: parts are missing.
    Filling,
}

impl StampState {
    /// Every state.
    pub const ALL: [StampState; 3] = [StampState::Whole, StampState::Applying, StampState::Filling];

    /// The word for it, in stamps and for people.
    pub fn word(self) -> &'static str {
        match self {
            StampState::Whole => "whole",
            StampState::Applying => "applying",
            StampState::Filling => "filling",
        }
    }
}

impl fmt::Display for StampState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Why a guest must not start from an image.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StampRefusal {
    /// It is another guest's.
    #[error("it belongs to guest '{0}'")]
    OtherGuest(GuestName),
    /// It is not whole.
    #[error("it was being filled by a resync at {0} and is not whole")]
    Filling(EpochId),
    /// It may not be consistent.
    #[error("it is a secondary's, at {0}, which did not end in order, so an epoch may be in it by half")]
    Applying(EpochId),
    /// There is a newer one.
    #[error("it is of {at}, and the arbiter knows of {newest}: the newest image is on the other host")]
    Old {
        /// What the stamp says.
        at: EpochId,
        /// The newest generation on record.
        newest: Generation,
    },
}

/// Whether `guest` may start from an image that is stamped as `owner`'s, so new and so good, when
/// `newest` is the newest generation on record, if there is a record.
///
/// # Errors
/// [`StampRefusal`].
pub fn check_start_from(
    (owner, at, state): (&GuestName, EpochId, StampState),
    guest: &GuestName,
    newest: Option<Generation>,
) -> Result<(), StampRefusal> {
    match (state, newest) {
        _ if owner != guest => Err(StampRefusal::OtherGuest(owner.clone())),
        (StampState::Filling, _) => Err(StampRefusal::Filling(at)),
        (_, Some(newest)) if at.generation < newest => Err(StampRefusal::Old { at, newest }),
        (StampState::Applying, _) => Err(StampRefusal::Applying(at)),
        (StampState::Whole, _) => Ok(()),
    }
}
