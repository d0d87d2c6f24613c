//! From flags to a [`NodeConfig`]: what is missing, what contradicts what, and what follows from
//! what.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::arbiter;
use super::args::{CompressFlag, CpuFlag, GuestClockFlag, MachineArgs, NodeArgs, SecondaryArgs};
use super::exit::Failure;
use super::values::{Cidr, ConsoleFlag, Disk, Mac, Size};
use crate::arbiter::ArbiterSpec;
use crate::checkpoint::snapshot::SnapshotHead;
use crate::control::console::ConsoleTo;
use crate::machine::LinuxGuest;
use crate::node::config::{Compress, GuestAddress, GuestBoot, NodeConfig, PrimaryStart, SecondaryStart};
use crate::protocol::failure_detector::HeartbeatConfig;
use crate::protocol::guest_clock::ClockPolicy;
use crate::protocol::machine_shape::{DISKS_MAX, MachineShape};
use crate::protocol::types::GuestName;

/// The built-in guest needs this much to boot and serve.
const MEMORY_MIN: Size = Size::mib(16);

/// A machine's defaults.
const MEMORY_DEFAULT: Size = Size::mib(128);

/// The most a machine can have.
const MEMORY_MAX: Size = Size::mib(1 << 20);

/// A kernel's command line by default: output on the serial port, which is the console.
const APPEND_DEFAULT: &str = "console=ttyS0";

/// Less could not hold one busy epoch.
const STAGING_MIN: Size = Size::mib(1);

/// What both roles need.
pub(super) fn node(args: &NodeArgs) -> Result<NodeConfig, Failure> {
    let guest = required(args.guest.clone(), "--guest NAME", "name the guest, the same on both nodes")?;
    let tap = required(args.tap.clone(), "--tap NAME", "name the tap device of the guest's network card")?;
    let heartbeat = heartbeat(args.heartbeat_interval_ms, args.heartbeat_timeout_ms)?;
    let heartbeat_listen = heartbeat_address("--listen", args.listen, "--heartbeat-listen", args.heartbeat_listen)?;
    let interval = Duration::from_millis(args.interval_ms);
    let interval_min = Duration::from_micros(args.interval_min_us);
    if interval_min > interval {
        return Err(Failure::usage(format!(
            "--interval-min-us {} is more than --interval-ms {}: \
                the least time between captures cannot exceed the most; lower it",
            args.interval_min_us, args.interval_ms
        )));
    }
    if let Some(staging) = args.staging_max.filter(|staging| *staging < STAGING_MIN) {
        return Err(Failure::usage(format!(
            "--staging-max {staging}: too little for an epoch; give at least {STAGING_MIN}"
        )));
    }
    if args.disk.len() > DISKS_MAX {
        return Err(Failure::usage(format!(
            "--disk is given {} times: a guest has at most {DISKS_MAX} disks",
            args.disk.len()
        )));
    }
    twice(&args.disk)?;
    let control = match &args.control {
        Some(path) => path.clone(),
        None => default_control(&guest)?,
    };
    let console = match &args.console {
        ConsoleFlag::Stdout => ConsoleTo::Stdout,
        ConsoleFlag::Stdio => ConsoleTo::Stdio,
        ConsoleFlag::File(path) => ConsoleTo::File(path.clone()),
        ConsoleFlag::Socket(Some(path)) => ConsoleTo::Socket(path.clone()),
        ConsoleFlag::Socket(None) => ConsoleTo::Socket(console_beside(&control)),
        ConsoleFlag::None => ConsoleTo::None,
    };
    Ok(NodeConfig {
        guest,
        tap,
        cpu: args.cpu.map(CpuFlag::model).unwrap_or_default(),
        guest_clock: match args.guest_clock {
            GuestClockFlag::Correct => ClockPolicy::Correct,
            GuestClockFlag::Continue => ClockPolicy::Continue,
        },
        listen: args.listen,
        heartbeat_listen,
        arbiter: arbiter::config(&args.who)?,
        interval,
        interval_min,
        commit_on_output: args.commit_on_output,
        stall_max: stall_max(args.stall_max_ms, heartbeat)?,
        heartbeat,
        compress: match args.compress {
            CompressFlag::Auto => Compress::Auto,
            CompressFlag::None => Compress::None,
            CompressFlag::Lz4 => Compress::Lz4,
        },
        staging_bytes_max: args.staging_max.map(|staging| staging.bytes),
        output_bytes_max: output_bytes(args.output_max_bytes)?,
        output_packets_max: usize::try_from(args.output_max_packets).unwrap_or(usize::MAX),
        control,
        disks: args.disk.iter().map(|disk| disk.config()).collect(),
        force_disk: args.force_disk,
        console,
    })
}

