//! What really happened, beside what the nodes believe; and the invariants, checked with every
//! step.

use mcd::protocol::record::{Record, RecordState};
use mcd::protocol::types::{EpochId, Generation, InstanceId};

use crate::guest::Pages;

/// What a node has committed.
#[derive(Clone, Debug, PartialEq, Hash)]
pub struct Holding {
    pub who: InstanceId,
    pub epoch: EpochId,
    /// Packets below this number were sent before the epoch ended.
    pub counter: u8,
    /// Memory as it was at the capture.
    pub oracle: Pages,
    /// With this epoch or one before it the image became whole.
    pub whole: bool,
}

/// A property that does not hold: which, and how.
#[derive(Clone, Debug, PartialEq, Hash)]
pub struct Broken {
    pub property: &'static str,
    pub how: String,
}

pub type Check = Result<(), Broken>;

pub const I1: &str = "I1 released only what is committed on the peer";
pub const I2: &str = "I2 activated is the newest committed whole epoch";
pub const I3: &str = "I3 one releaser per generation";
pub const I4: &str = "I4 in order, once";
pub const I5: &str = "I5 no lost dirty";
pub const I6: &str = "I6 the guest is not lost";
pub const RECORD: &str = "the record transitions by its rules";
pub const FENCED: &str = "a fenced node does nothing";
pub const STALLED: &str = "after a stall nothing leaves unproven";
pub const ONCE: &str = "one takeover per generation";

fn broken(property: &'static str, how: String) -> Check {
    Err(Broken { property, how })
}

/// The arbiter's record and all that followed from it.
#[derive(Clone, Debug, Hash)]
pub struct Oracle {
    pub record: Record,
    /// Who owned each generation, from the first on.
    owners: Vec<InstanceId>,
    releasers: Vec<Option<InstanceId>>,
    /// Generations in which somebody took over.
    taken: Vec<Generation>,
    /// At each takeover on record: the generation, and the packet the guest goes on from.
    floors: Vec<(Generation, u8)>,
    pub holdings: [Option<Holding>; 2],
    /// The next packet each node is to release.
    pub next: [u8; 2],
    /// The first packet that nobody released.
    released: u8,
}

impl Oracle {
    pub fn new(record: Record) -> Oracle {
        Oracle {
            record,
            owners: vec![record.owner],
            releasers: vec![None],
            taken: Vec::new(),
            floors: Vec::new(),
            holdings: [None, None],
            next: [0, 0],
            released: 0,
        }
    }

    fn owner(&self, generation: Generation) -> Option<InstanceId> {
        let at = usize::try_from(generation.0).ok()?.checked_sub(1)?;
        self.owners.get(at).copied()
    }

    /// True if `who` has committed anything.
    pub fn holds(&self, who: InstanceId) -> bool {
        self.held_by(who).is_some()
    }

    fn held_by(&self, who: InstanceId) -> Option<&Holding> {
        self.holdings.iter().flatten().find(|holding| holding.who == who)
    }

    /// The arbiter puts `new` in place of its record.
    pub fn swapped(&mut self, new: Record) -> Check {
        if new == self.record {
            return Ok(()); // a primary that asks whether the arbiter can write
        }
        let old = std::mem::replace(&mut self.record, new);
        self.owners.push(new.owner);
        self.releasers.push(None);
        if new.generation != old.generation.next() {
            return broken(RECORD, format!("{} follows {}", new.generation, old.generation));
        }
        if old.state == RecordState::Stopped {
            return broken(RECORD, format!("{:?} starts a guest that was shut down", new.owner));
        }
        match (new.state, new.peer) {
            (RecordState::Paired, Some(peer)) if new.owner == old.owner && old.state == RecordState::Solo => {
                if !self.held_by(peer).is_some_and(|holding| holding.whole) {
                    // A peer that is dead by now had it; a living one must have it.
                    return self.never_whole(peer);
                }
            }
            (RecordState::Solo | RecordState::Stopped, None) if new.owner == old.owner => {}
            (RecordState::Solo, None) if self.may_take_over(new.owner, old) => return self.taken_over(new),
            _ => return broken(RECORD, format!("{new:?} follows {old:?}")),
        }
        Ok(())
    }

