//! What a node has whatever its role: its configuration, its inbox, its status and its arbiter.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use netbuf::{Limits, OutputBuffer, VnetTapPort};

use super::arbiter_thread::{ArbiterThread, Contact};
use super::clock;
use super::config::{Compress, NodeConfig};
use super::disks::NodeDisks;
use super::error::NodeError;
use super::inbox::{Flag, InboxSender};
use super::status::StatusStore;
use super::tap_watch;
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
use crate::protocol::types::ConnId;

/// Time between two questions to an arbiter out of reach, or two tries to reach a primary.
pub(super) const RETRY: Duration = Duration::from_millis(200);
/// How long a newcomer may take from its hello to its heartbeat connection.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a newcomer may make no progress with building its machine.
const BUILD_SILENCE_MAX: Duration = Duration::from_secs(30);
/// How long the secondary may take to take over a guest that was handed over.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the end of a guest waits for shared storage to take its last writes.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Pages in one background push: small enough that an epoch never waits long behind it (2 MiB,
/// about 1 ms on a fast link).
const PUSH_PAGES_MAX: usize = 512;

/// A context whose arbiter nobody may ask yet but the one who claims the guest.
pub(crate) struct ContextWithoutArbiter {
    pub config: NodeConfig,
    pub guest_ip: Option<Ipv4Addr>,
    pub events: InboxSender,
    pub status: Arc<StatusStore>,
    pub sink: EventSink,
    pub console: Arc<Console>,
    pub cpu: HostCpu,
}

impl ContextWithoutArbiter {
    /// Hands the arbiter to its thread.
    pub(crate) fn with_arbiter(self, arbiter: Box<dyn Arbiter>) -> std::io::Result<Context> {
        let notice = notice(self.status.clone(), self.sink.clone());
        let arbiter = ArbiterThread::start(arbiter, self.events.clone(), notice)?;
        let sink = self.sink.clone();
        tap_watch::start(self.config.tap.clone(), &self.status, move |event| report(&sink, event))?;
        let captures = CapturePool::default();
        let warming = captures.clone();
        std::thread::Builder::new().name("mcd-warm".into()).spawn(move || warming.warm())?;
        let ContextWithoutArbiter { config, guest_ip, events, status, sink, console, cpu } = self;
        Ok(Context { config, guest_ip, events, status, sink, console, arbiter, cpu, captures })
    }
}

/// Keeps in the status whether the arbiter answers, and tells people when that changes.
fn notice(status: Arc<StatusStore>, sink: EventSink) -> impl FnMut(Contact) + Send {
    move |Contact { lost, event }| {
        status.arbiter_contacted(lost);
        event.into_iter().for_each(|event| report(&sink, &event));
    }
}

/// Writes an event to the log and sends it to the control clients; waits for neither.
fn report(sink: &EventSink, event: &Event) {
    if event.is_warning() {
        tracing::warn!(event = event.name(), "{event}");
    } else {
        tracing::info!(event = event.name(), "{event}");
    }
    sink.emit(event.name(), serde_json::json!({ "detail": event.to_string() }));
}

/// The parts of a node that outlive its role.
pub(crate) struct Context {
    /// What the operator decided.
    pub config: NodeConfig,
    /// The guest's address, if known: announced after a takeover.
    pub guest_ip: Option<Ipv4Addr>,
    /// The way into the inbox, where everything that happens arrives.
    pub events: InboxSender,
    /// What the control socket answers queries from.
    pub status: Arc<StatusStore>,
    /// The way to the control clients.
    pub sink: EventSink,
    /// The guest's serial console.
    pub console: Arc<Console>,
    /// The arbiter's thread.
    pub arbiter: ArbiterThread,
    /// The CPU this host can give a guest.
    pub cpu: HostCpu,
    /// Room for captures, made ready in the background from the start: a node may need it at any
    /// moment, and at once.
    pub captures: CapturePool,
}

impl Context {
    /// Writes an event to the log and sends it to the control clients.
    pub(crate) fn tell(&self, event: &Event) {
        report(&self.sink, event);
    }

    /// The engine finds a connection broken: it hears of that in its turn, as from other threads.
    pub(crate) fn link_failed(&self, conn: ConnId, why: String) {
        // The inbox is this context's own, so it is there.
        let _ = self.events.link_failed(conn, why);
    }

    /// The protocol's view of the configuration.
    pub(crate) fn primary_config(&self, shape: MachineShape, tsc_khz: u32) -> PrimaryConfig {
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
            build_silence_max: BUILD_SILENCE_MAX,
            stall_max: self.config.stall_max,
            handover_timeout: HANDOVER_TIMEOUT,
            drain_timeout: DRAIN_TIMEOUT,
            push_pages_max: PUSH_PAGES_MAX,
        }
    }

    /// Feature bits this node offers.
    pub(crate) fn features(&self) -> u64 {
        let lz4 = if self.config.compress == Compress::None { 0 } else { features::LZ4 };
        lz4 | features::DISK_HASHES
    }
}

/// The tap, behind a closed gate that raises the flags of its output in `events`.
pub(crate) fn open_gate(config: &NodeConfig, events: &InboxSender) -> Result<Arc<OutputGate>, NodeError> {
    let port = VnetTapPort::open(&config.tap)?;
    let limits = Limits { bytes_max: config.output_bytes_max, packets_max: config.output_packets_max };
    let forwarder = OutputForwarder { events: events.clone() };
    Ok(OutputGate::new(Box::new(port), OutputBuffer::new(limits), Box::new(forwarder), clock::monotonic_us))
}

/// A paused machine behind `gate` and with these disks, whose events reach the inbox and whose
/// serial port is `console`.
pub(crate) fn new_machine(
    shape: &MachineShape,
    cpu: CpuModel,
    gate: Arc<OutputGate>,
    disks: &NodeDisks,
    console: &Console,
    events: &InboxSender,
) -> Result<Machine, NodeError> {
    let machine = Machine::new(shape, cpu, gate, disks.gates(), console.writer())?;
    console.plug(machine.console_input());
    let (from, to) = (machine.events(), events.of_new_machine());
    std::thread::Builder::new()
        .name("mcd-guest".into())
        .spawn(move || from.into_iter().for_each(|event| to.send(event)))?;
    Ok(machine)
}

/// Turns the gate's calls, which come from vCPU and device threads, into events.
struct OutputForwarder {
    events: InboxSender,
}

impl OutputListener for OutputForwarder {
    fn output_waiting(&self) {
        self.events.raise(Flag::OutputWaiting);
    }

    fn output_full(&self) {
        self.events.raise(Flag::OutputFull);
    }
}
