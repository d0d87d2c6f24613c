//! The rules of the node that runs the guest.
//!
//! ```text
//!            hello          first heartbeat           last page pushed, arbiter in reach
//!   Solo ────────────▶ Joining ────────────▶ Resync ────────────▶ Completing (output held)
//!    ▲ ▲                  │                    │                        │ ack
//!    │ └──── newcomer lost: nothing was held ──┘                        │
//!    │                                                                  ▼
//!    │ swap won                 peer suspected             swap won   Pairing
//!    └──────────── Deciding ◀──── Completing, Protected ◀───────────────┘
//!                     │ swap lost                     │ another record stands
//!                     └──────────▶ Fenced ◀───────────┘
//! ```

mod commands;
mod compare;
mod digest;
mod epochs;
mod peer;
mod storage;
mod types;
mod verdicts;

use std::collections::VecDeque;

pub use compare::VerifyRefused;
pub use types::{Action, Command, DiskChoice, Input, OutputCut, PrimaryConfig};

use self::epochs::Epochs;
use self::peer::Peer;
use super::arbitration::{ArbiterRequest, Arbitration};
use super::block_hashes::Comparison;
use super::event::Event;
use super::failure_detector::SleepGuard;
use super::messages::{Channel, Message};
use super::mutant;
use super::pages::PageSet;
use super::record::Record;
use super::resync::Ledger;
use super::types::{ConnId, EpochId, Generation, InstanceId, Instant};
use super::verify::Verify;

/// What a primary is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Runs the guest alone; output passes.
    Solo,
    /// A newcomer said hello, builds its machine, and opens its heartbeat connection.
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
    peer: Option<Peer>,
    epochs: Epochs,
    ledger: Option<Ledger>,
    /// Blocks that both nodes are summing, in a resync or for `verify`.
    comparison: Option<Box<Comparison>>,
    tickets: u64,
    /// The verify under way, or the last one.
    verify: Option<Box<Verify>>,
    /// When the newcomer is told again how far it is.
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
    arbiter_lost: Option<String>,
    stopped_by_operator: bool,
    stopped_by_full_output: bool,
    /// A snapshot, for which the guest stands still.
    snapshot: Option<commands::Snapshot>,
    /// An operator ends this node as soon as the arbiter has answered.
    quitting: bool,
    guest_runs: bool,
    actions: VecDeque<Action>,
}

