//! The guest of the simulator: pages with version numbers, packets with numbers, and the real gate
//! and buffer that hold them.

use std::io;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use mcd::checkpoint::output::{OutputGate, OutputListener, ReleaseEnd};
use mcd::device::{NetBackend, Transmit};
use mcd::protocol::pages::PageSet;
use mcd::protocol::primary::OutputCut;
use netbuf::{Limits, OutputBuffer, PacketPort};

/// Marks a page that was read while the guest wrote it: no image may ever keep one.
pub const TORN: u64 = 1 << 63;

/// What a capture saves, and what a takeover goes on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub pages: Rc<[u64]>,
    /// Its disk.
    pub blocks: Rc<[u64]>,
    /// The number of the next packet the guest will send.
    pub counter: u64,
    /// Which start of the guest this is: a cold start begins another life.
    pub life: u64,
}

/// A guest in memory.
#[derive(Clone, Debug)]
pub struct Guest {
    pub pages: Vec<u64>,
    /// Its disk as it must see it.
    pub blocks: Vec<u64>,
    pub counter: u64,
    pub life: u64,
    pub tracking: bool,
    pub dirty: PageSet,
    pub runs: bool,
    pub shut_down: bool,
}

impl Guest {
    pub fn fresh(pages: u64, life: u64) -> Guest {
        Guest {
            pages: vec![0; pages as usize],
            blocks: Vec::new(),
            counter: 0,
            life,
            tracking: false,
            dirty: PageSet::empty(pages),
            runs: true,
            shut_down: false,
        }
    }

    pub fn restored(pages: Vec<u64>, counter: u64, life: u64) -> Guest {
        Guest { pages, counter, ..Guest::fresh(0, life) }.with_dirty()
    }

    fn with_dirty(mut self) -> Guest {
        self.dirty = PageSet::empty(self.pages.len() as u64);
        self
    }

    pub fn write(&mut self, page: u64, version: u64) {
        self.pages[page as usize] = version;
        if self.tracking {
            self.dirty.insert(page);
        }
    }

    pub fn snapshot(&self) -> Snapshot {
        let (pages, blocks) = (self.pages.as_slice().into(), self.blocks.as_slice().into());
        Snapshot { pages, blocks, counter: self.counter, life: self.life }
    }

    /// The dirty pages since the last look; reading clears it.
    pub fn take_dirty(&mut self) -> PageSet {
        std::mem::replace(&mut self.dirty, PageSet::empty(self.pages.len() as u64))
    }
}

/// The output of one node: the real gate before a port that remembers what left.
pub struct Output {
    gate: Arc<OutputGate>,
    left: Arc<Mutex<Vec<u64>>>,
    told: Arc<Told>,
}

/// What the gate told its driver and the driver has not looked at yet.
#[derive(Default)]
struct Told {
    waiting: AtomicBool,
    full: AtomicBool,
}

struct Listener(Arc<Told>);

impl OutputListener for Listener {
    fn output_waiting(&self) {
        self.0.waiting.store(true, Relaxed);
    }

    fn output_full(&self) {
        self.0.full.store(true, Relaxed);
    }
}

struct Port(Arc<Mutex<Vec<u64>>>);

impl PacketPort for Port {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let number = <[u8; 8]>::try_from(frame).map_err(|_| io::ErrorKind::InvalidData)?;
        if let Ok(mut left) = self.0.lock() {
            left.push(u64::from_le_bytes(number));
        }
        Ok(())
    }

    fn recv(&self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn as_raw_fd(&self) -> RawFd {
        -1
    }
}

impl Output {
    /// A closed gate that holds at most `packets_max` packets.
    pub fn new(packets_max: usize) -> Output {
        let left = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::new(Told::default());
        let buffer = OutputBuffer::new(Limits { bytes_max: 1 << 20, packets_max });
        let gate = OutputGate::new(Box::new(Port(left.clone())), buffer, Box::new(Listener(told.clone())), || 0);
        Output { gate, left, told }
    }

    /// The guest sends packet `number`; false if the gate has no room.
    pub fn transmit(&self, number: u64) -> bool {
        self.gate.transmit(&number.to_le_bytes()) == Transmit::Accepted
    }

    pub fn cut(&self, output: OutputCut, epoch: u64) {
        match output {
            OutputCut::Pass => {}
            OutputCut::Hold => self.gate.hold(),
            OutputCut::Seal => self.gate.seal(epoch),
        }
    }

    /// True if the release was finished; `may` is asked before each packet.
    pub fn release(&self, through: u64, may: impl FnMut() -> bool) -> bool {
        self.gate.release(through, may) == ReleaseEnd::Done
    }

    pub fn pass(&self) {
        self.gate.pass();
    }

    pub fn close(&self) {
        self.gate.close();
    }

    pub fn has_open(&self) -> bool {
        self.gate.open_packets() > 0
    }

    /// What left since the last look.
    pub fn take_left(&self) -> Vec<u64> {
        self.left.lock().map(|mut left| std::mem::take(&mut *left)).unwrap_or_default()
    }

    /// True once if the open epoch has got its first packet.
    pub fn take_waiting(&self) -> bool {
        self.told.waiting.swap(false, Relaxed)
    }

    /// True once if a packet was turned away.
    pub fn take_full(&self) -> bool {
        self.told.full.swap(false, Relaxed)
    }
}
