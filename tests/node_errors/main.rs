//! Errors at the edges of a node, with real processes: what the host lacks, who connects, whom the
//! node connects to, and what the arbiter answers. Each ends in one clear line and the right exit
//! code, or has no effect at all; none ends in a panic.

mod arbiter;
mod block_hashes;
mod disks;
mod environment;
#[expect(dead_code, reason = "another test uses the rest")]
#[path = "../etcd/mod.rs"]
mod etcd;
mod fake;
mod held_joining;
mod host;
mod joining;
mod messages;
mod primaries;
mod process;
mod silent_connections;
mod slow_prefault;
mod snapshots;
mod taps;
mod unknown_peers;
