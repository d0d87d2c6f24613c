//! Floor 1: every rule about epochs, acks, release, takeover, resync and capacity. Pure: no socket,
//! thread, clock, file, KVM or random source; a test enforces it.

pub mod admission;
pub mod arbiter_queue;
pub mod arbitration;
pub mod block_hashes;
pub mod claim;
pub mod command;
pub mod cpu;
pub mod event;
pub mod failure_detector;
pub mod guest_clock;
pub mod guest_event;
pub mod id;
pub mod layout;
pub mod local_record;
pub mod machine_shape;
pub mod messages;
pub mod mutant;
pub mod pages;
pub mod peer_loss;
pub mod primary;
pub mod record;
pub mod resync;
pub mod secondary;
pub mod shared_disk;
pub mod stall_detector;
pub mod stamp;
pub mod types;
pub mod verify;
