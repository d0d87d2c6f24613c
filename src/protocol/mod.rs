//! Floor 1: every rule about epochs, acks, release, takeover, resync and capacity. Pure: no socket, thread, clock, file, KVM or
//! random source; a test enforces it.

pub mod messages;
pub mod pages;
pub mod record;
pub mod types;
