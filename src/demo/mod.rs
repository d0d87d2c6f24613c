//! `mcd demo`: two nodes protect a guest, its host is killed under load, and every reply that the
//! clients get is checked. What it runs on is [`crate::testbed`].

pub mod error;
mod interactive;
pub mod report;
mod rounds;
mod run;
mod screen;

pub use run::{DemoOptions, run};
