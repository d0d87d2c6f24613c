//! `docs/operating/reference.md` has an entry for every event, every field of the status and every
//! exit code, and none that the program does not have.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use mcd::cli::ExitStatus;
use mcd::control::metrics::{EpochSample, EpochsReply, Quantiles};
use mcd::control::status::{
    ArbiterStatus, EpochCounts, NodeStatus, ResyncPart, ResyncProgress, Role, State, TakeoverReport,
};
use mcd::control::verify::{DiskVerify, VerifyReport, VerifyState};
use mcd::protocol::event::Event;
use serde::Serialize;
use serde_json::Value;

const DOCUMENT: &str = "docs/operating/reference.md";
const ALARMS: &str = "docs/operating/alarms.md";

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The first cells of the table under `heading`, without backticks; and what is wrong with its
/// rows.
fn entries(document: &str, heading: &str) -> (Vec<String>, Vec<String>) {
    let start = format!("## {heading}");
    let section =
        document.lines().skip_while(|line| *line != start).skip(1).take_while(|line| !line.starts_with("## "));
    let rows = section.filter(|line| line.starts_with('|')).skip(2);
    let (mut names, mut wrong) = (Vec::new(), Vec::new());
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let name = cells[0].trim_matches('`').to_owned();
        if cells.iter().any(|cell| cell.is_empty()) {
            wrong.push(format!("{heading}: the entry of {name} has an empty cell"));
        }
        if names.contains(&name) {
            wrong.push(format!("{heading}: {name} has two entries"));
        }
        names.push(name);
    }
    (names, wrong)
}

/// What differs between the entries under `heading` and the names that the program has.
fn differences(document: &str, heading: &str, program: &[String]) -> Vec<String> {
    let (documented, mut wrong) = entries(document, heading);
    let missing = program.iter().filter(|name| !documented.contains(name));
    wrong.extend(missing.map(|name| format!("{heading}: {name} has no entry")));
    let unknown = documented.iter().filter(|name| !program.contains(name));
    wrong.extend(unknown.map(|name| format!("{heading}: {name} is not in the program")));
    wrong
}

fn assert_complete(heading: &str, program: &[String]) {
    assert!(!program.is_empty());
    let wrong = differences(&read(DOCUMENT), heading, program);
    assert!(wrong.is_empty(), "{DOCUMENT}:\n{}", wrong.join("\n"));
}

/// The paths of all values in it. A list stands for its elements as `NAME[]`; a value that is
/// missing (`null`, an empty list) would hide its fields, and fails.
fn fields(value: &impl Serialize) -> Vec<String> {
    fn walk(value: &Value, path: &str, into: &mut BTreeSet<String>) {
        match value {
            Value::Object(members) => {
                assert!(!members.is_empty(), "{path} has no members here: fill it");
                for (name, value) in members {
                    let dot = if path.is_empty() { "" } else { "." };
                    walk(value, &format!("{path}{dot}{name}"), into);
                }
            }
            Value::Array(elements) => {
                assert!(!elements.is_empty(), "{path} has no elements here: fill it");
                elements.iter().for_each(|element| walk(element, &format!("{path}[]"), into));
            }
            Value::Null => panic!("{path} is null here: fill it"),
            Value::Bool(_) | Value::Number(_) | Value::String(_) => drop(into.insert(path.to_owned())),
        }
    }
    let mut paths = BTreeSet::new();
    walk(&serde_json::to_value(value).unwrap(), "", &mut paths);
    paths.into_iter().collect()
}

