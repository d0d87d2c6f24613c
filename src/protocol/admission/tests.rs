//! Each bound of the admission, by a virtual clock.

use super::*;

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
        Arrival::TurnAway => panic!("turned away at {ms}"),
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
    assert!(!admission.said_hello(first), "it was closed");
    assert!(admission.said_hello(other));
}

#[test]
fn one_address_closes_no_connection_of_another_however_many_it_opens() {
    let mut admission = new();
    let real = admitted(&mut admission, 0, 'r').0;
    for ms in 1..1000 {
        let close = admitted(&mut admission, ms, 'a').1;
        assert_ne!(close, Some(real));
    }
    assert!(admission.said_hello(real));
}

#[test]
fn with_many_addresses_the_longest_silent_of_all_makes_room() {
    let mut admission = new();
    let conns: Vec<_> = "abcdef".chars().zip(0..).map(|(address, ms)| admitted(&mut admission, ms, address)).collect();
    assert!(conns.iter().all(|(_, close)| close.is_none()));
    assert!(admission.said_hello(conns[0].0), "so it is silent no more");
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
        admission.said_hello(conn).then_some(conn)
    };
    let first = greet(&mut admission, 'a').expect("room for it");
    greet(&mut admission, 'a').expect("room for it");
    assert_eq!(admission.arrived(at(1), 'a'), Arrival::TurnAway, "two of one address");
    greet(&mut admission, 'b').expect("room for it");
    greet(&mut admission, 'c').expect("room for it");
    assert_eq!(admission.arrived(at(2), 'd'), Arrival::TurnAway, "four in all");
    assert!(admission.gone(first));
    assert!(greet(&mut admission, 'a').is_some());
    assert!(!admission.gone(first), "it is gone already");
}

#[test]
fn a_hello_past_the_bound_is_turned_away_too() {
    let mut admission = new();
    let conns: Vec<_> = (0..3).map(|ms| admitted(&mut admission, ms, 'a').0).collect();
    let greeted: Vec<_> = conns.iter().map(|conn| admission.said_hello(*conn)).collect();
    assert_eq!(greeted, [true, true, false]);
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
    assert!(admission.said_hello(greeted));
    assert_eq!(admission.poll_timeout(), Some(at(5000)));
    assert_eq!(admission.poll(at(4999)), None);
    assert_eq!(admission.poll(at(5000)), Some(Overdue::Close(silent)));
    assert_eq!((admission.poll(at(5000)), admission.poll_timeout()), (None, Some(at(6000))));
    assert!(admission.said_hello(later));
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
