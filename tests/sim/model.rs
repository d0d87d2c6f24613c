//! The trivial model: what was captured, committed, activated and released, and whether that keeps
//! the invariants.

use std::collections::{BTreeMap, BTreeSet};

use mcd::protocol::record::{Record, RecordState};
use mcd::protocol::types::{EpochId, Generation, InstanceId};

use crate::arbiter::Arbiter;
use crate::guest::{Snapshot, TORN};

/// What a node holds of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Holding {
    pub epoch: EpochId,
    /// Packets below this number were sent before the epoch ended.
    pub counter: u64,
    pub life: u64,
    /// The image has no holes.
    pub whole: bool,
}

/// What one node released.
#[derive(Clone, Copy, Debug)]
struct Releases {
    next: u64,
    life: u64,
}

#[derive(Debug, Default)]
pub struct Model {
    snapshots: BTreeMap<EpochId, Snapshot>,
    pub holdings: BTreeMap<InstanceId, Holding>,
    releases: BTreeMap<InstanceId, Releases>,
    names: BTreeSet<InstanceId>,
    releasers: BTreeMap<Generation, InstanceId>,
    /// The first packet that was not yet released, per life.
    released: BTreeMap<u64, u64>,
    /// At each takeover on record: generation, life, and the counter the guest goes on from.
    floors: Vec<(Generation, u64, u64)>,
    pub life: u64,
    /// When the record last went to another owner.
    pub owner_since_us: u64,
    pub packets: u64,
    pub takeovers: u64,
    pub late_releases: u64,
    /// The longest after a swap that an old owner released something.
    pub latest_release_us: u64,
    pub late_us_max: u64,
    /// The nodes keep their records themselves.
    pub recordless: bool,
}

type Check = Result<(), String>;

impl Model {
    /// A node begins a life with nothing: under a name that held an image once, it could be given
    /// the guest.
    pub fn lives(&mut self, me: InstanceId) -> Check {
        if self.names.insert(me) { Ok(()) } else { Err(format!("I2: instance id {me:?} is used for a second life")) }
    }

    /// `me` runs the guest from packet number `counter` on.
    pub fn runs(&mut self, me: InstanceId, life: u64, counter: u64) {
        self.releases.insert(me, Releases { next: counter, life });
    }

    pub fn captured(&mut self, id: EpochId, snapshot: Snapshot) -> Check {
        match self.snapshots.insert(id, snapshot) {
            None => Ok(()),
            // What a node that was switched off captured under the same name, nobody ever
            // committed; see `swapped`.
            Some(_) if self.recordless && !self.holdings.values().any(|holding| holding.epoch == id) => Ok(()),
            Some(_) => Err(format!("I2: epoch {id} was captured twice")),
        }
    }

    fn snapshot(&self, id: EpochId) -> Result<&Snapshot, String> {
        self.snapshots.get(&id).ok_or_else(|| format!("I2: nobody captured epoch {id}"))
    }

    /// A node committed an epoch.
    pub fn committed(&mut self, me: InstanceId, id: EpochId, completes: bool) -> Check {
        let snapshot = self.snapshot(id)?;
        let whole = completes || self.holdings.get(&me).is_some_and(|holding| holding.whole);
        let holding = Holding { epoch: id, counter: snapshot.counter, life: snapshot.life, whole };
        self.holdings.insert(me, holding);
        Ok(())
    }

    /// The record changed from `old` to `new`.
    pub fn swapped(&mut self, now_us: u64, old: Record, new: Record) -> Check {
        // Without a shared record a new primary that has not heard of its pair counts from the
        // record before; the old owner is off by then.
        let unheard = self.recordless && new.generation == old.generation && old.peer == Some(new.owner);
        if new.generation != old.generation.next() && !unheard {
            return Err(format!("the swap from {} to {} skips", old.generation, new.generation));
        }
        if new.state == RecordState::Paired {
            let Some(peer) = new.peer else { return Err("a pair of one is on record".into()) };
            if !self.holdings.get(&peer).is_some_and(|holding| holding.whole) {
                return Err(format!("I2: {peer:?} is on record as peer, but its image is not whole"));
            }
        }
        if new.owner != old.owner {
            let Some(holding) = self.holdings.get(&new.owner) else {
                return Err(format!("I2: {:?} took over with nothing", new.owner));
            };
            if !Model::may_take_over(holding, new.owner, old) {
                return Err(format!("I3: {:?} took over, but is neither on record as peer nor about to be", new.owner));
            }
            self.floors.push((new.generation, holding.life, holding.counter));
            self.owner_since_us = now_us;
            let released = self.released.get(&holding.life).copied().unwrap_or(0);
            if released > holding.counter {
                return Err(format!(
                    "I1: packet {} is out, but {:?} takes over from packet {}",
                    released - 1,
                    new.owner,
                    holding.counter
                ));
            }
        }
        Ok(())
    }

