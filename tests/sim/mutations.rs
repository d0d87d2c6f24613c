//! Deliberate bugs. Each must be found; a simulator that cannot fail proves nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use mcd::protocol::mutant;

use crate::{number, run};

/// Seeds after which a bug counts as not found.
const SEEDS_MAX: u64 = 20_000;

/// Every bug: its name in the code, and what is wrong with it.
const MUTANTS: [(&str, &str); 84] = [
    ("release-on-send", "output leaves when its epoch is sent, not when it is committed"),
    ("one-epoch-too-many", "an ack releases the epoch after it too"),
    ("ack-before-whole", "an epoch is staged and acknowledged when half of it has arrived"),
    ("ack-without-commit", "every other epoch is acknowledged and thrown away"),
    ("hold-one-epoch-late", "holding begins one epoch after the one that completes the image"),
    ("pair-without-the-arbiter", "a pair is formed without asking"),
    ("pairing-given-up", "a primary whose newcomer is lost while the arbiter thinks goes on alone without the answer"),
    ("completing-given-up", "a primary whose newcomer is lost as it becomes whole goes on alone without asking"),
    ("alone-without-the-arbiter", "a primary whose secondary is lost goes on alone without asking"),
    ("lost-swap-ignored", "a primary that lost the swap goes on"),
    ("secondary-ignores-a-lost-swap", "a secondary that lost the swap takes over"),
    ("takes-over-a-solo-guest", "a secondary takes over a guest whose pair is not on record (a stale generation)"),
    ("standby-gives-up", "a secondary that did not hear of its pair does not take over"),
    (
        "standby-reads-first",
        "a newcomer that did not hear of its pair drops its image if the pair is not on record yet",
    ),
    ("own-win-not-recognised", "a swap that was won, but whose answer was lost, counts as lost"),
    ("no-check-after-a-stall", "a primary that was frozen releases without asking again"),
    ("release-without-deadline", "a release in hand goes on however long it takes"),
    ("fence-releases-first", "a fenced primary lets its held output go"),
    ("lost-newcomer-keeps-holding", "output stays held when the newcomer is lost"),
    ("older-epoch-activated", "a takeover goes back to the epoch before the newest"),
    ("output-again-after-takeover", "the new primary sends a packet that its state says was sent"),
    ("old-id-kept", "a restarted node keeps its instance id"),
    ("done-while-pushing", "the image counts as whole while the last push is being read"),
    ("push-skips-a-page", "one page after each push is neither pushed nor dirty"),
    ("dirty-forgotten", "a dirty page does not travel and is not dirty again"),
    ("resync-before-the-first-heartbeat", "epochs may overtake the welcome"),
    ("silence-never-suspected", "a secondary waits for ever for a silent primary"),
    ("bytes-extend-nothing", "a heartbeat that is stuck behind pages counts as missing"),
    ("overtaken-heartbeats-not-missed", "bytes outweigh missing heartbeats, however many epochs come without one"),
    (
        "newcomer-not-fenced",
        "without a record, a primary goes on alone while a newcomer with a whole image may take over",
    ),
    ("zero-page-skipped", "a page of zeros is not written to the wire"),
    ("first-epoch-taken-for-the-last", "staging calls an image whole with its first epoch"),
    ("quit-at-once", "an operator's quit ends a node that alone has the guest"),
    ("shutdown-not-told", "the secondary hears of a shutdown before the arbiter does"),
    ("shared-written-before-the-commit", "writes reach shared storage when their epoch is sent"),
    (
        "kept-writes-forgotten-early",
        "a secondary forgets all writes it keeps with the first word that some are written",
    ),
    ("takeover-without-the-lock", "a new primary writes to shared storage while its old primary still may"),
    (
        "whole-before-the-storage",
        "a newcomer counts as whole while the storage lacks what the primary's host has cached",
    ),
    (
        "flush-answered-at-the-commit",
        "a flush is answered when its writes are committed, not when they are in the storage",
    ),
    ("newest-kept-writes-only", "a new primary writes what it kept of the newest epoch, and forgets those before it"),
    ("device-without-fencing", "a block device is shared though nothing keeps the other host from writing late"),
    ("runs-while-it-is-saved", "the guest runs on while its snapshot is written"),
    ("two-snapshots-at-once", "a second snapshot is begun while one is being written"),
    ("snapshot-without-its-disks", "a guest that goes on writing to its disk is saved without it"),
    (
        "stopped-snapshot-goes-on",
        "a guest that is to stop with its snapshot runs on while the arbiter is asked about its peer",
    ),
    ("snapshot-counts-as-quit", "a snapshot that stops its guest and one quit count as an operator who asks twice"),
    ("stop-only-from-the-old-record", "a shutdown while a swap is on its way fences the node"),
    ("different-block-taken-for-equal", "a newcomer's block that differs is taken for equal, and not pushed"),
    ("data-taken-for-a-hole", "where a newcomer has made its disk just now, no block of it is sent"),
    ("made-image-taken-for-equal", "a newcomer's disk that was made just now is taken for the guest's"),
    ("unreadable-taken-for-equal", "blocks that a primary cannot hash are taken for equal"),
    (
        "own-hashes-of-an-earlier-question",
        "a primary takes its own hashes for an earlier question as those for this one",
    ),
    ("block-too-many-settled", "a block of a disk that travels settles the block after it too"),
    ("whole-while-comparing", "an image counts as whole while some of its blocks are being compared"),
    ("made-for-ever", "a secondary whose disk was made for this resync does not sum it even when it is whole"),
    (
        "verify-asks-before-the-cut",
        "a verify asks the secondary ahead of the epoch of which the primary reads its own blocks",
    ),
    ("verify-waits-for-ever", "a verify does not go on when the primary's hashes come after the secondary's"),
    ("verify-of-what-is-there-now", "a verify reads the primary's blocks as they are, not as they were at the cut"),
    ("frozen-after-the-cut", "a verify freezes blocks for an epoch that is being cut already"),
    ("late-cut-carried-out", "a capture that was begun for a newcomer who is given up since holds the output"),
    ("stuck-guest-vouched-for-ever", "a primary whose guest cannot be captured never hands it over"),
    ("own-sleep-counts", "a node that was asleep itself takes that time for its peer's silence"),
    ("handed-over-and-released", "a primary that hands its guest over lets the held output go"),
    ("handed-over-without-looking", "a primary that hands its guest over asks for it again at once"),
    ("begun-forgotten-with-the-peer", "a second capture is begun while one for a lost newcomer still runs"),
    ("tracking-failure-ignored", "epochs are captured although no dirty pages are tracked"),
    ("failed-stop-believed", "a guest that could not be stopped counts as stopped"),
    ("lease-without-end", "heartbeats go on for ever while the engine hangs"),
    ("staging-not-given-back", "what an epoch took of the staging memory is not given back when it is applied"),
    ("zero-window-taken-for-loss", "a connection whose peer takes nothing for a while counts as stuck"),
    ("heartbeats-wait-for-the-sender", "no heartbeat leaves while the data connection does not take what is sent"),
    ("takeover-before-applied", "a new primary restores its image before all that is committed is in it"),
    ("spoilt-image-ignored", "a secondary whose image is spoilt goes on, and takes over"),
    ("lost-guest-joins-again", "a node that cannot restore the guest it won joins again as a newcomer"),
    ("claim-won-without-an-answer", "a start that gets no answer to its swap takes the guest for its own"),
    ("claim-read-anew", "a start that gets no answer reads the record again, and takes its own win for another node's"),
    ("claim-won-by-generation", "of two starts at once both win the generation that they asked for"),
    ("running-guest-claimed", "a start takes a guest that the record says another node runs"),
    ("candidates-without-bound", "a primary keeps every newcomer that says hello and does not go on"),
    ("silent-peers-keep-others-out", "with too many silent connections open a new one is turned away, not the oldest"),
    ("another-guests-hello-welcomed", "a primary welcomes who wants to hold another guest"),
    ("any-heartbeat-connection-joins", "whoever opens a heartbeat connection makes the first newcomer the peer"),
    ("joining-held-for-ever", "a newcomer that makes no progress with its machine is waited for as long as it beats"),
    ("hashed-behind-a-later-epoch", "a secondary hashes its blocks when it gets to it, whatever it has applied since"),
];

