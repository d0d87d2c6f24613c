//! Room for captures is made before the pause, and only when it may be needed.

use super::*;

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
