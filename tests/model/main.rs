//! The takeover and arbitration core, checked in all interleavings within bounds: the real state machines of both nodes, their two
//! connections, one arbiter, and everything that may go wrong with them. See "Exhaustive check" in `docs/testing.md`.

mod bounds;
mod calm;
mod driver;
mod guest;
mod moves;
mod net;
mod truth;
mod world;

use std::time::{Duration, Instant};

use mcd::protocol::primary;
use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::bounds::Bounds;
use crate::moves::Move;
use crate::world::World;

/// A world to begin with, and all that may follow.
struct Space {
    begin: World,
}

impl Model for Space {
    type State = World;
    type Action = Move;

    fn init_states(&self) -> Vec<World> {
        vec![self.begin.clone()]
    }

    fn actions(&self, world: &World, moves: &mut Vec<Move>) {
        world.moves(moves);
    }

    fn next_state(&self, world: &World, step: Move) -> Option<World> {
        world.after(step)
    }

    fn properties(&self) -> Vec<Property<Space>> {
        vec![
            Property::always("invariants", |_, world: &World| world.broken.is_none()),
            Property::always(truth::I6, |_, world: &World| world.comes_to_rest()),
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
    let record = world.truth.record;
    format!("{:<24} {:<24} {} {:?} {:?}", node(0), node(1), record.generation, record.state, record.owner)
}

/// Explores all of a space, or until `limit` has passed.
fn explore(space: Space, limit: Duration) -> Seen {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let start = Instant::now();
    let checker = space
        .checker()
        .threads(threads)
        .timeout(limit)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
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

fn check(name: &str, begin: World) {
    let limit = Duration::from_secs(600);
    let seen = explore(Space { begin }, limit);
    println!(
        "{name}: {} unique states, {} in all, depth {}, {:.1} s{}",
        seen.unique,
        seen.total,
        seen.depth,
        seen.took.as_secs_f64(),
        if seen.took >= limit { ", out of time" } else { "" }
    );
    if let Some(how) = seen.broken {
        panic!("{name}: {how}");
    }
}

fn faults(faults: u8) -> Bounds {
    Bounds {
        faults,
        crashes: 2,
        losses: 2,
        stalls: 1,
        splits: 1,
        silences: 2,
        failed_captures: 1,
        ..Bounds::NONE
    }
}

#[test]
fn a_pair_forms() {
    let n = std::env::var("MODEL_FAULTS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    check("a pair forms", World::forming(Bounds { packets: 1, connects: 2, checkpoints: 0, ..faults(n) }));
}

#[test]
fn a_pair_breaks() {
    let n = std::env::var("MODEL_FAULTS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    check("a pair breaks", paired(Bounds { packets: 1, ..faults(n) }));
}
