//! The status of a node: its driver pushes notes, the control socket reads them at any time.
//!
//! Neither waits for the other. A driver that took a lock which a client's thread holds would stand
//! still whenever that thread is not scheduled, and a node that stalls is suspected: so the
//! driver only pushes into queues, and readers put the notes together.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;
use parking_lot::{Mutex, MutexGuard};

use super::clock;
use super::config::{ArbiterConfig, NodeConfig};
use super::meter::Pace;
use crate::checkpoint::journal::JournalFigures;
use crate::checkpoint::output::HeldFigures;
use crate::control::metrics::{EpochLog, EpochSample, EpochsReply};
use crate::control::status::{ArbiterStatus, NodeStatus, ResyncProgress, Role, State, TakeoverReport};
use crate::control::verify::VerifyReport;
use crate::device::driver_looks::DriverLooks;
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::primary::{self, Primary};
use crate::protocol::secondary::{self, Secondary};
use crate::protocol::types::StorageFault;
use crate::protocol::types::{EpochId, InstanceId};

/// Samples of epochs kept for `mc-query-epochs`.
const SAMPLES_MAX: usize = 16_384;
/// Notes kept for readers: some ten seconds of back-to-back epochs; of more the oldest are lost.
const NOTES_MAX: usize = 16_384;
/// The figures that change all the time; cheap to copy.
#[derive(Clone, Debug)]
struct StatusSnapshot {
    held: HeldFigures,
    journal: JournalFigures,
    held_disk_bytes: u64,
    refused_newcomers: u64,
    role: Role,
    state: State,
    protected: bool,
    instance: Option<InstanceId>,
    at: EpochId,
    running: bool,
    peer: Option<InstanceId>,
    resync: Option<Pace>,
    no_primary: Option<String>,
    /// An epoch is being captured for too long.
    stuck: bool,
    /// What is wrong with the guest itself.
    guest_alarm: Option<String>,
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
    verify: Option<VerifyReport>,
    /// Why shared storage does not take writes.
    storage: Option<String>,
    /// Why the guest has no network here.
    tap: Option<String>,
    drivers: Option<Drivers>,
    /// Why the arbiter did not answer when it was last asked.
    arbiter_lost: Option<String>,
}

/// A note for the readers.
enum Note {
    Committed(EpochSample),
    Aborted,
    WireBytes(u64),
    Takeover(Box<TakeoverReport>),
    Verify(Box<VerifyReport>),
    ArbiterLost(Option<String>),
    Storage(Option<String>),
    Tap(Option<String>),
    Drivers(Drivers),
}

/// What the guest's drivers have looked at, and since when the guest runs here.
struct Drivers {
    looks: Arc<DriverLooks>,
    since_us: u64,
}

/// How long a guest may take to boot before it is an alarm that no driver looked at a device.
const BOOT_TIME_US: u64 = 60_000_000;

/// The status of one node, over all its roles.
pub(crate) struct StatusStore {
    fixed: Fixed,
    shown: Mutex<Shown>,
    /// The newest snapshot that nobody has read yet.
    latest: ArrayQueue<StatusSnapshot>,
    notes: ArrayQueue<Note>,
}

