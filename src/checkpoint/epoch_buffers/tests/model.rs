//! The buffers against a model that knows of each page, block and packet only when it was last
//! written, and of each buffer only since when it forgets.

use std::cell::RefCell;

use proptest::prelude::*;

use super::*;

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
