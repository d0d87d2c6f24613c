//! What a node shows: the driver drops notes, the control socket reads them at any time.
//!
//! Neither waits for the other. A driver that took a lock which a client's thread holds would stand
//! still whenever that thread is not scheduled, and a node that stands still is suspected: so the
//! driver only pushes into queues, and readers put the notes together.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::bounded;
use crossbeam::queue::ArrayQueue;
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Map, Value, json};

use super::config::{ArbiterConfig, NodeConfig};
use super::events::{NodeEvent, SnapshotRequest};
use super::inbox::InboxSender;
use super::meter::Pace;
use crate::checkpoint::journal::JournalFigures;
use crate::checkpoint::output::HeldFigures;
use crate::control::metrics::{EpochLog, EpochSample};
use crate::control::status::{ArbiterStatus, NodeStatus, ResyncProgress, Role, State, TakeoverReport};
use crate::control::verify::VerifyReport;
use crate::control::{Handler, QmpError};
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::primary::{self, Command, DiskChoice, Primary};
use crate::protocol::secondary::{self, Secondary};
use crate::protocol::types::StorageFault;
use crate::protocol::types::{EpochId, InstanceId};

/// Samples of epochs kept for `mc-query-epochs`.
const SAMPLES_MAX: usize = 16_384;
/// Notes kept for readers: some ten seconds of back-to-back epochs; of more the oldest are lost.
const NOTES_MAX: usize = 16_384;
/// How long a command may take to take effect before its client is told that it did not.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);
/// The same for a snapshot, which has to be written: an hour is enough for a terabyte.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(3600);
const COMMANDS: &[&str] = &[
    "query-status",
    "query-name",
    "mc-query",
    "mc-query-epochs",
    "mc-checkpoint",
    "mc-disk-verify",
    "mc-query-disk-verify",
    "mc-snapshot",
    "stop",
    "cont",
    "quit",
];
/// The parameters that commands have.
const PARAMETERS: &[(&str, &str)] =
    &[("mc-query-epochs", "since"), ("mc-disk-verify", "disk"), ("mc-snapshot", "path"), ("mc-snapshot", "stop")];

/// The figures that change all the time; cheap to copy.
#[derive(Clone, Debug)]
struct StatusSnapshot {
    held: HeldFigures,
    journal: JournalFigures,
    held_disk_bytes: u64,
    role: Role,
    state: State,
    protected: bool,
    instance: Option<InstanceId>,
    at: EpochId,
    running: bool,
    peer: Option<InstanceId>,
    resync: Option<Pace>,
    arbiter_lost: Option<String>,
    no_primary: Option<String>,
    storage: Option<StorageFault>,
}

struct Fixed {
    guest: String,
    listen: String,
    arbiter_kind: &'static str,
    arbiter_detail: String,
    interval_ms: u64,
}

/// What readers have put together so far.
struct Shown {
    snapshot: StatusSnapshot,
    log: EpochLog,
    takeover: Option<TakeoverReport>,
    guest_alarm: Option<String>,
    verify: Option<VerifyReport>,
    /// Why shared storage does not take writes.
    storage: Option<String>,
    /// Why the arbiter did not answer when it was last looked at.
    arbiter_lost: Option<String>,
}

/// A note for the readers.
enum Note {
    Committed(EpochSample),
    Aborted,
    WireBytes(u64),
    Takeover(Box<TakeoverReport>),
    GuestAlarm(String),
    Verify(Box<VerifyReport>),
    Arbiter(Option<String>),
    Storage(Option<String>),
}

/// The board of one node, over all its roles.
pub struct StatusStore {
    fixed: Fixed,
    shown: Mutex<Shown>,
    /// The newest vitals nobody has read yet.
    latest: ArrayQueue<StatusSnapshot>,
    notes: ArrayQueue<Note>,
    events: InboxSender,
}

