//! Each rule of the inbox, and a race of many threads for its wake-ups.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;
use crate::protocol::command::Command;
use crate::protocol::messages::{Activity, Heartbeat, Message};
use crate::protocol::types::{Generation, InstanceId};

const PAST: Option<Instant> = Some(Instant { us: 0 });

fn background(conn: u64, bytes: usize) -> NodeEvent {
    NodeEvent::Background { conn, payload: vec![0; bytes] }
}

fn message(conn: u64) -> NodeEvent {
    NodeEvent::Message { conn, message: Message::HashBlocks { first: 0, count: 1 } }
}

fn checkpoint() -> NodeEvent {
    NodeEvent::Command { command: Command::Checkpoint, reply: None }
}

fn hashed(ticket: u64) -> NodeEvent {
    NodeEvent::OwnHashes { ticket, hashes: Ok(Vec::new()) }
}

fn epoch(epoch: u64) -> EpochId {
    EpochId { generation: Generation(1), epoch }
}

/// A word for what comes next, without waiting for it.
fn next(inbox: &Inbox) -> String {
    let queues = inbox.queues();
    let event = queues.try_take(&mut queues.shared.turn.lock());
    match event {
        Some(event) => name(Next::Event(event)),
        None => "nothing".into(),
    }
}

fn name(next: Next) -> String {
    match next {
        Next::Due => "due".into(),
        Next::Gone => "gone".into(),
        Next::Event(event) => match event {
            NodeEvent::Background { conn, .. } | NodeEvent::Message { conn, .. } => format!("link {conn}"),
            NodeEvent::Closed { conn, why } => format!("closed {conn} ({why})"),
            NodeEvent::Command { command, .. } => format!("{command:?}"),
            NodeEvent::OwnHashes { ticket, .. } => format!("report {ticket}"),
            NodeEvent::OutputWaiting => "output waiting".into(),
            NodeEvent::OutputFull => "output full".into(),
            NodeEvent::JournalFull => "journal full".into(),
            NodeEvent::DisksHaveRoom => "disks have room".into(),
            NodeEvent::Written { through } => format!("written {through}"),
            NodeEvent::StorageFault(why) => format!("storage {why:?}"),
            NodeEvent::Machine(event) => format!("{event:?}"),
            _ => "another".into(),
        },
    }
}

#[test]
fn a_due_timer_comes_before_everything_and_does_not_starve_it() {
    let (sender, inbox) = inbox();
    sender.raise(Flag::OutputWaiting);
    sender.report(hashed(1)).unwrap();
    let order: Vec<_> = (0..5).map(|_| name(inbox.next(PAST))).collect();
    assert_eq!(order, ["due", "output waiting", "due", "report 1", "due"]);
    assert_eq!(name(inbox.next(PAST)), "due", "nothing waits");
}

#[test]
fn the_newest_heartbeat_comes_before_a_due_timer_and_does_not_starve_it() {
    let (sender, inbox) = inbox();
    let beat = |sequence| {
        let (instance, generation) = (InstanceId(1), Generation(1));
        Message::Heartbeat(Heartbeat { instance, generation, sequence, committed: None, activity: Activity::Ready })
    };
    sender.heartbeat(7, beat(1));
    sender.heartbeat(7, beat(2));
    match inbox.next(PAST) {
        Next::Event(NodeEvent::Message { conn: 7, message }) => assert_eq!(message, beat(2), "only the newest is kept"),
        other => panic!("{}", name(other)),
    }
    sender.heartbeat(7, beat(3));
    assert_eq!(name(inbox.next(PAST)), "due", "a flood of heartbeats starves no timer");
    assert_eq!(name(inbox.next(PAST)), "link 7");
    assert_eq!(name(inbox.next(PAST)), "due", "nothing waits");
    for conn in 0..100 {
        sender.heartbeat(conn, beat(1));
    }
    let kept = std::iter::from_fn(|| inbox.queues().shared.latches.take_heartbeat()).count();
    assert!((1..=8).contains(&kept), "{kept} kept of connections without end");
}

