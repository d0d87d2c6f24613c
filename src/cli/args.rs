//! The commands and flags, and the words `--help` teaches them with.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use super::disk::DiskArgs;
use super::exit;
use super::values::{self, Cidr, ConsoleFlag, DirtyLoad, Disk, Mac, Size};
use crate::arbiter::ArbiterSpec;
use crate::protocol::types::GuestName;

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "mcd",
    version,
    about = "Micro-checkpointing fault tolerance for KVM guests: kill the host, no client notices",
    long_about = "Micro-checkpointing fault tolerance for KVM guests: kill the host, no client notices.\n\n\
        Two nodes share one guest. The primary runs it and sends what changed to the secondary many times a second; no \
        packet leaves the guest before the secondary could go on from there. When the primary dies, the secondary takes \
        over within milliseconds, with every connection as it was. An arbiter makes sure that there is never more than \
        one of them.",
    after_help = "Start with:  mcd demo",
    after_long_help = TOP_HELP,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
}

const TOP_HELP: &str = "\
Examples:
  mcd demo                          see it work on this machine; nothing is left behind
  mcd primary   --guest web --tap tap0 --guest-ip 10.0.0.2/24 --arbiter file:/srv/mcd
  mcd secondary --guest web --tap tap0 --peer 192.0.2.1:7401  --arbiter file:/srv/mcd
  mcd status    --guest web
  docs/arbiters.md helps to choose an arbiter: file:, etcd:, command: or none.

";

/// What `mcd` can be asked to do.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a guest and protect it as soon as a secondary joins
    #[command(
        long_about = "Runs a guest, unprotected at first, and protects it as soon as a secondary joins.",
        after_help = PRIMARY_HELP,
        args_override_self = true
    )]
    Primary(PrimaryArgs),

    /// Join a primary, hold its guest's image, take over when it dies
    #[command(
        long_about = "Joins a primary, holds its guest's image and takes over when the primary dies. The guest's memory, \
            vCPUs and Ethernet address are told by the primary.",
        after_help = SECONDARY_HELP,
        args_override_self = true
    )]
    Secondary(SecondaryArgs),

    /// Start a guest anew after both of its nodes died
    #[command(
        long_about = "Starts a guest anew although the arbiter still knows it as running: what `mcd primary` refuses. \
            If a node of the guest is alive after all, there are two guests with one address.",
        after_help = COLD_START_HELP,
        args_override_self = true
    )]
    ColdStart(ColdStartArgs),

    /// Show the promise kept: a protected pair on this machine, killed under load
    #[command(
        long_about = "Starts two nodes as real processes in network namespaces of their own, puts a checked load on the \
            guest, kills the primary with SIGKILL at a random moment, lets the secondary take over, starts a new \
            secondary, and so on. Exit code 0 means: no acknowledged write was lost, no reply was wrong or came twice, \
            no connection was reset. Nothing is left behind.",
        after_help = DEMO_HELP,
        args_override_self = true
    )]
    Demo(DemoArgs),

    /// Look after disks: whether two images of one are equal, also while the guest runs
    #[command(
        long_about = "Looks after the disks of guests: compares the images of a guest that runs, or two that no node uses.",
        after_help = super::disk::HELP
    )]
    Disk(DiskArgs),

    /// Ask a running node how it is
    #[command(
        long_about = "Asks a running node how it is, over its control socket (QMP: `mc-query`).",
        after_help = STATUS_HELP,
        args_override_self = true
    )]
    Status(StatusArgs),

    /// Join the serial console of a guest that runs here
    #[command(
        long_about = "Joins the serial console of a guest whose node was started with --console socket: shows what it said last, then what it \
            says, and hands it every key. Ctrl-] leaves; the guest goes on.",
        after_help = CONSOLE_HELP,
        args_override_self = true
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
  mcd demo --stay                       leave the pair up and print a redis-cli line to try";

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
pub(super) struct PrimaryArgs {
    #[command(flatten)]
    pub(super) node: NodeArgs,
    #[command(flatten)]
    pub(super) machine: MachineArgs,
}

/// `mcd cold-start`.
#[derive(Debug, Args)]
pub(super) struct ColdStartArgs {
    /// Your word that no node of this guest runs any more. You looked. Not allowed in a file
    #[arg(long)]
    pub(super) i_know_both_nodes_are_dead: bool,
    #[command(flatten)]
    pub(super) node: NodeArgs,
    #[command(flatten)]
    pub(super) machine: MachineArgs,
}

