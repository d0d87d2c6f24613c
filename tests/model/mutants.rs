//! Deliberate bugs. Each must be found; a checker that cannot fail proves nothing.

use std::time::Duration;

use crate::{Seen, Space, breaking, explore, forming, healing};

/// Time after which a bug counts as not found.
const LIMIT: Duration = Duration::from_secs(120);

/// Every bug of the takeover and arbitration core, by its name in the code.
const MUTANTS: [&str; 23] = [
    "release-on-send",
    "one-epoch-too-many",
    "ack-without-commit",
    "hold-one-epoch-late",
    "pair-without-the-arbiter",
    "pairing-given-up",
    "completing-given-up",
    "alone-without-the-arbiter",
    "lost-swap-ignored",
    "secondary-ignores-a-lost-swap",
    "takes-over-a-solo-guest",
    "standby-gives-up",
    "standby-reads-first",
    "own-win-not-recognised",
    "no-check-after-a-stall",
    "release-without-deadline",
    "fence-releases-first",
    "lost-newcomer-keeps-holding",
    "older-epoch-activated",
    "done-while-pushing",
    "silence-never-suspected",
    "quit-at-once",
    "shutdown-not-told",
];

fn hunt(mutant: &'static str) -> Option<(&'static str, Seen)> {
    let spaces = [("forming", forming as fn(u8) -> _), ("breaking", breaking), ("healing", healing)];
    for faults in 0..=2 {
        for (name, begin) in spaces {
            let seen = explore(Space { begin: begin(faults), mutant }, LIMIT);
            if seen.broken.is_some() {
                return Some((name, seen));
            }
        }
    }
    None
}

#[test]
fn every_mutant_is_caught() {
    let mut missed = Vec::new();
    for mutant in MUTANTS {
        match hunt(mutant) {
            Some((space, seen)) => {
                let how = seen.broken.unwrap_or_default();
                let last = how.lines().last().unwrap_or_default();
                println!("caught after {:>6} states, {space:<8} {mutant}\n{last}", seen.unique);
            }
            None => {
                println!("NOT CAUGHT  {mutant}");
                missed.push(mutant);
            }
        }
    }
    println!("{} of {} mutants caught", MUTANTS.len() - missed.len(), MUTANTS.len());
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
