//! What an operator decides about a node: plain values, already checked. `cli/` makes them from
//! flags and files.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::arbiter::etcd::EtcdConfig;
use crate::control::console::ConsoleTo;
use crate::machine::{CpuModel, LinuxGuest};
use crate::protocol::failure_detector::HeartbeatConfig;
use crate::protocol::guest_clock::ClockPolicy;
use crate::protocol::machine_shape::MachineShape;
use crate::protocol::types::GuestName;

/// What every node needs to know, in either role: a secondary becomes a primary by takeover, and
/// then uses all of it.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The guest.
    pub guest: GuestName,
    /// The tap device the guest's network card is joined to.
    pub tap: String,
    /// The CPU the guest is shown, the same on both nodes.
    pub cpu: CpuModel,
    /// What a takeover does to the guest's clocks.
    pub guest_clock: ClockPolicy,
    /// Where a newcomer's data connection is accepted.
    pub listen: SocketAddr,
    /// Where a newcomer's heartbeat connection is accepted.
    pub heartbeat_listen: SocketAddr,
    /// Who decides when the nodes cannot see each other.
    pub arbiter: ArbiterConfig,
    /// The longest an epoch may last.
    pub interval: Duration,
    /// The least time from one capture to the next; at most `interval`.
    pub interval_min: Duration,
    /// Cut an epoch as soon as output waits and no commit is on its way.
    pub commit_on_output: bool,
    /// How often heartbeats are sent and when a silent peer is suspected; the timeout is at least
    /// twice the interval.
    pub heartbeat: HeartbeatConfig,
    /// How long a node vouches for a guest that cannot be captured; longer than the heartbeat
    /// timeout.
    pub stall_max: Duration,
    /// How pages are packed for the wire.
    pub compress: Compress,
    /// Most bytes of staging memory, as a secondary; `None`: what the guest needs.
    pub staging_bytes_max: Option<u64>,
    /// Most bytes of held output, as a primary.
    pub output_bytes_max: usize,
    /// Most packets of held output, as a primary.
    pub output_packets_max: usize,
    /// The control socket.
    pub control: PathBuf,
    /// Where the guest's serial console goes while the guest runs here.
    pub console: ConsoleTo,
    /// The guest's disks, in the order in which it finds them.
    pub disks: Vec<DiskConfig>,
    /// Take the disks' images whatever their stamps say.
    pub force_disk: bool,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Its image: a raw file or a block device.
    pub path: PathBuf,
    /// The operator says that it is raw, whatever it looks like.
    pub is_raw: bool,
    /// The guest can only read it; it is not replicated then.
    pub read_only: bool,
    /// Both nodes use this very image, on storage they share; never with `read_only`.
    pub shared: bool,
    /// The operator asserts that a host which lost the guest cannot write this shared block device:
    /// something else than mcd sees to it.
    pub fenced: bool,
    /// The serial number the guest sees, filled up with zero bytes; a secondary's is the primary's.
    pub serial: [u8; 20],
}

/// What only a node that starts as primary needs to know.
#[derive(Clone, Debug)]
pub struct PrimaryStart {
    /// The machine to build.
    pub shape: MachineShape,
    /// What runs in it.
    pub boot: GuestBoot,
    /// The guest's address, if known: where it runs is announced by ARP then, not by RARP alone.
    pub guest_ip: Option<Ipv4Addr>,
    /// The operator asserts that both nodes of the guest are dead: claim it whatever the arbiter
    /// has on record.
    pub both_nodes_are_dead: bool,
}

/// What a new machine starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestBoot {
    /// The built-in guest, with its network.
    BuiltIn(GuestAddress),
    /// A Linux kernel.
    Linux(LinuxGuest),
    /// What a snapshot file holds; the shape is the file's, but for the disks' images.
    Snapshot(PathBuf),
}

/// What only a node that starts as secondary needs to know.
#[derive(Clone, Debug)]
pub struct SecondaryStart {
    /// The primary's data address.
    pub peer: SocketAddr,
    /// The primary's heartbeat address.
    pub peer_heartbeat: SocketAddr,
    /// The guest's address, if known: a takeover is then announced by ARP too, not by RARP alone.
    pub guest_ip: Option<Ipv4Addr>,
}

/// The built-in guest's address and way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestAddress {
    /// Its address.
    pub ipv4: Ipv4Addr,
    /// Bits of its network's prefix, 1 to 32.
    pub prefix_len: u8,
    /// Its gateway, if it has one: in the same network, unless that is of one host.
    pub gateway: Option<Ipv4Addr>,
}

/// Which arbiter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArbiterConfig {
    /// Files in a directory both nodes see.
    File {
        /// The directory.
        directory: PathBuf,
        /// How long a question may take.
        timeout: Duration,
    },
    /// A key in an etcd cluster.
    Etcd(EtcdConfig),
    /// A fencing script on this host.
    Command {
        /// The script.
        script: PathBuf,
        /// How long it may run.
        timeout: Duration,
    },
    /// None: each node does what `--on-peer-loss` names.
    None {
        /// What that is.
        on_peer_loss: OnPeerLoss,
    },
}

/// What a node without arbiter does when its peer is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPeerLoss {
    /// Wait for the peer or a person: never two primaries, and no takeover by itself.
    Wait,
    /// Go on alone: a takeover by itself, and two primaries if both nodes live.
    Continue,
}

/// How pages are packed for the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compress {
    /// With lz4 while the link is slower than it.
    Auto,
    /// Not at all, but for zero pages.
    None,
    /// With lz4.
    Lz4,
}
