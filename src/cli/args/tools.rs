//! The flags of the commands that start no node of their own.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::node::LogArgs;
use crate::cli::values::{self, DirtyLoad, Size};
use crate::protocol::types::GuestName;

/// `mcd demo`.
#[derive(Debug, Args)]
pub(in crate::cli) struct DemoArgs {
    /// How often the primary is killed
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(in crate::cli) rounds: u32,
    /// Write the report to a file as JSON too
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) json: Option<PathBuf>,
    /// Leave the pair up at the end and print the redis-cli line to try; Ctrl-C ends it
    #[arg(long)]
    pub(in crate::cli) stay: bool,
    /// The seed of the random moments and keys [default: another each time, printed]
    #[arg(long, value_name = "N")]
    pub(in crate::cli) seed: Option<u64>,
    /// TCP connections of the load
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(in crate::cli) connections: u32,
    /// The guest's memory, in whole MiB
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    pub(in crate::cli) memory: Size,
    /// The guest's vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub(in crate::cli) cpus: u8,
    /// The longest an epoch may last
    #[arg(long, value_name = "MS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(in crate::cli) interval_ms: u64,
    /// Time between two heartbeats of the nodes; they suspect each other after three times that. More on a slow host
    #[arg(long, value_name = "MS", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub(in crate::cli) heartbeat_interval_ms: u64,
    /// Let the guest write memory as well: so many pages, so often per second
    #[arg(long, value_name = "PAGES,PER-SECOND")]
    pub(in crate::cli) dirty: Option<DirtyLoad>,
    /// Keep the nodes' logs and say where they are
    #[arg(long)]
    pub(in crate::cli) keep_logs: bool,
    #[command(flatten)]
    pub(in crate::cli) log: LogArgs,
}

/// `mcd disk`.
#[derive(Debug, Args)]
pub(in crate::cli) struct DiskArgs {
    #[command(subcommand)]
    pub(in crate::cli) what: DiskCommand,
}

/// What can be done to disk images.
#[derive(Debug, Subcommand)]
pub(in crate::cli) enum DiskCommand {
    /// Compare two images, byte for byte, and say what their stamps say
    #[command(
        long_about = "Compares two images byte for byte, and says what their stamps say and what their checksums \
        (CRC32C) are. Exit code 0 means that their contents are equal, 1 that they differ: the first difference is named."
    )]
    Verify {
        /// An image
        #[arg(value_name = "IMAGE")]
        one: PathBuf,
        /// The image to compare it with
        #[arg(value_name = "IMAGE")]
        other: PathBuf,
    },
}

/// `mcd status`.
#[derive(Debug, Args)]
pub(in crate::cli) struct StatusArgs {
    /// The node's control socket
    #[arg(long, value_name = "PATH", conflicts_with = "guest")]
    pub(in crate::cli) control: Option<PathBuf>,
    /// The guest whose node on this host is meant, if its control socket is where it is by default
    #[arg(long, value_name = "NAME", value_parser = values::guest_name)]
    pub(in crate::cli) guest: Option<GuestName>,
    /// Print the whole status as JSON
    #[arg(long)]
    pub(in crate::cli) json: bool,
    /// How long to wait for the answer
    #[arg(long, value_name = "MS", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub(in crate::cli) timeout_ms: u64,
}

/// `mcd console`.
#[derive(Debug, Args)]
pub(in crate::cli) struct ConsoleArgs {
    /// The console's socket
    #[arg(long, value_name = "PATH", conflicts_with = "guest")]
    pub(in crate::cli) socket: Option<PathBuf>,
    /// The guest whose node on this host is meant, if its console socket is where it is by default
    #[arg(long, value_name = "NAME", value_parser = values::guest_name)]
    pub(in crate::cli) guest: Option<GuestName>,
}
