//! Connections: two ordered streams that may end at any time, for each side at its own time.

use std::collections::VecDeque;

use mcd::protocol::messages::Message;
use mcd::protocol::types::ConnId;
use mcd::protocol::types::EpochId;

use crate::guest::{Page, Pages};

/// What travels on a connection.
#[derive(Clone, Debug, PartialEq, Hash)]
pub enum Item {
    Message(Message),
    /// Pages pushed behind the epochs.
    Background(Vec<Page>),
    /// An epoch's frames. `oracle` is what memory held at the capture, dirty or not: only the
    /// properties look at it.
    Epoch {
        id: EpochId,
        completes: bool,
        dirty: Vec<Page>,
        counter: u8,
        oracle: Pages,
    },
    /// The other side is gone.
    Fin,
}

/// One side of a connection.
#[derive(Clone, Debug, Hash)]
pub struct End {
    pub node: usize,
    /// The number this node knows the connection by.
    pub local: ConnId,
    pub open: bool,
    pub inbox: VecDeque<Item>,
}

impl End {
    fn new(node: usize, local: ConnId) -> End {
        End { node, local, open: true, inbox: VecDeque::new() }
    }

    /// Takes in what the other side sends. The number of a heartbeat means nothing, so two in a row
    /// are as good as one.
    fn take(&mut self, item: Item) {
        let beat = |item: &Item| matches!(item, Item::Message(Message::Heartbeat(_)));
        if self.open && !(beat(&item) && self.inbox.back().is_some_and(beat)) {
            self.inbox.push_back(item);
        }
    }
}

/// A connection; end 0 opened it.
#[derive(Clone, Debug, Hash)]
pub struct Conn {
    pub ends: [End; 2],
}

impl Conn {
    pub fn new(from: (usize, ConnId), to: (usize, ConnId)) -> Conn {
        Conn { ends: [End::new(from.0, from.1), End::new(to.0, to.1)] }
    }

    /// Sends from `end` to the other one.
    pub fn send(&mut self, end: usize, mut item: Item) {
        if let Item::Message(Message::Heartbeat(beat)) = &mut item {
            *beat = beat.unnumbered();
        }
        if self.ends[end].open {
            self.ends[1 - end].take(item);
        }
    }

    /// `end` is gone: it reads nothing more, and the other side will see that.
    pub fn close(&mut self, end: usize) {
        if self.ends[end].open {
            self.ends[end].open = false;
            self.ends[end].inbox.clear();
            self.ends[1 - end].take(Item::Fin);
        }
    }

    /// `end` is gone, and the other side will not hear of it.
    pub fn fall_silent(&mut self, end: usize) {
        self.ends[end].open = false;
        self.ends[end].inbox.clear();
    }

    pub fn is_over(&self) -> bool {
        self.ends.iter().all(|end| !end.open)
    }
}
