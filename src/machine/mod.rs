//! Floor 2: one virtual machine. It can be paused, read for dirt, saved, restored and resumed, and knows nothing of replication.

pub mod boot;
pub mod dirty;
pub mod initial;
pub mod memory;

pub use initial::{GuestNet, InitialVcpu};
pub use memory::{GuestRam, MemoryError};
