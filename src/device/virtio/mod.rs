//! virtio devices: the modern (version 2) memory-mapped transport, and the devices behind it.

pub mod blk;
mod blk_config;
mod blk_request;
mod blk_state;
mod chain;
mod interrupt;
pub mod mmio;
pub mod net;
mod net_offload;
mod net_state;
pub mod rng;
mod rng_state;
mod transport_state;

#[cfg(test)]
pub(crate) mod test_support;
