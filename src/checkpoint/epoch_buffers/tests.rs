//! The buffers against a model that knows of each page, block and packet only when it was last
//! written, and of each buffer only since when it forgets; and against two threads.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;

use netbuf::{Limits, OutputBuffer, PacketPort};
use proptest::prelude::*;

use super::super::capture_pool::CapturePool;
use super::super::journal::{BLOCK_COST_BYTES, Block, BlockSet, JournalListener};
use super::super::output::OutputListener;
use super::super::shared_journal::{SharedGate, SharedListener};
use super::*;
use crate::device::block::BlockBackend;
use crate::device::net::NetBackend;
use crate::device::shared_image::SharedImage;
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::types::Generation;

const PAGES: u64 = 12;
const BLOCKS: u64 = 6;
/// Index of the shared disk's first block.
const SHARED_FIRST: u64 = 100;

fn id(epoch: u64) -> EpochId {
    EpochId { generation: Generation(2), epoch }
}

struct Deaf;

impl OutputListener for Deaf {
    fn output_waiting(&self) {}
    fn output_full(&self) {}
}

impl JournalListener for Deaf {
    fn journal_full(&self) {}
}

impl SharedListener for Deaf {
    fn cut_wanted(&self) {}
    fn written(&self, _: EpochId) {}
    fn synced(&self, _: ConnId) {}
    fn has_room(&self) {}
    fn trouble(&self, _: Option<String>) {}
}

/// A port that remembers the first bytes of what left.
struct Port(Arc<Mutex<Vec<u64>>>);

impl PacketPort for Port {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let number = <[u8; 8]>::try_from(frame).map_err(|_| io::ErrorKind::InvalidData)?;
        self.0.lock().push(u64::from_le_bytes(number));
        Ok(())
    }

    fn recv(&self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn as_raw_fd(&self) -> RawFd {
        -1
    }
}

/// Buffers with all that the guest writes to.
struct Rig {
    _directory: tempfile::TempDir,
    buffers: EpochBuffers,
    left: Arc<Mutex<Vec<u64>>>,
    shared_disk: SharedGate,
}

impl Rig {
    fn new(pages: u64) -> Rig {
        let left = Arc::new(Mutex::default());
        let buffer = OutputBuffer::new(Limits { bytes_max: 1 << 20, packets_max: 10_000 });
        let output = OutputGate::new(Box::new(Port(Arc::clone(&left))), buffer, Box::new(Deaf), || 0);
        let journal = DiskJournal::new(1 << 30, Box::new(Deaf));
        let shared = SharedJournal::new(1 << 30, Box::new(Deaf));
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("shared.img");
        std::fs::write(&path, vec![0; BLOCKS as usize * PAGE_BYTES]).expect("an image");
        let image = Arc::new(SharedImage::open(&path).expect("an image"));
        image.take().expect("the lock");
        let shared_disk = SharedGate::new(image, Arc::clone(&shared), SHARED_FIRST);
        let buffers = EpochBuffers::new(pages, output, journal, Some(shared));
        Rig { _directory: directory, buffers, left, shared_disk }
    }

    fn transmit(&self, number: u64) {
        self.buffers.output().transmit(&number.to_le_bytes());
    }

    /// As a disk's gate does.
    fn write_block(&self, block: u64, value: u64) {
        let journal = &self.buffers.journal.buffer;
        let (mode, _under_way) = journal.begin_write();
        if mode == JournalMode::Keep {
            journal.reserve(BLOCK_COST_BYTES).expect("room").keep(block, Some(&content(value)));
        }
    }

    fn write_shared(&self, block: u64, value: u64) {
        // Refused once it is closed.
        let _ = self.shared_disk.write(block * PAGE_BYTES as u64, &content(value));
    }

    fn journal_mode(&self) -> JournalMode {
        self.buffers.journal.buffer.begin_write().0
    }
}

fn content(value: u64) -> Block {
    let mut block = [1; PAGE_BYTES];
    block[..8].copy_from_slice(&value.to_le_bytes());
    block
}

fn values(blocks: Option<&Arc<BlockSet>>) -> BTreeMap<u64, u64> {
    let value = |block: &Block| u64::from_le_bytes(block[..8].try_into().expect("eight bytes"));
    blocks.into_iter().flat_map(|blocks| blocks.iter().map(|(index, block)| (index, value(block)))).collect()
}

// ---- the model ----

