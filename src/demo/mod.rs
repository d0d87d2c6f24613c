//! The top floor: `mcd demo`, and the network, the checked client and the handling of nodes that
//! the benches share with it.

pub mod ask;
pub mod client;
pub mod error;
pub mod load;
pub mod model;
pub mod namespaces;
pub mod nodes;
pub mod probe;
pub mod report;
pub mod resp;
pub mod rng;
mod rounds;
mod run;
mod screen;
mod stay;
mod steering;
#[cfg(test)]
pub(crate) mod test_rights;
#[cfg(test)]
mod test_server;
pub mod trouble;

pub use run::{DemoOptions, run};
