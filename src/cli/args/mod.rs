//! The commands and flags, and the words `--help` teaches them with.

mod node;
mod snapshot;
mod tools;

use std::net::SocketAddr;

use clap::{Args, Parser, Subcommand};

pub(in crate::cli) use self::node::*;
pub(in crate::cli) use self::snapshot::*;
pub(in crate::cli) use self::tools::*;
use super::{exit, values};

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "mcd",
    version,
    about = "Micro-checkpointing fault tolerance for KVM guests: kill the host, no client notices",
    long_about = "Micro-checkpointing fault tolerance for KVM guests: kill the host, no client notices.\n\n\
        Two nodes share one guest. The primary runs it and sends what changed to the secondary many times a second; no \
        packet leaves the guest before the secondary could go on from there. When the primary dies, the secondary \
        takes over within milliseconds, with every connection as it was. An arbiter makes sure that there is never \
        more than one of them.",
    after_help = "Start with:  mcd demo",
    after_long_help = TOP_HELP,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(in crate::cli) struct Cli {
    #[command(subcommand)]
    pub(in crate::cli) command: Command,
}

const TOP_HELP: &str = "\
Examples:
  mcd demo                          see it work on this machine; nothing is left behind
  mcd primary   --guest web --tap tap0 --guest-ip 10.0.0.2/24 --arbiter file:/srv/mcd
  mcd secondary --guest web --tap tap0 --peer 192.0.2.1:7401  --arbiter file:/srv/mcd
  mcd status    --guest web
  docs/operating/arbiters.md helps to choose an arbiter: file:, etcd:, command: or none.

";

/// What `mcd` can be asked to do.
#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Command {
    /// Run a guest and protect it as soon as a secondary joins
    #[command(
        long_about = "Runs a guest, unprotected at first, and protects it as soon as a secondary joins.",
        after_help = PRIMARY_HELP
    )]
    Primary(PrimaryArgs),

    /// Join a primary, hold its guest's image, take over when it dies
    #[command(
        long_about = "Joins a primary, holds its guest's image and takes over when the primary dies. The guest's \
            memory, vCPUs and Ethernet address are told by the primary.",
        after_help = SECONDARY_HELP
    )]
    Secondary(SecondaryArgs),

    /// Start a guest anew after both of its nodes died
    #[command(
        long_about = "Starts a guest anew although the arbiter still knows it as running: what `mcd primary` refuses. \
            If a node of the guest is alive after all, there are two guests with one address.",
        after_help = COLD_START_HELP
    )]
    ColdStart(ColdStartArgs),

    /// Show the promise kept: a protected pair on this machine, killed under load
    #[command(
        long_about = "Starts two nodes as real processes in network namespaces of their own, puts a checked load on \
            the guest, kills the primary with SIGKILL at a random moment, lets the secondary take over, starts a new \
            secondary, and so on. Exit code 0 means: no acknowledged write was lost, no reply was wrong or came twice, \
            no connection was reset. Nothing is left behind.",
        after_help = DEMO_HELP
    )]
    Demo(DemoArgs),

    /// Look after disks: whether two images of one are equal, also while the guest runs
    #[command(
        long_about = "Looks after the disks of guests: compares the images of a guest that runs, \
            or two that no node uses.",
        after_help = super::disk::HELP
    )]
    Disk(DiskArgs),

    /// Save a guest to a file, look at such a file, or start a guest from one
    #[command(
        long_about = "Saves the memory and the machine of a guest to a file, from which it can be started again. \
            Disks are not in it: a guest that writes to disks is stopped with its snapshot, and its images are kept \
            as they are at that moment.",
        after_help = SNAPSHOT_HELP
    )]
    Snapshot(SnapshotArgs),

    /// Ask a running node how it is
    #[command(
        long_about = "Asks a running node how it is, over its control socket (QMP: `mc-query`).",
        after_help = STATUS_HELP
    )]
    Status(StatusArgs),

    /// Join the serial console of a guest that runs here
    #[command(
        long_about = "Joins the serial console of a guest whose node was started with --console socket: shows what it \
            said last, then what it says, and hands it every key. Ctrl-] leaves; the guest goes on.",
        after_help = CONSOLE_HELP
    )]
    Console(ConsoleArgs),
}

