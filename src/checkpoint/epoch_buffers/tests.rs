//! What the tests of the buffers share, and the two sides in two threads.

mod model;
mod room;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;

use netbuf::{Limits, OutputBuffer, PacketPort};

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
    fn fault(&self, _: Option<String>) {}
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

/// Where a machine fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    Log,
    Save,
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
