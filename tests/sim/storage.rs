//! Storage that the hosts share, and what each node does with it: the real rules of what is held,
//! kept and written, against one row of blocks with version numbers. What a host has in its page
//! cache is there for itself, and lost with it.

use std::collections::BTreeMap;

use mcd::protocol::primary;
use mcd::protocol::record::RecordState;
use mcd::protocol::secondary;
use mcd::protocol::shared_disk::{FlushTarget, HeldWrites, KeptWrites, Layer};
use mcd::protocol::types::ConnId;
use mcd::protocol::types::EpochId;
use mcd::protocol::types::StorageFault;

use crate::net::ProcId;
use crate::node::{AnyPhase, In};
use crate::world::{Event, World};

/// Blocks and the versions in them.
pub type Blocks = BTreeMap<u64, u64>;

/// What one epoch wrote.
#[derive(Clone, Debug, Default)]
pub struct Written(pub Blocks);

impl Layer for Written {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn add_older(&mut self, older: Written) {
        for (block, version) in older.0 {
            self.0.entry(block).or_insert(version);
        }
    }
}

/// The storage itself.
#[derive(Debug, Default)]
pub struct Storage {
    pub blocks: Vec<u64>,
    /// Who may write. Of a block device each host has a lock of its own.
    locks: Vec<Option<ProcId>>,
    /// The lock that counts on each host.
    lock_of: Vec<usize>,
    /// The versions that a flush vouched for.
    vouched: Vec<u64>,
}

impl Storage {
    /// Of `blocks` blocks, for as many hosts as there are `slots`.
    pub fn new(blocks: u64, slots: usize, device: bool) -> Storage {
        let empty = vec![0; blocks as usize];
        let lock_of = (0..slots).map(|slot| if device { slot } else { 0 }).collect();
        Storage { blocks: empty.clone(), locks: vec![None; slots], lock_of, vouched: empty }
    }

    fn lock(&mut self, slot: usize) -> &mut Option<ProcId> {
        &mut self.locks[self.lock_of[slot]]
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Closed,
    Pass,
    Hold,
}

/// What the writing thread does at once.
#[derive(Debug)]
struct Batch {
    blocks: Vec<(u64, u64)>,
    /// Its newest layer, if it has any.
    through: Option<u64>,
    /// Who waits for the sync.
    sync_for: Option<ConnId>,
}

/// A node's side of it.
#[derive(Debug, Default)]
pub struct Disk {
    held: HeldWrites<Written>,
    mode: Mode,
    /// Written through while alone, and not synced yet.
    cache: Blocks,
    sync_for: Option<ConnId>,
    /// The batch under way.
    writing: Option<Batch>,
    /// A flush the guest waits for, and what it vouches for.
    flush: Option<(FlushTarget, Vec<u64>)>,
    pub kept: KeptWrites<Vec<(u64, u64)>>,
}

impl Disk {
    fn due(&self) -> Vec<(u64, u64)> {
        self.held.due().flat_map(|(_, layer)| layer.0.iter().map(|(block, version)| (*block, *version))).collect()
    }

    pub fn cut(&mut self, id: EpochId) -> Vec<(u64, u64)> {
        self.held.cut(id).0.iter().map(|(block, version)| (*block, *version)).collect()
    }

    /// A secondary's: keeps the blocks of a committed epoch, and gives back its pages of memory.
    pub fn keep(&mut self, id: EpochId, pages: Vec<(u64, u64)>, memory_pages: u64) -> Vec<(u64, u64)> {
        let (memory, blocks): (Vec<_>, Vec<_>) = pages.into_iter().partition(|(page, _)| *page < memory_pages);
        if !blocks.is_empty() {
            let blocks = blocks.into_iter().map(|(page, version)| (page - memory_pages, version)).collect();
            self.kept.keep(id, blocks);
        }
        memory
    }

    pub fn put_back(&mut self) {
        self.held.put_back();
    }

    pub fn committed(&mut self, id: EpochId) {
        self.held.committed(id);
    }

    fn newest(&self, block: u64) -> Option<u64> {
        let held = self.held.newest_first().find_map(|layer| layer.0.get(&block));
        held.or_else(|| self.cache.get(&block)).copied()
    }
}

impl World {
    // ---- the guest ----

    /// The guest reads its disk, writes to it, and now and then waits for a flush.
    pub fn use_disk(&mut self, proc: ProcId) {
        if self.plan.blocks == 0 {
            return;
        }
        self.read_disk(proc);
        for _ in 0..self.rng.below(3) {
            let block = self.rng.below(self.plan.blocks);
            self.versions += 1;
            let version = self.versions;
            let disk = &mut self.procs[proc].disk;
            match disk.mode {
                Mode::Hold => drop(disk.held.open().0.insert(block, version)),
                // What is held goes first.
                Mode::Pass if disk.held.is_empty() => drop(disk.cache.insert(block, version)),
                Mode::Pass | Mode::Closed => continue,
            }
            if let Some(guest) = &mut self.procs[proc].guest {
                guest.blocks[block as usize] = version;
            }
        }
        if self.rng.chance(100) {
            self.flush(proc);
        }
    }

