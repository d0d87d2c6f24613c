//! A guest of two pages and a counter: each step writes a page and sends the packet of that number.

/// Pages of guest memory.
pub const PAGES: usize = 2;

/// All of guest memory; each page holds which generation wrote it last, and the number of the
/// packet it was written with.
pub type Pages = [u16; PAGES];

/// A page by its index.
pub type Page = (u64, u16);

/// What an image is before anything arrived.
pub const HOLES: Pages = [u16::MAX; PAGES];

#[derive(Clone, Debug, PartialEq, Hash)]
pub struct Guest {
    pub pages: Pages,
    /// The number of the next packet.
    pub counter: u8,
    /// The generation it was started in here.
    pub life: u8,
    pub runs: bool,
    pub tracking: bool,
    pub dirty: [bool; PAGES],
}

impl Guest {
    pub fn new(pages: Pages, counter: u8, life: u8) -> Guest {
        Guest { pages, counter, life, runs: true, tracking: false, dirty: [false; PAGES] }
    }

    /// Writes a page and says the number of the packet to send.
    pub fn step(&mut self) -> u8 {
        let number = self.counter;
        let page = usize::from(number) % PAGES;
        self.pages[page] = (u16::from(self.life) << 8) | (u16::from(number) + 1);
        self.dirty[page] |= self.tracking;
        self.counter += 1;
        number
    }

    /// The dirty pages since the last look; reading clears it.
    pub fn take_dirty(&mut self) -> Vec<Page> {
        let dirty = std::mem::take(&mut self.dirty);
        (0..PAGES).filter(|page| dirty[*page]).map(|page| (page as u64, self.pages[page])).collect()
    }

    pub fn put_back(&mut self, dirty: &[Page]) {
        for (page, _) in dirty {
            self.dirty[*page as usize] = true;
        }
    }
}

/// What holds packets back.
#[derive(Clone, Debug, Default, PartialEq, Hash)]
pub struct Output {
    pub holds: bool,
    pub open: Vec<u8>,
    pub sealed: Vec<(u64, Vec<u8>)>,
    /// The driver was told that output waits in the open epoch.
    pub told: bool,
    /// The driver is to be told.
    pub tell: bool,
}

impl Output {
    pub fn seal(&mut self, epoch: u64) {
        let open = std::mem::take(&mut self.open);
        if !open.is_empty() {
            self.sealed.push((epoch, open));
        }
        self.told = false;
        self.tell = false;
    }

    pub fn take_through(&mut self, epoch: u64) -> Vec<u8> {
        let (out, stays): (Vec<_>, Vec<_>) = self.sealed.drain(..).partition(|(sealed, _)| *sealed <= epoch);
        self.sealed = stays;
        out.into_iter().flat_map(|(_, packets)| packets).collect()
    }

    /// Everything, and from now on nothing is held.
    pub fn take_all(&mut self) -> Vec<u8> {
        let mut packets = self.take_through(u64::MAX);
        packets.append(&mut self.open);
        *self = Output::default();
        packets
    }

    pub fn is_empty(&self) -> bool {
        self.open.is_empty() && self.sealed.is_empty()
    }
}