    /// True for the peer on record, and for a newcomer whose image became whole under the very
    /// record its primary runs alone with (one that died after it asked held it). What that primary
    /// released, I1 says.
    pub fn may_take_over(&self, who: InstanceId, record: Record) -> bool {
        match record.state {
            RecordState::Paired => record.peer == Some(who),
            RecordState::Solo => {
                self.held_by(who).is_none_or(|held| held.whole && held.epoch.generation == record.generation)
            }
            RecordState::Stopped => false,
        }
    }

    fn never_whole(&self, peer: InstanceId) -> Check {
        match self.held_by(peer) {
            Some(_) => broken(I2, format!("{peer:?} is on record as peer, but its image is not whole")),
            None => Ok(()),
        }
    }

    fn taken_over(&mut self, new: Record) -> Check {
        let Some(holding) = self.held_by(new.owner) else {
            return Ok(()); // it died after it asked
        };
        let counter = holding.counter;
        self.floors.push((new.generation, counter));
        if self.released > counter {
            let last = self.released - 1;
            return broken(I1, format!("packet {last} is out, {:?} takes over from packet {counter}", new.owner));
        }
        Ok(())
    }

    /// A node commits an epoch to its image.
    pub fn committed(&mut self, node: usize, holding: Holding) {
        let whole = self.holdings[node].as_ref().is_some_and(|held| held.who == holding.who && held.whole);
        let whole = whole || holding.whole;
        self.holdings[node] = Some(Holding { whole, ..holding });
    }

    /// A node starts the guest from its image.
    pub fn activated(
        &mut self,
        node: usize,
        who: InstanceId,
        (record, epoch): (Record, EpochId),
        (image, counter): (Pages, u8),
    ) -> Check {
        let Some(held) = self.holdings[node].as_ref().filter(|held| held.who == who) else {
            return broken(I2, format!("{who:?} activates {epoch}, but committed nothing"));
        };
        if held.epoch != epoch || !held.whole || counter != held.counter {
            return broken(I2, format!("{who:?} activates {epoch}, what it has is {held:?}"));
        }
        if image != held.oracle {
            return broken(I5, format!("{who:?} activates {image:?}, memory at the capture was {:?}", held.oracle));
        }
        if self.owner(record.generation) != Some(who) || record.state != RecordState::Solo {
            return broken(I3, format!("{who:?} takes over under {record:?}, which was never on record"));
        }
        if self.taken.contains(&record.generation) {
            return broken(ONCE, format!("{} is taken twice", record.generation));
        }
        self.taken.push(record.generation);
        self.next[node] = counter;
        Ok(())
    }

    /// `who`, which believes to run in `generation`, lets a packet out.
    pub fn released(&mut self, node: usize, who: InstanceId, generation: Generation, number: u8) -> Check {
        if self.owner(generation) != Some(who) {
            return broken(I3, format!("{who:?} releases in {generation}, which it never owned"));
        }
        let at = (generation.0 - 1) as usize;
        if *self.releasers[at].get_or_insert(who) != who {
            return broken(I3, format!("two nodes release in {generation}"));
        }
        if self.next[node] != number {
            return broken(I4, format!("{who:?} releases packet {number}, not {}", self.next[node]));
        }
        self.next[node] = number + 1;
        if let Some((at, first)) = self.floors.iter().find(|(at, first)| *at > generation && number >= *first) {
            return broken(I3, format!("{who:?} releases packet {number}; {at} went on from packet {first}"));
        }
        self.released = self.released.max(number + 1);
        if self.record.owner == who
            && let Some(peer) = self.record.peer
            && let Some(held) = self.held_by(peer)
            && number >= held.counter
        {
            let (peer, counter) = (held.who, held.counter);
            return broken(I1, format!("{who:?} releases packet {number}; {peer:?} has those below {counter}"));
        }
        Ok(())
    }

    /// A newcomer starts where another instance's image was.
    pub fn forget(&mut self, node: usize) {
        self.holdings[node] = None;
    }
}
