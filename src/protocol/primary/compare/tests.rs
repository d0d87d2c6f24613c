//! A primary whose peer, arbiter and driver are the test's own: what it compares, when, and what it
//! makes of the answers.

use std::collections::BTreeSet;
use std::ops::Range;

use super::super::{Action, Input, Phase, Primary, PrimaryConfig};
use crate::protocol::arbitration::{ArbiterAnswer, ArbiterRequest};
use crate::protocol::block_hashes::BlockHash;
use crate::protocol::command::{Command, CommandRefused, DiskChoice, VerifyRefused};
use crate::protocol::cpu::HostCpu;
use crate::protocol::event::Event;
use crate::protocol::machine_shape::{DiskShape, MachineShape};
use crate::protocol::messages::{Activity, Channel, Heartbeat, Hello, Message, PROTOCOL_VERSION, features};
use crate::protocol::record::Record;
use crate::protocol::types::{EpochId, GuestName, InstanceId, Instant};
use crate::protocol::verify::{DiskFindings, Outcome};

const ME: InstanceId = InstanceId(1);
const PEER: InstanceId = InstanceId(2);
const DATA: u64 = 11;
const BEATS: u64 = 12;
const CPU: HostCpu = HostCpu { digest: 7, tsc_khz: 1000, tsc_scales: true };
/// Blocks of the first disk, which come behind four pages of memory. The second can only be read;
/// the third has one block.
const BLOCKS: u64 = 300;

fn config() -> PrimaryConfig {
    let disk = |blocks: u64, read_only, serial| DiskShape {
        bytes: blocks * 4096,
        read_only,
        serial: [serial; 20],
        shared: false,
    };
    let mut shape = MachineShape::bare(4 * 4096, 1, [2, 0, 0, 0, 0, 1]);
    shape.disks = vec![disk(BLOCKS, false, 1), disk(9, true, 2), disk(1, false, 3)];
    PrimaryConfig { shape, features: features::DISK_HASHES, ..PrimaryConfig::for_tests() }
}

struct Rig {
    primary: Primary,
    now_ms: u64,
    /// Blocks that differ between the nodes, by index.
    differ: BTreeSet<u64>,
    pushed: Vec<u64>,
    /// What was hashed, and as of which epoch.
    hashed: Vec<(Range<u64>, Option<EpochId>)>,
    preserved: Option<Range<u64>>,
    told: Vec<Event>,
    /// When each run was frozen.
    froze_ms: Vec<u64>,
    /// The peer answers questions for hashes.
    answers: bool,
    /// The answer to the newest command.
    answer: Option<Result<(), CommandRefused>>,
}

impl Rig {
    /// Solo, with these features at the peer's.
    fn joined(features: u64, differ: &[u64]) -> Rig {
        let record = Record::first(ME);
        let mut rig = Rig {
            primary: Primary::new(config(), ME, record, Instant::from_us(0)),
            now_ms: 0,
            differ: differ.iter().copied().collect(),
            pushed: Vec::new(),
            hashed: Vec::new(),
            preserved: None,
            told: Vec::new(),
            froze_ms: Vec::new(),
            answers: true,
            answer: None,
        };
        for (conn, channel) in [(DATA, Channel::Data), (BEATS, Channel::Heartbeat)] {
            let hello = Hello {
                channel,
                version: PROTOCOL_VERSION,
                guest: GuestName::new("web").expect("a name"),
                instance: PEER,
                features,
                staging_bytes_max: u64::MAX,
                cpu: CPU,
            };
            rig.take(Input::Hello { conn, hello });
        }
        let beat = Heartbeat {
            instance: PEER,
            generation: record.generation,
            sequence: 1,
            committed: None,
            activity: Activity::Ready,
        };
        rig.take(Input::Message { conn: BEATS, message: Message::Heartbeat(beat) });
        rig
    }

