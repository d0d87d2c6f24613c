//! What a node has whatever its role: its configuration, its inbox, its board and its arbiter.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender};
use netbuf::{Limits, OutputBuffer, VnetTapPort};

use super::arbiter_thread::{ArbiterThread, Reach};
use super::clock;
use super::config::{Compress, NodeConfig};
use super::disks::NodeDisks;
use super::error::NodeError;
use super::events::NodeEvent;
use super::status::StatusStore;
use crate::arbiter::Arbiter;
use crate::checkpoint::capture_pool::CapturePool;
use crate::checkpoint::output::{OutputGate, OutputListener};
use crate::control::EventSink;
use crate::control::console::Console;
use crate::machine::{CpuModel, Machine};
use crate::protocol::cpu::{GuestCpu, HostCpu};
use crate::protocol::event::Event;
use crate::protocol::machine_shape::MachineShape;
use crate::protocol::messages::features;
use crate::protocol::primary::PrimaryConfig;

/// Time between two questions to an arbiter out of reach, or two tries to reach a primary.
pub const RETRY: Duration = Duration::from_millis(200);
/// How long a newcomer may take to build its machine and open its second connection.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Pages in one background push: small enough that an epoch never waits long behind it (2 MiB,
/// about 1 ms on a fast link).
const PUSH_PAGES_MAX: usize = 512;

/// A context whose arbiter nobody may ask yet but the one who claims the guest.
pub struct ContextWithoutArbiter {
    pub config: NodeConfig,
    pub guest_ip: Option<Ipv4Addr>,
    pub inbox: Receiver<NodeEvent>,
    pub events: Sender<NodeEvent>,
    pub status: Arc<StatusStore>,
    pub sink: EventSink,
    pub console: Console,
    pub cpu: HostCpu,
}

impl ContextWithoutArbiter {
    /// Hands the arbiter to its thread.
    pub fn with_arbiter(self, arbiter: Box<dyn Arbiter>) -> std::io::Result<Context> {
        let notice = notice(self.status.clone(), self.sink.clone());
        let arbiter = ArbiterThread::start(arbiter, self.events.clone(), notice)?;
        let captures = CapturePool::default();
        let warming = captures.clone();
        std::thread::Builder::new().name("mcd-warm".into()).spawn(move || warming.warm())?;
        let ContextWithoutArbiter { config, guest_ip, inbox, events, status, sink, console, cpu } = self;
        Ok(Context { config, guest_ip, inbox, events, status, sink, console, arbiter, cpu, captures })
    }
}

/// Writes down whether the arbiter answers, and tells programs what was found while nobody asked:
/// what is found by a question is told by `protocol/`, which asked it.
fn notice(status: Arc<StatusStore>, sink: EventSink) -> impl FnMut(Reach) + Send {
    let mut told = false;
    move |Reach { lost, watched }| {
        match &lost {
            Some(why) if watched && !told => {
                told = true;
                tracing::warn!(event = "MC_ARBITER_LOST", "arbiter out of reach: {why}");
                sink.emit("MC_ARBITER_LOST", serde_json::json!({ "detail": format!("arbiter out of reach: {why}") }));
            }
            None if told => {
                told = false;
                let event = Event::ArbiterBack;
                tracing::info!(event = event.name(), "{event}");
                sink.emit(event.name(), serde_json::json!({ "detail": event.to_string() }));
            }
            Some(_) | None => {}
        }
        status.arbiter_noticed(lost);
    }
}

/// The parts of a node that outlive its role.
pub struct Context {
    /// What the operator decided.
    pub config: NodeConfig,
    /// The guest's address, if known: announced after a takeover.
    pub guest_ip: Option<Ipv4Addr>,
    /// Everything that happens arrives here.
    pub inbox: Receiver<NodeEvent>,
    /// The way into the inbox.
    pub events: Sender<NodeEvent>,
    /// What people see.
    pub status: Arc<StatusStore>,
    /// What programs are told.
    pub sink: EventSink,
    /// The guest's serial console.
    pub console: Console,
    /// Who decides.
    pub arbiter: ArbiterThread,
    /// The CPU this host can give a guest.
    pub cpu: HostCpu,
    /// Room for captures, made ready in the background from the start: a node may need it at any
    /// moment, and in a abort.
    pub captures: CapturePool,
}

impl Context {
    /// Tells people and programs.
    pub fn tell(&self, event: &Event) {
        if event.is_warning() {
            tracing::warn!(event = event.name(), "{event}");
        } else {
            tracing::info!(event = event.name(), "{event}");
        }
        self.sink.emit(event.name(), serde_json::json!({ "detail": event.to_string() }));
    }

    /// The protocol's view of the configuration.
    pub fn primary_config(&self, shape: MachineShape, tsc_khz: u32) -> PrimaryConfig {
        PrimaryConfig {
            guest: self.config.guest.clone(),
            shape,
            cpu: GuestCpu { digest: self.cpu.digest, tsc_khz },
            features: self.features(),
            interval: self.config.interval,
            interval_min: self.config.interval_min,
            commit_on_output: self.config.commit_on_output,
            heartbeat: self.config.heartbeat,
            arbiter_retry: RETRY,
            join_timeout: JOIN_TIMEOUT,
            push_pages_max: PUSH_PAGES_MAX,
        }
    }

    /// Feature bits this node offers.
    pub fn features(&self) -> u64 {
        let lz4 = if self.config.compress == Compress::None { 0 } else { features::LZ4 };
        lz4 | features::DISK_HASHES
    }
}

/// The tap, behind a closed gate that tells `events` what waits.
pub fn open_gate(config: &NodeConfig, events: &Sender<NodeEvent>) -> Result<Arc<OutputGate>, NodeError> {
    let port = VnetTapPort::open(&config.tap)?;
    let limits = Limits { bytes_max: config.output_bytes_max, packets_max: config.output_packets_max };
    let acceptor = OutputForwarder { events: events.clone() };
    Ok(OutputGate::new(Box::new(port), OutputBuffer::new(limits), Box::new(acceptor), clock::monotonic_us))
}

/// A paused machine behind `gate` and with these disks, whose events reach the inbox and whose
/// serial port is `console`.
pub fn new_machine(
    shape: &MachineShape,
    cpu: CpuModel,
    gate: Arc<OutputGate>,
    disks: &NodeDisks,
    console: &Console,
    events: &Sender<NodeEvent>,
) -> Result<Machine, NodeError> {
    let machine = Machine::new(shape, cpu, gate, disks.gates(), console.writer())?;
    console.plug(machine.console_input());
    let (from, to) = (machine.events(), events.clone());
    std::thread::Builder::new().name("mcd-guest".into()).spawn(move || {
        for event in from {
            if to.send(NodeEvent::Machine(event)).is_err() {
                break;
            }
        }
    })?;
    Ok(machine)
}

/// Turns the gate's calls (from vCPU threads) into events.
struct OutputForwarder {
    events: Sender<NodeEvent>,
}

impl OutputListener for OutputForwarder {
    fn output_waiting(&self) {
        // A node that is ending does not mind.
        let _ = self.events.send(NodeEvent::OutputWaiting);
    }

    fn output_full(&self) {
        let _ = self.events.send(NodeEvent::OutputFull);
    }
}
