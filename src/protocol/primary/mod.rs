//! The rules of the node that runs the guest.
//!
//! ```text
//!         both hellos      heartbeat: ready          last page pushed, arbiter in reach
//!   Solo ────────────▶ Joining ────────────▶ Resync ────────────▶ Completing (output held)
//!    ▲ ▲                  │                    │                        │ ack
//!    │ └──── newcomer lost: nothing was held ──┘                        │
//!    │                                                                  ▼
//!    │ swap won                 peer suspected             swap won   Pairing
//!    └──────────── Deciding ◀──── Completing, Protected ◀───────────────┘
//!                     │ swap lost                     │ another record stands
//!                     └──────────▶ Fenced ◀───────────┘
//! ```
//!
//! Captures and the start of dirty tracking are begun and done: the driver may take any time for
//! them, and everything else goes on meanwhile. A guest that cannot be captured for `stall_max` is
//! handed over: the secondary is asked to take over, and this node looks at the record until that
//! came about, or asks for the guest again when it did not (`capture.rs`).

mod capture;
mod commands;
mod compare;
mod digest;
mod ending;
mod epochs;
mod guest;
mod peer;
mod refusals;
mod storage;
mod types;
mod verdicts;

use std::collections::VecDeque;

pub use ending::{LastStamp, LastWrites};
pub use types::{Action, End, Input, OutputCut, PrimaryConfig};

use self::capture::Begun;
use self::commands::Pending;
use self::epochs::Epochs;
use self::peer::{Candidate, Peer};
use self::refusals::Refusals;
use super::arbitration::{ArbiterRequest, Arbitration};
use super::block_hashes::Comparison;
use super::event::Event;
use super::failure_detector::SleepGuard;
use super::guest_event::GuestEvent;
use super::machine_shape::MachineShape;
use super::messages::{Activity, Channel, Heartbeat, Message};
use super::mutant;
use super::peer_loss::{PeerFault, PeerLoss};
use super::record::Record;
use super::resync::Ledger;
use super::types::{ConnId, EpochId, Generation, InstanceId, Instant};
use super::verify::Verify;

/// What a primary is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Runs the guest alone; output passes.
    Solo,
    /// A newcomer has both connections and builds its machine.
    Joining,
    /// A newcomer receives epochs and pages; output passes.
    Resync,
    /// The epoch that makes the newcomer's image whole is on its way; output is held. The newcomer
    /// may take over from now on.
    Completing,
    /// That epoch is committed; the arbiter is asked to record the pair; output is held.
    Pairing,
    /// Output leaves as its epochs are committed.
    Protected,
    /// The peer, or a newcomer whose image may be whole, is suspected; the arbiter is asked whether
    /// this node may go on alone; output is held.
    Deciding,
    /// The guest has shut down (or must); the arbiter is told.
    Stopping,
    /// Another node runs the guest.
    Fenced,
}

/// The primary's state machine.
#[derive(Clone, Debug)]
pub struct Primary {
    config: PrimaryConfig,
    me: InstanceId,
    record: Record,
    phase: Phase,
    /// Newcomers that have not opened their heartbeat connection yet.
    candidates: Vec<Candidate>,
    peer: Option<Peer>,
    refusals: Refusals,
    epochs: Epochs,
    /// What the driver was asked to do with the machine and has not finished.
    begun: Option<Begun>,
    /// Dirty pages are tracked for the newcomer or secondary.
    tracking: bool,
    /// Until when the secondary may take over the guest that was handed over.
    handed_over_until: Option<Instant>,
    ledger: Option<Ledger>,
    /// Blocks that both nodes are hashing, in a resync or for `verify`.
    comparison: Option<Box<Comparison>>,
    /// Blocks among which holes are looked for, and the ticket of that.
    hole_search: Option<(u64, std::ops::Range<u64>)>,
    tickets: u64,
    /// The verify under way, or the last one.
    verify: Option<Box<Verify>>,
    /// When the resync's progress is sent to the newcomer again.
    progress_at: Instant,
    /// When the verify may go on.
    verify_at: Instant,
    arbitration: Arbitration,
    guard: SleepGuard,
    /// False after a stall, until the arbiter has confirmed the record.
    proven: bool,
    /// The arbiter confirmed the record since this resync became complete.
    pairing_checked: bool,
    /// Shared storage may lack what was written before this resync began.
    storage_behind: bool,
    stopped_by_operator: bool,
    stopped_by_full_output: bool,
    /// A snapshot, for which the guest is paused.
    snapshot: Option<commands::Snapshot>,
    /// An operator ends this node as soon as the arbiter has answered.
    quitting: bool,
    /// The guest asked for a reset with its end.
    restart: bool,
    /// What is wrong with the guest itself.
    guest_alarm: Option<GuestEvent>,
    guest_runs: bool,
    /// Commands that wait for what they ask for.
    pending: Pending,
    actions: VecDeque<Action>,
}

