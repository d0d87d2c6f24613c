//! Whether a guest that runs on one host's CPU can go on on another's: told before it has to, not
//! when its host is gone.

use thiserror::Error;

/// Most parts per million by which a guest's TSC and a host's may differ without scaling: what KVM
/// itself takes for equal.
pub const TSC_TOLERANCE_PPM: u64 = 250;

/// The CPU a guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestCpu {
    /// A digest of its features.
    pub digest: u64,
    /// How fast its TSC runs, in kHz.
    pub tsc_khz: u32,
}

/// The CPU a host can give a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostCpu {
    /// A digest of the features it can give.
    pub digest: u64,
    /// How fast its own TSC runs, in kHz.
    pub tsc_khz: u32,
    /// It can give a guest a TSC of another speed.
    pub tsc_scales: bool,
}

/// Why a guest cannot go on on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CpuUnfit {
    /// It would see other features.
    #[error("has other CPU features than the guest was started with; use hosts of one kind, or --cpu baseline on both")]
    Features,
    /// Its TSC would change its speed.
    #[error(
        "has a TSC of {host_khz} kHz and cannot scale it, and the guest was started with one of {guest_khz} kHz; use \
         hosts whose TSC has the same speed, or one whose KVM scales it"
    )]
    Tsc {
        /// The guest's, in kHz.
        guest_khz: u32,
        /// The host's, in kHz.
        host_khz: u32,
    },
}

/// Whether a TSC of `host_khz` is as good as one of `guest_khz` by itself.
pub fn same_tsc(guest_khz: u32, host_khz: u32) -> bool {
    let off_khz = u64::from(host_khz.abs_diff(guest_khz));
    off_khz * 1_000_000 <= u64::from(guest_khz) * TSC_TOLERANCE_PPM
}

impl HostCpu {
    /// What a guest sees that is started on this host.
    pub fn own_guest(self) -> GuestCpu {
        GuestCpu { digest: self.digest, tsc_khz: self.tsc_khz }
    }

    /// Whether `guest` can go on on this host; true if its TSC must be scaled for that.
    ///
    /// # Errors
    /// [`CpuUnfit`].
    pub fn takes(self, guest: GuestCpu) -> Result<bool, CpuUnfit> {
        if self.digest != guest.digest {
            return Err(CpuUnfit::Features);
        }
        match same_tsc(guest.tsc_khz, self.tsc_khz) {
            true => Ok(false),
            false if self.tsc_scales => Ok(true),
            false => Err(CpuUnfit::Tsc { guest_khz: guest.tsc_khz, host_khz: self.tsc_khz }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_takes_what_it_can_run_unchanged() {
        let guest = GuestCpu { digest: 7, tsc_khz: 2_000_000 };
        let host = |tsc_khz, tsc_scales| HostCpu { digest: 7, tsc_khz, tsc_scales };
        // 250 ppm of 2 GHz are 500 kHz.
        for near in [2_000_000, 2_000_500, 1_999_500] {
            assert_eq!(host(near, false).takes(guest), Ok(false));
        }
        for (far, scales) in [(2_000_501, true), (1_999_499, true), (4_294_967_295, true)] {
            assert_eq!(host(far, scales).takes(guest), Ok(true));
            let refused = CpuUnfit::Tsc { guest_khz: 2_000_000, host_khz: far };
            assert_eq!(host(far, false).takes(guest), Err(refused));
        }
        assert_eq!(HostCpu { digest: 8, ..host(2_000_000, true) }.takes(guest), Err(CpuUnfit::Features));
        assert_eq!(host(2_000_000, false).own_guest(), guest);
    }
}