impl StatusStore {
    /// The board of a node that was started for `role` and has done nothing yet.
    pub fn new(config: &NodeConfig, role: Role, events: InboxSender) -> Arc<StatusStore> {
        let (arbiter_kind, arbiter_detail) = match &config.arbiter {
            ArbiterConfig::File { directory, .. } => ("file", directory.display().to_string()),
            ArbiterConfig::Etcd(etcd) => ("etcd", format!("{}{}", etcd.endpoints.join(","), etcd.prefix)),
            ArbiterConfig::Command { script, .. } => ("command", script.display().to_string()),
            ArbiterConfig::None { .. } => ("none", "no arbiter: see --on-peer-loss".into()),
        };
        let fixed = Fixed {
            guest: config.guest.to_string(),
            listen: config.listen.to_string(),
            arbiter_kind,
            arbiter_detail,
            interval_ms: u64::try_from(config.interval.as_millis()).unwrap_or(u64::MAX),
        };
        let snapshot = StatusSnapshot {
            held: HeldFigures::default(),
            journal: JournalFigures::default(),
            held_disk_bytes: 0,
            role,
            state: if role == Role::Primary { State::Starting } else { State::Connecting },
            protected: false,
            instance: None,
            at: EpochId::default(),
            running: false,
            peer: None,
            resync: None,
            arbiter_lost: None,
            no_primary: None,
            storage: None,
        };
        Arc::new(StatusStore {
            fixed,
            shown: Mutex::new(Shown {
                snapshot,
                log: EpochLog::new(SAMPLES_MAX),
                takeover: None,
                guest_alarm: None,
                verify: None,
                storage: None,
                arbiter_lost: None,
            }),
            latest: ArrayQueue::new(1),
            notes: ArrayQueue::new(NOTES_MAX),
            events,
        })
    }

    fn note(&self, note: Note) {
        if self.notes.is_full()
            && let Some(mut shown) = self.shown.try_lock()
        {
            // Nobody has asked for a long time: this is as good a time as any.
            self.read_notes(&mut shown);
        }
        self.notes.force_push(note);
    }

    fn read_notes(&self, shown: &mut Shown) {
        if let Some(snapshot) = self.latest.pop() {
            shown.snapshot = snapshot;
        }
        while let Some(note) = self.notes.pop() {
            match note {
                Note::Committed(sample) => shown.log.commit(sample),
                Note::Aborted => shown.log.abort(),
                Note::WireBytes(bytes) => shown.log.add_wire_bytes(bytes),
                Note::Takeover(report) => shown.takeover = Some(*report),
                Note::Verify(report) => shown.verify = Some(*report),
                Note::GuestAlarm(alarm) => shown.guest_alarm = Some(alarm),
                Note::Arbiter(lost) => shown.arbiter_lost = lost,
                Note::Storage(trouble) => shown.storage = trouble,
            }
        }
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        let mut shown = self.shown.lock();
        self.read_notes(&mut shown);
        shown
    }

    /// Writes down how a primary is.
    pub fn primary(
        &self,
        node: &Primary,
        running: bool,
        resync: Option<Pace>,
        held: HeldFigures,
        journal: JournalFigures,
        held_disk_bytes: u64,
    ) {
        use primary::Phase;
        let (role, state) = match node.phase() {
            Phase::Solo | Phase::Stopping => (Role::Primary, State::Solo),
            Phase::Joining | Phase::Resync | Phase::Completing | Phase::Pairing => (Role::Primary, State::Resync),
            Phase::Protected => (Role::Primary, State::Protected),
            Phase::Deciding => (Role::Primary, State::Suspecting),
            Phase::Fenced => (Role::Fenced, State::Fenced),
        };
        self.latest.force_push(StatusSnapshot {
            held,
            journal,
            held_disk_bytes,
            role,
            state,
            protected: node.phase() == Phase::Protected,
            instance: Some(node.me()),
            at: node.running_epoch(),
            running,
            peer: node.peer(),
            resync,
            arbiter_lost: node.arbiter_lost().map(str::to_owned),
            no_primary: None,
            storage: None,
        });
    }

    /// Writes down how a secondary is.
    pub fn secondary(&self, node: &Secondary, resync: Option<Pace>) {
        use secondary::Phase;
        let state = match node.phase() {
            Phase::Connecting | Phase::Greeting | Phase::Done => State::Connecting,
            Phase::Building | Phase::Joining | Phase::Syncing => State::Resync,
            Phase::Standby | Phase::Paired => State::Standby,
            Phase::Deciding => State::Suspecting,
            Phase::Locking | Phase::Promoted => State::Takeover,
        };
        let at = node.committed().unwrap_or(EpochId { generation: node.generation(), epoch: 0 });
        self.latest.force_push(StatusSnapshot {
            held: HeldFigures::default(),
            journal: JournalFigures::default(),
            held_disk_bytes: 0,
            role: Role::Secondary,
            state,
            protected: node.phase() == Phase::Paired,
            instance: Some(node.me()),
            at,
            running: false,
            peer: node.primary(),
            resync,
            arbiter_lost: node.arbiter_lost().map(str::to_owned),
            no_primary: node.no_primary().map(str::to_owned),
            storage: node.storage_fault().cloned(),
        });
    }