#[test]
fn latches_come_before_commands_and_those_before_links() {
    let (sender, inbox) = inbox();
    sender.link_event(message(1)).unwrap();
    sender.command(checkpoint()).unwrap();
    sender.raise(Flag::OutputWaiting);
    sender.raise(Flag::OutputFull);
    let order: Vec<_> = (0..4).map(|_| next(&inbox)).collect();
    assert_eq!(order, ["output full", "output waiting", "Checkpoint", "link 1"]);
}

#[test]
fn a_broken_connection_comes_behind_what_its_reader_delivered_and_waits_for_no_room() {
    let (sender, inbox) = inbox();
    for _ in 0..LINK_EVENTS_MAX {
        sender.link_event(message(1)).unwrap();
    }
    for who in ["its sender", "its heartbeats", "the engine"] {
        sender.link_failed(1, who.into()).unwrap();
    }
    sender.report(hashed(1)).unwrap();
    assert_eq!(next(&inbox), "report 1");
    for _ in 0..LINK_EVENTS_MAX {
        assert_eq!(next(&inbox), "link 1");
    }
    assert_eq!(next(&inbox), "closed 1 (its sender)", "once, whoever finds it");
    assert_eq!(next(&inbox), "nothing");
    sender.link_failed(1, "again".into()).unwrap();
    assert_eq!(next(&inbox), "closed 1 (again)");
    drop(inbox);
    assert_eq!(sender.link_failed(1, "late".into()), Err(InboxGone));
}

#[test]
fn a_flag_raised_many_times_is_one_event() {
    let (sender, inbox) = inbox();
    for _ in 0..1_000_000 {
        sender.raise(Flag::OutputWaiting);
        sender.raise(Flag::JournalFull);
        sender.raise(Flag::DisksHaveRoom);
    }
    let order: Vec<_> = (0..4).map(|_| next(&inbox)).collect();
    assert_eq!(order, ["journal full", "output waiting", "disks have room", "nothing"]);
    sender.raise(Flag::OutputWaiting);
    assert_eq!(next(&inbox), "output waiting");
}

#[test]
fn flags_raised_all_the_time_let_queued_events_through() {
    let (sender, inbox) = inbox();
    sender.report(hashed(1)).unwrap();
    sender.link_event(message(1)).unwrap();
    let mut order = Vec::new();
    for _ in 0..4 {
        sender.raise(Flag::OutputFull);
        order.push(next(&inbox));
    }
    assert_eq!(order, ["output full", "report 1", "output full", "link 1"]);
}

#[test]
fn commands_all_the_time_let_links_through() {
    let (sender, inbox) = inbox();
    sender.link_event(message(1)).unwrap();
    let mut before = 0;
    loop {
        sender.command(checkpoint()).unwrap();
        if next(&inbox) == "link 1" {
            break;
        }
        before += 1;
        assert!(before <= INTERNAL_RUN_MAX, "the link event is starved");
    }
    assert_eq!(before, INTERNAL_RUN_MAX);
}

#[test]
fn a_guest_that_rings_its_event_port_for_ever_is_one_event_and_cannot_hide_its_end() {
    let (sender, inbox) = inbox();
    let machine = sender.of_new_machine();
    for _ in 0..100_000 {
        machine.send(GuestEvent::Booted);
        machine.send(GuestEvent::Panicked);
        machine.send(GuestEvent::DeviceBroken { device: "net", reason: "again".into(), count: 1 });
    }
    machine.send(GuestEvent::Reset);
    machine.send(GuestEvent::Shutdown);
    assert_eq!(next(&inbox), "Reset", "the first end");
    assert_eq!([next(&inbox), next(&inbox)], ["Booted", "Panicked"]);
    assert!(next(&inbox).starts_with("DeviceBroken"));
    machine.send(GuestEvent::Shutdown);
    machine.send(GuestEvent::Booted);
    machine.send(GuestEvent::VcpuFailed { cpu: 0, reason: "late".into() });
    assert_eq!(next(&inbox), "nothing", "an end is delivered once");
}

