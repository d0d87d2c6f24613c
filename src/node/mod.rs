//! Floor 5: the node's drivers. They turn what happens into inputs for `protocol/` and its actions
//! into effects.
//!
//! ```text
//!  vCPU threads ─ output waiting ─┐                     ┌─▶ release, tap ─▶ network
//!  link readers ─ messages ───────┤                     ├─▶ machine thread ─▶ captures ─▶ data connection
//!  arbiter thread ─ answers ──────┼─▶ inbox ─▶ engine ──┼─▶ heartbeat thread ─▶ heartbeat connection
//!  worker threads ─ reports ──────┤        (protocol)   ├─▶ arbiter thread
//!  control socket ─ commands ─────┘                     └─▶ status snapshot ◀─ control socket (never waits)
//! ```
//!
//! Which thread drives an engine is in `engine`.

mod acceptor;
mod announce;
#[cfg(test)]
mod arbiter_tests;
mod arbiter_thread;
mod block_hasher;
mod claim;
pub mod clock;
mod commands;
pub mod config;
mod connections;
mod connector;
mod context;
mod disk_error;
mod disks;
mod engine;
mod error;
mod events;
mod heartbeats;
mod inbox;
mod memory_holder;
mod meter;
mod primary;
mod priority;
mod restore;
mod secondary;
mod shared_disks;
mod signals;
mod stamp_writer;
mod status;
mod tap_watch;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

pub use disks::DiskError;
pub use error::NodeError;

use self::claim::claim_guest;
use self::commands::Commands;
use self::config::{ArbiterConfig, GuestAddress, GuestBoot, NodeConfig, OnPeerLoss, PrimaryStart, SecondaryStart};
use self::context::{Context, ContextWithoutArbiter, RETRY, new_machine, open_gate};
use self::disks::NodeDisks;
use self::inbox::{Inbox, InboxSender, inbox};
use self::primary::PrimaryNode;
use self::secondary::{Promoted, SecondaryEnd, SecondaryNode};
use self::status::StatusStore;
use crate::arbiter::Arbiter;
use crate::arbiter::command::CommandArbiter;
use crate::arbiter::etcd::EtcdArbiter;
use crate::arbiter::file::FileArbiter;
use crate::control::Server;
use crate::control::console::Console;
use crate::control::status::Role;
use crate::machine::{GuestNet, MachineError, host_cpu};
use crate::protocol::id::Id;
use crate::protocol::primary::{End, Primary};
use crate::protocol::secondary::{Ending, Secondary, SecondaryConfig};

/// How long a primary may take to answer a hello.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How a node's process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeEnd {
    /// As asked.
    Quit,
    /// The guest shut down.
    GuestEnded(String),
    /// The guest asked for a reset; it is off, and to be started again.
    Restart,
    /// Another node runs the guest.
    Fenced,
}

/// Prepares the process. Call it first, from the main thread, before any file or thread is there.
pub fn prepare_process() {
    if let Err(error) = memory_holder::start() {
        tracing::warn!(
            %error,
            "no memory holder process: if this node is killed, its peer notices the later the more memory the guest has"
        );
    }
}

/// Starts the guest and protects it until it ends here.
///
/// # Errors
/// See [`NodeError`]: what the host lacks, why the arbiter refused, what failed.
pub fn run_primary(config: NodeConfig, start: &PrimaryStart) -> Result<NodeEnd, NodeError> {
    let me = new_id()?;
    let (events, inbox) = inbox();
    let gate = open_gate(&config, &events)?;
    netbuf::check_up(&config.tap)?;
    let mut shape = start.shape.clone();
    let mut snapshot = match &start.boot {
        GuestBoot::Snapshot(path) => Some(restore::open(path, &config, &shape)?),
        GuestBoot::BuiltIn(_) | GuestBoot::Linux(_) => None,
    };
    let (images, disks) = disks::open_images(&config)?;
    shape.disks = match &snapshot {
        Some(snapshot) => disks::check_images_of_snapshot(&config.disks, &disks, &snapshot.head)?,
        None => disks,
    };
    let disks = NodeDisks::new(&config, &shape, images, &events)?;
    let console = Arc::new(Console::open(&config.console)?);
    let mut machine = new_machine(&shape, config.cpu, gate.clone(), &disks, &console, &events)?;
    machine.memory().prefault(crate::machine::prefault_threads(), |_| {}).map_err(MachineError::from)?;
    match &start.boot {
        GuestBoot::BuiltIn(GuestAddress { ipv4, prefix_len, gateway }) => {
            machine.boot_builtin(&GuestNet { ipv4: *ipv4, prefix_len: *prefix_len, gateway: *gateway })?;
        }
        GuestBoot::Linux(guest) => machine.boot_linux(guest)?,
        GuestBoot::Snapshot(path) => {
            if let Some(snapshot) = snapshot.take() {
                tracing::info!(at = %snapshot.head.at, "the guest goes on from its snapshot");
                snapshot.load(path, &mut machine, &gate)?;
            }
        }
    }
    let mut arbiter = open_arbiter(&config, start.both_nodes_are_dead)?;
    let (server, context) = open_endpoints(config, Role::Primary, start.guest_ip, console, events)?;
    // The claim comes last: a guest that cannot start here must not be on record as ours.
    let record = claim_guest(arbiter.as_mut(), &context.config, me, start.both_nodes_are_dead)?;
    let context = context.with_arbiter(arbiter)?;
    let protocol = Primary::new(context.primary_config(shape, machine.tsc_khz()), me, record, clock::now());
    let guest = context.config.guest.as_str();
    tracing::info!(guest, generation = record.generation.0, "the guest starts; it runs alone until a secondary joins");
    let end = PrimaryNode::run(Arc::new(context), &inbox, machine, gate, disks, protocol, None)?;
    drop(server);
    Ok(end_of(end))
}

