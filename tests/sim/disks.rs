//! Disks of which each host has an image of its own. An image outlives the processes of its host,
//! and what a newcomer finds in it is compared with the primary's: the hashes of blocks, asked for
//! and answered while the guest writes on.

use std::ops::Range;

use mcd::protocol::block_hashes::{BlockHash, HASH_BYTES};
use mcd::protocol::command::{Command, DiskChoice};
use mcd::protocol::event::Event as Told;
use mcd::protocol::mutant;
use mcd::protocol::primary;
use mcd::protocol::types::{EpochId, InstanceId};

use crate::guest::TORN;
use crate::net::ProcId;
use crate::node::{In, Role};
use crate::plan::Plan;
use crate::rng::Rng;
use crate::world::{Event, World};

/// The sum of a block of this version: as good as a hash, for no two versions share one.
fn sum_of(version: u64) -> BlockHash {
    let mut sum = [0; HASH_BYTES];
    sum[..8].copy_from_slice(&version.to_le_bytes());
    sum
}

/// The images of a host's disks: their blocks in one row, and which of them are there.
#[derive(Clone, Debug)]
pub struct HostDisks {
    blocks: Vec<u64>,
    there: Vec<bool>,
}

impl HostDisks {
    /// What lay there before the world began: nothing, or something of which the other hosts have
    /// more or less the same.
    pub fn draw(plan: &Plan, rng: &mut Rng) -> HostDisks {
        let count = plan.pages - plan.memory;
        let known = rng.below(1000);
        let block = |number| if rng.chance(known) { number % 5 } else { rng.below(50) };
        let blocks = (0..count).map(block).collect();
        HostDisks { blocks, there: plan.own.iter().map(|_| rng.chance(600)).collect() }
    }
}

/// A run of blocks that a cut freezes, and what they were then.
#[derive(Debug)]
pub struct Frozen {
    run: Range<u64>,
    at: Option<(EpochId, Vec<u64>)>,
}

impl Frozen {
    pub fn at_the_next_cut(run: Range<u64>) -> Frozen {
        Frozen { run, at: None }
    }

    /// Epoch `id` of a guest with these pages is cut.
    pub fn cut(&mut self, id: EpochId, pages: &[u64]) {
        let run = self.run.start as usize..self.run.end as usize;
        self.at.get_or_insert_with(|| (id, pages[run].to_vec()));
    }
}

/// A primary's question for the hashes of its own blocks.
#[derive(Clone, Debug)]
pub struct Question {
    pub ticket: u64,
    pub run: Range<u64>,
    pub as_of: Option<EpochId>,
}

impl World {
    // ---- the images ----

    /// The blocks of a host's disks, as one who opens them finds them, and which of the disks had
    /// to be made.
    pub fn find_disks(&mut self, slot: usize) -> (Vec<u64>, Vec<bool>) {
        let mut first = 0;
        for (disk, blocks) in self.plan.own.iter().enumerate() {
            let end = first + *blocks as usize;
            if !self.disks[slot].there[disk] {
                self.disks[slot].blocks[first..end].fill(0);
            }
            first = end;
        }
        let disks = &mut self.disks[slot];
        let made = disks.there.iter_mut().map(|there| !std::mem::replace(there, true)).collect();
        (disks.blocks.clone(), made)
    }

    /// A guest that starts anew goes on with its disks as they are.
    pub fn open_own_disks(&mut self, proc: ProcId) {
        let (blocks, _) = self.find_disks(self.procs[proc].slot);
        if let Some(guest) = &mut self.procs[proc].guest {
            guest.pages.truncate(self.plan.memory as usize);
            guest.pages.extend(blocks);
        }
    }

    /// This page of a process's image or guest is written: if it is a block of a disk, its host has
    /// it from now on.
    pub fn store_own(&mut self, proc: ProcId, page: u64, version: u64) {
        if let Some(block) = page.checked_sub(self.plan.memory) {
            let slot = self.procs[proc].slot;
            self.disks[slot].blocks[block as usize] = version;
        }
    }

    pub fn guest_writes(&mut self, proc: ProcId, page: u64, version: u64) {
        if let Some(guest) = &mut self.procs[proc].guest {
            guest.write(page, version);
            self.store_own(proc, page, version);
        }
    }

    /// A host dies, and the newest writes in its cache with it, in whatever order they would have
    /// gone out. Now and then a disk is lost.
    pub fn spoil_disks(&mut self, slot: usize) {
        let spoilt = self.rng.below(600);
        for block in 0..self.disks[slot].blocks.len() {
            if self.rng.chance(spoilt) {
                self.versions += 1;
                let other = self.rng.below(self.disks.len() as u64) as usize;
                let beside = self.rng.below(self.disks[slot].blocks.len() as u64) as usize;
                let versions =
                    [0, self.versions | TORN, self.disks[other].blocks[block], self.disks[slot].blocks[beside]];
                self.disks[slot].blocks[block] = *self.rng.pick(&versions);
            }
        }
        for disk in 0..self.plan.own.len() {
            let kept = !self.rng.chance(150);
            self.disks[slot].there[disk] &= kept;
        }
    }

    // ---- the primary's hashes ----

    /// A thread of the primary hashes its blocks, when it gets to it.
    pub fn ask_own_hashes(&mut self, proc: ProcId, question: Question) {
        let us = self.takes(self.plan.sum_us);
        self.after(us, Event::HashesRead(proc, question));
    }

