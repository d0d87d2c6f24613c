//! The reports of the lab's program in the guest, as JSON: shared by the program and the lab.

use serde::{Deserialize, Serialize};

/// The port on which the guest tells what its clocks did: a line for each line it gets.
pub const CLOCKS_PORT: u16 = 7001;

/// What one clock did, as seen on one vCPU against all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockSteps {
    /// How often it was behind what some vCPU had read before.
    pub back: u64,
    /// By how much at most, in ns.
    pub back_ns_max: u64,
    /// Most that it moved on between two reads of this vCPU, in ns. A thread that sleeps or is not
    /// run moves it too.
    pub forward_ns_max: u64,
}

/// What the clocks did on one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuClocks {
    /// How often each was read.
    pub reads: u64,
    /// CLOCK_MONOTONIC.
    pub monotonic: ClockSteps,
    /// CLOCK_BOOTTIME.
    pub boottime: ClockSteps,
    /// CLOCK_REALTIME.
    pub realtime: ClockSteps,
}

/// What the guest's clocks did since the program was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// One for each vCPU.
    pub cpus: Vec<CpuClocks>,
    /// The wall clock when this was written, in ns since 1970.
    pub realtime_ns: u64,
    /// How much the distance between wall clock and CLOCK_MONOTONIC changed since the program was
    /// started, in ns: at least and at most.
    pub wall_moved_ns: [i64; 2],
    /// What the kernel reads the time from.
    pub clocksource: String,
}

/// How fast a disk is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskSpeed {
    /// A new file in pieces of 1 MiB, then fsync; in MiB/s, fsync included.
    pub write_mib_s: f64,
    /// The same file past the page cache in pieces of 1 MiB, in MiB/s.
    pub read_mib_s: f64,
    /// 4 KiB over old content, then fdatasync, one after the other.
    pub sync_write: Operations,
    /// 4 KiB from anywhere past the page cache, one after the other.
    pub random_read: Operations,
}

/// Operations one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Operations {
    /// How many there were.
    pub count: u64,
    /// How many in a second.
    pub per_s: f64,
    /// How long one took, in µs.
    pub p50_us: u64,
    /// The 99th of a hundred, in µs.
    pub p99_us: u64,
}
