//! virtio devices: the modern (version 2) memory-mapped transport, and the devices behind it.
//!
//! Each device has a directory: the device in `mod.rs`, its saved state in `persist.rs`, and what
//! its kind of request or frame needs beside them. What they share is here: the transport and its
//! saved state, descriptor chains, interrupts, and the thread of a device that has one.

pub mod blk;
mod chain;
mod interrupt;
pub mod mmio;
pub mod net;
pub mod rng;
mod thread;
mod transport_persist;

#[cfg(test)]
pub(crate) mod test_support;
