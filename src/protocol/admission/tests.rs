//! Each bound of the admission, by a virtual clock.

use super::*;
use crate::protocol::cpu::HostCpu;
use crate::protocol::types::{GuestName, InstanceId};

const CONFIG: AdmissionConfig = AdmissionConfig {
    silent_max: 6,
    silent_per_address_max: 3,
    greeted_max: 4,
    greeted_per_address_max: 2,
    hello_timeout: Duration::from_secs(5),
    report_interval: Duration::from_secs(3),
};
const FIRST: ConnId = 100;

fn at(ms: u64) -> Instant {
    Instant::from_us(ms * 1000)
}

fn new() -> Admission<char> {
    Admission::new(CONFIG, FIRST)
}

/// The number of a connection that must be admitted, and the one that is closed for it.
fn admitted(admission: &mut Admission<char>, ms: u64, address: char) -> (ConnId, Option<ConnId>) {
    match admission.arrived(at(ms), address) {
        Arrival::Admit { conn, close } => (conn, close),
        Arrival::TurnAway(why) => panic!("turned away at {ms}: {why}"),
    }
}

#[test]
fn the_longest_silent_of_an_address_makes_room_for_its_next() {
    let mut admission = new();
    let other = admitted(&mut admission, 0, 'b').0;
    let first = admitted(&mut admission, 1, 'a').0;
    let second = admitted(&mut admission, 2, 'a').0;
    assert_eq!(admitted(&mut admission, 3, 'a').1, None, "three may be silent");
    assert_eq!(admitted(&mut admission, 4, 'a').1, Some(first), "not the other address's, which is older");
    assert_eq!(admitted(&mut admission, 5, 'a').1, Some(second));
    assert_eq!(admission.said_hello(first), Err(TurnedAway::Displaced));
    assert_eq!(admission.said_hello(other), Ok(()));
}

#[test]
fn one_address_closes_no_connection_of_another_however_many_it_opens() {
    let mut admission = new();
    let real = admitted(&mut admission, 0, 'r').0;
    for ms in 1..1000 {
        let close = admitted(&mut admission, ms, 'a').1;
        assert_ne!(close, Some(real));
    }
    assert_eq!(admission.said_hello(real), Ok(()));
}

#[test]
fn with_many_addresses_the_longest_silent_of_all_makes_room() {
    let mut admission = new();
    let conns: Vec<_> = "abcdef".chars().zip(0..).map(|(address, ms)| admitted(&mut admission, ms, address)).collect();
    assert!(conns.iter().all(|(_, close)| close.is_none()));
    assert_eq!(admission.said_hello(conns[0].0), Ok(()), "so it is silent no more");
    assert_eq!(admitted(&mut admission, 10, 'g').1, None);
    assert_eq!(admitted(&mut admission, 11, 'h').1, Some(conns[1].0));
    assert!(admission.gone(conns[2].0));
    assert_eq!(admitted(&mut admission, 12, 'i').1, None, "one went away by itself");
}

#[test]
fn those_that_said_hello_are_never_closed_and_bounded() {
    let mut admission = new();
    let greet = |admission: &mut Admission<char>, address| {
        let (conn, _) = admitted(admission, 0, address);
        admission.said_hello(conn).map(|()| conn).ok()
    };
    let first = greet(&mut admission, 'a').expect("room for it");
    greet(&mut admission, 'a').expect("room for it");
    assert_eq!(admission.arrived(at(1), 'a'), Arrival::TurnAway(TurnedAway::CrowdedSource(2)));
    greet(&mut admission, 'b').expect("room for it");
    greet(&mut admission, 'c').expect("room for it");
    assert_eq!(admission.arrived(at(2), 'd'), Arrival::TurnAway(TurnedAway::Crowded(4)));
    assert!(admission.gone(first));
    assert!(greet(&mut admission, 'a').is_some());
    assert!(!admission.gone(first), "it is gone already");
}

#[test]
fn a_hello_past_the_bound_is_turned_away_too() {
    let mut admission = new();
    let conns: Vec<_> = (0..3).map(|ms| admitted(&mut admission, ms, 'a').0).collect();
    let greeted: Vec<_> = conns.iter().map(|conn| admission.said_hello(*conn)).collect();
    assert_eq!(greeted, [Ok(()), Ok(()), Err(TurnedAway::CrowdedSource(2))]);
    assert!(!admission.gone(conns[2]));
}

#[test]
fn numbers_are_never_used_twice() {
    let mut admission = new();
    let numbers: Vec<_> = (0..20).map(|ms| admitted(&mut admission, ms, 'a').0).collect();
    assert_eq!(numbers, (FIRST..FIRST + 20).collect::<Vec<_>>());
}

