//! A primary's disks and its new primary's, against a naive model.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use proptest::prelude::*;

use super::super::block_hashes::hash_run;
use super::super::copy_before_write::PreservedError;
use super::super::disk::DiskGate;
use super::super::image::GuestImage;
use super::super::journal::{BLOCK_COST_BYTES, BlockSet, DiskJournal, JournalListener, JournalMode, ZERO_COST_BYTES};
use crate::device::block::{BlockBackend, Stored};
use crate::machine::memory::GuestRam;
use crate::protocol::block_hashes::BlockHash;
use crate::protocol::layout::ImageLayout;
use crate::protocol::machine_shape::{DiskShape, MachineShape};
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::resync::Ledger;
use crate::protocol::types::{EpochId, Generation};

const BLOCK_BYTES: u64 = PAGE_BYTES as u64;
/// Two disks, of which the first does not end with a whole block.
const DISK_BYTES: [u64; 2] = [5 * BLOCK_BYTES + 1536, 3 * BLOCK_BYTES];

/// Storage in memory.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn new(bytes: u64, content: u8) -> Arc<Memory> {
        Arc::new(Memory(Mutex::new(vec![content; bytes as usize])))
    }

    fn content(&self) -> Vec<u8> {
        self.0.lock().clone()
    }

    fn range(&self, offset: u64, bytes: usize) -> io::Result<Range<usize>> {
        let start = offset as usize;
        let end = start + bytes;
        if end <= self.0.lock().len() { Ok(start..end) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }
}

impl BlockBackend for Memory {
    fn bytes(&self) -> u64 {
        self.0.lock().len() as u64
    }
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let range = self.range(offset, into.len())?;
        into.copy_from_slice(&self.0.lock()[range]);
        Ok(())
    }
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<Stored> {
        let range = self.range(offset, from.len())?;
        self.0.lock()[range].copy_from_slice(from);
        Ok(Stored::Accepted)
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, bytes: u64) -> io::Result<Stored> {
        let range = self.range(offset, bytes as usize)?;
        self.0.lock()[range].fill(0);
        Ok(Stored::Accepted)
    }
    fn write_zeroes(&self, offset: u64, bytes: u64, _: bool) -> io::Result<Stored> {
        self.discard(offset, bytes)
    }
}

#[derive(Clone, Default)]
struct Counts(Arc<AtomicUsize>);

