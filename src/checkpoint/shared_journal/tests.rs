//! Held writes of a shared disk against a naive model, and what a secondary keeps of them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam::channel::{Receiver, Sender, unbounded};
use proptest::prelude::*;

use super::super::apply::{Applier, ApplyError};
use super::super::image::GuestImage;
use super::super::journal::{BLOCK_COST_BYTES, BlockSet};
use super::super::packing::{Packer, Packing};
use super::super::shared_journal::{SharedGate, SharedJournal, SharedListener};
use super::super::shared_writer::{SharedWriter, Work};
use super::super::stage::{StagedEpoch, StagingBudget};
use crate::device::block::{BlockBackend, Stored};
use crate::device::shared_image::SharedImage;
use crate::machine::GuestRam;
use crate::protocol::layout::ImageLayout;
use crate::protocol::machine_shape::{DiskShape, MachineShape};
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::types::ConnId;
use crate::protocol::types::{EpochId, Generation};

/// The last block is not whole.
const DISK_BYTES: u64 = 5 * 4096 + 512;
const SECTORS: u64 = DISK_BYTES / 512;

fn id(epoch: u64) -> EpochId {
    EpochId { generation: Generation(3), epoch }
}

/// What the journal told.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    CutWanted,
    Written(EpochId),
    Synced(ConnId),
    HasRoom,
    Fault(bool),
}

struct Events(Sender<Heard>);

impl Events {
    fn hear(&self, heard: Heard) {
        // A test that does not listen does not mind.
        let _ = self.0.send(heard);
    }
}

impl SharedListener for Events {
    fn cut_wanted(&self) {
        self.hear(Heard::CutWanted);
    }
    fn written(&self, through: EpochId) {
        self.hear(Heard::Written(through));
    }
    fn synced(&self, conn: ConnId) {
        self.hear(Heard::Synced(conn));
    }
    fn has_room(&self) {
        self.hear(Heard::HasRoom);
    }
    fn fault(&self, why: Option<String>) {
        self.hear(Heard::Fault(why.is_some()));
    }
}

/// A node with one shared disk, whose lock it has, and a page of memory.
struct Node {
    _directory: tempfile::TempDir,
    path: PathBuf,
    image: Arc<SharedImage>,
    layout: Arc<ImageLayout>,
    journal: Arc<SharedJournal>,
    gate: SharedGate,
    heard: Receiver<Heard>,
}

impl Node {
    fn new(journal_bytes_max: u64) -> Node {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("shared.img");
        std::fs::write(&path, vec![0xaa; DISK_BYTES as usize]).expect("an image");
        let image = Arc::new(SharedImage::open(&path).expect("open"));
        let mut shape = MachineShape::bare(4096, 1, [2, 0, 0, 0, 0, 1]);
        shape.disks = vec![DiskShape { bytes: DISK_BYTES, read_only: false, shared: true, serial: [0; 20] }];
        let layout = Arc::new(ImageLayout::of(&shape));
        let (events, heard) = unbounded();
        let journal = SharedJournal::new(journal_bytes_max, Box::new(Events(events)));
        let gate = SharedGate::new(Arc::clone(&image), Arc::clone(&journal), 1);
        Node { _directory: directory, path, image, layout, journal, gate, heard }
    }

    fn disks(&self) -> Vec<Arc<dyn BlockBackend>> {
        vec![Arc::clone(&self.image) as Arc<dyn BlockBackend>]
    }

    fn writer(&self) -> SharedWriter {
        let images = vec![Arc::clone(&self.image)];
        SharedWriter::start(Arc::clone(&self.journal), Arc::clone(&self.layout), self.disks(), images)
            .expect("a thread")
    }

    /// What is in the image.
    fn stored(&self) -> Vec<u8> {
        std::fs::read(&self.path).expect("an image")
    }

    /// What the guest sees.
    fn seen(&self) -> Vec<u8> {
        let mut bytes = vec![0; DISK_BYTES as usize];
        self.gate.read(0, &mut bytes).expect("read");
        bytes
    }
}

