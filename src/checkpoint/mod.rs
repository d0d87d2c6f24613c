//! Floor 3: the data path, in order: dirt → capture → encode and send → stage → apply; and the output that waits for it.

pub mod apply;
pub mod capture;
pub mod dirt;
pub mod disk;
#[cfg(test)]
mod disk_tests;
pub mod freeze;
pub mod image;
pub mod journal;
pub mod output;
pub mod packing;
pub mod sender;
pub mod shared;
#[cfg(test)]
mod shared_tests;
pub mod shared_writer;
pub mod snapshot;
pub mod stage;
pub mod stamp;
pub mod sums;