/// `mcd secondary`.
#[derive(Debug, Args)]
pub(super) struct SecondaryArgs {
    /// The primary's data address: its --listen
    #[arg(long, value_name = "IP:PORT", value_parser = values::address, help_heading = "Peer")]
    pub(super) peer: Option<SocketAddr>,
    /// The primary's heartbeat address [default: the port after --peer's]
    #[arg(long, value_name = "IP:PORT", value_parser = values::address, help_heading = "Peer")]
    pub(super) peer_heartbeat: Option<SocketAddr>,
    #[command(flatten)]
    pub(super) node: NodeArgs,
}

/// The flags that describe the machine.
#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
pub(super) struct MachineArgs {
    /// Boot this Linux kernel, a bzImage (as distributions have it) or a vmlinux [default: the built-in guest]
    #[arg(long, value_name = "FILE")]
    pub(super) kernel: Option<PathBuf>,
    /// The kernel's first file system
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(super) initrd: Option<PathBuf>,
    /// The kernel's command line [default: console=ttyS0]
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    pub(super) append: Option<String>,
    /// The guest's memory; a distribution's kernel needs 128M or more
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    pub(super) memory: Size,
    /// The guest's vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub(super) cpus: u8,
    /// The guest's Ethernet address [default: made from the guest's name]
    #[arg(long, value_name = "MAC")]
    pub(super) mac: Option<Mac>,
    /// The built-in guest's gateway
    #[arg(long, value_name = "IP")]
    pub(super) guest_gateway: Option<Ipv4Addr>,
}

/// The flags both roles have: a secondary becomes a primary.
#[derive(Debug, Args)]
#[command(next_help_heading = "Node")]
pub(super) struct NodeArgs {
    /// A TOML file of flags without the dashes, such as `interval-ms = 10`; flags given here win
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// The guest's name, the same on both nodes
    #[arg(long, value_name = "NAME", value_parser = values::guest_name)]
    pub(super) guest: Option<GuestName>,
    /// The tap device of the guest's network card; it exists already and is up
    #[arg(long, value_name = "NAME", value_parser = values::device_name)]
    pub(super) tap: Option<String>,
    /// The guest's address and network; a secondary uses it to announce a takeover by ARP too
    #[arg(long, value_name = "IP/BITS")]
    pub(super) guest_ip: Option<Cidr>,

    /// The CPU the guest is shown, the same on both nodes: all that this host has (for equal hosts), or `baseline`, x86-64-v2, which
    /// hosts of one maker have in common
    #[arg(long, value_name = "MODEL", value_enum, default_value = "host")]
    pub(super) cpu: CpuFlag,

    /// A disk of the guest, a raw image or block device: PATH, PATH,ro or PATH,serial=TEXT; as often as the guest has disks, on both
    /// nodes in the same order. A secondary makes an image that is not there, and overwrites one that is
    #[arg(long, value_name = "PATH[,ro][,serial=TEXT]", help_heading = "Disks")]
    pub(super) disk: Vec<Disk>,
    /// Take disk images whatever their stamps say. Not allowed in a file
    #[arg(long, help_heading = "Disks")]
    pub(super) force_disk: bool,

    /// Where a newcomer's data connection is accepted
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:7401", value_parser = values::address, help_heading = "Peer")]
    pub(super) listen: SocketAddr,
    /// Where a newcomer's heartbeat connection is accepted [default: the port after --listen's]
    #[arg(long, value_name = "IP:PORT", value_parser = values::address, help_heading = "Peer")]
    pub(super) heartbeat_listen: Option<SocketAddr>,
    /// Time between two heartbeats
    #[arg(long, value_name = "MS", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=10_000), help_heading = "Peer")]
    pub(super) heartbeat_interval_ms: u64,
    /// Silence after which the peer is suspected, at least twice the interval [default: three times]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(2..=600_000), help_heading = "Peer")]
    pub(super) heartbeat_timeout_ms: Option<u64>,

    #[command(flatten)]
    pub(super) who: ArbiterArgs,