    /// A takeover has come as far as a running guest.
    pub fn takeover(&self, report: TakeoverReport) {
        self.note(Note::Takeover(Box::new(report)));
    }

    /// An epoch was committed.
    pub fn committed(&self, sample: EpochSample) {
        self.note(Note::Committed(sample));
    }

    /// An epoch was captured and will not be committed.
    pub fn aborted(&self) {
        self.note(Note::Aborted);
    }

    /// Bytes went to the peer outside an epoch.
    pub fn add_wire_bytes(&self, bytes: u64) {
        self.note(Note::WireBytes(bytes));
    }

    /// The guest has a trouble of its own.
    pub fn guest_alarm(&self, alarm: String) {
        self.note(Note::GuestAlarm(alarm));
    }

    /// A verify of the guest's disks has come so far.
    pub fn verified(&self, report: VerifyReport) {
        self.note(Note::Verify(Box::new(report)));
    }

    /// The arbiter was found to answer, or not to.
    pub fn arbiter_noticed(&self, lost: Option<String>) {
        self.note(Note::Arbiter(lost));
    }

    /// Shared storage was found to take writes, or not to.
    pub fn storage_noticed(&self, trouble: Option<String>) {
        self.note(Note::Storage(trouble));
    }

    /// The whole status.
    pub fn status(&self) -> NodeStatus {
        let shown = self.shown();
        let Shown { snapshot, log, takeover, guest_alarm, storage, arbiter_lost, verify: _ } = &*shown;
        let mut alarms: Vec<String> = guest_alarm.iter().cloned().collect();
        let arbiter_lost = snapshot.arbiter_lost.as_ref().or(arbiter_lost.as_ref());
        if let Some(why) = arbiter_lost {
            alarms.push(format!("arbiter out of reach: {}; {why}", without_arbiter(snapshot.state)));
        }
        if let Some(why) = &snapshot.no_primary {
            alarms.push(format!("no primary to join: {why}"));
        }
        if let Some(why) = storage {
            alarms.push(format!("shared storage fails, so the guest's flushes wait: {why}"));
        }
        match &snapshot.storage {
            Some(StorageFault::Locked(why)) => alarms.push(format!("MC_DISK_LOCKED: the takeover waits: {why}")),
            Some(StorageFault::Failing(why)) => alarms.push(format!("MC_DISK_FAILING: the takeover waits: {why}")),
            None => {}
        }
        NodeStatus {
            role: snapshot.role,
            state: snapshot.state,
            protected: snapshot.protected,
            guest: self.fixed.guest.clone(),
            instance: snapshot.instance.map(|id| id.to_string()).unwrap_or_default(),
            generation: snapshot.at.generation.0,
            epoch: snapshot.at.epoch,
            running: snapshot.running,
            peer: snapshot.peer.map(|id| id.to_string()),
            listen: self.fixed.listen.clone(),
            arbiter: ArbiterStatus {
                kind: self.fixed.arbiter_kind.into(),
                reachable: arbiter_lost.is_none(),
                detail: arbiter_lost.unwrap_or(&self.fixed.arbiter_detail).clone(),
            },
            interval_ms: self.fixed.interval_ms,
            pause_us: log.pause_us(),
            commit_us: log.commit_us(),
            dirty_pages: log.dirty_pages(),
            hold_us: log.hold_us(),
            epochs: log.counts(),
            wire_bytes: log.wire_bytes(),
            held_packets: snapshot.held.packets,
            held_bytes: snapshot.held.bytes,
            held_disk_bytes: snapshot.held_disk_bytes,
            journal_bytes: snapshot.journal.bytes,
            journal_full_times: snapshot.journal.full_times,
            resync: snapshot.resync.as_ref().map(|Pace { parts, rate_pages_s }| {
                ResyncProgress::of(parts, rate_pages_s.map(|pages| pages.saturating_mul(PAGE_BYTES as u64)))
            }),
            takeover: takeover.clone().map(|report| with_first_packet(report, snapshot.held.first_out_us)),
            alarms,
        }
    }

    fn command(&self, command: Command) -> Result<Value, QmpError> {
        let (reply, result) = bounded(1);
        let command_event = NodeEvent::Command { command, reply: Some(reply) };
        self.events.command(command_event).map_err(|error| QmpError::generic(error.to_string()))?;
        match result.recv_timeout(COMMAND_TIMEOUT) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(why)) => Err(QmpError::generic(why)),
            Err(_) if command == Command::Quit => Ok(json!({})),
            Err(_) => Err(QmpError::generic("the command did not take effect in time; see mc-query for the state")),
        }
    }
}