#[test]
fn the_end_of_a_guest_is_that_of_the_newest_machine() {
    let (sender, inbox) = inbox();
    let old = sender.of_new_machine();
    old.send(GuestEvent::Shutdown);
    let new = sender.of_new_machine();
    old.send(GuestEvent::Reset);
    assert_eq!(next(&inbox), "nothing");
    new.send(GuestEvent::Shutdown);
    assert_eq!(next(&inbox), "Shutdown");
}

#[test]
fn of_storage_only_the_newest_counts() {
    let (sender, inbox) = inbox();
    (0..1000).for_each(|k| sender.written(epoch(k)));
    sender.storage_fault(Some("full".into()));
    sender.storage_fault(None);
    assert_eq!([next(&inbox), next(&inbox), next(&inbox)], ["written g1/999", "storage None", "nothing"]);
}

#[test]
fn two_signals_are_two_quits_and_more_are_no_more() {
    let (sender, inbox) = inbox();
    (0..5).for_each(|_| sender.quit());
    assert_eq!([next(&inbox), next(&inbox), next(&inbox)], ["Quit", "Quit", "nothing"]);
}

#[test]
fn a_command_too_many_is_refused_and_reports_are_not() {
    let (sender, inbox) = inbox();
    for _ in 0..COMMANDS_MAX {
        assert_eq!(sender.command(checkpoint()), Ok(()));
    }
    assert_eq!(sender.command(checkpoint()), Err(CommandNotTaken::Full));
    sender.report(hashed(7)).unwrap();
    assert_eq!(next(&inbox), "Checkpoint");
    assert_eq!(sender.command(checkpoint()), Ok(()), "there is room again");
    let rest: Vec<_> = std::iter::from_fn(|| Some(next(&inbox)).filter(|name| name != "nothing")).collect();
    assert_eq!(rest.iter().filter(|name| *name == "report 7").count(), 1);
    assert_eq!(rest.len(), COMMANDS_MAX + 1);
}

#[test]
fn more_reports_than_jobs_end_the_node() {
    let (sender, inbox) = inbox();
    for _ in 0..REPORTS_MAX {
        sender.report(hashed(1)).unwrap();
    }
    assert_eq!(sender.report(hashed(1)), Err(InboxGone));
    assert!(matches!(inbox.next(None), Next::Gone));
}

#[test]
fn a_flood_on_a_connection_waits_for_the_driver_and_no_other_connection_does() {
    let (sender, inbox) = inbox();
    let sent = Arc::new(AtomicUsize::new(0));
    const FLOOD: usize = 1000;
    const BYTES: usize = 1 << 20;
    let flood = {
        let (sender, sent) = (sender.clone(), Arc::clone(&sent));
        thread::spawn(move || {
            for _ in 0..FLOOD {
                sender.link_event(background(1, BYTES)).unwrap();
                sent.fetch_add(1, Ordering::SeqCst);
            }
        })
    };
    // Another one gets in meanwhile, at whatever point of the flood, and is served.
    sender.link_event(message(2)).unwrap();
    let (mut taken, mut others) = (0, 0);
    while taken < FLOOD {
        match inbox.next(None) {
            Next::Event(NodeEvent::Background { .. }) => taken += 1,
            Next::Event(_) => others += 1,
            _ => panic!("the senders are there"),
        }
        // One more than the bound is the one that this thread has just taken out.
        assert!(sent.load(Ordering::SeqCst) <= taken + LINK_BYTES_MAX / BYTES + 1, "more waits than may");
    }
    flood.join().unwrap();
    assert_eq!((others, next(&inbox).as_str()), (1, "nothing"));
}