/// Joins a primary, holds its guest's image, and takes over when it fails.
///
/// # Errors
/// See [`NodeError`].
pub fn run_secondary(config: NodeConfig, start: &SecondaryStart) -> Result<NodeEnd, NodeError> {
    let (events, inbox) = inbox();
    // An occupied tap or image is an error now, not at the takeover.
    drop(open_gate(&config, &events)?);
    netbuf::check_up(&config.tap)?;
    disks::check_images_open(&config)?;
    let arbiter = open_arbiter(&config, false)?;
    let console = Arc::new(Console::open(&config.console)?);
    let (server, context) = open_endpoints(config, Role::Secondary, start.guest_ip, console, events)?;
    let context = Arc::new(context.with_arbiter(arbiter)?);
    let mut last_conn = 0;
    let mut start_at = clock::now();
    let end = loop {
        let me = new_id()?;
        let config = SecondaryConfig {
            guest: context.config.guest.clone(),
            cpu: context.cpu,
            features: context.features(),
            staging_bytes_max: context.config.staging_bytes_max.unwrap_or(u64::MAX),
            retry: RETRY,
            answer_timeout: ANSWER_TIMEOUT,
            stall_max: context.config.stall_max,
        };
        let protocol = Secondary::new(config, me, last_conn, start_at);
        let (end, newest_conn) = SecondaryNode::new(&context, start, protocol)?.run(&inbox)?;
        last_conn = newest_conn;
        match end {
            SecondaryEnd::Promoted(promoted, protocol) => break lead(context, &inbox, *promoted, *protocol)?,
            SecondaryEnd::Over { ending, .. } => break ending_of(ending)?,
            SecondaryEnd::Rejoin(after) => start_at = clock::now() + after,
        }
    };
    drop(server);
    Ok(end)
}

/// The secondary is the primary now.
fn lead(context: Arc<Context>, inbox: &Inbox, promoted: Promoted, protocol: Primary) -> Result<NodeEnd, NodeError> {
    let Promoted { machine, gate, disks, report, .. } = promoted;
    PrimaryNode::run(context, inbox, machine, gate, disks, protocol, Some(report)).map(end_of)
}

fn end_of(end: End) -> NodeEnd {
    match end {
        End::GuestOver { restart: true } => NodeEnd::Restart,
        End::GuestOver { restart: false } | End::Quit | End::GuestFailed(_) => NodeEnd::Quit,
        End::Fenced => NodeEnd::Fenced,
    }
}

fn ending_of(ending: Ending) -> Result<NodeEnd, NodeError> {
    match ending {
        Ending::Quit => Ok(NodeEnd::Quit),
        Ending::GuestEnded(why) => Ok(NodeEnd::GuestEnded(why)),
        Ending::Refused { detail, .. } => Err(NodeError::Refused(detail)),
        Ending::Foreign(why) => Err(NodeError::NotAPrimary(why)),
        Ending::NoMachine(why) => Err(NodeError::NoMachine(why)),
        Ending::ImageFailed(why) => Err(NodeError::ImageFailed(why)),
        Ending::NotRestored { record, epoch, why } => {
            Err(NodeError::NotRestored { generation: record.generation, epoch, why })
        }
    }
}

/// A name that nobody has: of an instance, or of a snapshot.
fn new_id() -> Result<Id, NodeError> {
    let mut bytes = [0; Id::BYTES];
    getrandom::fill(&mut bytes).map_err(|error| NodeError::Thread(std::io::Error::other(error.to_string())))?;
    Ok(Id::from_bytes(bytes))
}

fn open_arbiter(config: &NodeConfig, both_nodes_are_dead: bool) -> Result<Box<dyn Arbiter>, NodeError> {
    Ok(match &config.arbiter {
        ArbiterConfig::File { directory, timeout } => {
            Box::new(FileArbiter::with_timeout(directory, &config.guest, *timeout))
        }
        ArbiterConfig::Etcd(etcd) => Box::new(EtcdArbiter::new(etcd.clone(), &config.guest)?),
        ArbiterConfig::Command { script, timeout } => {
            let arbiter = CommandArbiter::new(script, &config.guest, *timeout)?;
            Box::new(if both_nodes_are_dead { arbiter.with_dead_peer() } else { arbiter })
        }
        ArbiterConfig::None { on_peer_loss } => {
            tracing::warn!(
                "no arbiter: {}",
                match on_peer_loss {
                    OnPeerLoss::Wait => "a lost peer is waited for, and a person must decide",
                    OnPeerLoss::Continue => "if the link between the nodes is cut, both will run the guest",
                }
            );
            let on_peer_loss = match on_peer_loss {
                OnPeerLoss::Wait => crate::arbiter::none::OnPeerLoss::Wait,
                OnPeerLoss::Continue => crate::arbiter::none::OnPeerLoss::Continue,
            };
            Box::new(crate::arbiter::none::NoArbiter::new(on_peer_loss))
        }
    })
}

/// Opens the ports, the control socket and the signal handlers.
fn open_endpoints(
    config: NodeConfig,
    role: Role,
    guest_ip: Option<Ipv4Addr>,
    console: Arc<Console>,
    events: InboxSender,
) -> Result<(Server, ContextWithoutArbiter), NodeError> {
    let cpu = host_cpu(config.cpu)?;
    acceptor::listen(config.listen, config.heartbeat_listen, events.clone())?;
    let status = StatusStore::new(&config, role);
    let server = Server::bind(&config.control, Commands::new(status.clone(), events.clone()))?;
    signals::listen(events.clone())?;
    let sink = server.events();
    Ok((server, ContextWithoutArbiter { config, guest_ip, events, status, sink, console, cpu }))
}
