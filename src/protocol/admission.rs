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

/// What to do with a connection that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It may stay until it has said hello.
    Admit {
        /// Its number.
        conn: ConnId,
        /// A silent connection to close in its favour.
        close: Option<ConnId>,
    },
    /// Too many that have said hello are open.
    TurnAway,
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
        let AdmissionConfig { greeted_max, greeted_per_address_max, .. } = self.config;
        let greeted = |open: &&Open<A>| open.has_greeted;
        let greeted_of_it = self.open.values().filter(greeted).filter(|open| open.address == address).count();
        if self.open.values().filter(greeted).count() >= greeted_max || greeted_of_it >= greeted_per_address_max {
            return Arrival::TurnAway;
        }
        let close = self.one_too_many(&address);
        if close.is_some() && mutant::is("silent-peers-keep-others-out") {
            return Arrival::TurnAway;
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

    /// A connection has said hello. False if it was closed before that was known, or if too many
    /// others have said hello since it arrived: then it is to be closed.
    pub fn said_hello(&mut self, conn: ConnId) -> bool {
        let AdmissionConfig { greeted_max, greeted_per_address_max, .. } = self.config;
        let Some(address) = self.open.get(&conn).map(|open| open.address.clone()) else { return false };
        let greeted = |open: &&Open<A>| open.has_greeted;
        let of_it = self.open.values().filter(greeted).filter(|open| open.address == address).count();
        if self.open.values().filter(greeted).count() >= greeted_max || of_it >= greeted_per_address_max {
            self.open.remove(&conn);
            return false;
        }
        self.open.get_mut(&conn).into_iter().for_each(|open| open.has_greeted = true);
        true
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
