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
    #[arg(long, alias = "stay")]
    pub(in crate::cli) interactive: bool,
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
    /// Time between two heartbeats of the nodes; they suspect each other after three times that.
    /// More on a slow host
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

/// What can be done to disks.
#[derive(Debug, Subcommand)]
pub(in crate::cli) enum DiskCommand {
    /// Compare a guest's disks on its two nodes while it runs, or two images that no node uses
    #[command(
        long_about = "With --guest or --control: has the primary and its secondary compare their images of the \
            guest's disks while it runs, each block as of one committed epoch, and tells the blocks that differ. With \
            two images: compares them byte for byte, and says what their stamps and checksums (CRC32C) are.",
        after_help = crate::cli::disk::HELP
    )]
    Verify(VerifyArgs),
}

/// `mcd disk verify`.
#[derive(Debug, Args)]
pub(in crate::cli) struct VerifyArgs {
    /// Two images, which no node uses
    #[arg(
        value_name = "IMAGE",
        num_args = 2,
        required_unless_present_any = ["guest", "control"],
        conflicts_with_all = ["guest", "control"]
    )]
    pub(in crate::cli) images: Vec<PathBuf>,
    /// The guest whose primary on this host is asked, if its control socket is where it is by
    /// default
    #[arg(long, value_name = "NAME", value_parser = values::guest_name)]
    pub(in crate::cli) guest: Option<GuestName>,
    /// The control socket of the primary
    #[arg(long, alias = "socket", value_name = "PATH", conflicts_with = "guest")]
    pub(in crate::cli) control: Option<PathBuf>,
    /// Only this disk: its number, counted from 0 in the order of --disk, or its serial number
    /// [default: all that the guest can write]
    #[arg(long, value_name = "NUMBER|SERIAL", conflicts_with = "images")]
    pub(in crate::cli) disk: Option<String>,
    /// Print the result as JSON
    #[arg(long, conflicts_with = "images")]
    pub(in crate::cli) json: bool,
    /// How long to wait for an answer of the node (the verify itself takes as long as it takes)
    #[arg(long, value_name = "MS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub(in crate::cli) timeout_ms: u64,
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