#[test]
fn a_flush_waits_until_its_epoch_is_committed_and_written() {
    let node = Node::new(1 << 20);
    node.image.take().expect("the lock");
    let _writer = node.writer();
    node.journal.alone();
    assert_eq!(node.gate.write(0, &[1; 512]).expect("write"), Stored::Accepted);
    assert_eq!(node.stored()[0], 1, "alone, it is written at once");
    node.gate.flush().expect("flush");
    node.journal.hold(7);
    assert_eq!(node.heard.recv().expect("told"), Heard::Synced(7));
    node.gate.flush().expect("nothing is held");
    assert_eq!(node.gate.write(512, &[2; 512]).expect("write"), Stored::Accepted);
    assert_eq!((node.stored()[512], node.seen()[511], node.seen()[512]), (0xaa, 1, 2));
    let ended = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            node.gate.flush().expect("flush");
            ended.store(1, Ordering::SeqCst);
        });
        assert_eq!(node.heard.recv().expect("told"), Heard::CutWanted, "it asks for the cut of its epoch");
        let blocks = node.journal.cut(id(0));
        assert_eq!(blocks.indexes().collect::<Vec<_>>(), [1], "the block after memory's only page");
        node.journal.committed(id(0));
        assert_eq!((node.stored()[512], ended.load(Ordering::SeqCst)), (0xaa, 0), "committed, and it may not go yet");
        node.journal.write_through(id(0));
        assert_eq!(node.heard.recv().expect("told"), Heard::Written(id(0)));
    });
    assert_eq!(node.stored()[512], 2);
    // Whoever waits when the node loses the guest hears of it.
    node.gate.write(0, &[3; 512]).expect("write");
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| node.gate.flush());
        assert_eq!(node.heard.recv().expect("told"), Heard::CutWanted);
        node.journal.close();
        assert!(flush.join().expect("no panic").is_err());
    });
    assert!(node.gate.write(0, &[4; 512]).is_err());
    assert_eq!(node.stored()[0], 1, "what was held is gone");
}

#[test]
fn storage_that_fails_is_tried_again_and_nothing_is_lost() {
    let node = Node::new(1 << 20);
    let _writer = node.writer();
    node.journal.hold(1);
    // Without the lock the image takes nothing: a storage that fails.
    assert_eq!(node.heard.recv().expect("told"), Heard::Synced(1));
    node.gate.write(0, &[9; 4096]).expect("held");
    node.journal.cut(id(0));
    node.journal.committed(id(0));
    node.journal.write_through(id(0));
    assert_eq!(node.heard.recv().expect("told"), Heard::Fault(true));
    assert_eq!((node.stored()[0], node.seen()[0]), (0xaa, 9));
    node.image.take().expect("the lock");
    let heard: Vec<_> = node.heard.iter().take_while(|heard| *heard != Heard::Written(id(0))).collect();
    assert_eq!(heard.last(), Some(&Heard::Fault(false)));
    assert_eq!(node.stored()[0], 9);
}

#[test]
fn what_is_held_is_bounded_and_a_lone_node_writes_nothing_past_it() {
    let node = Node::new(2 * BLOCK_COST_BYTES);
    node.image.take().expect("the lock");
    node.journal.hold(1);
    let write = |block: u64, value| node.gate.write(block * 4096, &[value; PAGE_BYTES]).expect("write");
    assert_eq!((write(0, 1), write(1, 1), write(2, 1), write(2, 1)), {
        (Stored::Accepted, Stored::Accepted, Stored::Full, Stored::Full)
    });
    assert_eq!(node.heard.try_iter().collect::<Vec<_>>(), [Heard::CutWanted], "told once");
    node.journal.cut(id(0));
    node.journal.committed(id(0));
    assert_eq!(write(2, 1), Stored::Full, "committed, and not written");
    node.journal.alone();
    assert_eq!(write(0, 2), Stored::Full, "what is held goes first");
    let writer = node.writer();
    // The first tells that the newcomer's image is synced no more: there is none.
    assert_eq!(node.heard.iter().find(|heard| *heard == Heard::HasRoom), Some(Heard::HasRoom));
    assert_eq!(write(0, 2), Stored::Accepted);
    assert_eq!((node.stored()[0], node.stored()[4096]), (2, 1));
    drop(writer);
    assert!(node.image.write(0, &[3; 512]).is_err(), "the lock is given up when it is over");
}

