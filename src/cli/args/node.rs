//! The flags of a node: its machine, its place, its peer, its arbiter.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

use crate::arbiter::ArbiterSpec;
use crate::cli::values::{self, Cidr, ConsoleFlag, Disk, Mac, Size};
use crate::machine::CpuModel;
use crate::protocol::types::GuestName;

/// The flags that describe the machine.
#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
pub(in crate::cli) struct MachineArgs {
    /// Boot this Linux kernel, a bzImage (as distributions have it) or a vmlinux [default: the
    /// built-in guest]
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) kernel: Option<PathBuf>,
    /// Go on from this snapshot file (see `mcd snapshot`) in place of starting a guest: the machine
    /// is the file's. Not allowed in a file
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) restore: Option<PathBuf>,
    /// The kernel's first file system
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(in crate::cli) initrd: Option<PathBuf>,
    /// The kernel's command line [default: console=ttyS0]
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    pub(in crate::cli) append: Option<String>,
    /// The guest's memory; a distribution's kernel needs 128M or more [default: 128M]
    #[arg(long, value_name = "SIZE")]
    pub(in crate::cli) memory: Option<Size>,
    /// The guest's vCPUs [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    pub(in crate::cli) cpus: Option<u8>,
    /// Give the guest a source of random bytes, virtio-rng [default: true if it has a kernel]
    #[arg(long, value_name = "BOOL", action = ArgAction::Set)]
    pub(in crate::cli) rng: Option<bool>,
    /// The guest's Ethernet address [default: made from the guest's name]
    #[arg(long, value_name = "MAC")]
    pub(in crate::cli) mac: Option<Mac>,
    /// The built-in guest's gateway
    #[arg(long, value_name = "IP")]
    pub(in crate::cli) guest_gateway: Option<Ipv4Addr>,
}

/// The flags both roles have: a secondary becomes a primary.
#[derive(Debug, Args)]
#[command(next_help_heading = "Node")]
pub(in crate::cli) struct NodeArgs {
    /// A TOML file of flags without the dashes, such as `interval-ms = 10`; flags given here win
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) config: Option<PathBuf>,
    /// The guest's name, the same on both nodes
    #[arg(long, value_name = "NAME", value_parser = values::guest_name)]
    pub(in crate::cli) guest: Option<GuestName>,
    /// The tap device of the guest's network card; it exists already and is up
    #[arg(long, value_name = "NAME", value_parser = values::device_name)]
    pub(in crate::cli) tap: Option<String>,
    /// The guest's address and network; a secondary uses it to announce a takeover by ARP too
    #[arg(long, value_name = "IP/BITS")]
    pub(in crate::cli) guest_ip: Option<Cidr>,

    /// The CPU the guest is shown, the same on both nodes: all that this host has (for equal
    /// hosts), or `baseline`, x86-64-v2, which hosts of one maker have in common [default: host]
    #[arg(long, value_name = "MODEL", value_enum)]
    pub(in crate::cli) cpu: Option<CpuFlag>,

    /// What a takeover by this node does to the guest's clocks: `correct` them by the time it took
    /// (up to 10 s), or let them `continue` where they stood, for the guest's time server to mend
    #[arg(long, value_name = "HOW", value_enum, default_value = "correct")]
    pub(in crate::cli) guest_clock: GuestClockFlag,

    /// A disk of the guest, a raw image or block device: PATH, PATH,ro or PATH,serial=TEXT; as
    /// often as the guest has disks, on both nodes in the same order. A secondary makes an image
    /// that is not there, and overwrites one that is. With PATH,mode=shared both nodes name the
    /// same storage instead. With PATH,format=raw a file that looks like qcow2 or the like is taken
    /// byte for byte
    #[arg(long, value_name = "PATH[,ro|,mode=shared[,fenced]][,format=raw][,serial=TEXT]", help_heading = "Disks")]
    pub(in crate::cli) disk: Vec<Disk>,
    /// Take disk images whatever their stamps say. Not allowed in a file
    #[arg(long, help_heading = "Disks")]
    pub(in crate::cli) force_disk: bool,

    /// Where a newcomer's data connection is accepted
    #[arg(
        long,
        value_name = "IP:PORT",
        default_value = "0.0.0.0:7401",
        value_parser = values::address,
        help_heading = "Peer"
    )]
    pub(in crate::cli) listen: SocketAddr,
    /// Where a newcomer's heartbeat connection is accepted [default: the port after --listen's]
    #[arg(long, value_name = "IP:PORT", value_parser = values::address, help_heading = "Peer")]
    pub(in crate::cli) heartbeat_listen: Option<SocketAddr>,
    /// Time between two heartbeats
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 50,
        value_parser = clap::value_parser!(u64).range(1..=10_000),
        help_heading = "Peer"
    )]
    pub(in crate::cli) heartbeat_interval_ms: u64,
    /// Silence after which the peer is suspected, at least twice the interval [default: three
    /// times]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(2..=600_000), help_heading = "Peer")]
    pub(in crate::cli) heartbeat_timeout_ms: Option<u64>,
    /// How long a guest that cannot be captured is vouched for before the secondary is asked to
    /// take over [default: 2000, or four heartbeat timeouts]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=600_000), help_heading = "Peer")]
    pub(in crate::cli) stall_max_ms: Option<u64>,

    #[command(flatten)]
    pub(in crate::cli) who: ArbiterArgs,

    /// The longest an epoch may last
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 20,
        value_parser = clap::value_parser!(u64).range(1..=1000),
        help_heading = "Epochs"
    )]
    pub(in crate::cli) interval_ms: u64,
    /// The least time from one capture to the next
    #[arg(
        long,
        value_name = "US",
        default_value_t = 200,
        value_parser = clap::value_parser!(u64).range(0..=1_000_000),
        help_heading = "Epochs"
    )]
    pub(in crate::cli) interval_min_us: u64,
    /// Cut an epoch as soon as output waits: low latency for little cost
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set, help_heading = "Epochs")]
    pub(in crate::cli) commit_on_output: bool,
    /// How pages are packed for the wire
    #[arg(long, value_name = "HOW", value_enum, default_value = "auto", help_heading = "Epochs")]
    pub(in crate::cli) compress: CompressFlag,
    /// Most memory a secondary spends on epochs it has not applied yet [default: 512M, or one whole
    /// epoch of the guest if that is more]
    #[arg(long, value_name = "SIZE", help_heading = "Epochs")]
    pub(in crate::cli) staging_max: Option<Size>,
    /// Most output held back, in bytes
    #[arg(long, value_name = "SIZE", default_value = "64M", help_heading = "Epochs")]
    pub(in crate::cli) output_max_bytes: Size,
    /// Most output held back, in packets
    #[arg(
        long,
        value_name = "N",
        default_value_t = 65_536,
        value_parser = clap::value_parser!(u64).range(16..=16_777_216),
        help_heading = "Epochs"
    )]
    pub(in crate::cli) output_max_packets: u64,

    /// The control socket (QMP) [default: /run/mcd/GUEST.sock for root, else
    /// $XDG_RUNTIME_DIR/mcd/GUEST.sock]
    #[arg(long, value_name = "PATH", help_heading = "Operation")]
    pub(in crate::cli) control: Option<PathBuf>,
    /// The guest's serial console: stdout, stdio (keys go to the guest; Ctrl-] stops that), socket
    /// for `mcd console`, socket:/PATH, file:/PATH, or none
    #[arg(long, value_name = "WHERE", default_value = "stdout", help_heading = "Operation")]
    pub(in crate::cli) console: ConsoleFlag,
    #[command(flatten)]
    pub(in crate::cli) log: LogArgs,
}

