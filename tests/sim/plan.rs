//! What a seed decides before its run begins: how the nodes are configured, how the world behaves,
//! and which faults it will inject.

use std::time::Duration;

use mcd::protocol::cpu::HostCpu;
use mcd::protocol::failure_detector::HeartbeatConfig;
use mcd::protocol::machine_shape::{DiskShape, MachineShape};
use mcd::protocol::messages::features;
use mcd::protocol::pages::PAGE_BYTES;
use mcd::protocol::primary::PrimaryConfig;
use mcd::protocol::secondary::SecondaryConfig;
use mcd::protocol::shared_disk::Fencing;
use mcd::protocol::types::GuestName;

use crate::rng::Rng;
use crate::stream::FRAME_BYTES_MAX;
use crate::unknown_peers::Says;

/// Every host has this one.
pub const CPU: HostCpu = HostCpu { digest: 7, tsc_khz: 1_000_000, tsc_scales: false };

/// The kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// A process dies; its sockets close.
    ProcessCrash,
    /// A host dies; its sockets fall silent.
    HostCrash,
    /// A node is frozen.
    Stall,
    /// One connection breaks.
    Break,
    /// Nothing passes between two nodes, on one channel or both, one way or both.
    Partition,
    /// A node, or all of them, cannot reach the arbiter, or does not hear its answers.
    ArbiterCut,
    /// Everything on one channel takes long.
    Slow,
    /// The wire between two hosts carries little, one way: heartbeats wait behind pages.
    Narrow,
    /// Heartbeats of one node to another are lost, and nothing else.
    Deaf,
    /// The next capture fails.
    CaptureFails,
    /// Captures do not get to their cut for a while: a vCPU or a device does not stop.
    CaptureHangs,
    /// Dirty pages cannot be tracked, or not for a while.
    TrackingFails,
    /// The guest cannot be stopped when that is next asked for.
    StopFails,
    /// A host's kernel takes nothing of its data connections: their windows are closed.
    ZeroWindow,
    /// The sender thread cannot write.
    SenderBlocked,
    /// What is committed is not applied for a while.
    ApplySlow,
    /// The next that is to be applied cannot be.
    ApplyFails,
    /// The next guest that this host takes over cannot be restored.
    RestoreFails,
    /// Programs that are no node of the pair connect to a host.
    UnknownPeers,
    /// An operator starts the guest on a host on which nothing runs.
    Claim,
    /// An operator's command.
    Command,
    /// The guest shuts itself down.
    Shutdown,
}

const KINDS: [FaultKind; 15] = [
    FaultKind::ProcessCrash,
    FaultKind::HostCrash,
    FaultKind::Stall,
    FaultKind::Break,
    FaultKind::Partition,
    FaultKind::ArbiterCut,
    FaultKind::Slow,
    FaultKind::Narrow,
    FaultKind::Deaf,
    FaultKind::CaptureFails,
    FaultKind::CaptureHangs,
    FaultKind::TrackingFails,
    FaultKind::StopFails,
    FaultKind::Command,
    FaultKind::Shutdown,
];

/// Those that are in fewer runs, so that they do not crowd the others out.
const RARE_KINDS: [FaultKind; 7] = [
    FaultKind::UnknownPeers,
    FaultKind::Claim,
    FaultKind::ZeroWindow,
    FaultKind::SenderBlocked,
    FaultKind::ApplySlow,
    FaultKind::ApplyFails,
    FaultKind::RestoreFails,
];

/// A fault that waits for a node to come into a phase, so that short phases are hit as often as
/// long ones.
#[derive(Clone, Debug)]
pub struct Trigger {
    /// The phase's name, as `Debug` writes it.
    pub phase: &'static str,
    /// True for a primary's phase.
    pub primary: bool,
    /// Fires the time after so many entries.
    pub skip: u64,
    pub kind: FaultKind,
    pub after_us: u64,
}

const PRIMARY_PHASES: [&str; 7] = ["Joining", "Resync", "Completing", "Pairing", "Protected", "Deciding", "Stopping"];
const SECONDARY_PHASES: [&str; 7] = ["Building", "Joining", "Syncing", "Standby", "Paired", "Deciding", "Locking"];

