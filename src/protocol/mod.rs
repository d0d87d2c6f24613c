//! Floor 1: every rule about epochs, acks, release, takeover, resync and capacity. Pure: no socket, thread, clock, file, KVM or
//! random source; a test enforces it.

pub mod arbitration;
pub mod claim;
pub mod cpu;
pub mod echo;
pub mod event;
pub mod guest_clock;
pub mod heartbeat;
pub mod layout;
pub mod messages;
pub mod mutant;
pub mod notebook;
pub mod pages;
pub mod primary;
pub mod record;
pub mod resync;
pub mod secondary;
pub mod shared;
pub mod sums;
pub mod types;
pub mod verify;
