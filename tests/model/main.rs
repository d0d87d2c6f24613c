//! The takeover and arbitration core, checked in all interleavings within bounds: the real state
//! machines of both nodes, their two connections, one arbiter, and everything that may go wrong
//! with them. See "Exhaustive check" in `docs/internals/testing.md`.

mod bounds;
mod driver;
mod guest;
mod liveness;
#[cfg(feature = "mutants")]
mod mutants;
mod net;
mod oracle;
mod transitions;
mod world;

use std::time::{Duration, Instant};

use mcd::protocol::primary;
use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::bounds::Bounds;
use crate::transitions::Transition;
use crate::world::World;

/// A world to begin with, and all that may follow.
struct Space {
    begin: World,
    /// The deliberate bug to explore with; none is "".
    mutant: &'static str,
}

impl Space {
    fn new(begin: World) -> Space {
        Space { begin, mutant: "" }
    }

    /// Makes the bug the one of this thread: the checker has its own threads.
    fn choose_mutant(&self) {
        #[cfg(feature = "mutants")]
        mcd::protocol::mutant::choose(self.mutant);
        #[cfg(not(feature = "mutants"))]
        assert!(self.mutant.is_empty());
    }
}

impl Model for Space {
    type State = World;
    type Action = Transition;

    fn init_states(&self) -> Vec<World> {
        vec![self.begin.clone()]
    }

    fn actions(&self, world: &World, transitions: &mut Vec<Transition>) {
        world.transitions(transitions);
    }

    fn next_state(&self, world: &World, step: Transition) -> Option<World> {
        self.choose_mutant();
        world.after(step)
    }

    fn properties(&self) -> Vec<Property<Space>> {
        vec![
            Property::always("invariants", |_, world: &World| world.broken.is_none()),
            Property::always(oracle::I6, |space: &Space, world: &World| {
                space.choose_mutant();
                world.comes_to_rest()
            }),
        ]
    }
}

/// What an exploration saw.
struct Seen {
    unique: usize,
    total: usize,
    depth: usize,
    took: Duration,
    /// How a property was broken, step by step.
    broken: Option<String>,
}

fn describe(world: &World) -> String {
    let node = |n: usize| match &world.nodes[n].role {
        world::Role::Absent => "absent".to_owned(),
        world::Role::Secondary(machine) => format!("{:?} {:?}", machine.me(), machine.phase()),
        world::Role::Primary(machine) => {
            format!("{:?} {:?} {}", machine.me(), machine.phase(), machine.generation())
        }
    };
    let record = world.oracle.record;
    format!("{:<24} {:<24} {} {:?} {:?}", node(0), node(1), record.generation, record.state, record.owner)
}

/// Explores all of a space, or until `limit` has passed.
fn explore(space: Space, limit: Duration) -> Seen {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let start = Instant::now();
    let checker =
        space.checker().threads(threads).timeout(limit).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let took = start.elapsed();
    let broken = checker.discoveries().into_iter().next().map(|(name, path)| {
        let mut text = format!("broken: {name}\n");
        for (world, step) in path.into_vec() {
            text += &describe(&world);
            if let Some(broken) = &world.broken {
                text += &format!("  {}: {}", broken.property, broken.how);
            }
            if let Some(step) = step {
                text += &format!("\n    {step:?}\n");
            }
        }
        text
    });
    let (unique, total, depth) = (checker.unique_state_count(), checker.state_count(), checker.max_depth());
    Seen { unique, total, depth, took, broken }
}

fn is_protected(world: &World) -> bool {
    world.nodes.iter().any(|node| node.primary().is_some_and(|machine| machine.phase() == primary::Phase::Protected))
}

/// A pair in peace, from which `bounds` may happen.
fn paired(bounds: Bounds) -> World {
    let quiet = Bounds { connects: 2, ..Bounds::NONE };
    let mut world = World::forming(quiet).until(is_protected);
    world.deliver_all();
    World { bounds, ..world }
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// How many faults may come together: `MODEL_FAULTS`, or `usual`.
fn faults(usual: u8) -> u8 {
    number("MODEL_FAULTS").and_then(|faults| u8::try_from(faults).ok()).unwrap_or(usual)
}

/// Explores a space to its end and says how large it is.
fn check(name: &str, begin: World) {
    let limit = Duration::from_secs(number("MODEL_SECONDS").unwrap_or(3600));
    let seen = explore(Space::new(begin), limit);
    println!(
        "{name}: {} unique states, {} in all, depth {}, {:.1} s{}",
        seen.unique,
        seen.total,
        seen.depth,
        seen.took.as_secs_f64(),
        if seen.took >= limit { ", out of time: not all" } else { "" }
    );
    if let Some(how) = seen.broken {
        panic!("{name}: {how}");
    }
}

/// From the first connection on: a newcomer joins, is filled, and becomes the peer on record.
fn forming(faults: u8) -> World {
    World::forming(Bounds { packets: 1, connects: 2, ..every_kind(faults) })
}

/// From a pair on.
fn breaking(faults: u8) -> World {
    paired(Bounds { packets: 2, ..every_kind(faults) })
}

/// From a pair on: it breaks, and the lone node gets a newcomer.
fn healing(faults: u8) -> World {
    paired(Bounds { packets: 1, connects: 2, newcomers: 1, ..every_kind(faults) })
}

fn every_kind(faults: u8) -> Bounds {
    Bounds {
        faults,
        crashes: 2,
        losses: 2,
        stalls: 1,
        splits: 1,
        silences: 2,
        failed_captures: 1,
        quits: 1,
        ..Bounds::NONE
    }
}

#[test]
fn a_pair_forms() {
    check("a pair forms", forming(faults(2)));
}

#[test]
fn a_pair_breaks() {
    check("a pair breaks", breaking(faults(2)));
}

#[test]
fn a_pair_breaks_and_heals() {
    check("a pair breaks and heals", healing(faults(1)));
}
