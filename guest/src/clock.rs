//! From time stamp counter ticks to nanoseconds, as the kvmclock ABI defines it.

/// `ticks` in nanoseconds: shifted by `shift` (left if positive), then multiplied by `multiplier` /
/// 2^32.
pub fn scale(ticks: u64, multiplier: u32, shift: i8) -> u64 {
    let shifted = if shift < 0 {
        ticks.checked_shr(u32::from(shift.unsigned_abs())).unwrap_or(0)
    } else {
        ticks.checked_shl(u32::from(shift.unsigned_abs())).unwrap_or(0)
    };
    ((u128::from(shifted) * u128::from(multiplier)) >> 32) as u64
}

#[cfg(test)]
mod tests {
    use super::scale;

    #[test]
    fn scales_as_kvm_does() {
        // 2 GHz: half a nanosecond per tick.
        assert_eq!(scale(2_000_000_000, 1 << 31, 0), 1_000_000_000);
        assert_eq!(scale(1 << 20, u32::MAX, -1), (1 << 19) - 1);
        assert_eq!(scale(1 << 20, 1 << 31, 1), 1 << 20);
        assert_eq!(scale(u64::MAX, u32::MAX, -128), 0);
        assert_eq!(scale(u64::MAX, u32::MAX, 127), 0);
    }
}
