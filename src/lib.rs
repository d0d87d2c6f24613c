//! mcd: micro-checkpointing fault tolerance for KVM guests.
//!
//! The crate is a house of five floors; a room imports from its own floor or those under it. Above
//! them are the command line, the demonstration, and the testbed that tests and benches share.

#![warn(unreachable_pub)]

pub mod arbiter;
pub mod checkpoint;
pub mod cli;
pub mod control;
pub mod demo;
pub mod device;
pub mod machine;
pub mod node;
pub mod protocol;
pub mod testbed;
pub mod wire;