/// Pages or blocks: when each was last written while it counted, and with what.
#[derive(Default)]
struct Written {
    last: BTreeMap<u64, (u64, u64)>,
    /// What was written up to then is nobody's any more.
    forgotten_at: u64,
    /// What was written up to then is committed.
    safe_at: u64,
}

impl Written {
    fn due(&self) -> BTreeMap<u64, u64> {
        let counts = |at: u64| at > self.forgotten_at.max(self.safe_at);
        self.last.iter().filter(|(_, (at, _))| counts(*at)).map(|(index, (_, value))| (*index, *value)).collect()
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Closed,
    Pass,
    Hold,
}

#[derive(Default)]
struct Model {
    now: u64,
    decisions: u64,
    output: (Mode, u64),
    journal: (Mode, u64),
    shared: (Mode, u64),
    tracked_since: Option<u64>,
    fenced: bool,
    pages: Written,
    blocks: Written,
    shared_blocks: Written,
    /// The newest epoch that was cut, and when; none if that did not succeed.
    newest: Option<(EpochId, u64)>,
    /// The newest epoch that was sent.
    sent: Option<EpochId>,
    /// The newest committed one.
    committed: Option<u64>,
    packets: Vec<(Option<u64>, u64)>,
    left: Vec<u64>,
}

impl Model {
    fn later(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn decide(&mut self) -> u64 {
        self.decisions += 1;
        self.decisions
    }

    fn pass_disks(&mut self, decision: u64) {
        let now = self.later();
        if decision >= self.journal.1 {
            (self.journal, self.blocks.forgotten_at) = ((Mode::Pass, decision), now);
        }
        if decision >= self.shared.1 {
            (self.shared, self.shared_blocks.forgotten_at) = ((Mode::Pass, decision), now);
        }
    }

    fn release(&mut self, due: impl Fn(Option<u64>) -> bool) {
        let packets = std::mem::take(&mut self.packets);
        let (go, stay): (Vec<_>, Vec<_>) = packets.into_iter().partition(|(epoch, _)| due(*epoch));
        self.left.extend(go.iter().map(|(_, number)| *number));
        self.packets = stay;
    }
}

/// What the deciding side does.
#[derive(Clone, Copy, Debug)]
enum Deciding {
    Committed,
    Release { back: u64 },
    Alone,
    Fence,
}

/// The deciding side and the guest, and what they should find.
struct World {
    rig: Rig,
    model: RefCell<Model>,
}

impl World {
    fn run(&self, what: &[Deciding]) {
        what.iter().for_each(|what| self.decide(*what));
    }

    fn decide(&self, what: Deciding) {
        let mut model = self.model.borrow_mut();
        let buffers = &self.rig.buffers;
        match what {
            Deciding::Committed => {
                let Some(id) = model.sent else { return };
                let _ = buffers.committed(id);
                model.committed = model.committed.max(Some(id.epoch));
                if let Some((newest, at)) = model.newest
                    && newest == id
                {
                    model.pages.safe_at = at;
                    model.blocks.safe_at = at;
                    model.shared_blocks.safe_at = at;
                }
            }
            Deciding::Release { back } => {
                let Some(through) = model.committed.and_then(|newest| newest.checked_sub(back)) else { return };
                let (end, _) = buffers.release(through, || true);
                assert_eq!(end, ReleaseEnd::Done);
                model.release(|epoch| epoch.is_some_and(|epoch| epoch <= through));
            }
            Deciding::Alone => {
                let _ = buffers.alone();
                let decision = model.decide();
                if !model.fenced {
                    model.release(|_| true);
                    model.output = (Mode::Pass, decision);
                    model.pass_disks(decision);
                }
            }
            Deciding::Fence => {
                buffers.fence();
                let now = model.later();
                model.fenced = true;
                model.packets.clear();
                let closed = (Mode::Closed, u64::MAX);
                (model.output, model.journal, model.shared) = (closed, closed, closed);
                (model.blocks.forgotten_at, model.shared_blocks.forgotten_at) = (now, now);
            }
        }
        drop(model);
        self.check();
    }

    fn check(&self) {
        let model = self.model.borrow();
        assert_eq!(*self.rig.left.lock(), model.left, "what left");
        assert_eq!(self.rig.buffers.output().figures().packets, model.packets.len() as u64, "what is held");
        let journal = match model.journal.0 {
            Mode::Closed => JournalMode::Closed,
            Mode::Pass => JournalMode::Pass,
            Mode::Hold => JournalMode::Keep,
        };
        assert_eq!(self.rig.journal_mode(), journal);
    }

