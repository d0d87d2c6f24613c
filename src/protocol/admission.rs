//! Who may keep a connection to this node open before it has said hello, and how many that have.
//!
//! Anybody who reaches the ports can open connections and say nothing. They cost a thread and a
//! descriptor each, so there is a bound, for each source address and in all. At the bound the
//! connection that has been silent longest is closed in favour of the new one: a real secondary
//! says hello at once, so silence is what tells others from it, and no number of silent connections
//! keeps it out. Connections that have said hello are bounded too; past that bound new ones are
//! turned away, because those that are there may be the secondary's.

use std::collections::BTreeMap;
use std::time::Duration;

use thiserror::Error;

use super::messages::{Channel, Hello, Message, RefuseReason};
use super::mutant;
use super::types::{ConnId, Instant};

/// The bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmissionConfig {
    /// Connections that have not said hello, in all.
    pub silent_max: usize,
    /// The same, of one address.
    pub silent_per_address_max: usize,
    /// Connections that have said hello, in all.
    pub greeted_max: usize,
    /// The same, of one address.
    pub greeted_per_address_max: usize,
    /// How long a connection may take to say the whole of its hello.
    pub hello_timeout: Duration,
    /// Time between two reports of how many were turned away.
    pub report_interval: Duration,
}

/// What counts as one source of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// An IPv4 address.
    V4([u8; 4]),
    /// The 64 bits of an IPv6 address that name a network, whose hosts choose the rest as they
    /// like.
    V6Network([u8; 8]),
}

impl Source {
    /// The source that an IPv6 address belongs to; `::ffff:192.0.2.1` is the IPv4 address in it.
    pub fn of_v6(address: [u8; 16]) -> Source {
        match address {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Source::V4([a, b, c, d]),
            [a, b, c, d, e, f, g, h, ..] => Source::V6Network([a, b, c, d, e, f, g, h]),
        }
    }
}

/// Why a connection may not stay, in words for its peer and for the log.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TurnedAway {
    /// Too many that have said hello are open.
    #[error("{0} connections are open; try again later")]
    Crowded(usize),
    /// Too many of this source that have said hello are open.
    #[error("{0} connections from its address are open; try again later")]
    CrowdedSource(usize),
    /// It said no hello, and another one needed its place.
    #[error("too many connections are open that say no hello; try again later")]
    Displaced,
    /// It took too long.
    #[error("it said no hello in time")]
    Late,
    /// Nobody can read it.
    #[error("the host gives no more threads: {0}")]
    NoThread(String),
    /// A hello on the port of the other channel.
    #[error("{}", other_channel(*.0))]
    OtherChannel(Channel),
    /// Another message than a hello.
    #[error("a newcomer begins with a hello, not {0}")]
    NoHello(&'static str),
    /// What it sent cannot be read.
    #[error("{why}")]
    Unreadable {
        /// What it is told, if it would understand that.
        reason: Option<RefuseReason>,
        /// Why, in words.
        why: String,
    },
}

fn other_channel(port: Channel) -> &'static str {
    match port {
        Channel::Data => "this is the data port, and the hello is for heartbeats; check --peer-heartbeat",
        Channel::Heartbeat => "this is the heartbeat port, and the hello is for data; check --peer",
    }
}

impl TurnedAway {
    /// The refusal that its peer is sent; none to one that would not understand it, or said
    /// nothing for too long to be a node.
    pub fn reason(&self) -> Option<RefuseReason> {
        match self {
            TurnedAway::Crowded(_) | TurnedAway::CrowdedSource(_) | TurnedAway::Displaced => Some(RefuseReason::Busy),
            TurnedAway::OtherChannel(_) | TurnedAway::NoHello(_) => Some(RefuseReason::Malformed),
            TurnedAway::Unreadable { reason, .. } => *reason,
            TurnedAway::Late | TurnedAway::NoThread(_) => None,
        }
    }

    /// What it is counted as.
    pub fn refusal(&self) -> Refusal {
        match self {
            TurnedAway::Crowded(_) | TurnedAway::CrowdedSource(_) | TurnedAway::Displaced | TurnedAway::NoThread(_) => {
                Refusal::Crowded
            }
            TurnedAway::Late | TurnedAway::OtherChannel(_) | TurnedAway::NoHello(_) | TurnedAway::Unreadable { .. } => {
                Refusal::NoHello
            }
        }
    }
}

/// The hello that the first message on the port of `channel` has to be.
///
/// # Errors
/// [`TurnedAway`], if it is another message or belongs on the other port.
pub fn first_hello(channel: Channel, message: Message) -> Result<Hello, TurnedAway> {
    match message {
        Message::Hello(hello) if hello.channel == channel => Ok(hello),
        Message::Hello(_) => Err(TurnedAway::OtherChannel(channel)),
        other => Err(TurnedAway::NoHello(other.name())),
    }
}

/// What to do with a connection that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It may stay until it has said hello.
    Admit {
        /// Its number.
        conn: ConnId,
        /// A silent connection to close in its favour.
        close: Option<ConnId>,
    },
    /// It may not stay.
    TurnAway(TurnedAway),
}

/// Why a connection was refused, as far as refusals are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// Too many were open.
    Crowded,
    /// It said no hello, or something else.
    NoHello,
}

impl Refusal {
    /// Refusals that are reported one by one before they are only counted.
    fn burst(self) -> u64 {
        match self {
            Refusal::Crowded => 1,
            // Each may have another reason, which helps to find a wrong flag.
            Refusal::NoHello => 16,
        }
    }
}