    fn read_disk(&mut self, proc: ProcId) {
        let node = &self.procs[proc];
        let Some(guest) = &node.guest else { return };
        for (block, expected) in (0..).zip(&guest.blocks) {
            let seen = node.disk.newest(block).unwrap_or(self.storage.blocks[block as usize]);
            if seen != *expected {
                let (slot, expected) = (node.slot, *expected);
                let why = format!("disk: the guest on n{slot} reads version {seen} of block {block}, not {expected}");
                return self.violate(why);
            }
        }
    }

    fn flush(&mut self, proc: ProcId) {
        let node = &mut self.procs[proc];
        let Some(guest) = &node.guest else { return };
        let blocks = guest.blocks.clone();
        match node.disk.held.flush_target() {
            _ if node.disk.flush.is_some() => {}
            None => {
                self.sync(proc);
                self.vouch(&blocks);
            }
            Some(target) => {
                node.disk.flush = Some((target, blocks));
                if target.needs_cut {
                    node.inbox.push_back(In::Primary(primary::Input::JournalFull));
                }
            }
        }
    }

    fn vouch(&mut self, blocks: &[u64]) {
        for (vouched, version) in self.storage.vouched.iter_mut().zip(blocks) {
            *vouched = (*vouched).max(*version);
        }
        self.check_vouched();
    }

    /// What was flushed never goes back.
    fn check_vouched(&mut self) {
        let all = (0..).zip(self.storage.blocks.iter().zip(&self.storage.vouched));
        let lost: Option<(u64, u64, u64)> =
            all.map(|(block, (there, vouched))| (block, *there, *vouched)).find(|(_, there, vouched)| there < vouched);
        if let Some((block, there, vouched)) = lost {
            self.violate(format!("disk: version {vouched} of block {block} was flushed, and the storage has {there}"));
        }
    }

    // ---- the primary ----

    pub fn hold_writes(&mut self, proc: ProcId, conn: ConnId) {
        let disk = &mut self.procs[proc].disk;
        (disk.mode, disk.sync_for) = (Mode::Hold, Some(conn));
        self.kick_writer(proc);
    }

    pub fn pass_writes(&mut self, proc: ProcId) {
        let disk = &mut self.procs[proc].disk;
        disk.held.alone();
        (disk.mode, disk.sync_for) = (Mode::Pass, None);
        self.kick_writer(proc);
    }

    pub fn write_through(&mut self, proc: ProcId, through: EpochId) {
        self.procs[proc].disk.held.may_go(through);
        self.kick_writer(proc);
    }

    /// The node is fenced: what is under way ends, and then the lock is free.
    pub fn close_disk(&mut self, proc: ProcId) {
        let disk = &mut self.procs[proc].disk;
        disk.held.discard();
        disk.mode = Mode::Closed;
        if disk.writing.is_none() {
            self.unlock(proc);
        }
    }

    fn kick_writer(&mut self, proc: ProcId) {
        let disk = &mut self.procs[proc].disk;
        if disk.writing.is_some() || disk.mode == Mode::Closed || self.plan.blocks == 0 {
            return;
        }
        let through = disk.held.due().map(|(number, _)| number).max();
        if through.is_none() && disk.sync_for.is_none() {
            return;
        }
        disk.writing = Some(Batch { blocks: disk.due(), through, sync_for: disk.sync_for });
        let us = self.takes(self.plan.storage_us);
        self.after(us, Event::DiskWritten(proc));
    }

    /// The writing thread's batch is in the storage, and synced.
    pub fn disk_written(&mut self, proc: ProcId) {
        let node = &self.procs[proc];
        if !node.alive {
            return;
        }
        if self.now < node.paused_until {
            // It is frozen too, in the middle of it.
            return self.at(node.paused_until, Event::DiskWritten(proc));
        }
        let Some(Batch { blocks, through, sync_for }) = self.procs[proc].disk.writing.take() else { return };
        self.sync(proc);
        for (block, version) in blocks {
            self.store(proc, block, version);
        }
        let node = &mut self.procs[proc];
        if node.disk.mode == Mode::Closed {
            return self.unlock(proc);
        }
        if let Some(through) = through.and_then(|through| node.disk.held.written(through)) {
            node.inbox.push_back(In::Primary(primary::Input::Written { through }));
        }
        if let Some(conn) = node.disk.sync_for.take_if(|conn| Some(*conn) == sync_for) {
            node.inbox.push_back(In::Primary(primary::Input::StorageSynced { conn }));
        }
        let held = &node.disk.held;
        if let Some((_, blocks)) = node.disk.flush.take_if(|(target, _)| held.is_flushed(*target)) {
            self.vouch(&blocks);
        }
        self.kick_writer(proc);
        self.drive(proc);
    }

