//! The parts of the built-in guest that touch no bare machine: RESP, the key-value store, the
//! commands and the TCP server.
//!
//! They build for the guest (no_std) and, for tests, for any host.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod bytes;
pub mod clock;
pub mod command;
pub mod connection;
pub mod dirty;
pub mod disk;
pub mod reply;
pub mod resp;
pub mod server;
pub mod store;
pub mod sum;
#[cfg(test)]
mod test_support;
