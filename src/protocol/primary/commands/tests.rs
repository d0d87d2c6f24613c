//! A primary that is asked to end, by its operator or with a snapshot, while the arbiter has not
//! answered.

use std::time::Duration;

use super::super::{Action, Input, Phase, Primary, PrimaryConfig};
use crate::protocol::arbitration::{ArbiterAnswer, ArbiterRequest};
use crate::protocol::command::{AnnounceSeries, Command, CommandRefused, DiskChoice};
use crate::protocol::cpu::HostCpu;
use crate::protocol::messages::{Activity, Channel, Heartbeat, Hello, Message, PROTOCOL_VERSION};
use crate::protocol::record::{Record, RecordState};
use crate::protocol::types::{GuestName, InstanceId, Instant};

const ME: InstanceId = InstanceId(1);
const PEER: InstanceId = InstanceId(2);
const DATA: u64 = 11;
const BEATS: u64 = 12;
const CPU: HostCpu = HostCpu { digest: 7, tsc_khz: 1000, tsc_scales: true };

struct Rig {
    primary: Primary,
    /// The question that waits for an answer: its ticket, and the record it wants.
    asked: Option<(u64, Option<Record>)>,
    exited: bool,
    /// The vCPUs do not stop when they are told to.
    stops_fail: bool,
    /// What they were told: to run, or to stop.
    orders: Vec<bool>,
}

impl Rig {
    /// Takes an input, and does what the primary wants but answering for the arbiter.
    fn take(&mut self, input: Input) {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            self.primary.handle(Instant::from_us(0), input);
            while let Some(action) = self.primary.poll_action() {
                match action {
                    Action::Push { .. } => inputs.push(Input::Pushed),
                    Action::StartTracking { conn } => inputs.push(Input::Tracking { conn, result: Ok(()) }),
                    Action::Run(run) => {
                        let fails = !run && self.stops_fail;
                        let result = if fails { Err("a vCPU does not stop".into()) } else { Ok(()) };
                        self.orders.push(run);
                        inputs.push(Input::RunDone { run, result });
                    }
                    // Backwards: what is last is taken first.
                    Action::Capture { id, .. } => {
                        let ack = Message::Ack { id, staged_bytes: 0 };
                        inputs.extend([Input::Message { conn: DATA, message: ack }, Input::Captured { id }]);
                    }
                    Action::Ask(call) => {
                        let wanted = match call.request {
                            ArbiterRequest::Swap { new, .. } => Some(new),
                            ArbiterRequest::Read => None,
                        };
                        self.asked = Some((call.ticket, wanted));
                    }
                    Action::Exit(_) => self.exited = true,
                    _ => {}
                }
            }
        }
    }

    /// The arbiter carries out what it was asked; the record that stands then.
    fn win(&mut self) -> Option<Record> {
        let (ticket, wanted) = self.asked.take()?;
        self.take(Input::Answer { ticket, answer: ArbiterAnswer::Won });
        wanted
    }

    /// Protected.
    fn protected() -> Rig {
        let name = || GuestName::new("web").expect("a name");
        let config = PrimaryConfig { interval: Duration::from_secs(1), ..PrimaryConfig::for_tests() };
        let record = Record::first(ME);
        let primary = Primary::new(config, ME, record, Instant::from_us(0));
        let mut rig = Rig { primary, asked: None, exited: false, stops_fail: false, orders: Vec::new() };
        for (conn, channel) in [(DATA, Channel::Data), (BEATS, Channel::Heartbeat)] {
            let (version, staging_bytes_max) = (PROTOCOL_VERSION, u64::MAX);
            let hello =
                Hello { channel, version, guest: name(), instance: PEER, features: 0, staging_bytes_max, cpu: CPU };
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
        // That it can write, and the pair.
        assert!(rig.win().is_some() && rig.win().is_some());
        assert_eq!(rig.primary.phase(), Phase::Protected);
        rig
    }

    /// Protected, with a snapshot that was to stop the guest written while the peer is suspected.
    fn stopped_while_deciding() -> Rig {
        let mut rig = Rig::protected();
        rig.take(Input::Snapshot { stop: true });
        rig.take(Input::Closed { conn: DATA, why: "cut".into() });
        rig.take(Input::SnapshotEnded { written: true });
        assert_eq!((rig.primary.phase(), rig.primary.guest_runs(), rig.exited), (Phase::Deciding, false, false));
        rig
    }

    fn quit(&mut self) {
        self.take(Input::Command { ticket: 1, command: Command::Quit });
    }
}

#[test]
fn a_guest_stopped_by_its_snapshot_is_stopped_on_record_once_it_is_known_to_be_ours() {
    let mut rig = Rig::stopped_while_deciding();
    assert_eq!(rig.win().map(|record| record.state), Some(RecordState::Solo));
    assert_eq!((rig.primary.phase(), rig.exited), (Phase::Stopping, false));
    assert_eq!(rig.win().map(|record| record.state), Some(RecordState::Stopped));
    assert!(rig.exited);
}

#[test]
fn a_snapshot_and_one_quit_are_not_an_operator_who_asks_twice() {
    for answered_first in [false, true] {
        let mut rig = Rig::stopped_while_deciding();
        if answered_first {
            rig.win();
        }
        rig.quit();
        assert!(!rig.exited, "the record does not say yet that the guest is over");
        while rig.win().is_some() {}
        assert!(rig.exited && rig.primary.record().state == RecordState::Stopped);

        let mut rig = Rig::stopped_while_deciding();
        if answered_first {
            rig.win();
        }
        rig.quit();
        rig.quit();
        assert!(rig.exited, "twice is twice");
    }
}

#[test]
fn a_guest_that_could_not_be_stopped_for_full_output_runs_and_can_be_stopped_later() {
    let mut rig = Rig::protected();
    rig.take(Input::Closed { conn: DATA, why: "cut".into() });
    rig.stops_fail = true;
    rig.take(Input::OutputFull);
    assert!(rig.primary.guest_runs(), "it did not stop");
    rig.stops_fail = false;
    rig.orders.clear();
    rig.take(Input::Command { ticket: 1, command: Command::Stop });
    assert_eq!((rig.orders.as_slice(), rig.primary.guest_runs()), (&[false][..], false));
}

#[test]
fn a_fenced_node_refuses_what_only_the_node_that_runs_the_guest_can_do() {
    let mut rig = Rig::stopped_while_deciding();
    let (ticket, wanted) = rig.asked.take().expect("a question");
    let theirs = rig.primary.record().next_solo(PEER);
    assert!(wanted.is_some_and(|wanted| wanted != theirs));
    rig.take(Input::Answer { ticket, answer: ArbiterAnswer::Record(Some(theirs)) });
    assert_eq!(rig.primary.phase(), Phase::Fenced);
    for command in [
        Command::Cont,
        Command::Stop,
        Command::Checkpoint,
        Command::VerifyDisks(DiskChoice::All),
        Command::AnnounceSelf(AnnounceSeries::DEFAULT),
    ] {
        rig.primary.handle(Instant::from_us(0), Input::Command { ticket: 9, command });
        let actions: Vec<_> = std::iter::from_fn(|| rig.primary.poll_action()).collect();
        assert!(
            matches!(actions.as_slice(), [Action::Answer { ticket: 9, result: Err(CommandRefused::Fenced) }]),
            "{command:?}: {actions:?}"
        );
    }
}
