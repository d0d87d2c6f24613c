//! The guest of the simulator: pages with version numbers, packets with numbers, and the queue that holds them.

use std::collections::VecDeque;
use std::rc::Rc;

use mcd::protocol::pages::PageSet;

/// Marks a page that was read while the guest wrote it: no image may ever keep one.
pub const TORN: u64 = 1 << 63;

/// What a capture saves, and what a takeover goes on from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub pages: Rc<[u64]>,
    /// The number of the next packet the guest will send.
    pub counter: u64,
    /// Which start of the guest this is: a cold start begins another life.
    pub life: u64,
}

/// A guest in memory.
#[derive(Clone, Debug)]
pub struct Guest {
    pub pages: Vec<u64>,
    pub counter: u64,
    pub life: u64,
    pub tracking: bool,
    pub dirt: PageSet,
    pub runs: bool,
    pub shut_down: bool,
}

impl Guest {
    pub fn fresh(pages: u64, life: u64) -> Guest {
        Guest {
            pages: vec![0; pages as usize],
            counter: 0,
            life,
            tracking: false,
            dirt: PageSet::empty(pages),
            runs: true,
            shut_down: false,
        }
    }

    pub fn restored(pages: Vec<u64>, counter: u64, life: u64) -> Guest {
        Guest { pages, counter, ..Guest::fresh(0, life) }.with_dirt()
    }

    fn with_dirt(mut self) -> Guest {
        self.dirt = PageSet::empty(self.pages.len() as u64);
        self
    }

    pub fn write(&mut self, page: u64, version: u64) {
        self.pages[page as usize] = version;
        if self.tracking {
            self.dirt.insert(page);
        }
    }

    pub fn snapshot(&self) -> Snapshot {
        Snapshot { pages: self.pages.as_slice().into(), counter: self.counter, life: self.life }
    }

    /// The dirt since the last look; reading clears it.
    pub fn take_dirt(&mut self) -> PageSet {
        std::mem::replace(&mut self.dirt, PageSet::empty(self.pages.len() as u64))
    }
}

/// The output of one node.
#[derive(Debug, Default)]
pub struct Output {
    pub holds: bool,
    sealed: VecDeque<(u64, VecDeque<u64>)>,
    open: VecDeque<u64>,
    held: usize,
    pub told_waiting: bool,
    pub told_full: bool,
}

impl Output {
    /// Begins to hold; what comes from now on waits for its epoch.
    pub fn hold(&mut self) {
        self.holds = true;
    }

    pub fn held(&self) -> usize {
        self.held
    }

    pub fn push(&mut self, packet: u64) {
        self.open.push_back(packet);
        self.held += 1;
    }

    pub fn seal(&mut self, epoch: u64) {
        self.told_waiting = false;
        let open = std::mem::take(&mut self.open);
        if !open.is_empty() {
            self.sealed.push_back((epoch, open));
        }
    }

    /// Takes the packets of epochs up to `through`, in order.
    pub fn take_through(&mut self, through: u64) -> Vec<u64> {
        let mut out = Vec::new();
        while self.sealed.front().is_some_and(|(epoch, _)| *epoch <= through) {
            if let Some((_, packets)) = self.sealed.pop_front() {
                out.extend(packets);
            }
        }
        self.held -= out.len();
        out
    }

    /// Takes everything and holds no longer.
    pub fn take_all(&mut self) -> Vec<u64> {
        let mut out = self.take_through(u64::MAX);
        out.extend(std::mem::take(&mut self.open));
        self.held = 0;
        self.holds = false;
        self.told_waiting = false;
        out
    }

    pub fn discard(&mut self) {
        *self = Output::default();
    }
}