/// Refuses an image that is named twice, which one disk would then find locked by another. What
/// nobody writes may well be two disks.
fn twice(disks: &[Disk]) -> Result<(), Failure> {
    let configs: Vec<_> = disks.iter().map(Disk::config).collect();
    let mut pairs =
        configs.iter().enumerate().flat_map(|(at, one)| configs.iter().skip(at + 1).map(move |two| (one, two)));
    match pairs.find(|(one, two)| one.path == two.path && !(one.read_only && two.read_only)) {
        Some((one, _)) => Err(Failure::usage(format!(
            "--disk {} is given twice: each disk of the guest has an image of its own; name another",
            one.path.display()
        ))),
        None => Ok(()),
    }
}

/// What a primary needs besides.
pub(super) fn primary(
    node: &NodeArgs,
    machine: &MachineArgs,
    restored: Option<&SnapshotHead>,
    cold: bool,
) -> Result<PrimaryStart, Failure> {
    let guest = required(node.guest.clone(), "--guest NAME", "name the guest, the same on both nodes")?;
    if cold && node.who.arbiter == Some(ArbiterSpec::None) {
        return Err(Failure::usage(
            "mcd cold-start overrides what an arbiter has on record, and --arbiter none has no record; use mcd primary",
        ));
    }
    let guest_ip = node.guest_ip.map(|cidr| cidr.ipv4);
    if let (Some(head), Some(path)) = (restored, &machine.restore) {
        let boot = GuestBoot::Snapshot(path.clone());
        return Ok(PrimaryStart { shape: head.shape.clone(), boot, guest_ip, both_nodes_are_dead: cold });
    }
    let memory = machine.memory.unwrap_or(MEMORY_DEFAULT);
    if !(MEMORY_MIN..=MEMORY_MAX).contains(&memory) || !memory.bytes.is_multiple_of(4096) {
        return Err(Failure::usage(format!(
            "--memory {memory}: give a multiple of 4K from {MEMORY_MIN} to {MEMORY_MAX}, such as 128M"
        )));
    }
    let Mac(mac) = machine.mac.unwrap_or_else(|| Mac::of_guest(&guest));
    let rng = machine.rng.unwrap_or(machine.kernel.is_some());
    Ok(PrimaryStart {
        shape: MachineShape { rng, ..MachineShape::bare(memory.bytes, machine.cpus.unwrap_or(1), mac) },
        boot: boot(node, machine)?,
        guest_ip,
        both_nodes_are_dead: cold,
    })
}

/// What the machine starts: a kernel if one is named.
fn boot(node: &NodeArgs, machine: &MachineArgs) -> Result<GuestBoot, Failure> {
    let Some(kernel) = &machine.kernel else {
        let what_to_do = "give the built-in guest an address, such as 10.0.0.2/24, or name a kernel with --kernel";
        let ip = required(node.guest_ip, "--guest-ip IP/BITS", what_to_do)?;
        return Ok(GuestBoot::BuiltIn(guest_address(ip, machine.guest_gateway)?));
    };
    if machine.guest_gateway.is_some() {
        return Err(Failure::usage(
            "--guest-gateway is for the built-in guest: a kernel is told of its network by --append",
        ));
    }
    let append = machine.append.clone().unwrap_or_else(|| APPEND_DEFAULT.to_owned());
    Ok(GuestBoot::Linux(LinuxGuest { kernel: kernel.clone(), initrd: machine.initrd.clone(), append }))
}

/// What a secondary needs besides.
pub(super) fn secondary(args: &SecondaryArgs) -> Result<SecondaryStart, Failure> {
    let peer = required(args.peer, "--peer IP:PORT", "give the primary's --listen address")?;
    if peer.port() == 0 || peer.ip().is_unspecified() {
        return Err(Failure::usage(format!(
            "--peer {peer}: nobody can be reached there; give the primary's address and port"
        )));
    }
    if peer == args.node.listen {
        return Err(Failure::usage(format!("--peer {peer} is this node's own --listen; give the primary's address")));
    }
    let peer_heartbeat = heartbeat_address("--peer", peer, "--peer-heartbeat", args.peer_heartbeat)?;
    Ok(SecondaryStart { peer, peer_heartbeat, guest_ip: args.node.guest_ip.map(|cidr| cidr.ipv4) })
}

