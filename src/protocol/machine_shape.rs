//! What a machine is made of: all that a newcomer must know to build one like it.

/// The shape of a machine: all that a newcomer must know to build one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MachineShape {
    /// Guest memory, in bytes, a multiple of the page size.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u8,
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// Its disks, in the order in which the guest finds them; at most [`DISKS_MAX`].
    pub disks: Vec<DiskShape>,
    /// The guest has a source of random bytes (virtio-rng).
    pub rng: bool,
}

/// Most bytes that wait for their commit in the journal of a machine's disks, all of them together;
/// a block counts with what it takes beside its content. (A single write that is larger is taken
/// when nothing else is there.)
pub const JOURNAL_BYTES_MAX: u64 = 64 << 20;

/// Most disks a machine may have.
pub const DISKS_MAX: usize = 6;
/// Bytes of a disk's sector: a disk's size is a multiple of it.
pub const SECTOR_BYTES: u64 = 512;

/// The shape of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DiskShape {
    /// Its size in bytes: a multiple of [`SECTOR_BYTES`], not 0.
    pub bytes: u64,
    /// The guest can only read it.
    pub read_only: bool,
    /// Both nodes use the same storage for it (see [`shared`](super::shared_disk)); never with
    /// `read_only`.
    pub shared: bool,
    /// The serial number the guest sees: text, filled up with zero bytes.
    pub serial: [u8; 20],
}

impl DiskShape {
    /// True if a disk can be like this.
    pub fn is_possible(&self) -> bool {
        self.bytes != 0 && self.bytes.is_multiple_of(SECTOR_BYTES) && !(self.shared && self.read_only)
    }
}

impl MachineShape {
    /// A machine without disks and without a source of random bytes.
    pub fn bare(memory_bytes: u64, cpus: u8, mac: [u8; 6]) -> MachineShape {
        MachineShape { memory_bytes, cpus, mac, disks: Vec::new(), rng: false }
    }

    /// The most bytes one epoch of this machine can take in staging memory: every page raw with its
    /// record header, the machine's state, and what its disks' journal holds.
    pub fn epoch_bytes_max(&self) -> u64 {
        const STATE_BYTES_MAX: u64 = 1 << 20;
        let headers = self.memory_bytes / 256;
        // Replicated disks have one journal, shared ones another: what of it is kept until it is
        // written, and what travels.
        let replicated = self.disks.iter().any(|disk| !disk.read_only && !disk.shared);
        let journal = (u64::from(replicated) + u64::from(self.shares_storage())) * JOURNAL_BYTES_MAX;
        let state = STATE_BYTES_MAX * (1 + u64::from(self.cpus));
        self.memory_bytes.saturating_add(headers).saturating_add(journal).saturating_add(state)
    }
}