    /// True for the peer on record, and for a newcomer that became whole under the very record its
    /// primary runs alone with: that primary has to hold its output until another record stands.
    /// Whether it did, I1 says.
    pub fn may_take_over(holding: &Holding, who: InstanceId, record: Record) -> bool {
        holding.whole
            && match record.state {
                RecordState::Paired => record.peer == Some(who),
                RecordState::Solo => holding.epoch.generation == record.generation,
                RecordState::Stopped => false,
            }
    }

    /// `me` restores `epoch` from its image.
    pub fn activated(
        &mut self,
        me: InstanceId,
        epoch: EpochId,
        (image, storage): (&[u64], &[u64]),
        counter: u64,
    ) -> Check {
        self.takeovers += 1;
        let Some(holding) = self.holdings.get(&me).copied() else {
            return Err(format!("I2: {me:?} activates {epoch}, but committed nothing"));
        };
        if holding.epoch != epoch || !holding.whole {
            return Err(format!("I2: {me:?} activates {epoch}, its newest is {holding:?}"));
        }
        let snapshot = self.snapshot(epoch)?;
        if counter != snapshot.counter {
            return Err(format!("I2: state of {epoch} says packet {counter}, not {}", snapshot.counter));
        }
        if let Some(page) = (0..image.len()).find(|i| image[*i] != snapshot.pages[*i]) {
            let (have, want) = (image[page], snapshot.pages[page]);
            let torn = if have & TORN != 0 { " (torn)" } else { "" };
            return Err(format!("I5: page {page} of {epoch} is at version {}{torn}, not {want}", have & !TORN));
        }
        if *storage != *snapshot.blocks {
            return Err(format!(
                "disk: {me:?} activates {epoch} with {storage:?} in the storage, not {:?}",
                snapshot.blocks
            ));
        }
        self.runs(me, snapshot.life, counter);
        Ok(())
    }

    /// True if some node holds an epoch with this version of a block, or a newer one.
    pub fn has_committed(&self, block: u64, version: u64) -> bool {
        let newest = |holding: &Holding| self.snapshots.get(&holding.epoch)?.blocks.get(block as usize).copied();
        self.holdings.values().filter_map(newest).any(|newest| newest >= version)
    }

    /// `me`, which believes to run in `generation`, lets packet `number` out.
    pub fn released(
        &mut self,
        now_us: u64,
        me: InstanceId,
        generation: Generation,
        number: u64,
        arbiter: &Arbiter,
    ) -> Check {
        self.packets += 1;
        if arbiter.owners.get(&generation) != Some(&me) {
            return Err(format!("I3: {me:?} releases in {generation}, which it never owned"));
        }
        if *self.releasers.entry(generation).or_insert(me) != me {
            return Err(format!("I3: two nodes release in {generation}"));
        }
        let Some(mine) = self.releases.get_mut(&me) else {
            return Err(format!("I3: {me:?} releases without running the guest"));
        };
        if mine.next != number {
            return Err(format!("I4: {me:?} releases packet {number}, not {}", mine.next));
        }
        mine.next = number + 1;
        let life = mine.life;
        let floor = self.floors.iter().find(|(at, of, first)| *at > generation && *of == life && number >= *first);
        if let Some((at, _, first)) = floor {
            return Err(format!("I1: {me:?} releases packet {number}; {at} went on from {first}"));
        }
        let released = self.released.entry(life).or_insert(0);
        *released = (*released).max(number + 1);
        match arbiter.record {
            Some(Record { state: RecordState::Paired, owner, peer: Some(peer), .. }) if owner == me => {
                let counter = self.holdings.get(&peer).map_or(0, |holding| holding.counter);
                if number >= counter {
                    return Err(format!(
                        "I1: {me:?} releases packet {number}; its peer has {counter} packets committed"
                    ));
                }
                Ok(())
            }
            Some(Record { owner, .. }) if owner == me => Ok(()),
            Some(_) => self.released_late(now_us, me),
            None => Err("I3: a release without a record".into()),
        }
    }

    /// The guest went to another node, but what its old one releases is committed there: right for
    /// a short while, as long as the old one cannot know. After that it must have fallen silent,
    /// acked or not.
    fn released_late(&mut self, now_us: u64, me: InstanceId) -> Check {
        self.late_releases += 1;
        let late_us = now_us - self.owner_since_us;
        self.latest_release_us = self.latest_release_us.max(late_us);
        if late_us > self.late_us_max {
            return Err(format!(
                "I3: {me:?} still releases {} ms after the guest went to another node",
                late_us / 1000
            ));
        }
        Ok(())
    }
}
