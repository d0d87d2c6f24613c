//! Disks on storage that both nodes share: which writes may reach it and when, and who keeps them
//! until they have.
//!
//! ```text
//!  primary    open ── cut(k) ─▶ taken ── committed(k) ─▶ waiting ── may go ─▶ written and synced ── told ─┐
//!               ▲                 │ did not arrive           ▲                                            │
//!               └─────────────────┘                          └── alone(): everything, in order            │
//!  secondary  committed(k) ─▶ kept ◀─────────────────────── written up to k: forgotten ───────────────────┘
//!                              └─ takeover: lock, then write what is kept, newest first, then sync, then run
//! ```
//!
//! What this gives:
//! - No write of an epoch that may never have been reaches the storage: a write goes out once its
//!   epoch is committed, or once this node is on record as the only one. That is the rule of held
//!   packets, and the same decision.
//! - No committed write is lost: it is held here, or kept there, until the storage has it for good.
//! - A write is never followed in the storage by an older one: only the holder of the storage's
//!   lock writes, in order; a new primary writes what it kept before its guest runs, and of each
//!   block the newest.
//! - A flush is answered after all that was written before it is in the storage and synced. So an
//!   epoch never holds two writes between which a flush was answered, and whatever part of an epoch
//!   is in the storage, it is as after a loss of power.

use std::collections::VecDeque;

use super::machine_shape::MachineShape;
use super::mutant;
use super::types::EpochId;

impl MachineShape {
    /// True if it has a disk whose storage both nodes share.
    pub fn shares_storage(&self) -> bool {
        self.disks.iter().any(|disk| disk.shared)
    }
}

/// What keeps the other host from writing to the storage of a shared disk when it must not any
/// more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fencing {
    /// The storage's lock keeps programs of both hosts out: true of a file, not of a block device.
    pub lock_reaches_hosts: bool,
    /// Whoever gives the guest to a node has made sure that the other host is off.
    pub by_arbiter: bool,
    /// The operator says that something else does it.
    pub by_operator: bool,
}

impl Fencing {
    /// True if a frozen or cut-off primary cannot write late: without that, shared storage must not
    /// be used.
    pub fn is_enough(self) -> bool {
        self.lock_reaches_hosts || self.by_arbiter || self.by_operator || mutant::is("device-without-fencing")
    }
}

/// What was written in one epoch.
pub trait Layer: Default {
    /// True if nothing was.
    fn is_empty(&self) -> bool;

    /// Takes what `older` has and this one has not.
    fn add_older(&mut self, older: Self);
}

/// A layer that its epoch is over for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Closed<L> {
    number: u64,
    /// Its epoch; none for what this node wrote, or was left with, alone.
    id: Option<EpochId>,
    layer: L,
}

/// The primary's writes on their way to the storage.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HeldWrites<L> {
    open: L,
    /// The number of the open layer; layers that are older have lower ones.
    number: u64,
    taken: Option<Closed<L>>,
    waiting: VecDeque<Closed<L>>,
    /// The newest epoch whose writes may go out.
    through: Option<EpochId>,
}

impl<L: Layer> Default for HeldWrites<L> {
    fn default() -> Self {
        HeldWrites { open: L::default(), number: 0, taken: None, waiting: VecDeque::new(), through: None }
    }
}

impl<L: Layer> HeldWrites<L> {
    /// What is written in the running epoch.
    pub fn open(&mut self) -> &mut L {
        &mut self.open
    }

    /// What a read sees before the storage, newest first.
    pub fn newest_first(&self) -> impl Iterator<Item = &L> {
        let older = self.taken.iter().chain(self.waiting.iter().rev()).map(|closed| &closed.layer);
        std::iter::once(&self.open).chain(older)
    }

    /// True if the storage has everything.
    pub fn is_empty(&self) -> bool {
        self.newest_first().all(L::is_empty)
    }

    /// Epoch `id` ends here; what of it travels.
    pub fn cut(&mut self, id: EpochId) -> &L {
        self.put_back();
        let layer = std::mem::take(&mut self.open);
        let closed = Closed { number: self.number, id: Some(id), layer };
        self.number += 1;
        &self.taken.insert(closed).layer
    }

    /// The epoch on its way will not arrive: its writes belong to the open one.
    pub fn put_back(&mut self) {
        if let Some(closed) = self.taken.take() {
            self.open.add_older(closed.layer);
            // Who waits for the older layer waits for this one now.
            self.number = closed.number;
        }
    }

    /// Epoch `id` is committed on the secondary, which keeps its writes from now on.
    pub fn committed(&mut self, id: EpochId) {
        if let Some(closed) = self.taken.take_if(|closed| closed.id == Some(id))
            && !closed.layer.is_empty()
        {
            self.waiting.push_back(closed);
        }
    }