impl JournalListener for Counts {
    fn journal_full(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn id(epoch: u64) -> EpochId {
    EpochId { generation: Generation(3), epoch }
}

/// The disks of a node, and its image in one row.
struct Node {
    images: Vec<Arc<Memory>>,
    whole: GuestImage,
    layout: Arc<ImageLayout>,
}

impl Node {
    fn new(content: u8) -> Node {
        let mut shape = MachineShape::bare(4096, 1, [2, 0, 0, 0, 0, 1]);
        shape.disks =
            DISK_BYTES.map(|bytes| DiskShape { bytes, read_only: false, shared: false, serial: [0; 20] }).to_vec();
        let layout = Arc::new(ImageLayout::of(&shape));
        let images: Vec<_> = DISK_BYTES.iter().map(|bytes| Memory::new(*bytes, content)).collect();
        let backends = images.iter().map(|image| Arc::clone(image) as Arc<dyn BlockBackend>).collect();
        let whole = GuestImage::new(GuestRam::new(4096).expect("memory"), Arc::clone(&layout), backends);
        Node { images, whole, layout }
    }

    fn gates(&self, journal: &Arc<DiskJournal>) -> Vec<DiskGate> {
        let gate = |(disk, image): (usize, &Arc<Memory>)| {
            DiskGate::new(Arc::clone(image) as Arc<dyn BlockBackend>, Arc::clone(journal), self.layout.blocks_of(disk))
        };
        self.images.iter().enumerate().map(gate).collect()
    }

    fn content(&self) -> Vec<Vec<u8>> {
        self.images.iter().map(|image| image.content()).collect()
    }

    /// As the secondary's applying thread does: zeros come as such.
    fn apply(&self, blocks: &BlockSet) {
        let mut writer = self.whole.writer();
        for (index, content) in blocks.iter() {
            let is_zero = content.iter().all(|byte| *byte == 0);
            writer.put(index, (!is_zero).then_some(content)).expect("put");
        }
        writer.finish().expect("finish");
    }
}

#[test]
fn writes_pass_or_are_kept_or_refused() {
    let node = Node::new(1);
    let journal = DiskJournal::new(1 << 20, Box::new(Counts::default()));
    let gates = node.gates(&journal);
    assert!(gates[0].write(0, &[2; 512]).is_err(), "closed");
    assert_eq!(node.images[0].content()[0], 1);
    journal.set_mode(JournalMode::Pass);
    assert_eq!(gates[0].write(0, &[2; 512]).expect("write"), Stored::Accepted);
    assert_eq!(journal.used_bytes(), 0);
    journal.set_mode(JournalMode::Keep);
    assert_eq!(gates[0].write(512, &[3; 512]).expect("write"), Stored::Accepted);
    assert_eq!(gates[1].discard(0, 2 * BLOCK_BYTES).expect("discard"), Stored::Accepted);
    assert!(gates[1].write(2 * BLOCK_BYTES + 512, &[9; PAGE_BYTES]).is_err(), "beyond the end");
    assert_eq!(journal.used_bytes(), BLOCK_COST_BYTES + 2 * ZERO_COST_BYTES);
    journal.cut(id(0));
    let taken = journal.taken();
    assert_eq!(taken.indexes().collect::<Vec<_>>(), [1, 7, 8], "memory has page 0, the first disk six blocks");
    let (_, first) = taken.iter().next().expect("a block");
    assert_eq!((first[511], first[512], first[1023], first[1024]), (2, 3, 3, 1), "the whole block, as it is");
    // A mode that changes forgets what was kept for the one before.
    journal.set_mode(JournalMode::Keep);
    assert!(journal.taken().is_empty() && journal.used_bytes() == 0);
}

#[test]
fn a_full_journal_says_so_once_and_has_room_after_the_commit() {
    let node = Node::new(0);
    let heard = Counts::default();
    let journal = DiskJournal::new(2 * BLOCK_COST_BYTES, Box::new(heard.clone()));
    let gates = node.gates(&journal);
    journal.set_mode(JournalMode::Keep);
    let write = |block: u64| gates[0].write(block * BLOCK_BYTES, &[7; PAGE_BYTES]).expect("write");
    assert_eq!((write(0), write(1)), (Stored::Accepted, Stored::Accepted));
    assert!(!journal.take_was_full());
    assert_eq!((write(2), write(2)), (Stored::Full, Stored::Full));
    assert_eq!(node.images[0].content()[2 * PAGE_BYTES], 0, "nothing of it was taken");
    assert_eq!(heard.0.load(Ordering::SeqCst), 1);
    journal.cut(id(0));
    assert_eq!(write(2), Stored::Full, "the epoch on its way counts");
    journal.committed(id(7));
    assert_eq!(write(2), Stored::Full, "that was another epoch's commit");
    journal.committed(id(0));
    assert!(journal.take_was_full() && !journal.take_was_full());
    assert_eq!(write(2), Stored::Accepted);
    // Larger than the whole journal, and there is nothing to wait for.
    journal.cut(id(1));
    journal.committed(id(1));
    assert_eq!(gates[0].write(0, &[1; 3 * PAGE_BYTES]).expect("write"), Stored::Accepted);
}

#[test]
fn a_failed_write_is_told_and_what_it_left_travels() {
    /// Takes the first half of a write and then fails.
    struct Failing(Arc<Memory>);
    impl BlockBackend for Failing {
        fn bytes(&self) -> u64 {
            self.0.bytes()
        }
        fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
            self.0.read(offset, into)
        }
        fn write(&self, offset: u64, from: &[u8]) -> io::Result<Stored> {
            self.0.write(offset, &from[..from.len() / 2])?;
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> io::Result<Stored> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn write_zeroes(&self, offset: u64, bytes: u64, _: bool) -> io::Result<Stored> {
            self.discard(offset, bytes)
        }
    }
    let memory = Memory::new(2 * BLOCK_BYTES, 0);
    let journal = DiskJournal::new(1 << 20, Box::new(Counts::default()));
    let gate = DiskGate::new(Arc::new(Failing(memory)), Arc::clone(&journal), 10..12);
    journal.set_mode(JournalMode::Keep);
    let error = gate.write(0, &[5; 2 * PAGE_BYTES]).expect_err("no room");
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    journal.cut(id(0));
    let kept: Vec<_> = journal.taken().iter().map(|(index, content)| (index, content[0])).collect();
    assert_eq!(kept, [(10, 5), (11, 0)]);
}

#[test]
fn a_frozen_block_is_read_as_it_was_at_the_cut() {
    let node = Node::new(1);
    let journal = DiskJournal::new(1 << 20, Box::new(Counts::default()));
    let gates = node.gates(&journal);
    journal.set_mode(JournalMode::Keep);
    let first = node.layout.blocks_of(0).start;
    let was = |index: u64, as_of: u64| {
        let mut block = [0; PAGE_BYTES];
        node.whole.read(index, &mut block).expect("read");
        journal.copy_before_write().as_it_was(index, id(as_of), &mut block).map(|()| block)
    };
    let write = |offset: u64, bytes: usize, value: u8| gates[0].write(offset, &vec![value; bytes]).expect("write");
    journal.copy_before_write().preserve(first..first + 3);
    write(0, 512, 2);
    assert!(matches!(was(first, 0), Err(PreservedError::NotPreserved(_))), "not before the cut");
    journal.cut(id(0));
    // Blocks 0 and 1 by half and completely, twice; block 2 stays, block 3 is not frozen; the other
    // disk is not either.
    write(2048, 4096, 3);
    write(0, 8192, 4);
    gates[0].discard(0, 4096).expect("discard");
    write(3 * BLOCK_BYTES, 512, 5);
    gates[1].write(0, &[6; 512]).expect("write");
    journal.cut(id(1));
    write(0, 512, 7);
    let mut at_the_cut = [1; PAGE_BYTES];
    assert_eq!(was(first + 1, 0).expect("frozen"), at_the_cut);
    assert_eq!(was(first + 2, 0).expect("frozen"), at_the_cut);
    at_the_cut[..512].fill(2);
    assert_eq!(was(first, 0).expect("frozen"), at_the_cut);
    assert!(matches!(was(first + 3, 0), Err(PreservedError::NotPreserved(_))));
    assert!(matches!(was(first, 1), Err(PreservedError::NotPreserved(_))), "another epoch's");
    journal.copy_before_write().release_of(id(1));
    assert!(was(first, 0).is_ok());
    journal.copy_before_write().release_of(id(0));
    assert!(was(first, 0).is_err());
    // A pair that breaks up lets go.
    journal.copy_before_write().preserve(first..first + 1);
    journal.cut(id(2));
    assert!(was(first, 2).is_ok());
    journal.set_mode(JournalMode::Pass);
    assert!(was(first, 2).is_err());
}

/// What may happen to a primary's disks.
#[derive(Clone, Debug)]
enum Step {
    Write {
        disk: usize,
        sector: u64,
        sectors: u64,
        value: u8,
    },
    Zeros {
        disk: usize,
        sector: u64,
        sectors: u64,
        discard: bool,
    },
    /// An epoch is captured and sent, if none is on its way.
    Cut,
    /// The epoch on its way is committed.
    Commit,
    /// It will never be.
    Lose,
    /// The newcomer gets the next pages behind the epochs.
    Push,
    /// A new newcomer begins with garbage.
    StartOver,
    /// A new newcomer begins with the image that the last one left, whatever is in it.
    ComeBack,
    /// The newcomer hashes blocks, with what it has applied so far.
    Sum,
    /// The survivor hashes the same blocks, perhaps much later, and lays the two side by side.
    Compare,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..2usize, 0..44u64, 1..20u64);
    prop_oneof![
        6 => (place(), 1..255u8).prop_map(|((disk, sector, sectors), value)| {
            Step::Write { disk, sector, sectors, value }
        }),
        2 => (place(), any::<bool>()).prop_map(|((disk, sector, sectors), discard)| {
            Step::Zeros { disk, sector, sectors, discard }
        }),
        3 => Just(Step::Cut),
        3 => Just(Step::Commit),
        1 => Just(Step::Lose),
        2 => Just(Step::Push),
        1 => Just(Step::StartOver),
        1 => Just(Step::ComeBack),
        3 => Just(Step::Sum),
        3 => Just(Step::Compare),
    ]
}

/// A survivor, its newcomer, and what a naive model says of both.
struct World {
    survivor: Node,
    gates: Vec<DiskGate>,
    journal: Arc<DiskJournal>,
    new_primary: Node,
    ledger: Ledger,
    /// The image that the next newcomer finds.
    next_new_primary: Option<Node>,
    /// Blocks that the newcomer has hashed, and their hashes; `None` in them if it was not worth
    /// it.
    compared: Option<(Range<u64>, Option<Vec<BlockHash>>)>,
    /// The survivor's disks as the guest must see them.
    model: Vec<Vec<u8>>,
    epoch: u64,
    /// The disks at the capture on its way, and whether it makes the new primary's image whole.
    on_its_way: Option<(Vec<Vec<u8>>, bool)>,
    /// The disks at the newest committed capture, once the new primary's image is whole.
    committed: Option<Vec<Vec<u8>>>,
}

impl World {
    fn new(journal_bytes_max: u64) -> World {
        let survivor = Node::new(0xaa);
        let journal = DiskJournal::new(journal_bytes_max, Box::new(Counts::default()));
        let gates = survivor.gates(&journal);
        let (model, new_primary) = (survivor.content(), Node::new(0xee));
        let ledger = Ledger::new(&survivor.layout, true);
        let mut world = World {
            survivor,
            gates,
            journal,
            new_primary,
            ledger,
            next_new_primary: None,
            compared: None,
            model,
            epoch: 0,
            on_its_way: None,
            committed: None,
        };
        world.start_over();
        world
    }