/// The plan of a run. Times are in microseconds.
#[derive(Clone, Debug)]
pub struct Plan {
    pub slots: usize,
    /// Pages of an image: of memory, then of the disks of which each host has an image.
    pub pages: u64,
    pub memory: u64,
    /// Blocks of each such disk.
    pub own: Vec<u64>,
    /// Which hosts' builds can sum blocks.
    pub hashes: [bool; 3],
    /// How many of the guest's writes go to them.
    pub block_per_mille: u64,
    /// An operator verifies them now and then; where nobody does, what is wrong with them has to
    /// show itself at a takeover.
    pub verifies: bool,
    /// The longest it usually takes to sum some.
    pub sum_us: u64,
    /// Blocks of the guest's disk on shared storage, which come behind the image's pages; 0 if it
    /// has none.
    pub blocks: u64,
    /// That storage is a block device: its lock keeps only the programs of one host apart.
    pub device: bool,
    /// The longest a batch of writes to it usually takes.
    pub storage_us: u64,
    /// Room for what is staged and not applied yet: enough for one epoch and a frame, or plenty.
    pub staging_bytes_max: u64,
    /// The longest it usually takes to apply an epoch.
    pub apply_us: u64,
    pub heartbeat_us: u64,
    pub timeout_us: u64,
    pub epoch_us: u64,
    pub epoch_min_us: u64,
    pub commit_on_output: bool,
    pub retry_us: u64,
    pub join_timeout_us: u64,
    pub stall_max_us: u64,
    pub push_pages_max: usize,
    pub delay_us: (u64, u64),
    pub tail_per_mille: u64,
    pub tail_us: u64,
    pub user_timeout_us: u64,
    pub arbiter_us: (u64, u64),
    pub arbiter_timeout_us: u64,
    pub guest_step_us: u64,
    pub writes_max: u64,
    pub emit_per_mille: u64,
    pub output_cap: usize,
    pub capture_us: u64,
    pub commit_us: u64,
    pub slow_per_mille: u64,
    pub slow_us: u64,
    pub build_us: u64,
    pub restore_us: u64,
    pub clock_ppm: u64,
    pub faults_until_us: u64,
    pub fault_gap_us: u64,
    pub fault_len_us: u64,
    pub kinds: Vec<FaultKind>,
    /// The only thing that goes wrong is that the wire carries little.
    pub only_narrow: bool,
    /// The only thing that goes wrong is that engines sleep now and then, for less than the
    /// heartbeat timeout.
    pub only_naps: bool,
    /// The same, but no thread of the process runs: what arrives is not read either.
    pub only_freezes: bool,
    /// The only thing that goes wrong is that captures hang.
    pub only_hangs: bool,
    /// The only thing that goes wrong is that what is sent or committed waits for room.
    pub only_blocked: bool,
    /// The only thing that goes wrong is that unknown peers come, all the time.
    pub only_unknown: bool,
    /// What they all say; if not, it differs.
    pub flood: Option<Says>,
    pub hello_timeout_us: u64,
    /// The arbiter keeps no record: a script switches the other host off (`command:`).
    pub recordless: bool,
    /// The longest the sender thread takes to get to a job.
    pub sender_us: u64,
    pub triggers: Vec<Trigger>,
    pub recovery_us_max: u64,
}