#[test]
fn a_connection_has_a_bound_of_events_too_and_one_of_any_size_gets_in() {
    let (sender, inbox) = inbox();
    sender.link_event(background(1, 2 * LINK_BYTES_MAX)).unwrap();
    assert_eq!(next(&inbox), "link 1");
    for _ in 0..LINK_EVENTS_MAX {
        sender.link_event(message(1)).unwrap();
    }
    thread::scope(|scope| {
        let waiting = scope.spawn(|| sender.link_event(message(1)));
        sender.link_event(message(2)).unwrap();
        // Both get through only if the first gets its turn once there is room.
        for _ in 0..LINK_EVENTS_MAX + 2 {
            assert!(matches!(inbox.next(None), Next::Event(NodeEvent::Message { .. })));
        }
        assert_eq!(waiting.join().unwrap(), Ok(()));
    });
}

#[test]
fn readers_that_wait_are_let_go_when_the_driver_ends() {
    let (sender, inbox) = inbox();
    for _ in 0..LINK_EVENTS_MAX {
        sender.link_event(message(1)).unwrap();
    }
    thread::scope(|scope| {
        let waiting = scope.spawn(|| sender.link_event(message(1)));
        drop(inbox);
        assert_eq!(waiting.join().unwrap(), Err(InboxGone));
    });
    assert_eq!(sender.command(checkpoint()), Err(CommandNotTaken::Gone));
    assert_eq!(sender.report(hashed(1)), Err(InboxGone));
}

#[test]
fn a_client_whose_command_was_not_taken_hears_of_it() {
    let (sender, inbox) = inbox();
    let (reply, result) = crossbeam::channel::bounded(1);
    sender.command(NodeEvent::Command { command: Command::Stop, reply: Some(reply) }).unwrap();
    drop(inbox);
    assert!(result.recv().is_err(), "the reply is dropped with the inbox");
}

#[test]
fn without_senders_what_was_sent_still_comes() {
    let (sender, inbox) = inbox();
    let late = sender.clone();
    thread::scope(|scope| {
        scope.spawn(move || late.report(hashed(1)).unwrap());
        drop(sender);
        assert_eq!([name(inbox.next(None)), name(inbox.next(None))], ["report 1", "gone"]);
    });
}

/// Every producer waits for the answer to each of its events, so a single wake-up that gets lost
/// hangs the test.
#[test]
fn no_wake_up_is_lost() {
    const ROUNDS: u64 = 20_000;
    let (sender, inbox) = inbox();
    let (done, answers) = crossbeam::channel::bounded::<()>(1);
    let (told, reports) = crossbeam::channel::bounded::<()>(1);
    let (heard, links) = crossbeam::channel::bounded::<()>(1);
    thread::scope(|scope| {
        let flags = sender.clone();
        scope.spawn(move || {
            for _ in 0..ROUNDS {
                flags.raise(Flag::OutputWaiting);
                answers.recv().unwrap();
            }
        });
        let reporter = sender.clone();
        scope.spawn(move || {
            for ticket in 0..ROUNDS {
                reporter.report(hashed(ticket)).unwrap();
                reports.recv().unwrap();
            }
        });
        let reader = sender.clone();
        scope.spawn(move || {
            for _ in 0..ROUNDS {
                reader.link_event(message(1)).unwrap();
                links.recv().unwrap();
            }
        });
        drop(sender);
        let (mut flags, mut reports, mut links) = (0, 0, 0);
        loop {
            match inbox.next(None) {
                Next::Event(NodeEvent::OutputWaiting) => {
                    flags += 1;
                    done.send(()).unwrap();
                }
                Next::Event(NodeEvent::OwnHashes { .. }) => {
                    reports += 1;
                    told.send(()).unwrap();
                }
                Next::Event(_) => {
                    links += 1;
                    heard.send(()).unwrap();
                }
                Next::Due => panic!("there is no timer"),
                Next::Gone => break,
            }
        }
        assert_eq!((flags, reports, links), (ROUNDS, ROUNDS, ROUNDS));
    });
}
