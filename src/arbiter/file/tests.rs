use super::super::text;
use super::*;
use crate::protocol::record::RecordState;
use crate::protocol::types::InstanceId;
use std::fs;

const P: InstanceId = InstanceId(0xaaaa_0000_0000_0000_0000_0000_0000_0001);
const S: InstanceId = InstanceId(0xbbbb_0000_0000_0000_0000_0000_0000_0002);

fn guest() -> GuestName {
    GuestName::new("web-1").unwrap()
}

fn arbiter() -> (tempfile::TempDir, FileArbiter) {
    let directory = tempfile::tempdir().unwrap();
    let arbiter = FileArbiter::new(directory.path(), &guest());
    (directory, arbiter)
}

#[test]
fn a_guests_life_is_a_chain_of_swaps() {
    let (directory, mut arbiter) = arbiter();
    let first = Record::first(P);
    let paired = first.next_paired(P, S);
    let solo = paired.next_solo(S);
    assert_eq!(arbiter.read().unwrap(), None);
    assert_eq!(arbiter.swap(Some(&first), &paired).unwrap(), Swap::Lost(None));
    assert_eq!(arbiter.swap(None, &first).unwrap(), Swap::Won);
    assert_eq!(arbiter.swap(None, &first).unwrap(), Swap::Lost(Some(first)));
    assert_eq!(arbiter.swap(Some(&first), &paired).unwrap(), Swap::Won);
    // The other node sees it, and of two that start from the pair the second loses.
    let mut other = FileArbiter::new(directory.path(), &guest());
    assert_eq!(other.read().unwrap(), Some(paired));
    assert_eq!(other.swap(Some(&paired), &solo).unwrap(), Swap::Won);
    assert_eq!(arbiter.swap(Some(&paired), &paired.next_solo(P)).unwrap(), Swap::Lost(Some(solo)));
    assert_eq!(arbiter.swap(Some(&solo), &solo.next_stopped()).unwrap(), Swap::Won);
    // Another guest is another record.
    let mut neighbour = FileArbiter::new(directory.path(), &GuestName::new("web-2").unwrap());
    assert_eq!(neighbour.read().unwrap(), None);
    let mut files: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["web-1.lock", "web-1.record"], "nothing else is left behind");
}

#[test]
fn a_record_is_text_a_person_can_read() {
    let record = Record { generation: crate::protocol::types::Generation(8), ..Record::first(P).next_paired(P, S) };
    let text = text::write(&guest(), &record);
    let expected = "mcd-record 1\nguest web-1\ngeneration 8\nstate paired\n\
                    owner aaaa0000000000000000000000000001\npeer bbbb0000000000000000000000000002\n";
    assert_eq!(text, format!("{expected}crc32c {:08x}\n", crc32c::crc32c(expected.as_bytes())));
    for record in [record, record.next_solo(S), record.next_stopped()] {
        assert_eq!(text::read(&guest(), text::write(&guest(), &record).as_bytes()), Ok(record));
    }
    assert_eq!(text::read(&GuestName::new("web-2").unwrap(), text.as_bytes()), Err("it is another guest's"));
}

#[test]
fn a_damaged_record_is_an_error_and_stays() {
    let (_directory, mut arbiter) = arbiter();
    let first = Record::first(P);
    arbiter.swap(None, &first).unwrap();
    let path = arbiter.record_path();
    let good = fs::read(&path).unwrap();
    let mut wrong: Vec<Vec<u8>> = (0..good.len()).map(|length| good[..length].to_vec()).collect();
    for at in 0..good.len() {
        for flip in [0x01, 0x20, 0x80] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            wrong.push(bytes);
        }
    }
    wrong.push([good.as_slice(), b"\n"].concat());
    wrong.push([good.as_slice(), &[b' '; 5000]].concat());
    wrong.push(good.iter().map(|byte| if *byte == b'\n' { b'\r' } else { *byte }).collect());
    for bytes in wrong {
        assert!(text::read(&guest(), &bytes).is_err(), "{}", String::from_utf8_lossy(&bytes));
    }
    for bytes in [&good[..0], &good[..good.len() / 2], b"garbage\n"] {
        fs::write(&path, bytes).unwrap();
        assert!(matches!(arbiter.read(), Err(ArbiterError::Corrupt { .. })));
        for expected in [None, Some(&first)] {
            assert!(matches!(arbiter.swap(expected, &first.next_solo(S)), Err(ArbiterError::Corrupt { .. })));
        }
        assert_eq!(fs::read(&path).unwrap(), bytes, "a damaged record is left for a person");
    }
    fs::write(&path, good).unwrap();
    assert_eq!(arbiter.read().unwrap(), Some(first));
}