const PRIMARY_HELP: &str = "\
What happens next:
  The guest boots and answers on --guest-ip; the built-in guest speaks RESP on TCP port 6379, so
  redis-cli can talk to it. It is `solo`. Start `mcd secondary` on another host with --peer set
  to this node's --listen: the guest goes on while its memory is copied (`resync`), then it is
  `protected`. Ctrl-C, or `quit` on the control socket, ends the node.

Example:
  ip tuntap add tap0 mode tap && ip link set tap0 up master br0
  mcd primary --guest web --tap tap0 --guest-ip 10.0.0.2/24 --arbiter file:/srv/mcd";

const SECONDARY_HELP: &str = "\
What happens next:
  The node connects, gets the guest's image (`resync`) and stands by (`standby`). When the
  primary dies it asks the arbiter; if it wins, the guest goes on here, and this node waits on
  --listen for a secondary of its own.

Example:
  mcd secondary --guest web --tap tap0 --peer 192.0.2.1:7401 --arbiter file:/srv/mcd";

const COLD_START_HELP: &str = "\
Example:
  mcd cold-start --i-know-both-nodes-are-dead --guest web --tap tap0 \\
      --guest-ip 10.0.0.2/24 --arbiter file:/srv/mcd";

const DEMO_HELP: &str = "\
Examples:
  mcd demo                              three rounds and a report
  mcd demo --rounds 20 --json out.json  more of it, for a program to read
  mcd demo --interactive                leave the pair up and print a redis-cli line to try";

const CONSOLE_HELP: &str = "\
Examples:
  mcd console --guest web
  mcd console --socket /run/mcd/web.console";

const STATUS_HELP: &str = "\
Examples:
  mcd status --guest web
  mcd status --control /run/mcd/web.sock --json";

/// `mcd primary`.
#[derive(Debug, Args)]
pub(in crate::cli) struct PrimaryArgs {
    #[command(flatten)]
    pub(in crate::cli) node: NodeArgs,
    #[command(flatten)]
    pub(in crate::cli) machine: MachineArgs,
}

/// `mcd cold-start`.
#[derive(Debug, Args)]
pub(in crate::cli) struct ColdStartArgs {
    /// Your word that no node of this guest runs any more. You looked. Not allowed in a file
    #[arg(long)]
    pub(in crate::cli) i_know_both_nodes_are_dead: bool,
    #[command(flatten)]
    pub(in crate::cli) node: NodeArgs,
    #[command(flatten)]
    pub(in crate::cli) machine: MachineArgs,
}

/// `mcd secondary`.
#[derive(Debug, Args)]
pub(in crate::cli) struct SecondaryArgs {
    /// The primary's data address: its --listen
    #[arg(long, value_name = "IP:PORT", value_parser = values::address, help_heading = "Peer")]
    pub(in crate::cli) peer: Option<SocketAddr>,
    /// The primary's heartbeat address [default: the port after --peer's]
    #[arg(long, value_name = "IP:PORT", value_parser = values::address, help_heading = "Peer")]
    pub(in crate::cli) peer_heartbeat: Option<SocketAddr>,
    #[command(flatten)]
    pub(in crate::cli) node: NodeArgs,
}

/// The help of every command ends with the exit codes.
pub(in crate::cli) fn command() -> clap::Command {
    use clap::CommandFactory;
    let with_codes = |before: &str| format!("{}\n\n{}", before.trim_end(), exit::HELP);
    let mut command = Cli::command().after_long_help(with_codes(TOP_HELP));
    for name in command.get_subcommands().map(|c| c.get_name().to_owned()).collect::<Vec<_>>() {
        command = command.mut_subcommand(name, |sub| {
            let text = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            sub.after_help(with_codes(&text))
        });
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_finds_no_fault() {
        command().debug_assert();
    }

    #[test]
    fn every_help_names_the_exit_codes() {
        for sub in command().get_subcommands_mut() {
            let help = sub.render_long_help().to_string();
            assert!(help.contains(exit::HELP), "{help}");
        }
    }
}
