//! What touches the bare machine: entry, ports, clock, heap, the virtio-net driver and the memory
//! writer.

mod boot_info;
mod clock;
mod disk;
mod entry;
mod heap;
mod host;
mod memory_functions;
mod mmio;
mod net;
mod ports;
mod virtqueue;
mod writer;