/// The first seed that finds the bug, and what it found.
fn hunt(name: &'static str, seeds: u64) -> Option<(u64, String)> {
    mutant::choose(name);
    let found = (0..seeds).find_map(|seed| run(seed, false).1.map(|why| (seed, why)));
    mutant::choose("");
    found
}

#[test]
fn every_mutant_is_caught() {
    let seeds = number("SIM_SEEDS").unwrap_or(SEEDS_MAX);
    let wanted = std::env::var("SIM_MUTANT").unwrap_or_default();
    let mutants: Vec<_> = MUTANTS.iter().filter(|(name, _)| name.contains(&wanted)).collect();
    assert!(!mutants.is_empty(), "no mutant is called {wanted}");
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let caught = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((name, what)) = mutants.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    match hunt(name, seeds) {
                        Some((seed, why)) => {
                            caught.fetch_add(1, Ordering::Relaxed);
                            println!("caught after {:>5} seeds  {name}: {what}\n                     {why}", seed + 1);
                        }
                        None => println!("NOT CAUGHT in {seeds} seeds  {name}: {what}"),
                    }
                }
            });
        }
    });
    let caught = caught.into_inner();
    println!("{caught} of {} mutants caught", mutants.len());
    assert_eq!(caught, mutants.len() as u64);
}
