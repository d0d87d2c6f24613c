//! Which virtio devices no driver of the guest has looked at. A kernel without virtio-mmio boots,
//! and then has neither a network nor a disk.

use std::sync::atomic::{AtomicU32, Ordering};

/// The virtio devices of a machine, by number, and whether a driver has read or written a register
/// of each.
#[derive(Debug)]
pub struct DriverLooks {
    names: Vec<String>,
    /// A bit for each that nobody has looked at.
    unseen: AtomicU32,
}

impl DriverLooks {
    /// Nobody has looked at any of these; at most 32 of them count.
    pub(super) fn new(names: Vec<String>) -> DriverLooks {
        let unseen = (0..32).take(names.len()).fold(0, |bits, number| bits | 1 << number);
        DriverLooks { names, unseen: AtomicU32::new(unseen) }
    }

    /// A driver looks at the device with this number.
    pub(super) fn seen(&self, number: usize) {
        let bit = u32::try_from(number).ok().and_then(|number| 1u32.checked_shl(number)).unwrap_or(0);
        // Nearly always it is known already, and then nothing is written.
        if self.unseen.load(Ordering::Relaxed) & bit != 0 {
            self.unseen.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// The machine goes on from a saved state, in which drivers may have looked at all of them.
    pub(super) fn restored(&self) {
        self.unseen.store(0, Ordering::Relaxed);
    }

    /// Those that no driver has looked at.
    pub fn unseen(&self) -> Vec<String> {
        let unseen = self.unseen.load(Ordering::Relaxed);
        let is_unseen = |number: &usize| *number < 32 && unseen & (1 << number) != 0;
        self.names.iter().enumerate().filter(|(number, _)| is_unseen(number)).map(|(_, name)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_unseen_until_a_driver_looks_at_it() {
        let looks = DriverLooks::new(vec!["network card".into(), "disk 0".into(), "random source".into()]);
        assert_eq!(looks.unseen(), ["network card", "disk 0", "random source"]);
        looks.seen(1);
        looks.seen(1);
        looks.seen(70);
        assert_eq!(looks.unseen(), ["network card", "random source"]);
        looks.restored();
        assert!(looks.unseen().is_empty());
        assert!(DriverLooks::new(Vec::new()).unseen().is_empty());
    }
}