    /// Writes of epochs up to `id` may go out, as soon as these are committed.
    pub fn may_go(&mut self, id: EpochId) {
        self.through = self.through.max(Some(id));
    }

    /// This node is on record as the only one: everything may go out, and nobody else keeps any of
    /// it.
    pub fn alone(&mut self) {
        let open = Closed { number: self.number, id: None, layer: std::mem::take(&mut self.open) };
        self.number += 1;
        let held = [self.taken.take(), Some(open)].into_iter().flatten();
        self.waiting.extend(held.filter(|closed| !closed.layer.is_empty()));
        self.waiting.iter_mut().for_each(|closed| closed.id = None);
    }

    /// Another node runs the guest: nothing more may go out.
    pub fn discard(&mut self) {
        let number = self.number;
        *self = HeldWrites { number, ..HeldWrites::default() };
    }

    /// What may go out now, oldest first, each with its number.
    pub fn due(&self) -> impl Iterator<Item = (u64, &L)> {
        let may = |closed: &&Closed<L>| closed.id.is_none() || closed.id <= self.through;
        let early = self.taken.iter().filter(|_| mutant::is("shared-written-before-the-commit"));
        self.waiting.iter().take_while(may).chain(early).map(|closed| (closed.number, &closed.layer))
    }

    /// The layers up to `number` are in the storage and synced. The newest epoch among them, which
    /// a secondary may forget now.
    pub fn written(&mut self, number: u64) -> Option<EpochId> {
        let mut newest = None;
        while let Some(closed) = self.waiting.pop_front_if(|closed| closed.number <= number) {
            newest = newest.max(closed.id);
        }
        newest
    }

    /// What a flush that begins now must see written and synced; `None` if there is nothing.
    pub fn flush_target(&self) -> Option<FlushTarget> {
        let open = (!self.open.is_empty()).then_some(self.number);
        let closed = || self.taken.iter().chain(self.waiting.iter().rev());
        let older = || closed().find(|closed| !closed.layer.is_empty()).map(|closed| closed.number);
        open.or_else(older).map(|number| FlushTarget { number, needs_cut: open.is_some() })
    }

    /// True if all that `target` stands for is written and synced.
    pub fn is_flushed(&self, target: FlushTarget) -> bool {
        let waiting = self.waiting.iter().filter(|_| !mutant::is("flush-answered-at-the-commit"));
        let closed = waiting.chain(&self.taken).map(|closed| (closed.number, &closed.layer));
        let held = closed.chain(std::iter::once((self.number, &self.open)));
        held.filter(|(_, layer)| !layer.is_empty()).all(|(number, _)| number > target.number)
    }
}

/// The point in a guest's writes that a flush waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushTarget {
    number: u64,
    /// A part of it is in the open epoch: the sooner that is cut, the better.
    pub needs_cut: bool,
}

/// What a secondary keeps of committed epochs until the storage has it: `T` is the writes of one
/// epoch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KeptWrites<T> {
    epochs: VecDeque<(EpochId, T)>,
}

impl<T> Default for KeptWrites<T> {
    fn default() -> Self {
        KeptWrites { epochs: VecDeque::new() }
    }
}

impl<T> KeptWrites<T> {
    /// Epoch `id` is committed; epochs come in order.
    pub fn keep(&mut self, id: EpochId, writes: T) {
        self.epochs.push_back((id, writes));
    }

    /// The storage has every epoch up to `through` for good: what was kept of them.
    pub fn forget(&mut self, through: EpochId) -> impl Iterator<Item = T> {
        let early = mutant::is("kept-writes-forgotten-early");
        std::iter::from_fn(move || self.epochs.pop_front_if(|(id, _)| *id <= through || early))
            .map(|(_, writes)| writes)
    }

    /// What a new primary writes before its guest runs, newest first: of each block only the first
    /// it meets, so that nothing it writes is older than what the storage has.
    pub fn newest_first(&self) -> impl Iterator<Item = &T> {
        let epochs = if mutant::is("newest-kept-writes-only") { 1 } else { usize::MAX };
        self.epochs.iter().rev().take(epochs).map(|(_, writes)| writes)
    }