/// An epoch as it is staged: its memory page, and blocks of the shared disk.
fn staged(epoch: u64, blocks: &[(u64, u8)], budget: &StagingBudget) -> Box<StagedEpoch> {
    let mut packer = Packer::new(Packing::Uncompressed);
    let mut chunk = |pages: &[(u64, u8)]| {
        let mut chunk = Vec::new();
        for (index, value) in pages {
            packer.encoder().encode(*index, &[*value; PAGE_BYTES], &mut chunk);
        }
        chunk
    };
    let chunks = vec![chunk(&[(0, 1)]), chunk(blocks)];
    let bytes = chunks.iter().map(|chunk| chunk.len() as u64).sum();
    assert!(budget.spend(bytes, 0));
    Box::new(StagedEpoch { id: id(epoch), chunks, bytes, state: vec![7], ..StagedEpoch::default() })
}

#[test]
fn a_secondary_keeps_committed_writes_until_they_are_written_and_a_new_primary_writes_them() {
    let node = Node::new(0);
    let budget = StagingBudget::new(1 << 20);
    let whole = GuestImage::new(GuestRam::new(4096).expect("memory"), Arc::clone(&node.layout), node.disks());
    let applier = Applier::start(whole, Arc::clone(&budget), |_| {}).expect("a thread");
    applier.epoch(staged(0, &[(1, 10), (2, 10)], &budget));
    applier.epoch(staged(1, &[(1, 11), (6, 11)], &budget));
    applier.epoch(staged(2, &[(2, 12), (3, 0)], &budget));
    assert_eq!(applier.finish(id(2)).expect("the newest epoch"), [7]);
    assert_eq!(node.stored(), vec![0xaa; DISK_BYTES as usize], "kept, not written");
    let kept = budget.used();
    assert!(kept > 4 * 4096, "what is kept counts as staged: {kept}");
    applier.forget(id(0));
    assert!(write_kept(&applier).is_err(), "not without the lock");
    assert_eq!(node.stored(), vec![0xaa; DISK_BYTES as usize]);
    assert!(budget.used() < kept);
    node.image.take().expect("the lock");
    write_kept(&applier).expect("written");
    let mut expected = vec![0xaa; DISK_BYTES as usize];
    for (block, value) in [(0, 11), (5, 11), (1, 12), (2, 0)] {
        let end = (block * 4096 + 4096).min(DISK_BYTES as usize);
        expected[block * 4096..end].fill(value);
    }
    assert_eq!(node.stored(), expected);
    applier.forget(id(2));
    write_kept(&applier).expect("there is nothing left");
    assert_eq!(budget.used(), 0);
}

/// What may happen to a primary's shared disk.
#[derive(Clone, Debug)]
enum Step {
    Write { sector: u64, sectors: u64, value: u8 },
    Zeros { sector: u64, sectors: u64, discard: bool },
    Cut,
    Commit,
    Lose,
    WriteOut,
    Alone,
    Hold,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..SECTORS, 1..20u64);
    prop_oneof![
        6 => (place(), 1..255u8).prop_map(|((sector, sectors), value)| Step::Write { sector, sectors, value }),
        2 => (place(), any::<bool>()).prop_map(|((sector, sectors), discard)| Step::Zeros { sector, sectors, discard }),
        3 => Just(Step::Cut),
        3 => Just(Step::Commit),
        1 => Just(Step::Lose),
        2 => Just(Step::WriteOut),
        1 => Just(Step::Alone),
        2 => Just(Step::Hold),
    ]
}

/// A node, and what a naive model says of it.
struct World {
    node: Node,
    work: Work,
    /// The disk as the guest must see it.
    model: Vec<u8>,
    /// The disk as the storage must be.
    stored: Vec<u8>,
    /// The disk at the capture on its way.
    on_its_way: Option<Vec<u8>>,
    /// The disk at the newest commit, or when this node came to be alone: what may be stored.
    may_go: Vec<u8>,
    holds: bool,
    epoch: u64,
}

