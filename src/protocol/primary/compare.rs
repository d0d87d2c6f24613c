//! Blocks that are hashed on both nodes: in a resync, so that a newcomer's disk gets only what it
//! lacks, and to verify the disks of a pair.

use std::ops::Range;
use std::time::Duration;

use super::types::Action;
use super::{Phase, Primary};
use crate::protocol::block_hashes::{BlockHash, Comparison};
use crate::protocol::command::{DiskChoice, VerifyRefused};
use crate::protocol::event::Event;
use crate::protocol::layout::ImageLayout;
use crate::protocol::messages::{Channel, Message, features};
use crate::protocol::mutant;
use crate::protocol::peer_loss::PeerFault;
use crate::protocol::types::{ConnId, EpochId, Instant};
use crate::protocol::verify::{DiskFindings, Outcome, Verify};

/// Time from one word to a newcomer about its resync to the next.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// The least time from one run of a verify to the next, so that a guest whose epochs follow each
/// other closely is left its host: at most 50 MiB are compared in a second.
const VERIFY_INTERVAL: Duration = Duration::from_millis(20);

impl Primary {
    // ---- verify ----

    /// Whether the disks can be verified now.
    ///
    /// # Errors
    /// [`VerifyRefused`].
    pub fn check_verify(&self, choice: DiskChoice) -> Result<(), VerifyRefused> {
        if self.phase != Phase::Protected {
            return Err(VerifyRefused::NotProtected);
        }
        if self.peer_features() & features::DISK_HASHES == 0 {
            return Err(VerifyRefused::Unable);
        }
        if self.verify.as_ref().is_some_and(|verify| verify.is_running()) {
            return Err(VerifyRefused::Busy);
        }
        if self.chosen(choice).is_empty() { Err(VerifyRefused::NoSuchDisk) } else { Ok(()) }
    }

    /// The verify under way, or the last one.
    pub fn verify(&self) -> Option<&Verify> {
        self.verify.as_deref()
    }

    /// The numbers of the disks meant, of those that travel.
    fn chosen(&self, choice: DiskChoice) -> Vec<usize> {
        let disks = self.config.shape.disks.iter().enumerate().filter(|(_, disk)| !disk.read_only && !disk.shared);
        let chosen = disks.filter(|(number, disk)| match choice {
            DiskChoice::All => true,
            DiskChoice::Number(wanted) => *number as u64 == wanted,
            DiskChoice::Serial(serial) => disk.serial == serial,
        });
        chosen.map(|(number, _)| number).collect()
    }

    pub(super) fn verify_disks(&mut self, choice: DiskChoice) -> Result<(), VerifyRefused> {
        self.check_verify(choice)?;
        let verify = Verify::new(&ImageLayout::of(&self.config.shape), &self.chosen(choice));
        self.verify = Some(Box::new(verify));
        Ok(())
    }

    /// Preserves the next blocks with the next epoch. Not while one is being captured: that one may
    /// have been cut already.
    pub(super) fn verify_step(&mut self, now: Instant) {
        let capturing = self.epochs.is_capturing() && !mutant::is("frozen-after-the-cut");
        if self.phase != Phase::Protected || capturing || now < self.verify_at {
            return;
        }
        let Some(verify) = self.verify.as_mut().filter(|verify| verify.is_running()) else { return };
        if let Some(run) = verify.next_run() {
            self.verify_at = now + VERIFY_INTERVAL;
            self.actions.push_back(Action::Preserve { run });
            if mutant::is("verify-asks-before-the-cut") {
                self.hash_preserved(self.epochs.next_id());
            }
        } else if *verify.outcome() == Outcome::Done {
            let sum = |of: fn(&DiskFindings) -> u64| verify.disks().iter().map(of).sum();
            let (blocks, different) = (sum(|disk| disk.blocks), sum(|disk| disk.different));
            self.tell(Event::DisksVerified { blocks, different });
        }
    }

    /// Epoch `id` was cut and is on its way: what it froze is hashed here, and there behind it.
    pub(super) fn hash_preserved(&mut self, id: EpochId) {
        if self.phase == Phase::Protected
            && let Some(run) = self.verify.as_mut().and_then(|verify| verify.cut(id))
        {
            self.compare(run, Some(id).filter(|_| !mutant::is("verify-of-what-is-there-now")));
        }
    }

    /// There is no peer to compare with any more.
    pub(super) fn stop_comparing(&mut self) {
        (self.comparison, self.hole_search) = (None, None);
        self.verify_failed("the pair broke up meanwhile");
    }

    fn verify_failed(&mut self, why: &str) {
        if let Some(verify) = self.verify.as_mut().filter(|verify| verify.is_running()) {
            verify.fail(why);
            self.tell(Event::DisksNotVerified { why: why.into() });
        }
    }

    // ---- resync ----