    /// True if the storage has everything.
    pub fn is_empty(&self) -> bool {
        self.epochs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::protocol::types::Generation;

    /// Blocks and what is in them.
    type Blocks = BTreeMap<u64, u64>;

    impl Layer for Blocks {
        fn is_empty(&self) -> bool {
            BTreeMap::is_empty(self)
        }

        fn add_older(&mut self, older: Blocks) {
            for (block, content) in older {
                self.entry(block).or_insert(content);
            }
        }
    }

    fn id(epoch: u64) -> EpochId {
        EpochId { generation: Generation(1), epoch }
    }

    fn read(held: &HeldWrites<Blocks>, block: u64) -> Option<u64> {
        held.newest_first().find_map(|layer| layer.get(&block).copied())
    }

    fn due(held: &HeldWrites<Blocks>) -> Vec<(u64, u64)> {
        held.due().flat_map(|(_, layer)| layer.iter().map(|(block, content)| (*block, *content))).collect()
    }

    #[test]
    fn only_committed_writes_go_out_and_reads_see_the_newest() {
        let mut held = HeldWrites::<Blocks>::default();
        held.open().insert(1, 10);
        assert_eq!(held.cut(id(0)), &Blocks::from([(1, 10)]));
        held.open().extend([(1, 11), (2, 20)]);
        assert_eq!((read(&held, 1), read(&held, 2), read(&held, 3)), (Some(11), Some(20), None));
        assert!(due(&held).is_empty(), "on its way is not committed");
        held.committed(id(0));
        assert!(due(&held).is_empty(), "committed, but this node has to prove itself first");
        held.may_go(id(0));
        assert_eq!(due(&held), [(1, 10)]);
        held.cut(id(1));
        assert_eq!(due(&held), [(1, 10)]);
        let newest = held.due().map(|(number, _)| number).max().unwrap();
        assert_eq!(held.written(newest), Some(id(0)));
        assert_eq!(read(&held, 1), Some(11));
        held.committed(id(1));
        held.may_go(id(1));
        assert_eq!(due(&held), [(1, 11), (2, 20)]);
        assert_eq!(held.written(1), Some(id(1)));
        assert!(held.is_empty() && held.written(9).is_none());
    }

    #[test]
    fn what_did_not_arrive_is_the_next_epochs() {
        let mut held = HeldWrites::<Blocks>::default();
        held.open().extend([(1, 10), (2, 20)]);
        held.cut(id(0));
        held.open().insert(2, 21);
        assert_eq!(held.cut(id(1)), &Blocks::from([(1, 10), (2, 21)]));
        held.committed(id(0));
        held.may_go(id(1));
        assert!(due(&held).is_empty(), "a late word about an epoch that was put back");
        held.committed(id(1));
        assert_eq!(due(&held), [(1, 10), (2, 21)]);
    }

    #[test]
    fn alone_everything_goes_out_in_order_and_fenced_nothing() {
        let mut held = HeldWrites::<Blocks>::default();
        for epoch in 0..2 {
            held.open().insert(1, epoch);
            held.cut(id(epoch));
            held.committed(id(epoch));
        }
        held.open().insert(1, 2);
        held.cut(id(2));
        held.open().insert(1, 3);
        let fenced = &mut held.clone();
        held.alone();
        assert_eq!(due(&held), [(1, 0), (1, 1), (1, 2), (1, 3)]);
        let newest = held.due().map(|(number, _)| number).max().unwrap();
        assert_eq!(held.written(newest), None, "nobody keeps any of it");
        assert!(held.is_empty());
        fenced.discard();
        assert!(fenced.is_empty() && due(fenced).is_empty());
    }

    #[test]
    fn a_flush_waits_for_all_before_it_and_for_nothing_after() {
        let mut held = HeldWrites::<Blocks>::default();
        assert_eq!(held.flush_target(), None);
        held.open().insert(1, 10);
        let first = held.flush_target().unwrap();
        assert!(first.needs_cut && !held.is_flushed(first));
        held.cut(id(0));
        let again = held.flush_target().unwrap();
        assert!(!again.needs_cut, "what it waits for is on its way");
        held.open().insert(2, 20);
        held.put_back();
        assert!(!held.is_flushed(first) && !held.is_flushed(again), "it is held again");
        held.cut(id(1));
        held.open().insert(3, 30);
        held.committed(id(1));
        assert!(!held.is_flushed(first), "committed is not written");
        held.may_go(id(1));
        let newest = held.due().map(|(number, _)| number).max().unwrap();
        held.written(newest);
        assert!(held.is_flushed(first) && held.is_flushed(again));
        assert!(!held.is_flushed(held.flush_target().unwrap()));
    }

    #[test]
    fn a_new_primary_has_what_the_storage_may_lack_and_no_more() {
        let mut kept = KeptWrites::default();
        for epoch in 0..4 {
            kept.keep(id(epoch), epoch);
        }
        assert_eq!(kept.forget(id(1)).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(kept.newest_first().copied().collect::<Vec<_>>(), [3, 2]);
        assert_eq!(kept.forget(id(0)).count(), 0, "an older word changes nothing");
        assert_eq!(kept.forget(EpochId { generation: Generation(2), epoch: 0 }).count(), 2);
        assert!(kept.is_empty());
    }
}