    /// What the host has in its cache is in the storage.
    fn sync(&mut self, proc: ProcId) {
        for (block, version) in std::mem::take(&mut self.procs[proc].disk.cache) {
            self.store(proc, block, version);
        }
    }

    fn store(&mut self, proc: ProcId, block: u64, version: u64) {
        let (slot, me) = (self.procs[proc].slot, self.procs[proc].me);
        let locked = *self.storage.lock(slot) == Some(proc);
        let there = &mut self.storage.blocks[block as usize];
        let alone = self.arbiter.record.is_some_and(|record| record.owner == me && record.state != RecordState::Paired);
        if !locked {
            self.violate(format!("disk: n{slot} writes block {block} without the lock"));
        } else if version < *there {
            let there = *there;
            self.violate(format!("disk: n{slot} writes version {version} of block {block} over {there}"));
        } else if !alone && !self.plan.recordless && !self.model.has_committed(block, version) {
            self.violate(format!("disk: n{slot} writes version {version} of block {block}, which nobody committed"));
        } else {
            *there = version;
        }
    }

    fn unlock(&mut self, proc: ProcId) {
        self.storage.lock(self.procs[proc].slot).take_if(|holder| *holder == proc);
    }

    // ---- beginnings and ends ----

    /// True while another process that runs has the lock.
    pub fn is_locked_out(&self, proc: ProcId) -> bool {
        let holder = self.storage.locks[self.storage.lock_of[self.procs[proc].slot]];
        holder.is_some_and(|holder| holder != proc && self.procs[holder].alive)
    }

    /// A node starts the guest: whoever else has the lock is switched off by the one who starts it.
    pub fn take_disk(&mut self, proc: ProcId) {
        for holder in self.storage.locks.clone().into_iter().flatten().filter(|holder| *holder != proc) {
            self.end(holder);
        }
        *self.storage.lock(self.procs[proc].slot) = Some(proc);
        self.mount_disk(proc);
    }

    /// The guest finds its disk as the storage is.
    pub fn mount_disk(&mut self, proc: ProcId) {
        self.check_vouched();
        let blocks = self.storage.blocks.clone();
        let node = &mut self.procs[proc];
        node.disk = Disk { mode: Mode::Pass, ..Disk::default() };
        if let Some(guest) = &mut node.guest {
            guest.blocks = blocks;
        }
    }

    /// The process ends, and with it its lock. In order, all that may go out has gone; of a write
    /// that was under way anything may be there; what its host has cached is written, if the host
    /// lives.
    pub fn drop_disk(&mut self, proc: ProcId, host_lives: bool) {
        let stopping = self.procs[proc].phase == AnyPhase::Primary(primary::Phase::Stopping);
        let under_way = self.procs[proc].disk.writing.take().map(|batch| batch.blocks).unwrap_or_default();
        let holds_lock = *self.storage.lock(self.procs[proc].slot) == Some(proc);
        if holds_lock && host_lives {
            self.sync(proc);
        }
        for (block, version) in under_way {
            if holds_lock && (stopping || self.rng.chance(500)) && version > self.storage.blocks[block as usize] {
                self.store(proc, block, version);
            }
        }
        self.procs[proc].disk = Disk::default();
        self.unlock(proc);
    }

    // ---- the new primary ----

    pub fn take_storage(&mut self, proc: ProcId) {
        let input = match self.storage.lock(self.procs[proc].slot) {
            Some(holder) if *holder != proc => secondary::Input::StorageRefused(StorageFault::Locked("in use".into())),
            lock => {
                *lock = Some(proc);
                secondary::Input::StorageLocked
            }
        };
        self.note(proc, || format!("tries the lock: {input:?}"));
        self.procs[proc].urgent.push_back(In::Secondary(input));
    }

    pub fn write_kept(&mut self, proc: ProcId) {
        let kept: Vec<(u64, u64)> = self.procs[proc].disk.kept.newest_first().flatten().copied().collect();
        let mut newest = Blocks::new();
        for (block, version) in kept {
            newest.entry(block).or_insert(version);
        }
        for (block, version) in newest {
            self.store(proc, block, version);
        }
        self.arrive(proc, In::Secondary(secondary::Input::KeptWritten));
    }
}