    fn transmit(&self) {
        let mut model = self.model.borrow_mut();
        let number = model.later();
        self.rig.transmit(number);
        match model.output.0 {
            Mode::Closed => {}
            Mode::Pass => model.left.push(number),
            Mode::Hold => model.packets.push((None, number)),
        }
    }

    fn write_block(&self, block: u64, is_shared: bool) {
        let mut model = self.model.borrow_mut();
        let at = model.later();
        if is_shared {
            self.rig.write_shared(block, at);
            if model.shared.0 == Mode::Hold {
                model.shared_blocks.last.insert(SHARED_FIRST + block, (at, at));
            }
        } else {
            self.rig.write_block(block, at);
            if model.journal.0 == Mode::Hold {
                model.blocks.last.insert(block, (at, at));
            }
        }
    }

    fn track(&self, decided: (Decision, u64)) {
        let _ = self.rig.buffers.track(decided.0, 7);
        let mut model = self.model.borrow_mut();
        let now = model.later();
        model.tracked_since = Some(decided.1);
        // No ack of an earlier newcomer comes any more.
        (model.newest, model.sent) = (None, None);
        model.pages.forgotten_at = now;
        if decided.1 >= model.journal.1 {
            (model.journal, model.blocks.forgotten_at) = ((Mode::Hold, decided.1), now);
        }
        if decided.1 >= model.shared.1 {
            // What was held before goes on being held: it is the storage's to get first.
            model.shared = (Mode::Hold, decided.1);
        }
    }

    fn untrack(&self, decided: (Decision, u64)) {
        let _ = self.rig.buffers.untrack(decided.0);
        let mut model = self.model.borrow_mut();
        model.pages.forgotten_at = model.later();
        model.tracked_since = None;
        (model.newest, model.sent) = (None, None);
        model.pass_disks(decided.1);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    Log,
    Save,
}

/// The machine: its dirty log, and what the deciding side does while it is read, copied and saved.
struct Source<'a> {
    world: &'a World,
    log: &'a mut PageSet,
    fault: Fault,
    meanwhile: [Vec<Deciding>; 3],
}

impl CaptureSource for Source<'_> {
    type Error = Fault;

    fn collect_dirty(&mut self, into: &mut PageSet) -> Result<(), Fault> {
        self.world.run(&self.meanwhile[0]);
        into.union_with(self.log);
        self.log.clear();
        if self.fault == Fault::Log { Err(Fault::Log) } else { Ok(()) }
    }

    fn copy_pages(&self, pages: &PageSet, into: &mut Vec<u8>) {
        self.world.run(&self.meanwhile[1]);
        into.resize(into.len() + pages.count() as usize * PAGE_BYTES, 9);
    }