    /// The longest an epoch may last
    #[arg(long, value_name = "MS", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1000), help_heading = "Epochs")]
    pub(super) interval_ms: u64,
    /// The least time from one capture to the next
    #[arg(long, value_name = "US", default_value_t = 200, value_parser = clap::value_parser!(u64).range(0..=1_000_000), help_heading = "Epochs")]
    pub(super) interval_min_us: u64,
    /// Cut an epoch as soon as output waits: low latency for little cost
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set, help_heading = "Epochs")]
    pub(super) commit_on_output: bool,
    /// How pages are packed for the wire
    #[arg(long, value_name = "HOW", value_enum, default_value = "auto", help_heading = "Epochs")]
    pub(super) compress: CompressFlag,
    /// Most memory a secondary spends on epochs it has not applied yet
    #[arg(long, value_name = "SIZE", default_value = "512M", help_heading = "Epochs")]
    pub(super) staging_max: Size,
    /// Most output held back, in bytes
    #[arg(long, value_name = "SIZE", default_value = "64M", help_heading = "Epochs")]
    pub(super) output_max_bytes: Size,
    /// Most output held back, in packets
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = clap::value_parser!(u64).range(16..=16_777_216), help_heading = "Epochs")]
    pub(super) output_max_packets: u64,

    /// The control socket (QMP) [default: /run/mcd/GUEST.sock for root, else $XDG_RUNTIME_DIR/mcd/GUEST.sock]
    #[arg(long, value_name = "PATH", help_heading = "Operation")]
    pub(super) control: Option<PathBuf>,
    /// The guest's serial console: stdout, stdio (keys go to the guest; Ctrl-] stops that), socket for `mcd console`, socket:/PATH,
    /// file:/PATH, or none
    #[arg(long, value_name = "WHERE", default_value = "stdout", help_heading = "Operation")]
    pub(super) console: ConsoleFlag,
    #[command(flatten)]
    pub(super) log: LogArgs,
}

/// The flags about who decides.
#[derive(Debug, Args)]
#[command(next_help_heading = "Arbiter")]
pub(super) struct ArbiterArgs {
    /// Who decides when the nodes cannot see each other: file:/DIRECTORY (one both nodes see),
    /// etcd:http://HOST:2379,http://HOST:2379/PREFIX, command:/SCRIPT (a fencing script), or none
    #[arg(long, value_name = "WHO")]
    pub(super) arbiter: Option<ArbiterSpec>,
    /// Longest wait for the arbiter's answer [default: 2000, with a command 30000]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=600_000))]
    pub(super) arbiter_timeout_ms: Option<u64>,
    /// With etcd and https: the authorities that sign the members' certificates (PEM)
    #[arg(long, value_name = "FILE")]
    pub(super) arbiter_ca: Option<PathBuf>,
    /// With etcd and https: this host's certificate (PEM), if etcd wants one
    #[arg(long, value_name = "FILE")]
    pub(super) arbiter_cert: Option<PathBuf>,
    /// With etcd and https: the key of --arbiter-cert (PEM)
    #[arg(long, value_name = "FILE")]
    pub(super) arbiter_key: Option<PathBuf>,
    /// With etcd: the user to log in as, if etcd wants one
    #[arg(long, value_name = "NAME")]
    pub(super) arbiter_user: Option<String>,
    /// With etcd: the file whose first line is the user's password
    #[arg(long, value_name = "FILE")]
    pub(super) arbiter_password_file: Option<PathBuf>,
    /// With --arbiter none: `wait` for a person, or `continue` alone and risk two guests
    #[arg(long, value_name = "WHAT")]
    pub(super) on_peer_loss: Option<OnPeerLossFlag>,
}

/// The flags about the log on stderr.
#[derive(Debug, Args)]
#[command(next_help_heading = "Operation")]
pub(super) struct LogArgs {
    /// What is logged to stderr: error, warn, info, debug, trace, off, or MODULE=LEVEL,…
    #[arg(long, value_name = "LEVEL", value_parser = values::log_filter)]
    pub(super) log: Option<String>,
    /// How it is logged: for people, or one JSON object a line
    #[arg(long, value_name = "HOW", value_enum, default_value = "human")]
    pub(super) log_format: LogFormat,
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    Human,
    Json,
}

/// `--compress`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum CompressFlag {
    Auto,
    None,
    Lz4,
}

/// `--cpu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum CpuFlag {
    Host,
    Baseline,
}

/// `--on-peer-loss`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum OnPeerLossFlag {
    Wait,
    Continue,
}

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

/// `mcd status`.
#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// The node's control socket
    #[arg(long, value_name = "PATH", conflicts_with = "guest")]
    pub(super) control: Option<PathBuf>,
    /// The guest whose node on this host is meant, if its control socket is where it is by default
    #[arg(long, value_name = "NAME", value_parser = values::guest_name)]
    pub(super) guest: Option<GuestName>,
    /// Print the whole status as JSON
    #[arg(long)]
    pub(super) json: bool,
    /// How long to wait for the answer
    #[arg(long, value_name = "MS", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub(super) timeout_ms: u64,
}

/// `mcd console`.
#[derive(Debug, Args)]
pub(super) struct ConsoleArgs {
    /// The console's socket
    #[arg(long, value_name = "PATH", conflicts_with = "guest")]
    pub(super) socket: Option<PathBuf>,
    /// The guest whose node on this host is meant, if its console socket is where it is by default
    #[arg(long, value_name = "NAME", value_parser = values::guest_name)]
    pub(super) guest: Option<GuestName>,
}

/// The help of every command ends with the exit codes.
pub(super) fn command() -> clap::Command {
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