pub(super) fn required<T>(value: Option<T>, flag: &str, what_to_do: &str) -> Result<T, Failure> {
    value.ok_or_else(|| Failure::usage(format!("{flag} is missing: {what_to_do}")))
}

fn heartbeat_address(
    data_flag: &str,
    data: SocketAddr,
    flag: &str,
    given: Option<SocketAddr>,
) -> Result<SocketAddr, Failure> {
    match (given, data.port().checked_add(1)) {
        (Some(address), _) if address == data && data.port() != 0 => Err(Failure::usage(format!(
            "{flag} {address} is the same as {data_flag}: data and heartbeats have a port each; choose another"
        ))),
        (Some(address), _) => Ok(address),
        (None, Some(next)) if next > 1 => Ok(SocketAddr::new(data.ip(), next)),
        (None, _) => Err(Failure::usage(format!(
            "{data_flag} {data}: no port follows it that heartbeats could use; choose another or give {flag}"
        ))),
    }
}

fn heartbeat(interval_ms: u64, timeout_ms: Option<u64>) -> Result<HeartbeatConfig, Failure> {
    let timeout_ms = timeout_ms.unwrap_or(interval_ms.saturating_mul(3));
    if timeout_ms < interval_ms.saturating_mul(2) {
        return Err(Failure::usage(format!(
            "--heartbeat-timeout-ms {timeout_ms} is less than twice --heartbeat-interval-ms {interval_ms}: \
             one late heartbeat would be taken for a dead peer; raise it or shorten the interval"
        )));
    }
    Ok(HeartbeatConfig { interval: Duration::from_millis(interval_ms), timeout: Duration::from_millis(timeout_ms) })
}

/// By default long enough that a short stall of a disk is sat out, and never shorter than what
/// makes a difference to the peer.
fn stall_max(ms: Option<u64>, heartbeat: HeartbeatConfig) -> Result<Duration, Failure> {
    const DEFAULT: Duration = Duration::from_secs(2);
    let stall_max = ms.map_or(DEFAULT.max(heartbeat.timeout * 4), Duration::from_millis);
    if stall_max <= heartbeat.timeout {
        return Err(Failure::usage(format!(
            "--stall-max-ms {} is not longer than the heartbeat timeout of {} ms: a guest would be handed over before \
             anybody misses it; raise it or shorten the timeout",
            stall_max.as_millis(),
            heartbeat.timeout.as_millis()
        )));
    }
    Ok(stall_max)
}

fn guest_address(ip: Cidr, gateway: Option<Ipv4Addr>) -> Result<GuestAddress, Failure> {
    let Cidr { ipv4, prefix_len } = ip;
    match gateway {
        Some(gateway) if gateway == ipv4 => {
            Err(Failure::usage(format!("--guest-gateway {gateway} is the guest's own address; give the router's")))
        }
        // The gateway of a network of one host is outside of it, on the same link.
        Some(gateway) if !ip.has_host(gateway) && prefix_len < 32 => Err(Failure::usage(format!(
            "--guest-gateway {gateway} is not in the guest's network {ipv4}/{prefix_len}; give a router that is"
        ))),
        gateway => Ok(GuestAddress { ipv4, prefix_len, gateway }),
    }
}

fn output_bytes(size: Size) -> Result<usize, Failure> {
    const OUTPUT_MIN: Size = Size { bytes: 64 << 10 };
    match usize::try_from(size.bytes) {
        Ok(bytes) if size >= OUTPUT_MIN => Ok(bytes),
        _ => Err(Failure::usage(format!("--output-max-bytes {size}: give at least {OUTPUT_MIN}"))),
    }
}

/// Where the control socket of a guest's node is by default.
pub(super) fn default_control(guest: &GuestName) -> Result<PathBuf, Failure> {
    let missing = || {
        Failure::usage(
            "--control PATH is missing: you are not root and XDG_RUNTIME_DIR is not set, so there is no default",
        )
    };
    control_directory().map(|directory| directory.join(format!("{guest}.{CONTROL_EXTENSION}"))).ok_or_else(missing)
}

/// What the name of a control socket ends with.
pub(super) const CONTROL_EXTENSION: &str = "sock";

/// Where the console's socket is by default: beside the control socket.
pub(super) fn console_beside(control: &Path) -> PathBuf {
    control.with_extension("console")
}

/// The directory of the control sockets of this user.
pub(super) fn control_directory() -> Option<PathBuf> {
    if nix::unistd::geteuid().is_root() {
        return Some(PathBuf::from("/run/mcd"));
    }
    std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()).map(|dir| PathBuf::from(dir).join("mcd"))
}
