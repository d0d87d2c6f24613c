//! The state that is explored: two nodes, their connections, the arbiter, and what may still
//! happen.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use mcd::protocol::arbitration::{ArbiterAnswer, ArbiterCall, ArbiterRequest};
use mcd::protocol::cpu::HostCpu;
use mcd::protocol::failure_detector::HeartbeatConfig;
use mcd::protocol::machine_shape::MachineShape;
use mcd::protocol::pages::PAGE_BYTES;
use mcd::protocol::primary::{Primary, PrimaryConfig};
use mcd::protocol::record::Record;
use mcd::protocol::secondary::{Secondary, SecondaryConfig};
use mcd::protocol::types::ConnId;
use mcd::protocol::types::{EpochId, GuestName, InstanceId, Instant};

use crate::bounds::Bounds;
use crate::guest::{Guest, HOLES, Output, PAGES, Page, Pages};
use crate::net::Conn;
use crate::oracle::{Broken, Check, Oracle};

/// One unit of time: the heartbeat interval.
pub const UNIT: Duration = Duration::from_millis(10);
/// The heartbeat timeout, in units.
pub const TIMEOUT_UNITS: u32 = 2;

/// What a process is.
#[derive(Clone, Debug)]
pub enum Role {
    /// It crashed, accepted_loss, or is between two lives as a newcomer.
    Absent,
    Secondary(Box<Secondary>),
    Primary(Box<Primary>),
}

/// A question in the hands of the driver; the first is with the arbiter.
#[derive(Clone, Debug, Hash)]
pub struct Call {
    pub call: ArbiterCall,
    pub answer: Option<ArbiterAnswer>,
    /// The node was frozen since the answer was given.
    pub stale: bool,
}

/// An epoch in staging memory, whole.
#[derive(Clone, Debug, Hash)]
pub struct Staged {
    pub id: EpochId,
    pub completes: bool,
    pub dirty: Vec<Page>,
    pub counter: u8,
    pub oracle: Pages,
}

/// A node: the real state machine, and what its driver has.
#[derive(Clone, Debug)]
pub struct Node {
    pub me: InstanceId,
    pub role: Role,
    /// Its own clock; no other node's says anything about it.
    pub now: Instant,
    pub looked: Instant,
    /// Its actions are carried out one by one.
    pub stepping: bool,
    pub fenced: bool,
    /// It was frozen, and no answer given since then has arrived.
    pub unproven: bool,
    pub calls: VecDeque<Call>,
    /// The newest number it gave a connection.
    pub made: ConnId,
    pub guest: Option<Guest>,
    pub output: Output,
    /// Where epochs and pushes go.
    pub sender: Option<ConnId>,
    pub push: Option<Vec<u64>>,
    pub capture_fails: bool,
    pub image: Pages,
    pub image_counter: u8,
    pub staged: Option<Staged>,
}

impl Node {
    fn new(me: InstanceId, role: Role) -> Node {
        Node {
            me,
            role,
            now: Instant::from_us(0),
            looked: Instant::from_us(0),
            stepping: false,
            fenced: false,
            unproven: false,
            calls: VecDeque::new(),
            made: 100,
            guest: None,
            output: Output::default(),
            sender: None,
            push: None,
            capture_fails: false,
            image: HOLES,
            image_counter: 0,
            staged: None,
        }
    }

    pub fn primary(&self) -> Option<&Primary> {
        match &self.role {
            Role::Primary(machine) => Some(machine),
            _ => None,
        }
    }

    pub fn poll_timeout(&self) -> Option<Instant> {
        match &self.role {
            Role::Primary(machine) => machine.poll_timeout(),
            Role::Secondary(machine) => machine.poll_timeout(),
            Role::Absent => None,
        }
    }

    /// True if it runs the guest or may be told to.
    pub fn has_guest(&self) -> bool {
        self.guest.is_some()
    }

    pub fn is_absent(&self) -> bool {
        matches!(self.role, Role::Absent)
    }
}

impl Hash for Node {
    fn hash<H: Hasher>(&self, into: &mut H) {
        #[rustfmt::skip]
        let Node {
            me, role, now, looked, stepping, fenced, unproven, calls, made, guest, output, sender, push,
            capture_fails, image,
            image_counter, staged,
        } = self;
        (me, stepping, fenced, unproven, calls, made, sender, push).hash(into);
        (guest, output, capture_fails, image, image_counter, staged).hash(into);
        now.since(*looked).min(UNIT * TIMEOUT_UNITS).hash(into);
        match role {
            Role::Absent => 0.hash(into),
            Role::Secondary(machine) => machine.digest(*now, into),
            Role::Primary(machine) => machine.digest(*now, into),
        }
    }
}