impl Primary {
    /// A primary that runs the guest alone under `record`, which the arbiter holds already.
    pub fn new(config: PrimaryConfig, me: InstanceId, record: Record, now: Instant) -> Primary {
        Primary {
            me,
            record,
            phase: Phase::Solo,
            candidates: Vec::new(),
            peer: None,
            refusals: Refusals::default(),
            epochs: Epochs::new(record.generation, now),
            begun: None,
            tracking: false,
            handed_over_until: None,
            ledger: None,
            comparison: None,
            hole_search: None,
            tickets: 0,
            verify: None,
            progress_at: now,
            verify_at: now,
            arbitration: Arbitration::new(config.arbiter_retry),
            guard: SleepGuard::new(config.heartbeat.interval, config.heartbeat.timeout, now),
            proven: true,
            pairing_checked: false,
            storage_behind: false,
            stopped_by_operator: false,
            stopped_by_full_output: false,
            snapshot: None,
            quitting: false,
            restart: false,
            guest_alarm: None,
            guest_runs: true,
            pending: Pending::default(),
            actions: VecDeque::new(),
            config,
        }
    }

    /// What the primary is doing.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The guest's Ethernet address.
    pub fn mac(&self) -> [u8; 6] {
        self.config.shape.mac
    }

    /// The guest's machine.
    pub fn shape(&self) -> &MachineShape {
        &self.config.shape
    }

    /// The record it runs under.
    pub fn record(&self) -> Record {
        self.record
    }

    /// This node's instance id.
    pub fn me(&self) -> InstanceId {
        self.me
    }

    /// The generation and the number of the epoch that runs now.
    pub fn running_epoch(&self) -> EpochId {
        self.epochs.next_id()
    }

    /// The peer, if there is one.
    pub fn peer(&self) -> Option<InstanceId> {
        self.peer.as_ref().map(|peer| peer.instance)
    }

    /// What a newcomer still lacks, during a resync.
    pub fn resync(&self) -> Option<&Ledger> {
        self.ledger.as_ref()
    }

    /// True if the guest's vCPUs are to run (outside a capture's pause).
    pub fn guest_runs(&self) -> bool {
        self.guest_runs
    }

    /// True while output must be held.
    pub fn holds_output(&self) -> bool {
        matches!(self.phase, Phase::Completing | Phase::Pairing | Phase::Protected | Phase::Deciding)
    }

    /// Takes what happened.
    pub fn handle(&mut self, now: Instant, input: Input) {
        self.notice_stall(now);
        if self.phase == Phase::Fenced {
            self.handle_fenced(input);
            return;
        }
        match input {
            Input::Tick => {}
            Input::Hello { conn, hello } => self.hello(now, conn, hello),
            Input::Message { conn, message } => self.message(now, conn, message),
            Input::Closed { conn, why } => self.closed(conn, why),
            Input::OutputWaiting { open_packets } => self.epochs.output_waiting(open_packets),
            Input::OutputFull => self.output_full(),
            // A disk waits, not the guest: nothing has to stop, only the epoch to be cut.
            Input::JournalFull => self.epochs.press(),
            Input::Captured { id } => self.captured(id),
            Input::CaptureFailed { id, why } => self.capture_failed(now, id, why),
            Input::Tracking { conn, result } => self.tracking(conn, result),
            Input::RunDone { run, result } => self.run_done(run, result),
            Input::Pushed => self.pushed(),
            Input::Holes { ticket, through, holes } => self.own_holes(ticket, through, &holes),
            Input::PeerHashes { conn, first, hashes } => self.peer_hashes(conn, first, hashes),
            Input::OwnHashes { ticket, hashes } => self.own_hashes(ticket, hashes),
            Input::StorageSynced { conn } => self.storage_synced(conn),
            Input::Written { through } => self.written(through),
            Input::ReleaseExpired => self.prove_again(),
            Input::Answer { ticket, answer } => {
                if let Some(verdict) = self.arbitration.answer(now, ticket, answer) {
                    self.verdict(now, verdict);
                }
            }
            Input::Command { ticket, command } => self.command(ticket, command),
            Input::Guest(event) => self.guest_event(event),
            Input::Snapshot { stop } => self.take_snapshot(stop),
            Input::SnapshotEnded { written } => self.snapshot_ended(written),
        }
        self.on_time(now);
    }

