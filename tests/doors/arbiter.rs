//! What the arbiter says, and what it cannot write.

use std::fs;
use std::path::PathBuf;

use mcd::control::status::State;

use super::place::{FAILURE, Mount, Place, REFUSED, fill_up, mount, run};
use super::process::Node;

/// Room for a record, its successor and little more.
const DISK_BYTES: u64 = 32 << 10;

fn small_disk(place: &Place, fill: bool) -> Node {
    let mut node = place.primary_command(&[]);
    let fill = fill.then(|| place.arbiter().join("filler"));
    mount(&mut node.0, &[Mount::Small(place.arbiter(), DISK_BYTES)], fill);
    Node::start(node)
}

#[test]
fn a_full_disk_starts_no_guest() {
    run("arbiter::a_full_disk_starts_no_guest", |place| {
        small_disk(place, true).fails(FAILURE, &["no space left for arbiter record", "web.record", "make room"]);
        // Nothing is left in the way of the next one.
        let primary = place.primary();
        primary.assert_serves_alone();
    });
}

#[test]
fn a_disk_that_fills_up_costs_protection_and_nothing_else() {
    run("arbiter::a_disk_that_fills_up_costs_protection_and_nothing_else", |place| {
        let mut primary = small_disk(place, false);
        primary.wait_line("the guest starts");
        // Its disk, seen from here.
        let root = PathBuf::from(format!("/proc/{}/root", primary.pid()));
        let arbiter = root.join(place.arbiter().strip_prefix("/").expect("an absolute path"));
        fill_up(&arbiter.join("filler")).expect("it is writable");

        let secondary = place.secondary(&[]);
        let alarmed = primary.wait_status("alarmed", |status| !status.alarms.is_empty());
        assert_eq!(alarmed.state, State::Resync, "{alarmed}");
        assert!(alarmed.running && !alarmed.protected && !alarmed.arbiter.reachable, "{alarmed}");
        assert!(alarmed.alarms.iter().any(|alarm| alarm.contains("no space left")), "{alarmed}");
        primary.wait_warning("MC_ARBITER_LOST");
        // Output is not held meanwhile: the newcomer's image is completed only when the pair can be recorded.
        assert_eq!((alarmed.held_packets, secondary.status().state), (0, State::Resync));

        fs::remove_file(arbiter.join("filler")).expect("it is there");
        let well = primary.wait_state(State::Protected);
        assert!(well.alarms.is_empty() && well.arbiter.reachable, "{well}");
    });
}

#[test]
fn a_guest_on_record_elsewhere() {
    run("arbiter::a_guest_on_record_elsewhere", |place| {
        place.primary().kill();
        Node::start(place.primary_command(&[])).fails(REFUSED, &["guest 'web'", "running elsewhere", "mcd cold-start"]);
        let mut primary = Node::start(place.cold_start_command());
        primary.wait_line("the guest starts");
        primary.assert_serves_alone();
        // An end in order is on record, so that the next start needs nobody's word.
        primary.terminate();
        primary.ends_well();
        let mut primary = place.primary();
        primary.quit();
        primary.ends_well();
        place.primary().assert_serves_alone();
    });
}

#[test]
fn arbiters_that_cannot_be_asked() {
    run("arbiter::arbiters_that_cannot_be_asked", |place| {
        let record = place.arbiter().join("web.record");
        fs::write(&record, "nonsense").expect("a file");
        Node::start(place.primary_command(&[])).fails(FAILURE, &["web.record is damaged", "restore it"]);
        fs::remove_file(&record).expect("a file");
        fs::remove_dir(place.arbiter()).expect("it is empty but for the record");
        Node::start(place.primary_command(&[])).fails(FAILURE, &["arbiter directory", "does not exist", "mount"]);
        fs::write(place.arbiter(), "").expect("a file");
        Node::start(place.primary_command(&[])).fails(FAILURE, &["arbiter"]);
    });
}