/// Everything there is. Parts are shared between states until they differ.
#[derive(Clone, Debug)]
pub struct World {
    pub nodes: [Arc<Node>; 2],
    pub conns: Arc<Vec<Conn>>,
    pub oracle: Arc<Oracle>,
    /// Swaps that their nodes gave up and that may still be carried out.
    pub late: Vec<ArbiterRequest>,
    pub bounds: Bounds,
    /// How many instances there were.
    pub instances: u8,
    /// An operator shut the guest down, or its only holder on record died: nobody could have
    /// helped.
    pub accepted_loss: bool,
    pub broken: Option<Broken>,
}

impl Hash for World {
    fn hash<H: Hasher>(&self, into: &mut H) {
        let World { nodes, conns, oracle, late, bounds, instances, accepted_loss, broken } = self;
        (nodes, conns, oracle, late, bounds, instances, accepted_loss, broken).hash(into);
    }
}

impl PartialEq for World {
    fn eq(&self, other: &World) -> bool {
        let digest = |world: &World| {
            let mut hasher = DefaultHasher::new();
            world.hash(&mut hasher);
            hasher.finish()
        };
        digest(self) == digest(other)
    }
}

/// Every host has this one.
const CPU: HostCpu = HostCpu { digest: 1, tsc_khz: 1_000_000, tsc_scales: false };

fn guest_name() -> GuestName {
    GuestName::new("g").expect("a name")
}

/// The primary's settings: an epoch is cut on output or when asked for, never by time alone, or
/// epochs would have no end.
pub fn primary_config() -> PrimaryConfig {
    PrimaryConfig {
        guest: guest_name(),
        shape: MachineShape::bare((PAGES * PAGE_BYTES) as u64, 1, [2, 0, 0, 0, 0, 1]),
        cpu: CPU.own_guest(),
        features: 0,
        interval: Duration::from_secs(3600),
        interval_min: Duration::ZERO,
        commit_on_output: true,
        heartbeat: HeartbeatConfig { interval: UNIT, timeout: UNIT * TIMEOUT_UNITS },
        arbiter_retry: UNIT,
        join_timeout: UNIT,
        build_silence_max: UNIT * 100,
        stall_max: UNIT * 100,
        handover_timeout: UNIT,
        drain_timeout: UNIT,
        push_pages_max: PAGES,
    }
}

pub fn secondary_config() -> SecondaryConfig {
    SecondaryConfig {
        guest: guest_name(),
        cpu: CPU,
        features: 0,
        staging_bytes_max: u64::MAX,
        retry: UNIT,
        answer_timeout: UNIT,
        stall_max: UNIT * 100,
    }
}

/// The id of the nth instance; its number is in the digits that are printed.
pub fn instance(number: u8) -> InstanceId {
    InstanceId((0xa0 + u128::from(number)) << 96)
}

impl World {
    /// Node 0 runs the guest alone; node 1 is a newcomer.
    pub fn forming(bounds: Bounds) -> World {
        let (a, b) = (instance(0), instance(1));
        let record = Record::first(a);
        let start = Instant::from_us(0);
        let mut first = Node::new(a, Role::Primary(Box::new(Primary::new(primary_config(), a, record, start))));
        first.guest = Some(Guest::new([0; PAGES], 0, 1));
        let second = Node::new(b, Role::Secondary(Box::new(Secondary::new(secondary_config(), b, 0, start))));
        World {
            nodes: [Arc::new(first), Arc::new(second)],
            conns: Arc::new(Vec::new()),
            oracle: Arc::new(Oracle::new(record)),
            late: Vec::new(),
            bounds,
            instances: 2,
            accepted_loss: false,
            broken: None,
        }
    }

    pub fn node(&mut self, node: usize) -> &mut Node {
        Arc::make_mut(&mut self.nodes[node])
    }

    pub fn conns(&mut self) -> &mut Vec<Conn> {
        Arc::make_mut(&mut self.conns)
    }

    pub fn oracle(&mut self) -> &mut Oracle {
        Arc::make_mut(&mut self.oracle)
    }

    pub fn check(&mut self, check: Check) {
        if let Err(broken) = check {
            self.broken.get_or_insert(broken);
        }
    }

    /// A new newcomer in the place of `node`, which forgets all.
    pub fn newcomer(&mut self, node: usize) {
        let me = instance(self.instances);
        self.instances += 1;
        let start = Instant::from_us(0);
        let fresh = Node::new(me, Role::Secondary(Box::new(Secondary::new(secondary_config(), me, 0, start))));
        self.nodes[node] = Arc::new(fresh);
        self.oracle().forget(node);
    }

    pub fn conn_of(&self, node: usize, local: ConnId) -> Option<(usize, usize)> {
        let is = |end: &crate::net::End| end.node == node && end.local == local && end.open;
        self.conns.iter().enumerate().find_map(|(at, conn)| Some((at, conn.ends.iter().position(is)?)))
    }
}