    fn save(&mut self, into: &mut Vec<u8>) -> Result<(), Fault> {
        self.world.run(&self.meanwhile[2]);
        into.push(1);
        if self.fault == Fault::Save { Err(Fault::Save) } else { Ok(()) }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Transmit,
    WritePage(u64),
    WriteBlock {
        block: u64,
        is_shared: bool,
    },
    Prepare {
        fault: bool,
    },
    Deciding(Deciding),
    /// Decided on before `ahead`, carried out after it.
    Track {
        ahead: Vec<Deciding>,
    },
    Untrack {
        ahead: Vec<Deciding>,
    },
    Cut {
        ahead: Vec<Deciding>,
        holds: bool,
        fault: Fault,
        meanwhile: [Vec<Deciding>; 3],
    },
}

fn deciding() -> impl Strategy<Value = Deciding> {
    prop_oneof![
        6 => Just(Deciding::Committed),
        4 => (0..3u64).prop_map(|back| Deciding::Release { back }),
        3 => Just(Deciding::Alone),
        1 => Just(Deciding::Fence),
    ]
}

fn some_deciding() -> impl Strategy<Value = Vec<Deciding>> {
    prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(deciding(), 1..3)]
}

fn op() -> impl Strategy<Value = Op> {
    let fault = || prop_oneof![6 => Just(Fault::None), 1 => Just(Fault::Log), 1 => Just(Fault::Save)];
    let meanwhile = || [some_deciding(), some_deciding(), some_deciding()];
    prop_oneof![
        6 => Just(Op::Transmit),
        6 => (0..PAGES).prop_map(Op::WritePage),
        6 => (0..BLOCKS, any::<bool>()).prop_map(|(block, is_shared)| Op::WriteBlock { block, is_shared }),
        2 => prop::bool::weighted(0.2).prop_map(|fault| Op::Prepare { fault }),
        4 => deciding().prop_filter("rare", |what| !matches!(what, Deciding::Fence)).prop_map(Op::Deciding),
        2 => some_deciding().prop_map(|ahead| Op::Track { ahead }),
        1 => some_deciding().prop_map(|ahead| Op::Untrack { ahead }),
        7 => (some_deciding(), any::<bool>(), fault(), meanwhile())
            .prop_map(|(ahead, holds, fault, meanwhile)| Op::Cut { ahead, holds, fault, meanwhile }),
    ]
}

/// Cuts an epoch, and checks what is in it.
fn cut(world: &World, log: &mut PageSet, epoch: u64, op: (&[Deciding], bool, Fault, [Vec<Deciding>; 3])) {
    let (ahead, holds, fault, meanwhile) = op;
    let (rig, id) = (&world.rig, id(epoch));
    let (decision, decided) = (rig.buffers.decide(), world.model.borrow_mut().decide());
    world.run(ahead);
    let (starts, output) = {
        let mut model = world.model.borrow_mut();
        let current = decided >= model.journal.1 && decided >= model.shared.1;
        let tracked = model.tracked_since.is_some_and(|since| since <= decided);
        (model.newest, model.now) = (None, model.now + 1);
        let output = match model.output.0 {
            Mode::Pass if holds => OutputCut::Hold,
            Mode::Hold => OutputCut::Seal,
            _ => OutputCut::Pass,
        };
        (current && tracked, output)
    };
    let (blocks, shared) = {
        let model = world.model.borrow();
        (model.blocks.due(), model.shared_blocks.due())
    };
    if starts && fault != Fault::Log {
        // What the deciding side does from now on finds the epoch cut.
        let mut model = world.model.borrow_mut();
        model.newest = Some((id, model.now));
    }
    let mut capture = CapturePool::default().get();
    let mut source = Source { world, log, fault, meanwhile };
    let result = rig.buffers.cut(Instant::default(), Cut { decision, id, output }, &mut source, &mut capture);
    let mut model = world.model.borrow_mut();
    let sealed = decided >= model.output.1;
    if sealed {
        match output {
            OutputCut::Hold => model.output = (Mode::Hold, decided),
            OutputCut::Seal => model.packets.iter_mut().for_each(|(of, _)| *of = of.or(Some(epoch))),
            OutputCut::Pass => {}
        }
    }
    let expected = match fault {
        _ if !starts => Err(CutError::Superseded),
        Fault::None if !sealed => Err(CutError::Superseded),
        Fault::None => Ok(()),
        fault => Err(CutError::Source(fault)),
    };
    assert_eq!(format!("{result:?}"), format!("{expected:?}"));
    if starts && fault != Fault::Log {
        let pages: Vec<u64> = model.pages.due().into_keys().collect();
        assert_eq!(capture.pages, pages, "the pages of epoch {epoch}");
        rig.buffers.with_dirty_pages(|set| assert_eq!(set.iter().collect::<Vec<_>>(), pages));
        assert_eq!(values(capture.blocks.as_ref()), blocks, "the blocks of epoch {epoch}");
        assert_eq!(values(capture.shared.as_ref()), shared, "the shared blocks of epoch {epoch}");
    }
    if result.is_ok() {
        model.sent = Some(id);
    } else {
        rig.buffers.put_back(decision);
        model.newest = None;
    }
    drop(model);
    world.check();
}

fn run(ops: &[Op]) {
    let world = World { rig: Rig::new(PAGES), model: RefCell::default() };
    world.decide(Deciding::Alone);
    let mut log = PageSet::empty(PAGES);
    let decided = |ahead: &[Deciding]| {
        let decided = (world.rig.buffers.decide(), world.model.borrow_mut().decide());
        world.run(ahead);
        decided
    };
    for (epoch, op) in (0..).zip(ops) {
        match op.clone() {
            Op::Transmit => world.transmit(),
            Op::WritePage(page) => {
                let mut model = world.model.borrow_mut();
                let at = model.later();
                if model.tracked_since.is_some() {
                    model.pages.last.insert(page, (at, at));
                    log.insert(page);
                }
            }
            Op::WriteBlock { block, is_shared } => world.write_block(block, is_shared),
            Op::Prepare { fault } => {
                let fault = if fault { Fault::Log } else { Fault::None };
                let mut source = Source { world: &world, log: &mut log, fault, meanwhile: Default::default() };
                let mut capture = CapturePool::default().get();
                let tracked = world.model.borrow().tracked_since.is_some();
                // So long after the last cut that it tells nothing.
                let now = Instant::from_us(1 << 40);
                let prepared = world.rig.buffers.prepare(now, &mut source, &mut capture);
                assert_eq!(prepared.is_err(), tracked && fault == Fault::Log);
            }
            Op::Deciding(what) => world.decide(what),
            Op::Track { ahead } => {
                if world.model.borrow().tracked_since.is_some() {
                    world.untrack(decided(&[]));
                }
                log.clear();
                world.track(decided(&ahead));
            }
            Op::Untrack { ahead } => world.untrack(decided(&ahead)),
            Op::Cut { ahead, holds, fault, meanwhile } => {
                cut(&world, &mut log, epoch, (&ahead, holds, fault, meanwhile));
            }
        }
        world.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_page_block_and_packet_is_in_the_epoch_it_belongs_to(ops in prop::collection::vec(op(), 1..60)) {
        run(&ops);
    }
}

#[test]
fn a_cut_that_ends_after_alone_or_fence_holds_nothing() {
    for what in [Deciding::Alone, Deciding::Fence] {
        for place in 0..4 {
            let mut meanwhile: [Vec<Deciding>; 3] = Default::default();
            let mut ahead = Vec::new();
            meanwhile.get_mut(place).unwrap_or(&mut ahead).push(what);
            let world = World { rig: Rig::new(PAGES), model: RefCell::default() };
            world.decide(Deciding::Alone);
            let decided = (world.rig.buffers.decide(), world.model.borrow_mut().decide());
            world.track(decided);
            cut(&world, &mut PageSet::empty(PAGES), 0, (&ahead, true, Fault::None, meanwhile));
            world.rig.transmit(5);
            let (left, held) = (world.rig.left.lock().clone(), world.rig.buffers.output().figures().packets);
            let (expected, mode) = match what {
                Deciding::Alone => (vec![5], JournalMode::Pass),
                _ => (Vec::new(), JournalMode::Closed),
            };
            assert_eq!((left, held, world.rig.journal_mode()), (expected, 0, mode), "{what:?} in place {place}");
        }
    }
}

#[test]
fn after_a_fence_nothing_opens_the_buffers_again() {
    let rig = Rig::new(PAGES);
    let _ = rig.buffers.alone();
    rig.buffers.fence();
    let _ = rig.buffers.alone();
    let _ = rig.buffers.track(rig.buffers.decide(), 1);
    let _ = rig.buffers.untrack(rig.buffers.decide());
    rig.transmit(1);
    assert_eq!((rig.left.lock().len(), rig.journal_mode()), (0, JournalMode::Closed));
    assert!(rig.shared_disk.write(0, &content(1)).is_err());
}

/// A machine all of whose pages are dirty each time it is asked.
struct AllDirty(u64);

impl CaptureSource for AllDirty {
    type Error = Fault;

    fn collect_dirty(&mut self, into: &mut PageSet) -> Result<(), Fault> {
        (0..self.0).for_each(|page| into.insert(page));
        Ok(())
    }

    fn copy_pages(&self, pages: &PageSet, into: &mut Vec<u8>) {
        into.resize(into.len() + pages.count() as usize * PAGE_BYTES, 9);
    }

    fn save(&mut self, into: &mut Vec<u8>) -> Result<(), Fault> {
        into.resize(into.len() + 10_000, 1);
        Ok(())
    }
}

/// How often the pauses of epochs of so many pages, one after the other, made a cold buffer grow.
fn growths(pages: u64, machine_pages: u64, prepare: bool) -> u64 {
    let rig = Rig::new(machine_pages);
    let _ = rig.buffers.track(rig.buffers.decide(), 1);
    let (pool, mut machine) = (CapturePool::default(), AllDirty(pages));
    let mut growths = 0;
    for epoch in 0..2 {
        let mut capture = pool.get();
        let before = capture.growths();
        if prepare {
            rig.buffers.prepare(Instant::default(), &mut machine, &mut capture).expect("prepared");
        }
        let cut = Cut { decision: rig.buffers.decide(), id: id(epoch), output: OutputCut::Pass };
        rig.buffers.cut(Instant::default(), cut, &mut machine, &mut capture).expect("cut");
        assert_eq!((capture.pages.len() as u64, capture.bytes.len() as u64 >> 12), (pages, pages));
        growths += capture.growths() - before;
        assert!(2 * capture.room_bytes() <= CapturePool::bytes_max(machine_pages), "bounded");
        pool.put(capture);
        let _ = rig.buffers.committed(id(epoch));
    }
    growths
}

#[test]
fn a_cold_buffer_does_not_grow_in_the_pause_of_16_000_dirty_pages() {
    assert_eq!(growths(16_000, 20_000, false), 1, "the counter counts");
    assert_eq!(growths(16_000, 20_000, true), 0);
}

#[test]
fn a_cold_buffer_does_not_grow_in_the_pause_of_300_000_dirty_pages() {
    // Pages that are all of the machine's: there is no room beyond what the bound allows.
    assert_eq!(growths(300_000, 300_000, true), 0);
}

#[test]
fn the_log_is_not_read_ahead_of_small_epochs() {
    struct Counts(u64);
    impl CaptureSource for Counts {
        type Error = Fault;
        fn collect_dirty(&mut self, into: &mut PageSet) -> Result<(), Fault> {
            self.0 += 1;
            into.insert(3);
            Ok(())
        }
        fn copy_pages(&self, _: &PageSet, _: &mut Vec<u8>) {}
        fn save(&mut self, _: &mut Vec<u8>) -> Result<(), Fault> {
            Ok(())
        }
    }
    let rig = Rig::new(PAGES);
    let (pool, mut machine) = (CapturePool::default(), Counts(0));
    pool.warm();
    let mut epoch = |at_ms: u64, number: u64| {
        let (now, before) = (Instant::from_us(at_ms * 1000), machine.0);
        let mut capture = pool.get();
        rig.buffers.prepare(now, &mut machine, &mut capture).expect("prepared");
        let ahead = machine.0 - before;
        let cut = Cut { decision: rig.buffers.decide(), id: id(number), output: OutputCut::Pass };
        let _ = rig.buffers.cut(now, cut, &mut machine, &mut capture);
        pool.put(capture);
        ahead
    };
    assert_eq!(epoch(0, 0), 0, "nothing is tracked");
    let _ = rig.buffers.track(rig.buffers.decide(), 1);
    let ahead: Vec<u64> = (1..=6).map(|number| epoch(number * 10, number)).collect();
    assert_eq!(ahead, [1, 1, 1, 1, 0, 0]);
    assert_eq!(epoch(1000, 7), 1, "a long epoch");
    assert_eq!(epoch(1010, 8), 0);
}

/// Both sides at once: whatever the threads' order, the last decision stands, and nobody waits for
/// ever.
#[test]
fn two_threads_end_in_the_mode_of_the_last_decision() {
    const ROUNDS: u64 = 300;
    let rig = Rig::new(PAGES);
    let _ = rig.buffers.alone();
    let (send, jobs) = crossbeam::channel::unbounded::<(Decision, Decision, u64)>();
    std::thread::scope(|scope| {
        let buffers = &rig.buffers;
        scope.spawn(move || {
            let mut capture = CapturePool::default().get();
            for (track, decision, epoch) in jobs {
                let _ = buffers.track(track, epoch);
                let cut = Cut { decision, id: id(epoch), output: OutputCut::Hold };
                capture.clear();
                if buffers.cut(Instant::default(), cut, &mut AllDirty(3), &mut capture).is_err() {
                    buffers.put_back(decision);
                }
            }
        });
        for epoch in 0..ROUNDS {
            send.send((buffers.decide(), buffers.decide(), epoch)).expect("it runs");
            let _ = buffers.committed(id(epoch));
            let _ = buffers.release(epoch, || true);
            if epoch % 3 == 0 {
                let _ = buffers.alone();
            }
            rig.transmit(epoch);
        }
        let _ = buffers.alone();
        drop(send);
    });
    assert_eq!(rig.buffers.output().figures().packets, 0);
    assert_eq!(rig.journal_mode(), JournalMode::Pass);
    rig.transmit(ROUNDS);
    assert_eq!(rig.left.lock().last(), Some(&ROUNDS));
}