/// A status in which every field has a value.
fn full_status() -> NodeStatus {
    NodeStatus {
        role: Role::Primary,
        state: State::Resync,
        protected: false,
        guest: "web".into(),
        instance: "0123".into(),
        generation: 3,
        epoch: 17,
        running: true,
        peer: Some("4567".into()),
        listen: "0.0.0.0:7401".into(),
        arbiter: ArbiterStatus { kind: "file".into(), reachable: true, detail: "/srv/mcd".into() },
        interval_ms: 20,
        pause_us: Quantiles::default(),
        commit_us: Quantiles::default(),
        dirty_pages: Quantiles::default(),
        hold_us: Quantiles::default(),
        epochs: EpochCounts::default(),
        wire_bytes: 0,
        held_packets: 0,
        held_bytes: 0,
        lost_frames: 1,
        journal_bytes: 0,
        journal_full_times: 0,
        held_disk_bytes: 0,
        refused_newcomers: 1,
        unused_devices: vec!["disk 0".into()],
        resync: Some(ResyncProgress {
            pages_total: 2,
            pages_left: 1,
            parts: vec![ResyncPart { name: "memory".into(), bytes_total: 8192, bytes_left: 4096 }],
            rate_bytes_s: Some(4096),
            left_s: Some(1.0),
        }),
        takeover: Some(TakeoverReport {
            cause: "closed".into(),
            detect_ms: 0.0,
            arbitrate_ms: 0.0,
            apply_ms: 0.0,
            restore_ms: 0.0,
            resume_ms: 0.0,
            first_packet_ms: Some(0.0),
            started_monotonic_us: 0,
            first_packet_monotonic_us: Some(0),
            clock_forward_ms: 0.0,
            clock_behind_ms: 0.0,
        }),
        alarms: vec!["the arbiter was slow".into()],
    }
}

#[test]
fn every_event_has_its_entry() {
    assert_complete("Events", &Event::NAMES.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
}

#[test]
fn the_alarms_page_names_every_event() {
    let alarms = read(ALARMS);
    let missing: Vec<_> = Event::NAMES.iter().filter(|name| !alarms.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "{ALARMS} does not say what to do about {missing:?}");
}

#[test]
fn every_status_field_has_its_entry() {
    assert_complete("Fields of mc-query", &fields(&full_status()));
}

#[test]
fn every_field_about_epochs_has_its_entry() {
    let reply = EpochsReply { epochs: vec![EpochSample::default()], ..EpochsReply::default() };
    assert_complete("Fields of mc-query-epochs", &fields(&reply));
}

#[test]
fn every_field_about_a_disk_verify_has_its_entry() {
    let disk = DiskVerify { disk: 0, blocks: 2, compared: 2, different: 1, ranges: vec![(0, 1)] };
    let report = VerifyReport {
        state: VerifyState::Different,
        why: Some("no reason".into()),
        block_bytes: 4096,
        epochs: Some(("g1/1".into(), "g1/2".into())),
        disks: vec![disk],
    };
    assert_complete("Fields of mc-query-disk-verify", &fields(&report));
}

#[test]
fn every_exit_code_has_its_entry() {
    let codes: Vec<_> = ExitStatus::ALL.iter().map(|status| (*status as u8).to_string()).collect();
    assert_complete("Exit codes", &codes);
}

const EXAMPLE: &str =
    "## Events\n\nText.\n\n| event | when |\n|---|---|\n| `MC_A` | now |\n| `MC_B` | then |\n\n## Exit codes\n";

#[test]
fn a_missing_and_an_unknown_entry_are_named() {
    let differ = |program: &[&str]| {
        differences(EXAMPLE, "Events", &program.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
    };
    assert_eq!(differ(&["MC_A", "MC_B"]), Vec::<String>::new());
    assert_eq!(differ(&["MC_A", "MC_B", "MC_C"]), ["Events: MC_C has no entry"]);
    assert_eq!(differ(&["MC_B"]), ["Events: MC_A is not in the program"]);
    assert_eq!(differences(EXAMPLE, "Exit codes", &["0".into()]), ["Exit codes: 0 has no entry"]);
}

#[test]
fn empty_cells_and_double_entries_are_named() {
    let wrong = |row: &str| entries(&EXAMPLE.replace("| `MC_B` | then |", row), "Events").1;
    assert_eq!(wrong("| `MC_B` | |"), ["Events: the entry of MC_B has an empty cell"]);
    assert_eq!(wrong("| `MC_A` | again |"), ["Events: MC_A has two entries"]);
}

#[test]
fn nested_fields_have_paths() {
    let value = serde_json::json!({"a": 1, "b": {"c": true}, "d": [{"e": "x"}], "f": [[1, 2]]});
    assert_eq!(fields(&value), ["a", "b.c", "d[].e", "f[][]"]);
}

#[test]
#[should_panic(expected = "b.c is null here")]
fn a_field_that_is_not_filled_fails() {
    fields(&serde_json::json!({"a": 1, "b": {"c": null}}));
}
