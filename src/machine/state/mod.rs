//! Saving and restoring: the byte format, and one file per concern.

pub(super) mod irqchip;
pub(super) mod kvm_structs;
pub(super) mod sections;
pub(super) mod tsc;
pub(super) mod vcpu;

pub use sections::FormatError;