#[test]
fn a_hello_has_to_be_said_in_time() {
    let mut admission = new();
    assert_eq!(admission.poll_timeout(), None);
    let silent = admitted(&mut admission, 0, 'a').0;
    let greeted = admitted(&mut admission, 1, 'a').0;
    let later = admitted(&mut admission, 1000, 'a').0;
    assert_eq!(admission.said_hello(greeted), Ok(()));
    assert_eq!(admission.poll_timeout(), Some(at(5000)));
    assert_eq!(admission.poll(at(4999)), None);
    assert_eq!(admission.poll(at(5000)), Some(Overdue::Close(silent)));
    assert_eq!((admission.poll(at(5000)), admission.poll_timeout()), (None, Some(at(6000))));
    assert_eq!(admission.said_hello(later), Ok(()));
    assert_eq!((admission.poll(at(60_000)), admission.poll_timeout()), (None, None));
}

#[test]
fn a_flood_of_refusals_is_one_report_and_then_a_count() {
    let mut admission = new();
    let reported = (0..1000).filter(|ms| admission.refused(at(*ms), Refusal::Crowded)).count();
    assert_eq!(reported, 1);
    assert!(admission.refused(at(1000), Refusal::NoHello), "another kind has a count of its own");
    assert_eq!(admission.poll_timeout(), Some(at(3000)));
    assert_eq!(admission.poll(at(2999)), None);
    assert_eq!(admission.poll(at(3000)), Some(Overdue::Report(Refusal::Crowded, 999)));
    assert_eq!(admission.poll(at(3000)), None);
    // The flood goes on: only counted, once in an interval.
    let reported = (3000..5000).filter(|ms| admission.refused(at(*ms), Refusal::Crowded)).count();
    assert_eq!(reported, 0);
    assert_eq!(admission.poll(at(6000)), Some(Overdue::Report(Refusal::Crowded, 2000)));
    // It ended, and so do the reports.
    assert_eq!((admission.poll(at(9000)), admission.poll_timeout()), (None, None));
    assert!(admission.refused(at(9001), Refusal::Crowded), "the first after a quiet interval");
}

#[test]
fn what_others_said_wrong_is_reported_a_few_times() {
    let mut admission = new();
    let reported = (0..30).filter(|ms| admission.refused(at(*ms), Refusal::NoHello)).count();
    assert_eq!(reported, 16);
    assert_eq!(admission.poll(at(3000)), Some(Overdue::Report(Refusal::NoHello, 14)));
}

#[test]
fn a_network_is_one_source_and_so_is_an_ipv4_address_however_it_is_written() {
    let v6 = |network: u8, host: u8| {
        let mut address = [0x20, 1, 0xd, 0xb8, 0, 0, 0, network, 0, 0, 0, 0, 0, 0, 0, 0];
        address[15] = host;
        Source::of_v6(address)
    };
    assert_eq!(v6(1, 1), v6(1, 2), "its hosts choose the rest as they like");
    assert_ne!(v6(1, 1), v6(2, 1));
    let mapped = |host| Source::of_v6([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, host]);
    assert_eq!(mapped(1), Source::V4([192, 0, 2, 1]));
    assert_ne!(mapped(1), mapped(2));
}

#[test]
fn a_connection_begins_with_the_hello_of_its_port() {
    let hello = |channel| Hello {
        channel,
        version: 1,
        guest: GuestName::new("web").expect("a name"),
        instance: InstanceId(7),
        features: 0,
        staging_bytes_max: 0,
        cpu: HostCpu { digest: 7, tsc_khz: 1000, tsc_scales: true },
    };
    for (port, other) in [(Channel::Data, Channel::Heartbeat), (Channel::Heartbeat, Channel::Data)] {
        assert_eq!(first_hello(port, Message::Hello(hello(port))), Ok(hello(port)));
        let wrong = first_hello(port, Message::Hello(hello(other)));
        assert_eq!(wrong, Err(TurnedAway::OtherChannel(port)));
    }
    let bye = first_hello(Channel::Data, Message::Bye { reason: String::new() }).expect_err("no hello");
    assert_eq!(bye.to_string(), "a newcomer begins with a hello, not bye");
}

#[test]
fn who_is_turned_away_hears_why_if_it_is_a_node() {
    let unreadable = |reason| TurnedAway::Unreadable { reason, why: "why".into() };
    let cases = [
        (TurnedAway::Crowded(4), Some(RefuseReason::Busy), Refusal::Crowded),
        (TurnedAway::CrowdedSource(2), Some(RefuseReason::Busy), Refusal::Crowded),
        (TurnedAway::Displaced, Some(RefuseReason::Busy), Refusal::Crowded),
        (TurnedAway::NoThread("EAGAIN".into()), None, Refusal::Crowded),
        (TurnedAway::Late, None, Refusal::NoHello),
        (TurnedAway::OtherChannel(Channel::Data), Some(RefuseReason::Malformed), Refusal::NoHello),
        (TurnedAway::NoHello("bye"), Some(RefuseReason::Malformed), Refusal::NoHello),
        (unreadable(Some(RefuseReason::Version)), Some(RefuseReason::Version), Refusal::NoHello),
        (unreadable(None), None, Refusal::NoHello),
    ];
    for (why, reason, refusal) in cases {
        assert_eq!((why.reason(), why.refusal()), (reason, refusal), "{why}");
        assert!(!why.to_string().contains('\n'));
    }
}
