//! The names of things: generations, epochs, instances, guests, and a clock that nobody owns.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

/// A point in time, in microseconds since an origin that only the driver knows.
///
/// `protocol/` never reads a clock: the driver (or the simulator) says what time it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant {
    /// Microseconds since the driver's origin.
    pub us: u64,
}

impl Instant {
    /// A point `us` microseconds after the origin.
    pub const fn from_us(us: u64) -> Self {
        Instant { us }
    }

    /// The point `time` earlier, but not before the origin.
    pub fn before(self, time: Duration) -> Instant {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Instant { us: self.us.saturating_sub(us) }
    }

    /// The time that passed since `earlier`; zero if `earlier` is later.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_micros(self.us.saturating_sub(earlier.us))
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, rhs: Duration) -> Instant {
        let us = u64::try_from(rhs.as_micros()).unwrap_or(u64::MAX);
        Instant { us: self.us.saturating_add(us) }
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;
    fn sub(self, rhs: Instant) -> Duration {
        self.since(rhs)
    }
}

/// Goes up each time a node is allowed to run alone or takes over, and each time a pair forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation after this one.
    pub fn next(self) -> Generation {
        Generation(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}", self.0)
    }
}

/// One epoch, named for all time: epochs are numbered from 0 inside their generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct EpochId {
    /// The generation the epoch belongs to.
    pub generation: Generation,
    /// Its number inside that generation, from 0.
    pub epoch: u64,
}

impl EpochId {
    /// The epoch after this one in the same generation.
    pub fn next(self) -> EpochId {
        EpochId { generation: self.generation, epoch: self.epoch.saturating_add(1) }
    }
}

impl fmt::Display for EpochId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.generation, self.epoch)
    }
}

/// Names one start of one `mcd` process (or one life of it as a newcomer): a node that lost its
/// image has a new instance id, so that it can never take over in the name of what it was.
pub use super::id::Id as InstanceId;

/// Names a connection; the driver gives the numbers and never uses one twice.
pub type ConnId = u64;

/// Why shared storage cannot be had yet.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StorageFault {
    /// Another node has its lock.
    Locked(String),
    /// It does not take what this node kept.
    Failing(String),
}

/// Longest guest name, in bytes.
pub const GUEST_NAME_BYTES_MAX: usize = 64;

/// The name of a guest: 1 to 64 bytes of letters, digits, `-`, `_` and `.`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestName(String);

impl GuestName {
    /// Checks and takes a name; `None` if it is not one.
    pub fn new(name: &str) -> Option<GuestName> {
        let ok = !name.is_empty()
            && name.len() <= GUEST_NAME_BYTES_MAX
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        ok.then(|| GuestName(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_names_are_checked() {
        assert!(GuestName::new("web-1.prod_a").is_some());
        for bad in ["", "a b", "a/b", "ä", &"x".repeat(65)] {
            assert!(GuestName::new(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn time_does_not_wrap() {
        let end = Instant::from_us(u64::MAX);
        assert_eq!(end + Duration::from_secs(1), end);
        assert_eq!(Instant::from_us(1).since(end), Duration::ZERO);
    }
}