impl Primary {
    /// A primary that runs the guest alone under `record`, which the arbiter holds already.
    pub fn new(config: PrimaryConfig, me: InstanceId, record: Record, now: Instant) -> Primary {
        Primary {
            me,
            record,
            phase: Phase::Solo,
            peer: None,
            epochs: Epochs::new(record.generation, now),
            ledger: None,
            comparison: None,
            tickets: 0,
            verify: None,
            progress_at: now,
            verify_at: now,
            arbitration: Arbitration::new(config.arbiter_retry),
            guard: SleepGuard::new(config.heartbeat.timeout, now),
            proven: true,
            pairing_checked: false,
            storage_behind: false,
            arbiter_lost: None,
            stopped_by_operator: false,
            stopped_by_full_output: false,
            snapshot: None,
            quitting: false,
            guest_runs: true,
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

    /// The features both this node and its peer have; none without a peer.
    pub fn peer_features(&self) -> u64 {
        self.peer.as_ref().map_or(0, |peer| peer.features)
    }

    /// What a newcomer still lacks, during a resync.
    pub fn resync(&self) -> Option<&Ledger> {
        self.ledger.as_ref()
    }

    /// Why the arbiter is out of reach, if it is.
    pub fn arbiter_lost(&self) -> Option<&str> {
        self.arbiter_lost.as_deref()
    }

    /// True if the guest's vCPUs are to run (outside a capture's pause).
    pub fn guest_runs(&self) -> bool {
        self.guest_runs
    }

    /// True while output must be held.
    pub fn holds_output(&self) -> bool {
        matches!(self.phase, Phase::Completing | Phase::Pairing | Phase::Protected | Phase::Deciding)
    }

    /// Tells the resync ledger which pages travel in the epoch being captured. Called between
    /// `Action::Capture` and `Input::Captured`.
    pub fn note_dirty_pages(&mut self, dirty: &PageSet) {
        if let Some(ledger) = &mut self.ledger {
            ledger.travelled(dirty);
        }
    }

    /// The same for the blocks of disks that travel in it, by their index in the [image's
    /// row](crate::protocol::layout).
    pub fn note_blocks(&mut self, blocks: impl Iterator<Item = u64>) {
        if let Some(ledger) = &mut self.ledger {
            for block in blocks {
                ledger.settle(block);
                if mutant::is("block-too-many-settled") {
                    ledger.settle(block + 1);
                }
            }
        }
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
            Input::Closed { conn, why } => self.closed(now, conn, &why),
            Input::OutputWaiting => self.epochs.output_waiting(),
            Input::OutputFull => self.output_full(),
            // A disk waits, not the guest: nothing has to stop, only the epoch to be cut.
            Input::JournalFull => self.epochs.press(),
            Input::Captured { id } => self.captured(id),
            Input::CaptureFailed { why } => self.capture_failed(now, &why),
            Input::Pushed => self.pushed(),
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
            Input::Command(command) => self.command(command),
            Input::GuestShutdown => self.shut_down(),
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
        let peer = self.peer.as_ref().and_then(|peer| peer.due(self.phase));
        let capture = self.may_capture().then(|| self.epochs.due(&self.config, self.cuts_on_output()));
        [peer, capture, self.arbitration.due()].into_iter().flatten().min()
    }

    fn on_time(&mut self, now: Instant) {
        if let Some(call) = self.arbitration.poll(now) {
            self.actions.push_back(Action::Ask(call));
        }
        self.mind_peer(now);
        self.resync_step(now);
        if mutant::is("frozen-after-the-cut") {
            self.consider_capture(now);
        }
        self.verify_step(now);
        self.consider_capture(now);
        self.sync_run();
    }

    fn mind_peer(&mut self, now: Instant) {
        let committed = self.epochs.committed();
        let (me, generation) = (self.me, self.record.generation);
        let Some(peer) = &mut self.peer else { return };
        if let Some((conn, beat)) = peer.beat(now, me, generation, committed) {
            self.actions.push_back(Action::Send { conn, message: Message::Heartbeat(beat) });
        }
        if let Some(why) = peer.suspicion(now, self.phase) {
            self.lose_peer(&why);
        }
    }

    fn resync_step(&mut self, now: Instant) {
        if self.phase != Phase::Resync {
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
            self.ask(ArbiterRequest::Swap { expected: self.record, new: self.record });
        }
    }

    // ---- captures ----

    fn may_capture(&self) -> bool {
        matches!(self.phase, Phase::Resync | Phase::Protected) && self.epochs.idle()
    }

    fn cuts_on_output(&self) -> bool {
        self.phase == Phase::Protected && (self.config.commit_on_output || self.epochs.is_pressed())
    }

    fn completes(&self) -> bool {
        let ready = self.phase == Phase::Resync && self.pairing_checked && !self.storage_behind;
        ready && self.ledger.as_ref().is_some_and(Ledger::is_done)
    }

    fn consider_capture(&mut self, now: Instant) {
        if !self.may_capture() {
            return;
        }
        let completes_resync = self.completes();
        if !completes_resync && now < self.epochs.due(&self.config, self.cuts_on_output()) {
            return;
        }
        let id = self.epochs.begin(now);
        let output = match self.phase {
            Phase::Resync if completes_resync && !mutant::is("hold-one-epoch-late") => OutputCut::Hold,
            Phase::Resync => OutputCut::Pass,
            _ if id.epoch == 0 && mutant::is("hold-one-epoch-late") => OutputCut::Hold,
            _ => OutputCut::Seal,
        };
        if completes_resync {
            self.phase = Phase::Completing;
        }
        self.actions.push_back(Action::Capture { id, completes_resync, output });
    }

    fn captured(&mut self, id: EpochId) {
        self.epochs.captured(id);
        self.hash_preserved(id);
        if mutant::is("release-on-send") && self.phase == Phase::Protected {
            self.actions.push_back(Action::Release { through: id.epoch, before: Instant::from_us(u64::MAX) });
        }
    }

    fn capture_failed(&mut self, now: Instant, why: &str) {
        self.epochs.failed(now);
        self.lose_peer(&format!("capture failed ({why})"));
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
            self.lose_peer(&format!("it acknowledged epoch {id}, which is not on its way"));
            return;
        }
        self.actions.push_back(Action::Committed { id });
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
                    self.ask(ArbiterRequest::Swap { expected: self.record, new });
                }
            }
            Phase::Protected => self.release(now),
            _ => {}
        }
    }

    fn release(&mut self, now: Instant) {
        if self.phase != Phase::Protected || !(self.proven || mutant::is("no-check-after-a-stall")) {
            return;
        }
        let Some(committed) = self.epochs.committed() else { return };
        // The peer waits for the whole time-out after our last heartbeat, which left at most one
        // interval ago.
        let mut slack = self.config.heartbeat.timeout.saturating_sub(self.config.heartbeat.interval);
        if mutant::is("release-without-deadline") {
            slack = std::time::Duration::MAX;
        }
        self.actions.push_back(Action::Release { through: committed.epoch, before: now + slack });
        self.write_through(committed);
    }

    // ---- the peer ----

    fn drop_connections(&mut self) {
        self.stop_comparing();
        if let Some(peer) = self.peer.take() {
            for conn in [Some(peer.data), peer.heartbeat].into_iter().flatten() {
                self.actions.push_back(Action::Close { conn });
            }
        }
    }

    fn lose_peer(&mut self, why: &str) {
        self.drop_connections();
        match self.phase {
            Phase::Completing if mutant::is("completing-given-up") => self.go_solo(),
            Phase::Joining | Phase::Resync => {
                self.go_solo();
                self.tell(Event::NewcomerLost { why: why.into() });
            }
            Phase::Protected if mutant::is("alone-without-the-arbiter") => self.go_solo(),
            Phase::Pairing if mutant::is("pairing-given-up") => self.go_solo(),
            // A newcomer that has the epoch on its way may take the guest over from the record that
            // stands: nothing held may leave before another record bars that.
            Phase::Completing | Phase::Protected => {
                self.phase = Phase::Deciding;
                self.tell(Event::Suspected { why: why.into() });
                let new = self.record.next_solo(self.me);
                self.ask(ArbiterRequest::Swap { expected: self.record, new });
            }
            // Pairing: the answer decides. The others have no peer.
            Phase::Pairing | Phase::Solo | Phase::Deciding | Phase::Stopping | Phase::Fenced => {}
        }
    }

    fn go_solo(&mut self) {
        self.phase = Phase::Solo;
        self.ledger = None;
        self.pairing_checked = false;
        self.arbitration.forget();
        self.stopped_by_full_output = false;
        self.epochs.abandon();
        self.actions.push_back(Action::StopTracking);
        if mutant::is("lost-newcomer-keeps-holding") {
            return;
        }
        self.actions.push_back(Action::ReleaseAll);
    }

    fn start_resync(&mut self, now: Instant, conn: ConnId) {
        self.phase = Phase::Resync;
        self.pairing_checked = false;
        self.begin_ledger();
        self.progress_at = now;
        self.epochs.start(now);
        self.actions.push_back(Action::StartTracking { conn });
        if let Some(peer) = &self.peer {
            self.tell(Event::ResyncStarted { newcomer: peer.instance, scales_tsc: peer.scales_tsc });
        }
    }

    fn message(&mut self, now: Instant, conn: ConnId, message: Message) {
        let Some(peer) = &self.peer else { return };
        match (peer.channel_of(conn), message) {
            (Some(Channel::Heartbeat), Message::Heartbeat(beat)) if beat.instance == peer.instance => {
                self.heartbeat(now)
            }
            (Some(Channel::Data), Message::Ack { id, .. }) => self.acked(now, id),
            (Some(_), Message::Bye { reason }) => self.lose_peer(&format!("it left ({reason})")),
            (Some(_), other) => self.lose_peer(&format!("it sent what does not belong here ({})", other.name())),
            (None, _) => {}
        }
    }

    fn closed(&mut self, _now: Instant, conn: ConnId, why: &str) {
        if self.peer.as_ref().is_some_and(|peer| peer.channel_of(conn).is_some()) {
            self.lose_peer(why);
        }
    }

    /// The generation this node runs in.
    pub fn generation(&self) -> Generation {
        self.record.generation
    }
}