    /// The next thing to do, if any.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call `handle(now, Input::Tick)` at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.phase == Phase::Fenced {
            return None;
        }
        let peer = self.peer.as_ref().map(|peer| peer.due(self.build_silence_max()));
        let capture = self.may_capture().then(|| self.epochs.due(&self.config, self.cuts_on_output()));
        let stuck = self.stuck_due();
        [peer, capture, stuck, self.candidates_due(), self.arbitration.due()].into_iter().flatten().min()
    }

    fn on_time(&mut self, now: Instant) {
        if let Some(call) = self.arbitration.poll(now) {
            self.actions.push_back(Action::Ask(call));
        }
        self.mind_candidates(now);
        self.mind_peer(now);
        self.mind_capture(now);
        self.resync_step(now);
        if mutant::is("frozen-after-the-cut") {
            self.consider_capture(now);
        }
        self.verify_step(now);
        self.consider_capture(now);
        self.sync_run();
    }

    fn mind_peer(&mut self, now: Instant) {
        let building = self.build_silence_max();
        let activity = if self.is_capturing() { Activity::Capturing } else { Activity::Ready };
        let beat = Heartbeat {
            instance: self.me,
            generation: self.record.generation,
            sequence: 0,
            committed: self.epochs.committed(),
            activity,
        };
        let Some(peer) = &mut self.peer else { return };
        if peer.is_beat_due(now) {
            let mut until = now + self.config.stall_max;
            if mutant::is("lease-without-end") {
                until = Instant::from_us(u64::MAX);
            }
            self.actions.push_back(Action::Heartbeat { conn: peer.heartbeat, beat, until });
        }
        if let Some(why) = peer.suspicion(now, building) {
            self.lose_peer(why);
        }
    }

    fn resync_step(&mut self, now: Instant) {
        if self.phase != Phase::Resync || !self.tracking {
            return;
        }
        self.tell_progress(now);
        self.compare_step();
        let Some(ledger) = &mut self.ledger else { return };
        if let Some(pages) = ledger.next_push(self.config.push_pages_max) {
            self.actions.push_back(Action::Push { pages });
        } else if ledger.is_done() && !self.storage_behind && !self.pairing_checked && !self.arbitration.is_asking() {
            // Holding begins with the completing capture and ends with the arbiter's word that the
            // pair is on record: begin only if that word can be had. The record in its own place
            // changes nothing, but an arbiter that cannot write says so.
            self.ask(ArbiterRequest::Swap { expected: Some(self.record), new: self.record });
        }
    }

    fn pushed(&mut self) {
        if let Some(ledger) = &mut self.ledger {
            ledger.pushed();
        }
    }

    fn output_full(&mut self) {
        self.epochs.press();
        if matches!(self.phase, Phase::Completing | Phase::Pairing | Phase::Deciding) {
            self.stopped_by_full_output = true;
        }
    }

    fn acked(&mut self, now: Instant, id: EpochId) {
        if !self.epochs.commit(id) {
            self.lose_peer(PeerFault::AckNotInFlight(id).into());
            return;
        }
        self.actions.push_back(Action::Committed { id });
        self.checkpoint_committed(id);
        self.write_through_unreleased(id);
        match self.phase {
            Phase::Completing if mutant::is("pair-without-the-arbiter") => {
                let peer = self.peer().unwrap_or(self.me);
                self.phase = Phase::Pairing;
                self.paired(self.record.next_paired(self.me, peer));
            }
            Phase::Completing => {
                self.phase = Phase::Pairing;
                if let Some(peer) = &self.peer {
                    let new = self.record.next_paired(self.me, peer.instance);
                    self.ask(ArbiterRequest::Swap { expected: Some(self.record), new });
                }
            }
            Phase::Protected => self.release(now),
            _ => {}
        }
    }

    // ---- the peer ----

    fn drop_connections(&mut self) {
        self.stop_comparing();
        self.checkpoints_lost();
        for candidate in std::mem::take(&mut self.candidates) {
            self.actions.push_back(Action::Close { conn: candidate.data });
        }
        if let Some(peer) = self.peer.take() {
            for conn in [peer.data, peer.heartbeat] {
                self.actions.push_back(Action::Close { conn });
            }
        }
    }

    fn lose_peer(&mut self, why: PeerLoss) {
        self.drop_connections();
        match self.phase {
            Phase::Completing if mutant::is("completing-given-up") => self.go_solo(),
            Phase::Joining | Phase::Resync => {
                self.go_solo();
                self.tell(Event::NewcomerLost { why });
            }
            Phase::Protected if mutant::is("alone-without-the-arbiter") => self.go_solo(),
            Phase::Pairing if mutant::is("pairing-given-up") => self.go_solo(),
            // A newcomer that has the epoch in flight may take the guest over from the record that
            // stands: nothing held may leave before another record bars that.
            Phase::Completing | Phase::Protected => {
                self.phase = Phase::Deciding;
                self.tell(Event::Suspected { why });
                let new = self.record.next_solo(self.me);
                self.ask(ArbiterRequest::Swap { expected: Some(self.record), new });
            }
            // Pairing: the answer decides. The others have no peer.
            Phase::Pairing | Phase::Solo | Phase::Deciding | Phase::Stopping | Phase::Fenced => {}
        }
    }

    fn go_solo(&mut self) {
        self.phase = Phase::Solo;
        if mutant::is("begun-forgotten-with-the-peer") {
            self.begun = None;
        }
        self.ledger = None;
        self.pairing_checked = false;
        self.tracking = false;
        self.handed_over_until = None;
        self.arbitration.forget();
        self.stopped_by_full_output = false;
        self.epochs.abandon();
        self.actions.push_back(Action::StopTracking);
        if mutant::is("lost-newcomer-keeps-holding") {
            return;
        }
        assert_eq!(
            self.record.owner, self.me,
            "I3: a node goes on alone with a guest that the record gives to another"
        );
        self.actions.push_back(Action::ReleaseAll);
    }

    fn start_resync(&mut self, now: Instant, conn: ConnId) {
        self.phase = Phase::Resync;
        self.pairing_checked = false;
        self.begin_ledger();
        self.progress_at = now;
        self.epochs.start(now);
        self.begun = Some(Begun::tracking(conn, now));
        self.actions.push_back(Action::StartTracking { conn });
        if let Some(peer) = &self.peer {
            self.tell(Event::ResyncStarted { newcomer: peer.instance, scales_tsc: peer.scales_tsc });
        }
    }

    fn message(&mut self, now: Instant, conn: ConnId, message: Message) {
        if self.candidates.iter().any(|candidate| candidate.data == conn) {
            return self.candidate_said(conn, &message);
        }
        let Some(peer) = &self.peer else { return };
        match (peer.channel_of(conn), message) {
            (Some(Channel::Heartbeat), Message::Heartbeat(beat)) if beat.instance == peer.instance => {
                self.heartbeat(now, beat.activity);
            }
            (Some(Channel::Data), Message::Ack { id, .. }) => self.acked(now, id),
            (Some(_), Message::Bye { reason }) => self.lose_peer(PeerLoss::Left(reason)),
            (Some(_), other) => self.lose_peer(PeerFault::Misplaced(other.name()).into()),
            (None, _) => {}
        }
    }

    fn closed(&mut self, conn: ConnId, why: String) {
        self.candidates.retain(|candidate| candidate.data != conn);
        if self.peer.as_ref().is_some_and(|peer| peer.channel_of(conn).is_some()) {
            self.lose_peer(PeerLoss::Closed(why));
        }
    }

    /// The generation this node runs in.
    pub fn generation(&self) -> Generation {
        self.record.generation
    }
}
