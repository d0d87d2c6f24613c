//! Kernel structures as bytes.
//!
//! KVM's structures have a fixed layout (they are the kernel's ABI) and fill every byte with named
//! fields, padding included, so their bytes are a stable form of them. The state format stores them
//! as they are, on little-endian x86-64.

use kvm_bindings::{
    kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};

use super::sections::{Fields, FormatError};

/// A structure that is nothing but its bytes.
///
/// # Safety
/// The type must be `repr(C)` without implicit padding, and every bit pattern must be a value of
/// it.
pub(super) unsafe trait KvmStruct: Copy {}

// SAFETY: each is a kernel ABI structure of integers (or a union of such) whose padding is spelled
// out as fields; the sizes are asserted below against the hashes of their fields.
unsafe impl KvmStruct for kvm_regs {}
// SAFETY: as above.
unsafe impl KvmStruct for kvm_sregs {}
// SAFETY: as above.
unsafe impl KvmStruct for kvm_xcrs {}
// SAFETY: as above.
unsafe impl KvmStruct for kvm_debugregs {}
// SAFETY: as above.
unsafe impl KvmStruct for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl KvmStruct for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl KvmStruct for kvm_pit_state2 {}
// SAFETY: as above; every value made here starts from zeroed memory, so the bytes of the union are
// always initialised.
unsafe impl KvmStruct for kvm_irqchip {}
// SAFETY: as above.
unsafe impl KvmStruct for kvm_clock_data {}

const _: () = {
    assert!(size_of::<kvm_regs>() == 18 * 8);
    assert!(size_of::<kvm_sregs>() == 8 * 24 + 2 * 16 + 7 * 8 + 4 * 8);
    assert!(size_of::<kvm_xcrs>() == 8 + 16 * 16 + 16 * 8);
    assert!(size_of::<kvm_debugregs>() == 16 * 8);
    assert!(size_of::<kvm_lapic_state>() == 1024);
    assert!(size_of::<kvm_vcpu_events>() == 8 + 4 + 4 + 8 + 4 + 1 + 26 + 1 + 8);
    assert!(size_of::<kvm_pit_state2>() == 3 * 24 + 40);
    assert!(size_of::<kvm_irqchip>() == 8 + 512);
    assert!(size_of::<kvm_clock_data>() == 48);
};

/// The bytes of `value`.
pub(super) fn bytes_of<T: KvmStruct>(value: &T) -> &[u8] {
    // SAFETY: Plain promises initialised bytes without padding; the slice covers exactly the value
    // and borrows it.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }
}

/// The bytes of a row of words.
pub(super) fn bytes_of_words(words: &[u32]) -> &[u8] {
    // SAFETY: integers have no padding; the slice covers exactly the words and borrows them.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), size_of_val(words)) }
}

/// Reads a structure off the front of a section.
pub(super) fn read<T: KvmStruct>(fields: &mut Fields<'_>) -> Result<T, FormatError> {
    let bytes = fields.bytes(size_of::<T>())?;
    // SAFETY: `bytes` is exactly as long as T, and Plain promises that every bit pattern is a
    // value; the read is unaligned.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
