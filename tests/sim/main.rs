//! The simulator: the real protocol machines in a world of virtual time, faults and a seed.
//!
//! `SIM_SEEDS=n` runs n seeds (from `SIM_FIRST` on), `SIM_SEED=k` replays one and prints its trace.
//! `SIM_MUTANT=name` runs with the deliberate bugs of which that is (a part of) the name, instead
//! of all of them.

mod applier;
mod arbiter;
mod captures;
mod claims;
mod disks;
mod driver;
mod faults;
mod guest;
mod heartbeats;
mod image;
mod links;
mod losses;
mod machine;
mod model;
#[cfg(feature = "mutants")]
mod mutations;
mod net;
mod node;
mod operator;
mod plan;
mod processes;
mod rng;
mod secondary;
mod storage;
mod stream;
mod trace;
mod unknown_peers;
mod windows;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use world::{Stats, World};

/// Seeds run when nobody says how many.
const SEEDS_DEFAULT: u64 = 20_000;

/// Runs one seed: what it saw, what it found, and its trace if `traced`.
fn run(seed: u64, traced: bool) -> (Stats, Option<String>, Vec<String>) {
    let mut world = World::new(seed, traced);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    let violation = outcome.unwrap_or_else(|_| Some("something panicked; see above".into()));
    let stats = world.stats;
    (stats, violation, world.trace.into_lines())
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

#[derive(Default)]
struct Sum {
    seeds: u64,
    stats: Stats,
    failed: Vec<(u64, String)>,
}

fn run_many(first: u64, count: u64) -> Sum {
    let next = AtomicU64::new(first);
    let sum = Mutex::new(Sum::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        break;
                    }
                    let (stats, violation, _) = run(seed, false);
                    let mut sum = sum.lock().expect("no thread panics");
                    sum.add(seed, stats, violation);
                    if sum.failed.len() >= 20 {
                        break;
                    }
                }
            });
        }
    });
    sum.into_inner().expect("no thread panics")
}

impl Sum {
    fn add(&mut self, seed: u64, stats: Stats, violation: Option<String>) {
        self.seeds += 1;
        let all = &mut self.stats;
        all.simulated_us += stats.simulated_us;
        all.events += stats.events;
        all.faults += stats.faults;
        all.packets += stats.packets;
        all.takeovers += stats.takeovers;
        all.late_releases += stats.late_releases;
        all.handovers += stats.handovers;
        all.lost_guests.iter_mut().zip(stats.lost_guests).for_each(|(all, lost)| *all += lost);
        all.epochs += stats.epochs;
        all.blocks_compared += stats.blocks_compared;
        all.blocks_same += stats.blocks_same;
        all.verifies += stats.verifies;
        self.failed.extend(violation.map(|why| (seed, why)));
    }

    fn print(&self, seconds: f64) {
        let Stats { simulated_us, events, faults, packets, takeovers, late_releases, lost_guests, epochs, .. } =
            self.stats;
        let Stats { blocks_compared, blocks_same, verifies, handovers, .. } = self.stats;
        let lost = losses::Loss::ALL.map(|(loss, by)| format!("{} to {by}", lost_guests[loss as usize])).join(", ");
        println!(
            "{} seeds in {seconds:.1} s ({:.0} per minute); {:.0} simulated seconds per second; {events} events, \
             {epochs} epochs, {packets} packets, {faults} faults, \
             {takeovers} takeovers, guests lost: {lost}; \
             {late_releases} packets released late; {blocks_compared} blocks of newcomers' disks compared, \
             {blocks_same} of them there \
             already; {verifies} verifies; {handovers} guests handed over",
            self.seeds,
            self.seeds as f64 * 60.0 / seconds,
            simulated_us as f64 / 1e6 / seconds,
        );
    }
}

#[test]
fn seeds_keep_the_invariants() {
    if let Some(seed) = number("SIM_SEED") {
        let (stats, violation, ladder) = run(seed, true);
        for line in ladder {
            println!("{line}");
        }
        println!("{stats:?}");
        assert_eq!(violation, None, "seed {seed}");
        return;
    }
    let started = Instant::now();
    let sum = run_many(number("SIM_FIRST").unwrap_or(0), number("SIM_SEEDS").unwrap_or(SEEDS_DEFAULT));
    sum.print(started.elapsed().as_secs_f64());
    for (seed, why) in &sum.failed {
        println!("seed {seed}: {why}\n    replay: SIM_SEED={seed} cargo test --test sim -- --nocapture");
    }
    assert!(sum.failed.is_empty(), "{} seeds failed", sum.failed.len());
}

#[test]
fn a_seed_means_the_same_run_for_ever() {
    for seed in 0..20 {
        assert_eq!(run(seed, true).2, run(seed, true).2, "seed {seed}");
    }
}
