//! Starting a guest: which record a primary may claim it with.

use super::record::{Record, RecordState};
use super::types::InstanceId;

/// Why a primary may not start the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimRefused {
    /// The arbiter knows it as running elsewhere (or nobody said that it stopped).
    Elsewhere(Record),
}

/// The record with which `me` may start the guest that the arbiter knows as `stands`.
///
/// `cold` is the operator's word that no node of the record runs any more: only then is a guest
/// claimed that was never stopped.
pub fn claim(stands: Option<Record>, me: InstanceId, cold: bool) -> Result<Record, ClaimRefused> {
    match stands {
        None => Ok(Record::first(me)),
        Some(record) if record.state == RecordState::Stopped || cold => Ok(record.next_solo(me)),
        Some(record) => Err(ClaimRefused::Elsewhere(record)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_runs_elsewhere_is_not_started() {
        let (me, other) = (InstanceId(1), InstanceId(2));
        let first = claim(None, other, false).unwrap();
        assert_eq!(claim(Some(first), me, false), Err(ClaimRefused::Elsewhere(first)));
        let paired = first.next_paired(other, InstanceId(3));
        assert_eq!(claim(Some(paired), me, false), Err(ClaimRefused::Elsewhere(paired)));
        assert_eq!(claim(Some(paired), me, true), Ok(paired.next_solo(me)));
        let stopped = paired.next_stopped();
        assert_eq!(claim(Some(stopped), me, false), Ok(stopped.next_solo(me)));
    }
}