impl Plan {
    pub fn draw(rng: &mut Rng) -> Plan {
        let heartbeat_us = rng.range(4_000, 20_000);
        let mut timeout_us = heartbeat_us * rng.range(3, 6);
        let epoch_us = rng.range(2_000, 40_000);
        let faulty = !rng.chance(20);
        let mut kinds: Vec<FaultKind> = KINDS.iter().copied().filter(|_| faulty && rng.chance(500)).collect();
        kinds.extend(RARE_KINDS.iter().filter(|_| faulty && rng.chance(150)));
        if faulty && kinds.is_empty() {
            kinds.push(*rng.pick(&KINDS));
        }
        let only_narrow = faulty && rng.chance(80);
        if only_narrow {
            kinds = vec![FaultKind::Narrow];
        }
        let only_naps = faulty && !only_narrow && rng.chance(30);
        if only_naps {
            kinds = vec![FaultKind::Stall];
        }
        let only_freezes = faulty && !only_narrow && !only_naps && rng.chance(30);
        if only_freezes {
            (kinds, timeout_us) = (vec![FaultKind::Stall], heartbeat_us * rng.range(6, 9));
        }
        let only_hangs = faulty && !only_narrow && !only_naps && !only_freezes && rng.chance(30);
        if only_hangs {
            kinds = vec![FaultKind::CaptureHangs];
        }
        let only_blocked = faulty && !(only_narrow || only_naps || only_freezes || only_hangs) && rng.chance(30);
        if only_blocked {
            kinds = vec![FaultKind::ZeroWindow, FaultKind::SenderBlocked, FaultKind::ApplySlow];
        }
        let quiet = only_narrow || only_naps || only_freezes || only_hangs || only_blocked;
        let only_unknown = faulty && !quiet && rng.chance(20);
        if only_unknown {
            kinds = vec![FaultKind::UnknownPeers];
        }
        let quiet = quiet || only_unknown;
        let recordless = rng.chance(150);
        if recordless {
            // Nothing tells a secondary that was cut off of a guest that was shut down:
            // docs/operating/arbiters.md says so.
            kinds.retain(|kind| !matches!(kind, FaultKind::Command | FaultKind::Shutdown));
        }
        let device = rng.chance(400);
        let fencing = Fencing { lock_reaches_hosts: !device, by_arbiter: recordless, by_operator: false };
        let trigger_count = if kinds.is_empty() { 0 } else { rng.below(4) };
        let triggers = (0..trigger_count).map(|_| Trigger::draw(rng, &kinds, timeout_us)).collect();
        let memory = rng.range(4, 64);
        // Each disk is asked for by itself.
        let disks = if rng.chance(600) { rng.range(1, 3) } else { 0 };
        let own: Vec<u64> = (0..disks).map(|_| rng.range(1, 5)).collect();
        let pages = memory + own.iter().sum::<u64>();
        let blocks = if fencing.is_enough() && rng.chance(600) { rng.range(1, 8) } else { 0 };
        // What is kept of shared disks counts as staged too, and nothing bounds it here.
        let tight = blocks == 0 && (only_blocked || rng.chance(300));
        Plan {
            slots: if !recordless && rng.chance(400) { 3 } else { 2 },
            pages,
            memory,
            own,
            hashes: [rng.chance(850), rng.chance(850), rng.chance(850)],
            sum_us: if rng.chance(300) { rng.range(1_000, 40_000) } else { rng.range(50, 3_000) },
            verifies: rng.chance(600),
            block_per_mille: *rng.pick(&[3, 30, 200]),
            blocks,
            staging_bytes_max: if tight { pages * 4_200 + 2 * FRAME_BYTES_MAX as u64 } else { 1 << 30 },
            // With plenty of staging memory a thread slower than epochs come would never end.
            apply_us: if tight && rng.chance(500) { rng.range(100, epoch_us * 2) } else { rng.range(20, 200) },
            device,
            storage_us: rng.range(100, 20_000),
            heartbeat_us,
            timeout_us,
            epoch_us,
            epoch_min_us: rng.range(200, epoch_us),
            commit_on_output: rng.chance(700),
            retry_us: rng.range(5_000, 30_000),
            join_timeout_us: if only_naps || only_freezes || only_blocked {
                2_000_000
            } else {
                rng.range(40_000, 200_000)
            },
            stall_max_us: timeout_us * rng.range(2, 12),
            push_pages_max: rng.range(1, 32) as usize,
            delay_us: (20, rng.range(50, 1_500)),
            tail_per_mille: if !quiet && rng.chance(300) { rng.range(1, 20) } else { 0 },
            tail_us: timeout_us,
            user_timeout_us: timeout_us * rng.range(1, 8),
            arbiter_us: (100, rng.range(300, 8_000)),
            arbiter_timeout_us: rng.range(10_000, 60_000),
            guest_step_us: rng.range(400, 4_000),
            writes_max: rng.range(1, 8),
            emit_per_mille: rng.range(50, 700),
            output_cap: if rng.chance(300) { rng.range(2, 20) as usize } else { 10_000 },
            capture_us: rng.range(50, 1_000),
            commit_us: rng.range(10, 500),
            slow_per_mille: if !quiet && rng.chance(300) { rng.range(1, 30) } else { 0 },
            slow_us: timeout_us * 2,
            build_us: rng.range(500, 20_000),
            restore_us: rng.range(500, 10_000),
            clock_ppm: if rng.chance(500) { 50_000 } else { 0 },
            faults_until_us: rng.range(100_000, 1_200_000),
            fault_gap_us: rng.range(10_000, 300_000),
            fault_len_us: timeout_us * rng.range(1, 6),
            kinds,
            only_narrow,
            only_naps,
            only_freezes,
            only_hangs,
            only_blocked,
            only_unknown,
            flood: if rng.chance(500) { Some(Says::Nothing) } else { None },
            hello_timeout_us: if only_unknown { 2_000_000 } else { rng.range(20_000, 200_000) },
            recordless,
            sender_us: if rng.chance(300) { rng.range(300, 8_000) } else { 300 },
            triggers,
            recovery_us_max: 6_000_000,
        }
    }