impl StatusStore {
    /// Has a snapshot written, which may take a while.
    fn snapshot(&self, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
        let path = arguments.get("path").and_then(Value::as_str).map(PathBuf::from).filter(|path| path.is_absolute());
        let path = path.ok_or_else(|| QmpError::generic("'path' must be a path that begins at the root"))?;
        let stop = arguments.get("stop").map_or(Some(false), Value::as_bool);
        let stop = stop.ok_or_else(|| QmpError::generic("'stop' must be true or false"))?;
        let (reply, result) = bounded(1);
        let request = SnapshotRequest { path, stop };
        let command_event = NodeEvent::Snapshot { request, reply };
        self.events.command(command_event).map_err(|error| QmpError::generic(error.to_string()))?;
        match result.recv_timeout(SNAPSHOT_TIMEOUT) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(why)) => Err(QmpError::generic(why)),
            Err(_) => Err(QmpError::generic("the snapshot was not written in time; see mc-query for the state")),
        }
    }
}

/// What it means for a node in this state that the arbiter does not answer.
fn without_arbiter(state: State) -> &'static str {
    match state {
        State::Suspecting => {
            "the peer is suspected and nobody decides, so nothing is released and no node takes over until it answers"
        }
        State::Protected => "all goes on, but if a node fails now the other cannot go on until it answers",
        State::Standby => "all goes on, but if the primary fails now this node cannot take over until it answers",
        State::Resync => "no pair can form until it answers",
        State::Starting => "the guest does not start until it answers",
        State::Solo | State::Connecting => "the guest cannot become protected until it answers",
        State::Takeover | State::Fenced => "this node does not need it now",
    }
}

fn with_first_packet(mut report: TakeoverReport, first_out_us: Option<u64>) -> TakeoverReport {
    report.first_packet_monotonic_us = first_out_us;
    report.first_packet_ms = first_out_us.map(|us| us.saturating_sub(report.started_monotonic_us) as f64 / 1000.0);
    report
}

impl Handler for StatusStore {
    fn commands(&self) -> &[&str] {
        COMMANDS
    }

    fn execute(&self, command: &str, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
        if arguments.keys().any(|key| !PARAMETERS.contains(&(command, key.as_str()))) {
            return Err(QmpError::generic(format!("{command} was given a parameter that it does not have")));
        }
        match command {
            "query-status" => Ok(self.status().query_status()),
            "query-name" => Ok(json!({ "name": self.fixed.guest })),
            "mc-query" => to_value(&self.status()),
            "mc-query-epochs" => {
                let since = arguments.get("since").map_or(Some(0), Value::as_u64);
                let since = since.ok_or_else(|| QmpError::generic("'since' must be a number, 0 or more"))?;
                to_value(&self.shown().log.since(since))
            }
            "mc-disk-verify" => self.command(Command::VerifyDisks(disk_choice(arguments.get("disk"))?)),
            "mc-query-disk-verify" => match &self.shown().verify {
                Some(report) => to_value(report),
                None => Err(QmpError::generic("no disk was verified yet: ask for it with mc-disk-verify")),
            },
            "mc-checkpoint" => self.command(Command::Checkpoint),
            "mc-snapshot" => self.snapshot(arguments),
            "stop" => self.command(Command::Stop),
            "cont" => self.command(Command::Cont),
            "quit" => self.command(Command::Quit),
            other => Err(QmpError::not_found(format!("The command {other} has not been found"))),
        }
    }
}

fn disk_choice(disk: Option<&Value>) -> Result<DiskChoice, QmpError> {
    let bad = || QmpError::generic("'disk' must be a disk's number, counted from 0, or its serial number");
    match disk {
        None => Ok(DiskChoice::All),
        Some(Value::String(text)) => {
            let mut serial = [0; 20];
            serial
                .get_mut(..text.len())
                .filter(|room| !room.is_empty())
                .ok_or_else(bad)?
                .copy_from_slice(text.as_bytes());
            Ok(DiskChoice::Serial(serial))
        }
        Some(other) => other.as_u64().map(DiskChoice::Number).ok_or_else(bad),
    }
}

fn to_value(value: &impl serde::Serialize) -> Result<Value, QmpError> {
    serde_json::to_value(value).map_err(|error| QmpError::generic(error.to_string()))
}
