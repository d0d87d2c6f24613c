//! virtio devices: the modern (version 2) memory-mapped transport, and the devices behind it.

mod chain;
pub mod mmio;
pub mod net;
mod net_state;

#[cfg(test)]
pub(crate) mod test_support;