    /// How long after a takeover the old primary may still release what it knows to be committed:
    /// until a heartbeat that was long on its way, or an answer of the arbiter that was, is too old
    /// to count.
    pub fn late_us_max(&self) -> u64 {
        let link = self.user_timeout_us + self.timeout_us + 30_000;
        (link + self.arbiter_timeout_us + 2 * self.timeout_us) * 11 / 10
    }

    /// Nothing goes wrong but one harmless thing.
    pub fn is_quiet(&self) -> bool {
        self.only_narrow
            || self.only_naps
            || self.only_freezes
            || self.only_hangs
            || self.only_blocked
            || self.only_unknown
    }

    /// The longest a process may be frozen that nobody may suspect: its last heartbeat may have
    /// left an interval before, and its peer may have been frozen itself; clocks differ.
    pub fn freeze_us_max(&self) -> u64 {
        (self.timeout_us * 85 / 100).saturating_sub(self.heartbeat_us * 5 / 2 + 3_000)
    }

    pub fn guest_name() -> GuestName {
        GuestName::new("sim").expect("a good name")
    }

    fn shape(&self) -> MachineShape {
        let mut shape = MachineShape::bare(self.memory * PAGE_BYTES as u64, 1, [2, 0, 0, 0, 0, 1]);
        let disk = |blocks: u64, shared| DiskShape {
            bytes: blocks * PAGE_BYTES as u64,
            read_only: false,
            shared,
            serial: [0; 20],
        };
        shape.disks.extend(self.own.iter().map(|blocks| disk(*blocks, false)));
        shape.disks.extend((self.blocks > 0).then(|| disk(self.blocks, true)));
        shape
    }

    fn features(&self, slot: usize) -> u64 {
        features::LZ4 | if self.hashes[slot] { features::DISK_HASHES } else { 0 }
    }

    pub fn primary(&self, slot: usize) -> PrimaryConfig {
        let us = Duration::from_micros;
        PrimaryConfig {
            guest: Plan::guest_name(),
            shape: self.shape(),
            cpu: CPU.own_guest(),
            features: self.features(slot),
            interval: us(self.epoch_us),
            interval_min: us(self.epoch_min_us),
            commit_on_output: self.commit_on_output,
            heartbeat: HeartbeatConfig { interval: us(self.heartbeat_us), timeout: us(self.timeout_us) },
            arbiter_retry: us(self.retry_us),
            join_timeout: us(self.join_timeout_us),
            build_silence_max: us(self.build_us + self.slow_us + self.timeout_us * 20),
            stall_max: us(self.stall_max_us),
            handover_timeout: us(self.timeout_us * 4),
            drain_timeout: us(self.timeout_us),
            push_pages_max: self.push_pages_max,
        }
    }

    pub fn secondary(&self, slot: usize) -> SecondaryConfig {
        SecondaryConfig {
            guest: Plan::guest_name(),
            cpu: CPU,
            features: self.features(slot),
            staging_bytes_max: 1 << 30,
            retry: Duration::from_micros(self.retry_us),
            answer_timeout: Duration::from_micros(self.join_timeout_us),
            stall_max: Duration::from_micros(self.stall_max_us),
        }
    }
}

impl Trigger {
    fn draw(rng: &mut Rng, kinds: &[FaultKind], timeout_us: u64) -> Trigger {
        let primary = rng.chance(600);
        let phase = if primary { *rng.pick(&PRIMARY_PHASES) } else { *rng.pick(&SECONDARY_PHASES) };
        let span = *rng.pick(&[0, 300, 2_000, 10_000, timeout_us]);
        Trigger { phase, primary, skip: rng.below(3), kind: *rng.pick(kinds), after_us: rng.range(0, span) }
    }
}