    pub(super) fn compare_step(&mut self) {
        if let Some(run) = self.ledger.as_mut().and_then(|ledger| ledger.next_comparison()) {
            self.compare(run, None);
        }
        if let Some(run) = self.ledger.as_mut().and_then(|ledger| ledger.next_hole_search()) {
            self.tickets += 1;
            self.hole_search = Some((self.tickets, run.clone()));
            self.actions.push_back(Action::FindHoles { ticket: self.tickets, run });
        }
    }

    /// Holes of this node's image, where the newcomer has zeros. A block that is written after it
    /// was found to be a hole is in the journal and travels, as one that is written after it was
    /// compared.
    pub(super) fn own_holes(&mut self, ticket: u64, through: u64, holes: &[Range<u64>]) {
        let Some((_, run)) = self.hole_search.take_if(|(asked, _)| *asked == ticket) else { return };
        let Some(ledger) = &mut self.ledger else { return };
        let searched = run.start..through.clamp(run.start, run.end);
        match searched.is_empty() {
            // The storage does not say.
            true => ledger.incomparable(&run),
            false if mutant::is("data-taken-for-a-hole") => {
                ledger.found_holes(&searched, std::slice::from_ref(&searched))
            }
            false => ledger.found_holes(&searched, holes),
        }
        self.tell_comparisons();
    }

    pub(super) fn tell_progress(&mut self, now: Instant) {
        let Some(peer) = &self.peer else { return };
        if now < self.progress_at || peer.features & features::DISK_HASHES == 0 {
            return;
        }
        self.progress_at = now + PROGRESS_INTERVAL;
        let left = self.ledger.iter().flat_map(|ledger| ledger.parts()).map(|(_, left)| left).collect();
        self.actions.push_back(Action::Send { conn: peer.data, message: Message::ResyncLeft { left } });
    }

    fn tell_comparisons(&mut self) {
        if let Some((blocks, same)) = self.ledger.as_ref().and_then(|ledger| ledger.comparisons()) {
            self.tell(Event::DisksCompared { blocks, same });
        }
    }

    // ---- both ----

    fn compare(&mut self, run: Range<u64>, as_of: Option<EpochId>) {
        let Some(peer) = &self.peer else { return };
        self.tickets += 1;
        let (ticket, conn, first) = (self.tickets, peer.data, run.start);
        // A run has at most HASH_BLOCKS_MAX blocks.
        let count = u32::try_from(run.end - run.start).unwrap_or(u32::MAX);
        self.actions.push_back(Action::Send { conn, message: Message::HashBlocks { first, count } });
        self.actions.push_back(Action::HashBlocks { ticket, run: run.clone(), as_of });
        self.comparison = Some(Box::new(Comparison::new(ticket, run)));
    }

    pub(super) fn peer_hashes(&mut self, conn: ConnId, first: u64, hashes: Vec<BlockHash>) {
        if self.peer.as_ref().and_then(|peer| peer.channel_of(conn)) != Some(Channel::Data) {
            return;
        }
        let Some(comparison) = &mut self.comparison else {
            return self.lose_peer(PeerFault::UnaskedHashes.into());
        };
        if hashes.is_empty() && self.phase == Phase::Resync && first == comparison.run().start {
            let run = comparison.run();
            self.comparison = None;
            self.ledger.iter_mut().for_each(|ledger| match mutant::is("made-image-taken-for-equal") {
                true => ledger.compared(&run, &[]),
                false => ledger.blank(&run),
            });
            self.tell_comparisons();
        } else if comparison.take_theirs(first, hashes) {
            self.compared();
        } else {
            self.lose_peer(PeerFault::OtherHashes.into());
        }
    }

    pub(super) fn own_hashes(&mut self, ticket: u64, hashes: Result<Vec<BlockHash>, String>) {
        let asked = |comparison: &&mut Box<Comparison>| {
            comparison.is(ticket) || mutant::is("own-hashes-of-an-earlier-question")
        };
        if let Some(comparison) = self.comparison.as_mut().filter(asked) {
            comparison.take_own(hashes);
            if self.ledger.is_none() && mutant::is("verify-waits-for-ever") {
                return;
            }
            self.compared();
        }
    }

    /// Goes on once both nodes have answered.
    fn compared(&mut self) {
        let Some(comparison) = &self.comparison else { return };
        let (Some(differing), run) = (comparison.differing(), comparison.run()) else { return };
        self.comparison = None;
        match (&mut self.ledger, &mut self.verify, differing) {
            (Some(ledger), _, Ok(differing)) => {
                ledger.compared(&run, &differing);
                self.tell_comparisons();
            }
            (Some(ledger), _, Err(_)) => {
                // They are pushed instead; who reads them then will say what is wrong.
                match mutant::is("unreadable-taken-for-equal") {
                    true => ledger.compared(&run, &[]),
                    false => ledger.incomparable(&run),
                }
                self.tell_comparisons();
            }
            (None, Some(verify), Ok(differing)) => verify.compared(&run, &differing),
            (None, _, Err(why)) => self.verify_failed(&format!("the primary cannot hash its own image: {why}")),
            (None, None, Ok(_)) => {}
        }
    }
}

#[cfg(test)]
mod tests;