impl World {
    fn new(journal_bytes_max: u64) -> World {
        let node = Node::new(journal_bytes_max);
        node.image.take().expect("the lock");
        node.journal.alone();
        let (journal, layout) = (Arc::clone(&node.journal), Arc::clone(&node.layout));
        let work = Work { journal, layout, disks: node.disks(), images: Vec::new() };
        let model = node.stored();
        let (stored, may_go) = (model.clone(), model.clone());
        World { node, work, model, stored, on_its_way: None, may_go, holds: false, epoch: 0 }
    }

    fn change(&mut self, sector: u64, sectors: u64, value: u8, discard: Option<bool>) {
        let (offset, bytes) = (sector * 512, sectors.min(SECTORS - sector) * 512);
        let gate = &self.node.gate;
        let stored = match discard {
            None => gate.write(offset, &vec![value; bytes as usize]),
            Some(true) => gate.discard(offset, bytes),
            Some(false) => gate.write_zeroes(offset, bytes, true),
        };
        if stored.expect("storage that works") == Stored::Full {
            return;
        }
        let range = offset as usize..(offset + bytes) as usize;
        self.model[range.clone()].fill(value);
        if !self.holds {
            self.stored[range.clone()].fill(value);
            self.may_go[range].fill(value);
        }
    }

    fn take(&mut self, step: &Step) {
        let journal = &self.node.journal;
        match *step {
            Step::Write { sector, sectors, value } => self.change(sector, sectors, value, None),
            Step::Zeros { sector, sectors, discard } => self.change(sector, sectors, 0, Some(discard)),
            Step::Cut if self.holds && self.on_its_way.is_none() => {
                let _: Arc<BlockSet> = journal.cut(id(self.epoch));
                self.on_its_way = Some(self.model.clone());
            }
            Step::Commit => {
                if let Some(disk) = self.on_its_way.take() {
                    journal.committed(id(self.epoch));
                    journal.write_through(id(self.epoch));
                    self.epoch += 1;
                    self.may_go = disk;
                }
            }
            Step::Lose if self.on_its_way.take().is_some() => {
                journal.put_back();
                self.epoch += 1;
            }
            Step::WriteOut if self.stored != self.may_go => self.write_out(),
            Step::Alone => {
                journal.alone();
                (self.on_its_way, self.holds) = (None, false);
                self.may_go = self.model.clone();
            }
            Step::Hold if !self.holds => {
                journal.hold(self.epoch);
                self.holds = true;
            }
            Step::Cut | Step::Lose | Step::WriteOut | Step::Hold => {}
        }
    }

    fn write_out(&mut self) {
        let batch = self.work.next().expect("it is not over");
        self.work.write(&batch).expect("storage that works");
        self.work.done(&batch);
        self.stored = self.may_go.clone();
    }
}

proptest! {
    /// The guest reads what it wrote, and the storage has what was committed when it was last
    /// written, and nothing else.
    #[test]
    fn the_storage_has_committed_writes_and_no_others(
        steps in prop::collection::vec(step(), 1..120),
        blocks_max in 1..12u64,
    ) {
        let mut world = World::new(blocks_max * BLOCK_COST_BYTES);
        for step in &steps {
            world.take(step);
            prop_assert_eq!(&world.node.seen(), &world.model, "the guest reads what it wrote: {:?}", step);
            prop_assert_eq!(&world.node.stored(), &world.stored, "{:?}", step);
        }
        [Step::Alone, Step::WriteOut].iter().for_each(|step| world.take(step));
        prop_assert_eq!(&world.node.stored(), &world.model);
    }
}

/// Has the kept writes written, and waits for it.
fn write_kept(applier: &Applier) -> Result<(), ApplyError> {
    let (done, written) = crossbeam::channel::bounded(1);
    applier.write_kept(move |result| drop(done.send(result)));
    written.recv().expect("the applying thread answers")
}