    /// It has read them, and has its answer ready a while later.
    pub fn read_hashes(&mut self, proc: ProcId, question: Question) {
        if !self.procs[proc].alive || self.procs[proc].guest.is_none() {
            return;
        }
        if self.now < self.procs[proc].paused_until {
            // It is frozen too.
            return self.at(self.procs[proc].paused_until, Event::HashesRead(proc, question));
        }
        let Question { ticket, run, as_of } = question;
        let hashes = match as_of {
            // A resync goes on without what cannot be read just then.
            None if self.faults_over_since.is_none() && self.rng.chance(20) => Err("the storage is slow".into()),
            None => Ok(run.map(|block| sum_of(self.read_page(proc, block))).collect()),
            Some(epoch) => {
                let then =
                    self.procs[proc].frozen.take_if(|frozen| frozen.at.as_ref().is_some_and(|(at, _)| *at == epoch));
                match then {
                    Some(Frozen { run: of, at: Some((_, blocks)) }) if of == run => {
                        Ok(blocks.into_iter().map(sum_of).collect())
                    }
                    _ => Err(format!("blocks {run:?} are not frozen as of epoch {epoch}")),
                }
            }
        };
        let us = self.takes(self.plan.sum_us);
        self.after(us, Event::OwnHashes { proc, ticket, hashes });
    }

    pub fn own_hashes(&mut self, proc: ProcId, ticket: u64, hashes: Result<Vec<BlockHash>, String>) {
        let node = &mut self.procs[proc];
        if node.alive && node.is_primary() {
            self.arrive(proc, In::Primary(primary::Input::OwnHashes { ticket, hashes }));
            self.drive(proc);
        }
    }

    /// It finds blocks that nobody has written, and may stop half-way.
    pub fn find_holes(&mut self, proc: ProcId, ticket: u64, run: Range<u64>) {
        let through = if self.rng.chance(300) { self.rng.range(run.start, run.end) } else { run.end };
        let holes = (run.start..through).filter(|block| self.read_page(proc, *block) == 0);
        let holes = holes.map(|block| block..block + 1).collect();
        let us = self.takes(self.plan.sum_us);
        self.after(us, Event::Holes { proc, ticket, through, holes });
    }

    pub fn own_holes(&mut self, proc: ProcId, ticket: u64, through: u64, holes: Vec<Range<u64>>) {
        let node = &mut self.procs[proc];
        if node.alive && node.is_primary() {
            self.arrive(proc, In::Primary(primary::Input::Holes { ticket, through, holes }));
            self.drive(proc);
        }
    }

    // ---- the secondary's ----

    /// The blocks as they are with all that is committed, and nothing that comes later.
    pub fn sum_image(&mut self, proc: ProcId, run: Range<u64>) {
        let us = self.takes(self.plan.sum_us);
        let hashes = self.sums_of_image(proc, &run);
        let instance = self.procs[proc].me;
        self.after(us, Event::BlocksHashed { proc, instance, run, hashes });
    }

    fn sums_of_image(&self, proc: ProcId, run: &Range<u64>) -> Vec<BlockHash> {
        let blocks = self.procs[proc].image.get(run.start as usize..run.end as usize).unwrap_or_default();
        blocks.iter().map(|version| sum_of(*version)).collect()
    }

    pub fn hashed(&mut self, proc: ProcId, instance: InstanceId, run: Range<u64>, mut hashes: Vec<BlockHash>) {
        if mutant::is("hashed-behind-a-later-epoch") {
            hashes = self.sums_of_image(proc, &run);
        }
        let node = &mut self.procs[proc];
        if node.alive {
            self.arrive(proc, In::BlocksHashed { instance, first: run.start, hashes });
            self.drive(proc);
        }
    }

    // ---- the operator ----

    /// An operator verifies the disks of a pair, until the run is about to be over.
    pub fn verify_now_and_then(&mut self) {
        if !self.plan.verifies || self.protected_since.is_some_and(|(at, _)| self.now > at + 20_000) {
            return;
        }
        for slot in 0..self.slots.len() {
            let Some(proc) = self.slots[slot] else { continue };
            let Role::Primary(machine) = &self.procs[proc].role else { continue };
            if machine.check_verify(DiskChoice::All).is_ok() && self.rng.chance(400) {
                self.command(proc, Command::VerifyDisks(DiskChoice::All));
            }
        }
    }

    /// A verify is under way somewhere.
    pub fn is_verifying(&self) -> bool {
        let running = |role: &Role| match role {
            Role::Primary(machine) => machine.verify().is_some_and(|verify| verify.is_running()),
            _ => false,
        };
        self.procs.iter().any(|proc| proc.alive && running(&proc.role))
    }

    /// No disk here ever breaks: a verify has to find each block, and none different.
    pub fn mind_disks(&mut self, proc: ProcId, event: &Told) {
        let slot = self.procs[proc].slot;
        let all = self.plan.pages - self.plan.memory;
        match event {
            Told::DisksCompared { blocks, same } => {
                self.stats.blocks_compared += blocks;
                self.stats.blocks_same += same;
            }
            Told::DisksVerified { blocks, different: 0 } if *blocks == all => self.stats.verifies += 1,
            Told::DisksVerified { blocks, different } => {
                self.violate(format!("verify: n{slot} finds {different} of {blocks} blocks different, not 0 of {all}"));
            }
            Told::DisksNotVerified { why } if why.contains("cannot hash") => {
                self.violate(format!("verify: n{slot} cannot read what it froze: {why}"));
            }
            _ => {}
        }
    }
}
