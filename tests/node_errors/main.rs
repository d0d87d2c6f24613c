//! The doors of a node, with real processes: what the host lacks, who knocks, whom it meets, and
//! what the arbiter says. Whatever happens there ends in one clear line and the right exit code, or
//! in nothing at all; never in a panic.

mod arbiter;
mod block_hashes;
mod disks;
#[expect(dead_code, reason = "another test uses the rest")]
#[path = "../etcd/mod.rs"]
mod etcd;
mod fake;
mod host;
mod joining;
mod place;
mod primaries;
mod process;
mod snapshots;
mod unknown_peers;
