//! When writes held for [shared storage](crate::protocol::shared) may go out, and what the peer is
//! told of them; and what a newcomer still lacks.

use super::{Action, Phase, Primary};
use crate::protocol::layout::ImageLayout;
use crate::protocol::messages::{Message, features};
use crate::protocol::mutant;
use crate::protocol::pages::PageSet;
use crate::protocol::resync::Ledger;
use crate::protocol::types::ConnId;
use crate::protocol::types::EpochId;

impl Primary {
    /// What a newcomer lacks: everything but the storage it shares, which may be behind what this
    /// host has in its cache.
    pub(super) fn begin_ledger(&mut self) {
        let layout = ImageLayout::of(&self.config.shape);
        let compare = self.peer_features() & features::DISK_HASHES != 0;
        let mut ledger = Ledger::new(&layout, compare);
        layout.shared().iter().for_each(|blocks| ledger.has(blocks.clone()));
        self.ledger = Some(ledger);
        self.storage_behind = self.config.shape.shares_storage() && !mutant::is("whole-before-the-storage");
    }

    pub(super) fn storage_synced(&mut self, conn: ConnId) {
        // The word of a resync before this one says nothing of what was written since.
        if self.peer.as_ref().is_some_and(|peer| peer.data == conn) {
            self.storage_behind = false;
        }
    }

    /// A committed epoch's writes go out with its output. Before there is a pair, output passes, or
    /// waits for the pair; the writes need not: a newcomer that takes over has committed them.
    pub(super) fn write_through_unreleased(&mut self, id: EpochId) {
        if self.phase != Phase::Protected {
            self.write_through(id);
        }
    }

    pub(super) fn write_through(&mut self, through: EpochId) {
        if self.config.shape.shares_storage() {
            self.actions.push_back(Action::WriteThrough { through });
        }
    }

    pub(super) fn written(&mut self, through: EpochId) {
        let tracks = matches!(self.phase, Phase::Resync | Phase::Completing | Phase::Pairing | Phase::Protected);
        if let Some(peer) = self.peer.as_ref().filter(|_| tracks) {
            self.actions.push_back(Action::Send { conn: peer.data, message: Message::Written { through } });
        }
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
}
