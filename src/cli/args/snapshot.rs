//! The flags of `mcd snapshot`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::cli::values;
use crate::protocol::types::GuestName;

pub(super) const SNAPSHOT_HELP: &str = "\
Examples:
  mcd snapshot save /var/lib/mcd/web.snap --guest web          the guest goes on
  mcd snapshot save /var/lib/mcd/web.snap --guest web --stop   the guest ends
  mcd snapshot info /var/lib/mcd/web.snap
  mcd snapshot restore /var/lib/mcd/web.snap --tap tap0 --arbiter file:/srv/mcd";

/// `mcd snapshot`.
#[derive(Debug, Args)]
pub(in crate::cli) struct SnapshotArgs {
    #[command(subcommand)]
    pub(in crate::cli) what: SnapshotCommand,
}

/// What can be done with snapshots.
#[derive(Debug, Subcommand)]
pub(in crate::cli) enum SnapshotCommand {
    /// Have the node that runs a guest write its snapshot
    #[command(
        long_about = "Has the node that runs a guest write its snapshot. The guest is paused while its memory is \
            written, and then goes on (with --stop it is shut down); its node, its secondary and its output go on \
            meanwhile. The file appears when it is whole and durable."
    )]
    Save(SnapshotSaveArgs),
    /// Say what a snapshot file holds, and whether it is whole
    Info(SnapshotInfoArgs),
    /// Start a guest from a snapshot: the same as `mcd primary FLAGS --restore FILE`
    #[command(
        long_about = "Starts a guest from a snapshot; the same as `mcd primary FLAGS --restore FILE`, whose flags it \
            takes but for those that describe the machine. It is a new life: the arbiter must not know the guest as \
            running."
    )]
    Restore {
        /// The snapshot
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Flags of `mcd primary`: --tap, --arbiter, --listen, --disk …
        #[arg(value_name = "FLAGS", trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<OsString>,
    },
}

/// `mcd snapshot save`.
#[derive(Debug, Args)]
pub(in crate::cli) struct SnapshotSaveArgs {
    /// The file, on the node's host; what is there is replaced in the end
    #[arg(value_name = "FILE")]
    pub(in crate::cli) file: PathBuf,
    /// The node's control socket
    #[arg(long, value_name = "PATH", conflicts_with = "guest")]
    pub(in crate::cli) control: Option<PathBuf>,
    /// The guest whose node on this host is meant, if its control socket is where it is by default
    #[arg(long, value_name = "NAME", value_parser = values::guest_name)]
    pub(in crate::cli) guest: Option<GuestName>,
    /// Shut the guest down with its snapshot; the only way for a guest that writes to disks
    #[arg(long)]
    pub(in crate::cli) stop: bool,
    /// Print what was written as JSON
    #[arg(long)]
    pub(in crate::cli) json: bool,
    /// How long to wait until it is written
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 600_000,
        value_parser = clap::value_parser!(u64).range(1..=3_600_000)
    )]
    pub(in crate::cli) timeout_ms: u64,
}

/// `mcd snapshot info`.
#[derive(Debug, Args)]
pub(in crate::cli) struct SnapshotInfoArgs {
    /// The snapshot
    #[arg(value_name = "FILE")]
    pub(in crate::cli) file: PathBuf,
    /// Print it as JSON
    #[arg(long)]
    pub(in crate::cli) json: bool,
}