#[test]
fn a_record_that_no_state_allows_is_damaged() {
    let odd = Record { state: RecordState::Solo, ..Record::first(P).next_paired(P, S) };
    let text = text::write(&guest(), &odd);
    assert_eq!(text::read(&guest(), text.as_bytes()), Err("its peer does not go with its state"));
}

#[test]
fn a_missing_directory_is_not_a_missing_record() {
    let (directory, _) = arbiter();
    let mut arbiter = FileArbiter::new(directory.path().join("not-mounted"), &guest());
    assert!(matches!(arbiter.read(), Err(ArbiterError::NoDirectory { .. })));
    let error = arbiter.swap(None, &Record::first(P)).unwrap_err();
    assert!(matches!(error, ArbiterError::NoDirectory { .. }));
    assert!(error.to_string().contains("mount"));
}

#[test]
fn what_a_crash_left_behind_is_no_record() {
    let (directory, mut arbiter) = arbiter();
    fs::write(directory.path().join("web-1.record.new"), b"half a rec").unwrap();
    assert_eq!(arbiter.read().unwrap(), None);
    assert_eq!(arbiter.swap(None, &Record::first(P)).unwrap(), Swap::Won);
    assert_eq!(arbiter.read().unwrap(), Some(Record::first(P)));
}

#[test]
fn records_are_private_and_written_through_no_link() {
    use std::os::unix::fs::{MetadataExt, symlink};
    let (directory, mut arbiter) = arbiter();
    let victim = directory.path().join("victim");
    fs::write(&victim, b"precious").unwrap();
    symlink(&victim, directory.path().join("web-1.record.new")).unwrap();
    assert_eq!(arbiter.swap(None, &Record::first(P)).unwrap(), Swap::Won);
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    for name in ["web-1.record", "web-1.lock"] {
        let metadata = fs::symlink_metadata(directory.path().join(name)).unwrap();
        assert!(metadata.is_file() && metadata.mode() & 0o777 == 0o600, "{name}: {:o}", metadata.mode());
    }
}

/// Takes the guest's lock as another node would, and gives it back when dropped.
fn foreign_lock(directory: &Path) -> fs::File {
    let file =
        fs::OpenOptions::new().write(true).create(true).truncate(false).open(directory.join("web-1.lock")).unwrap();
    let whole_file = libc::flock { l_type: libc::F_WRLCK as i16, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole_file)).unwrap();
    file
}

#[test]
fn a_lock_that_is_never_given_back_makes_it_unreachable() {
    let (directory, mut patient) = arbiter();
    let mut arbiter = FileArbiter::with_timeout(directory.path(), &guest(), Duration::from_millis(20));
    let first = Record::first(P);
    patient.swap(None, &first).unwrap();
    let held = foreign_lock(directory.path());
    for _ in 0..3 {
        let error = arbiter.swap(Some(&first), &first.next_solo(S)).unwrap_err();
        assert!(matches!(error, ArbiterError::Unreachable { .. }));
        assert!(error.to_string().contains("web-1.lock"));
    }
    drop(held);
    // The swap that was late is not carried out behind our back: the one asked for now starts from
    // the old record and wins.
    assert_eq!(patient.swap(Some(&first), &first.next_stopped()).unwrap(), Swap::Won);
    arbiter.timeout = TIMEOUT_DEFAULT;
    assert_eq!(arbiter.read().unwrap(), Some(first.next_stopped()));
}

#[test]
fn a_swap_past_its_deadline_changes_nothing() {
    let (directory, mut arbiter) = arbiter();
    let store = Store::new(directory.path(), &guest());
    assert!(matches!(store.swap(None, &Record::first(P), Instant::now()), Err(ArbiterError::Unreachable { .. })));
    assert_eq!(arbiter.read().unwrap(), None);
    assert!(!directory.path().join("web-1.record.new").exists());
}