/// What is to be done because time has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overdue {
    /// This connection took too long to say hello.
    Close(ConnId),
    /// So many more were refused than were reported one by one.
    Report(Refusal, u64),
}

#[derive(Clone, Debug)]
struct Open<A> {
    address: A,
    arrived: Instant,
    has_greeted: bool,
}

/// Refusals of one kind since the last report.
#[derive(Clone, Copy, Debug)]
struct Refused {
    count: u64,
    since: Instant,
}

/// The open connections that others made to this node, by number. `A` is a source address.
#[derive(Clone, Debug)]
pub struct Admission<A> {
    config: AdmissionConfig,
    next: ConnId,
    open: BTreeMap<ConnId, Open<A>>,
    refused: BTreeMap<Refusal, Refused>,
}

impl<A: Clone + Eq> Admission<A> {
    /// Nobody is there yet; connections are numbered from `first`.
    pub fn new(config: AdmissionConfig, first: ConnId) -> Admission<A> {
        Admission { config, next: first, open: BTreeMap::new(), refused: BTreeMap::new() }
    }

    /// A connection from `address` was accepted.
    pub fn arrived(&mut self, now: Instant, address: A) -> Arrival {
        if let Err(why) = self.has_room_for(&address) {
            return Arrival::TurnAway(why);
        }
        let close = self.one_too_many(&address);
        if close.is_some() && mutant::is("silent-peers-keep-others-out") {
            return Arrival::TurnAway(TurnedAway::Displaced);
        }
        close.map(|conn| self.open.remove(&conn));
        let conn = self.next;
        self.next += 1;
        self.open.insert(conn, Open { address, arrived: now, has_greeted: false });
        Arrival::Admit { conn, close }
    }

    /// The connection that has to go before one more of `address` may be silent.
    fn one_too_many(&self, address: &A) -> Option<ConnId> {
        // Numbers go up with time, so the first is the one that has been silent longest.
        let silent = || self.open.iter().filter(|(_, open)| !open.has_greeted);
        let of_it = || silent().filter(|(_, open)| open.address == *address);
        if of_it().count() >= self.config.silent_per_address_max {
            return of_it().map(|(conn, _)| *conn).next();
        }
        silent().map(|(conn, _)| *conn).next().filter(|_| silent().count() >= self.config.silent_max)
    }

    /// A connection has said hello.
    ///
    /// # Errors
    /// [`TurnedAway`], and it is to be closed, if too many others have said hello since it arrived,
    /// or if it was displaced before.
    pub fn said_hello(&mut self, conn: ConnId) -> Result<(), TurnedAway> {
        let Some(address) = self.open.get(&conn).map(|open| open.address.clone()) else {
            return Err(TurnedAway::Displaced);
        };
        if let Err(why) = self.has_room_for(&address) {
            self.open.remove(&conn);
            return Err(why);
        }
        self.open.get_mut(&conn).into_iter().for_each(|open| open.has_greeted = true);
        Ok(())
    }

    /// Whether one more connection of `address` may have said hello.
    fn has_room_for(&self, address: &A) -> Result<(), TurnedAway> {
        let AdmissionConfig { greeted_max, greeted_per_address_max, .. } = self.config;
        let greeted = || self.open.values().filter(|open| open.has_greeted);
        let (all, of_it) = (greeted().count(), greeted().filter(|open| open.address == *address).count());
        match () {
            () if all >= greeted_max => Err(TurnedAway::Crowded(all)),
            () if of_it >= greeted_per_address_max => Err(TurnedAway::CrowdedSource(of_it)),
            () => Ok(()),
        }
    }

    /// A connection has ended. False if it was closed here.
    pub fn gone(&mut self, conn: ConnId) -> bool {
        self.open.remove(&conn).is_some()
    }

    /// A connection was refused. True if that is to be reported by itself; others are counted.
    pub fn refused(&mut self, now: Instant, refusal: Refusal) -> bool {
        let refused = self.refused.entry(refusal).or_insert(Refused { count: 0, since: now });
        refused.count = refused.count.saturating_add(1);
        refused.count <= refusal.burst()
    }

    /// When [`poll`](Admission::poll) has something next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let AdmissionConfig { hello_timeout, report_interval, .. } = self.config;
        let silent = self.open.values().find(|open| !open.has_greeted).map(|open| open.arrived + hello_timeout);
        let report = self.refused.values().map(|refused| refused.since + report_interval).min();
        silent.into_iter().chain(report).min()
    }

    /// What is overdue, one thing at a time.
    pub fn poll(&mut self, now: Instant) -> Option<Overdue> {
        let AdmissionConfig { hello_timeout, report_interval, .. } = self.config;
        let silent = self.open.iter().find(|(_, open)| !open.has_greeted);
        if let Some((&conn, _)) = silent.filter(|(_, open)| now >= open.arrived + hello_timeout) {
            self.open.remove(&conn);
            return Some(Overdue::Close(conn));
        }
        loop {
            let over = self.refused.iter().find(|(_, refused)| now >= refused.since + report_interval);
            let (&refusal, &Refused { count, .. }) = over?;
            self.refused.remove(&refusal);
            if count > refusal.burst() {
                // Those that follow are counted at once: a flood is reported once in an interval.
                self.refused.insert(refusal, Refused { count: refusal.burst(), since: now });
                return Some(Overdue::Report(refusal, count - refusal.burst()));
            }
        }
    }
}

#[cfg(test)]
mod tests;