impl StatusStore {
    /// The status of a node that was started for `role` and has done nothing yet.
    pub(crate) fn new(config: &NodeConfig, role: Role) -> Arc<StatusStore> {
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
            refused_newcomers: 0,
            role,
            state: if role == Role::Primary { State::Starting } else { State::Connecting },
            protected: false,
            instance: None,
            at: EpochId::default(),
            running: false,
            peer: None,
            resync: None,
            no_primary: None,
            stuck: false,
            guest_alarm: None,
            storage: None,
        };
        Arc::new(StatusStore {
            fixed,
            shown: Mutex::new(Shown {
                snapshot,
                log: EpochLog::new(SAMPLES_MAX),
                takeover: None,
                verify: None,
                storage: None,
                tap: None,
                drivers: None,
                arbiter_lost: None,
            }),
            latest: ArrayQueue::new(1),
            notes: ArrayQueue::new(NOTES_MAX),
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
                Note::ArbiterLost(lost) => shown.arbiter_lost = lost,
                Note::Storage(fault) => shown.storage = fault,
                Note::Tap(why) => shown.tap = why,
                Note::Drivers(drivers) => shown.drivers = Some(drivers),
            }
        }
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        let mut shown = self.shown.lock();
        self.read_notes(&mut shown);
        shown
    }

    /// Writes down how a primary is.
    pub(crate) fn primary(
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
            refused_newcomers: node.refused_count(),
            role,
            state,
            protected: node.phase() == Phase::Protected,
            instance: Some(node.me()),
            at: node.running_epoch(),
            running,
            peer: node.peer(),
            resync,
            no_primary: None,
            stuck: node.is_stuck(),
            guest_alarm: node.guest_alarm().map(|alarm| format!("the guest is in trouble: it {alarm}")),
            storage: None,
        });
    }

    /// Writes down how a secondary is.
    pub(crate) fn secondary(&self, node: &Secondary, resync: Option<Pace>) {
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
            refused_newcomers: 0,
            role: Role::Secondary,
            state,
            protected: node.phase() == Phase::Paired,
            instance: Some(node.me()),
            at,
            running: false,
            peer: node.primary(),
            resync,
            no_primary: node.no_primary().map(str::to_owned),
            stuck: false,
            guest_alarm: None,
            storage: node.storage_fault().cloned(),
        });
    }

    /// A takeover has come as far as a running guest.
    pub(crate) fn takeover(&self, report: TakeoverReport) {
        self.note(Note::Takeover(Box::new(report)));
    }

    /// An epoch was committed.
    pub(crate) fn committed(&self, sample: EpochSample) {
        self.note(Note::Committed(sample));
    }

    /// An epoch was captured and will not be committed.
    pub(crate) fn aborted(&self) {
        self.note(Note::Aborted);
    }

    /// Bytes went to the peer outside an epoch.
    pub(crate) fn add_wire_bytes(&self, bytes: u64) {
        self.note(Note::WireBytes(bytes));
    }

    /// A verify of the guest's disks has come so far.
    pub(crate) fn verified(&self, report: VerifyReport) {
        self.note(Note::Verify(Box::new(report)));
    }

    /// The arbiter was asked and answered, or did not; why.
    pub(super) fn arbiter_contacted(&self, lost: Option<String>) {
        self.note(Note::ArbiterLost(lost));
    }

    /// Shared storage was found to take writes, or not to.
    pub(crate) fn storage_noticed(&self, fault: Option<String>) {
        self.note(Note::Storage(fault));
    }

    /// The guest runs here from now on.
    pub(crate) fn guest_runs(&self, looks: Arc<DriverLooks>) {
        self.note(Note::Drivers(Drivers { looks, since_us: clock::monotonic_us() }));
    }

    /// The tap was found to be lost, or to be there again.
    pub(super) fn tap_noticed(&self, why: Option<String>) {
        self.note(Note::Tap(why));
    }

    /// The whole status.
    pub(crate) fn status(&self) -> NodeStatus {
        let shown = self.shown();
        let Shown { snapshot, log, takeover, storage, tap, drivers, arbiter_lost, verify: _ } = &*shown;
        let mut alarms: Vec<String> = snapshot.guest_alarm.iter().cloned().collect();
        let arbiter_lost = arbiter_lost.as_deref();
        if let Some(why) = arbiter_lost {
            alarms.push(format!("arbiter out of reach: {}; {why}", without_arbiter(snapshot.state)));
        }
        if snapshot.stuck {
            alarms.push(
                "MC_GUEST_STUCK: the guest cannot be captured, because a vCPU or a device does not stop; nothing is \
                 committed or released meanwhile"
                    .into(),
            );
        }
        if let Some(why) = &snapshot.no_primary {
            alarms.push(format!("no primary to join: {why}"));
        }
        let unused_devices = drivers.as_ref().map(|drivers| drivers.looks.unseen()).unwrap_or_default();
        if let Some(drivers) = drivers {
            alarms.extend(unused_alarm(&unused_devices, clock::monotonic_us().saturating_sub(drivers.since_us)));
        }
        if let Some(why) = tap {
            alarms.push(format!("MC_TAP_LOST: {why}"));
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
                detail: arbiter_lost.unwrap_or(&self.fixed.arbiter_detail).to_owned(),
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
            lost_frames: snapshot.held.lost_frames,
            refused_newcomers: snapshot.refused_newcomers,
            unused_devices,
            journal_bytes: snapshot.journal.bytes,
            journal_full_times: snapshot.journal.full_times,
            resync: snapshot.resync.as_ref().map(|Pace { parts, rate_pages_s }| {
                ResyncProgress::of(parts, rate_pages_s.map(|pages| pages.saturating_mul(PAGE_BYTES as u64)))
            }),
            takeover: takeover.clone().map(|report| with_first_packet(report, snapshot.held.first_out_us)),
            alarms,
        }
    }

    /// The guest's name.
    pub(super) fn guest(&self) -> &str {
        &self.fixed.guest
    }

    /// The figures of committed epochs from this index of the log on.
    pub(super) fn epochs_since(&self, since: u64) -> EpochsReply {
        self.shown().log.since(since)
    }

    /// How the last verify of the guest's disks is, if there was one.
    pub(super) fn verify_report(&self) -> Option<VerifyReport> {
        self.shown().verify.clone()
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

/// A guest that should have booted by now has drivers for all of its devices.
fn unused_alarm(devices: &[String], running_us: u64) -> Option<String> {
    let is_alarm = !devices.is_empty() && running_us >= BOOT_TIME_US;
    is_alarm.then(|| {
        format!(
            "no driver of the guest has looked at its {}: its kernel needs virtio-mmio (CONFIG_VIRTIO_MMIO, or the \
             module virtio_mmio in its initrd)",
            devices.join(", ")
        )
    })
}

fn with_first_packet(mut report: TakeoverReport, first_out_us: Option<u64>) -> TakeoverReport {
    report.first_packet_monotonic_us = first_out_us;
    report.first_packet_ms = first_out_us.map(|us| us.saturating_sub(report.started_monotonic_us) as f64 / 1000.0);
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_a_driver_is_an_alarm_once_the_guest_had_time_to_boot() {
        let devices = ["network card".to_owned(), "disk 0".to_owned()];
        assert_eq!(unused_alarm(&devices, BOOT_TIME_US - 1), None);
        assert_eq!(unused_alarm(&[], BOOT_TIME_US), None);
        let alarm = unused_alarm(&devices, BOOT_TIME_US).expect("an alarm");
        assert!(alarm.contains("network card, disk 0") && alarm.contains("virtio-mmio"), "{alarm}");
    }
}
