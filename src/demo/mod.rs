//! The top floor: `mcd demo`, and the network, the checked client and the handling of nodes that the benches share with it.

pub mod fabric;
pub mod rng;
#[cfg(test)]
pub(crate) mod test_rights;