/// The flags about who decides.
#[derive(Debug, Args)]
#[command(next_help_heading = "Arbiter")]
pub(in crate::cli) struct ArbiterArgs {
    /// Who decides when the nodes cannot see each other: file:/DIRECTORY (one both nodes see),
    /// etcd:http://HOST:2379,http://HOST:2379/PREFIX, command:/SCRIPT (a fencing script), or none
    #[arg(long, value_name = "WHO")]
    pub(in crate::cli) arbiter: Option<ArbiterSpec>,
    /// Longest wait for the arbiter's answer [default: 2000, with a command 30000]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=600_000))]
    pub(in crate::cli) arbiter_timeout_ms: Option<u64>,
    /// With etcd and https: the authorities that sign the members' certificates (PEM)
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) arbiter_ca: Option<PathBuf>,
    /// With etcd and https: this host's certificate (PEM), if etcd wants one
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) arbiter_cert: Option<PathBuf>,
    /// With etcd and https: the key of --arbiter-cert (PEM)
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) arbiter_key: Option<PathBuf>,
    /// With etcd: the user to log in as, if etcd wants one
    #[arg(long, value_name = "NAME")]
    pub(in crate::cli) arbiter_user: Option<String>,
    /// With etcd: the file whose first line is the user's password
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) arbiter_password_file: Option<PathBuf>,
    /// With --arbiter none: `wait` for a person, or `continue` alone and risk two guests
    #[arg(long, value_name = "WHAT")]
    pub(in crate::cli) on_peer_loss: Option<OnPeerLossFlag>,
}

/// The flags about the log on stderr.
#[derive(Debug, Args)]
#[command(next_help_heading = "Operation")]
pub(in crate::cli) struct LogArgs {
    /// What is logged to stderr: error, warn, info, debug, trace, off, or MODULE=LEVEL,…
    #[arg(long, value_name = "LEVEL", value_parser = values::log_filter)]
    pub(in crate::cli) log: Option<String>,
    /// How it is logged: for people, or one JSON object a line
    #[arg(long, value_name = "HOW", value_enum, default_value = "human")]
    pub(in crate::cli) log_format: LogFormat,
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum LogFormat {
    Human,
    Json,
}

/// `--compress`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum CompressFlag {
    Auto,
    None,
    Lz4,
}

/// `--cpu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum CpuFlag {
    Host,
    Baseline,
}

impl CpuFlag {
    /// The model it names.
    pub(in crate::cli) fn model(self) -> CpuModel {
        match self {
            CpuFlag::Host => CpuModel::Host,
            CpuFlag::Baseline => CpuModel::Baseline,
        }
    }
}

/// `--guest-clock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum GuestClockFlag {
    Correct,
    Continue,
}

/// `--on-peer-loss`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum OnPeerLossFlag {
    Wait,
    Continue,
}
