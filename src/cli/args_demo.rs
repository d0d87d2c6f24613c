//! The flags of `mcd demo`.

use std::path::PathBuf;

use clap::Args;

use super::args::LogArgs;
use super::values::{DirtyLoad, Size};

pub(super) const HELP: &str = "\
Examples:
  mcd demo                              three rounds and a report
  mcd demo --rounds 20 --json out.json  more of it, for a program to read
  mcd demo --stay                       leave the pair up and print a redis-cli line to try";

/// `mcd demo`.
#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// How often the primary is killed
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) rounds: u32,
    /// Write the report to a file as JSON too
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Leave the pair up at the end and print the redis-cli line to try; Ctrl-C ends it
    #[arg(long)]
    pub(super) stay: bool,
    /// The seed of the random moments and keys [default: another each time, printed]
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    /// TCP connections of the load
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(super) connections: u32,
    /// The guest's memory, in whole MiB
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    pub(super) memory: Size,
    /// The guest's vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub(super) cpus: u8,
    /// The longest an epoch may last
    #[arg(long, value_name = "MS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(super) interval_ms: u64,
    /// Time between two heartbeats of the nodes; they suspect each other after three times that. More on a slow host
    #[arg(long, value_name = "MS", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub(super) heartbeat_interval_ms: u64,
    /// Let the guest write memory as well: so many pages, so often per second
    #[arg(long, value_name = "PAGES,PER-SECOND")]
    pub(super) dirty: Option<DirtyLoad>,
    /// Keep the nodes' logs and say where they are
    #[arg(long)]
    pub(super) keep_logs: bool,
    #[command(flatten)]
    pub(super) log: LogArgs,
}
