//! What real nodes are run and watched with: networks of namespaces, node processes, a load that
//! checks every reply, and an etcd. The demonstration, the benches, the fault injection, the lab
//! and the tests of whole nodes stand on it; no node does.

pub mod client;
pub mod error;
pub mod etcd;
pub mod guest_client;
pub mod guest_commands;
pub mod load;
pub mod model;
pub mod namespaces;
pub mod nodes;
mod phase_barrier;
pub mod probe;
pub mod require;
pub mod resp;
pub mod rng;
#[cfg(test)]
mod test_server;
pub mod wait;