    /// Gives it an input and does what it wants, until it wants nothing more.
    fn take(&mut self, input: Input) {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            self.primary.handle(Instant::from_us(self.now_ms * 1000), input);
            while let Some(action) = self.primary.poll_action() {
                inputs.extend(self.act(action));
            }
        }
    }

    fn act(&mut self, action: Action) -> Vec<Input> {
        let message = |message| Input::Message { conn: DATA, message };
        match action {
            Action::Ask(call) => {
                let answer = match call.request {
                    ArbiterRequest::Swap { .. } => ArbiterAnswer::Won,
                    ArbiterRequest::Read => ArbiterAnswer::Record(Some(self.primary.record())),
                };
                vec![Input::Answer { ticket: call.ticket, answer }]
            }
            // Backwards: what is last is taken first.
            Action::Capture { id, .. } => vec![message(Message::Ack { id, staged_bytes: 0 }), Input::Captured { id }],
            Action::Push { pages } => {
                self.pushed.extend(pages);
                vec![Input::Pushed]
            }
            Action::Preserve { run } => {
                self.preserved = Some(run);
                self.froze_ms.push(self.now_ms);
                Vec::new()
            }
            Action::HashBlocks { ticket, run, as_of } => {
                assert!(as_of.is_none() || self.preserved.as_ref() == Some(&run), "{run:?} is not frozen");
                self.hashed.push((run.clone(), as_of));
                vec![Input::OwnHashes { ticket, hashes: Ok(hashes(run, &BTreeSet::new())) }]
            }
            Action::Send { message: Message::HashBlocks { first, count }, .. } if self.answers => {
                let hashes = hashes(first..first + u64::from(count), &self.differ);
                vec![Input::PeerHashes { conn: DATA, first, hashes }]
            }
            Action::StartTracking { conn } => vec![Input::Tracking { conn, result: Ok(()) }],
            Action::Run(run) => vec![Input::RunDone { run, result: Ok(()) }],
            Action::Answer { ticket: 1, result } => {
                self.answer = Some(result);
                Vec::new()
            }
            Action::Tell(event) => {
                self.told.push(event);
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms {
            self.now_ms += 1;
            self.take(Input::Tick);
        }
    }

    fn verify(&mut self, choice: DiskChoice) -> Result<(), VerifyRefused> {
        self.take(Input::Command { ticket: 1, command: Command::VerifyDisks(choice) });
        match self.answer.take() {
            Some(Err(CommandRefused::Verify(refused))) => Err(refused),
            answer => {
                answer.expect("an answer").expect("no other refusal");
                Ok(())
            }
        }
    }

    fn outcome(&self) -> Option<&Outcome> {
        self.primary.verify().map(|verify| verify.outcome())
    }
}

fn hashes(run: Range<u64>, differ: &BTreeSet<u64>) -> Vec<BlockHash> {
    run.map(|index| [u8::from(differ.contains(&index)); 32]).collect()
}

#[test]
fn a_newcomer_is_pushed_its_memory_and_the_blocks_that_differ() {
    let alone = Primary::new(config(), ME, Record::first(ME), Instant::from_us(0));
    assert_eq!(alone.check_verify(DiskChoice::All), Err(VerifyRefused::NotProtected));
    let mut rig = Rig::joined(features::DISK_HASHES, &[5, 4 + BLOCKS]);
    rig.pass(10);
    assert_eq!(rig.primary.phase(), Phase::Protected);
    rig.pushed.sort_unstable();
    assert_eq!(rig.pushed, [0, 1, 2, 3, 5, 4 + BLOCKS]);
    let runs = [4..260, 260..4 + BLOCKS, 4 + BLOCKS..5 + BLOCKS].map(|run| (run, None));
    assert_eq!(rig.hashed, runs);
    assert!(rig.told.contains(&Event::DisksCompared { blocks: BLOCKS + 1, same: BLOCKS - 1 }), "{:?}", rig.told);

    // An older peer is asked nothing and pushed everything, and its disks cannot be verified.
    let mut rig = Rig::joined(0, &[]);
    rig.pass(10);
    assert_eq!(rig.primary.phase(), Phase::Protected);
    assert_eq!((rig.pushed.len() as u64, rig.hashed.len()), (4 + BLOCKS + 1, 0));
    assert_eq!(rig.primary.check_verify(DiskChoice::All), Err(VerifyRefused::Unable));
}

#[test]
fn a_verify_sums_frozen_blocks_as_of_their_epoch_and_not_too_fast() {
    let mut rig = Rig::joined(features::DISK_HASHES, &[]);
    rig.pass(10);
    rig.hashed.clear();
    rig.differ = [5, 6, 4 + BLOCKS].into();
    for choice in [DiskChoice::Number(1), DiskChoice::Number(3), DiskChoice::Serial([2; 20])] {
        assert_eq!(rig.primary.check_verify(choice), Err(VerifyRefused::NoSuchDisk));
    }
    rig.verify(DiskChoice::All).expect("a pair");
    assert_eq!(rig.primary.check_verify(DiskChoice::All), Err(VerifyRefused::Busy));
    rig.pass(100);
    assert_eq!(rig.outcome(), Some(&Outcome::Done));
    let runs: Vec<_> = rig.hashed.iter().map(|(run, _)| run.clone()).collect();
    assert_eq!(runs, [4..260, 260..4 + BLOCKS, 4 + BLOCKS..5 + BLOCKS]);
    assert!(rig.hashed.iter().all(|(_, as_of)| as_of.is_some()));
    assert!(rig.froze_ms.windows(2).all(|two| two[1] >= two[0] + 20), "{:?}", rig.froze_ms);
    assert!(rig.told.contains(&Event::DisksVerified { blocks: BLOCKS + 1, different: 3 }), "{:?}", rig.told);
    let verify = rig.primary.verify().expect("one");
    let ranges = |disk: &DiskFindings| disk.ranges.iter().map(|range| (range.start, range.end)).collect::<Vec<_>>();
    let found: Vec<_> = verify.disks().iter().map(|disk| (disk.disk, disk.different, ranges(disk))).collect();
    assert_eq!(found, [(0, 2, vec![(1, 3)]), (2, 1, vec![(0, 1)])]);

    rig.differ.clear();
    rig.verify(DiskChoice::Serial([3; 20])).expect("the last one is done");
    rig.pass(100);
    assert!(rig.told.contains(&Event::DisksVerified { blocks: 1, different: 0 }), "{:?}", rig.told);
}

#[test]
fn a_verify_ends_with_its_pair_and_a_peer_with_its_lies() {
    let mut rig = Rig::joined(features::DISK_HASHES, &[]);
    rig.pass(10);
    rig.answers = false;
    rig.verify(DiskChoice::All).expect("a pair");
    rig.pass(30);
    assert_eq!((rig.outcome(), rig.hashed.len()), (Some(&Outcome::Running), 4), "one question at a time");
    rig.take(Input::Closed { conn: DATA, why: "the cable was cut".into() });
    assert!(matches!(rig.outcome(), Some(Outcome::Failed(_))));
    assert_eq!(rig.primary.phase(), Phase::Solo);
    // What comes too late, from either side, is nobody's.
    rig.take(Input::PeerHashes { conn: DATA, first: 4, hashes: hashes(4..260, &rig.differ) });
    rig.take(Input::OwnHashes { ticket: 4, hashes: Err("nothing is frozen".into()) });
    assert_eq!(rig.told.iter().filter(|event| matches!(event, Event::DisksNotVerified { .. })).count(), 1);

    // Hashes that nobody asked for, and none where some are due.
    for (asked, first, count) in [(false, 4, 256), (true, 5, 256), (true, 4, 255), (true, 4, 0)] {
        let mut rig = Rig::joined(features::DISK_HASHES, &[]);
        rig.pass(10);
        rig.answers = false;
        if asked {
            rig.verify(DiskChoice::Number(0)).expect("a pair");
            rig.pass(5);
        }
        rig.take(Input::PeerHashes { conn: DATA, first, hashes: hashes(first..first + count, &rig.differ) });
        assert_eq!(rig.primary.phase(), Phase::Solo, "{asked} {first} {count}");
    }
}

#[test]
fn what_cannot_be_read_here_costs_the_verify_and_not_the_pair() {
    let mut rig = Rig::joined(features::DISK_HASHES, &[]);
    rig.pass(10);
    rig.answers = false;
    rig.verify(DiskChoice::Number(0)).expect("a pair");
    rig.pass(5);
    let (run, _) = rig.hashed.last().cloned().expect("a question");
    let ticket = rig.hashed.len() as u64;
    rig.take(Input::OwnHashes { ticket, hashes: Err("an I/O error".into()) });
    assert_eq!(rig.outcome(), Some(&Outcome::Running), "the peer's answer is on its way");
    rig.take(Input::PeerHashes { conn: DATA, first: run.start, hashes: hashes(run, &rig.differ) });
    assert!(matches!(rig.outcome(), Some(Outcome::Failed(why)) if why.contains("an I/O error")), "{:?}", rig.outcome());
    rig.pass(10);
    assert_eq!(rig.primary.phase(), Phase::Protected);
}