    fn start_over(&mut self) {
        self.journal.set_mode(JournalMode::Keep);
        // A newcomer, with whatever the disk it finds holds.
        self.new_primary = self.next_new_primary.take().unwrap_or_else(|| Node::new(0xee));
        self.ledger = Ledger::new(&self.survivor.layout, true);
        (self.on_its_way, self.committed, self.compared) = (None, None, None);
    }

    fn change(&mut self, disk: usize, sector: u64, sectors: u64, value: u8, discard: Option<bool>) {
        let (offset, bytes) = (sector * 512, sectors * 512);
        if offset + bytes > DISK_BYTES[disk] {
            return;
        }
        let gate = &self.gates[disk];
        let stored = match discard {
            None => gate.write(offset, &vec![value; bytes as usize]),
            Some(true) => gate.discard(offset, bytes),
            Some(false) => gate.write_zeroes(offset, bytes, true),
        };
        if stored.expect("storage that works") == Stored::Accepted {
            self.model[disk][offset as usize..(offset + bytes) as usize].fill(value);
        }
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Write { disk, sector, sectors, value } => self.change(disk, sector, sectors, value, None),
            Step::Zeros { disk, sector, sectors, discard } => self.change(disk, sector, sectors, 0, Some(discard)),
            Step::Cut if self.on_its_way.is_none() => {
                let completes = self.ledger.is_done();
                self.journal.cut(id(self.epoch));
                self.journal.taken().indexes().for_each(|block| self.ledger.settle(block));
                self.on_its_way = Some((self.model.clone(), completes || self.committed.is_some()));
            }
            Step::Commit => {
                if let Some((disks, whole)) = self.on_its_way.take() {
                    self.new_primary.apply(&self.journal.taken());
                    self.journal.committed(id(self.epoch));
                    self.epoch += 1;
                    self.committed = whole.then_some(disks);
                }
            }
            Step::Lose if self.on_its_way.take().is_some() => {
                // Whether by a failed capture or a failed send.
                self.journal.put_back();
                self.epoch += 1;
            }
            Step::Push if self.on_its_way.is_none() => {
                let mut writer = self.new_primary.whole.writer();
                for index in self.ledger.next_push(3).into_iter().flatten() {
                    let mut page = [0; PAGE_BYTES];
                    self.survivor.whole.read(index, &mut page).expect("read");
                    writer.put(index, Some(&page)).expect("put");
                }
                writer.finish().expect("finish");
                self.ledger.pushed();
            }
            Step::StartOver => self.start_over(),
            Step::ComeBack => {
                self.next_new_primary = Some(std::mem::replace(&mut self.new_primary, Node::new(0)));
                self.start_over();
            }
            Step::Sum => {
                if let Some(run) = self.ledger.next_comparison() {
                    let second = self.new_primary.layout.blocks_of(1);
                    // An image that the newcomer has just made is not worth it.
                    let worth = run.start != second.start || !self.epoch.is_multiple_of(3);
                    let hashes =
                        worth.then(|| hash_run(run.clone(), |index, block| self.new_primary.whole.read(index, block)));
                    self.compared = Some((run, hashes.map(|hashes| hashes.expect("read"))));
                }
            }
            Step::Compare => match self.compared.take() {
                Some((run, None)) => self.ledger.incomparable(&run),
                Some((run, Some(theirs))) => {
                    let own = hash_run(run.clone(), |index, block| self.survivor.whole.read(index, block));
                    let both = run.clone().zip(own.expect("read").into_iter().zip(theirs));
                    let differing: Vec<u64> = both.filter(|(_, (a, b))| a != b).map(|(index, _)| index).collect();
                    self.ledger.compared(&run, &differing);
                }
                None => {}
            },
            Step::Cut | Step::Lose | Step::Push => {}
        }
    }
}

proptest! {
    /// The primary may die after any step: once the new primary's image is whole, it is the disks
    /// at the newest committed capture, exactly.
    #[test]
    fn the_new_primarys_disks_are_those_of_the_committed_epoch(
        steps in prop::collection::vec(step(), 1..120),
        blocks_max in 1..12u64,
    ) {
        let mut world = World::new(blocks_max * BLOCK_COST_BYTES);
        for step in &steps {
            world.take(step);
            prop_assert_eq!(&world.survivor.content(), &world.model, "the guest reads what it wrote: {:?}", step);
            if let Some(committed) = &world.committed {
                prop_assert_eq!(&world.new_primary.content(), committed, "{:?}", step);
            }
        }
        // Not only by chance: from here on it becomes whole.
        for _ in 0..10 {
            [Step::Commit, Step::Sum, Step::Compare, Step::Push].iter().for_each(|step| world.take(step));
        }
        [Step::Cut, Step::Commit].iter().for_each(|step| world.take(step));
        prop_assert_eq!(world.committed.as_ref(), Some(&world.model));
        prop_assert_eq!(&world.new_primary.content(), &world.model);
    }
}
