//! `mcd snapshot`: a guest saved to a file, what such a file has, and how to start from it.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::args::{SnapshotInfoArgs, SnapshotSaveArgs};
use super::config;
use super::exit::Failure;
use super::restore::{failure, mac_text};
use crate::checkpoint::snapshot::{SnapshotChecks, SnapshotHead, SnapshotReader};
use crate::control::{Client, ClientError};

/// How long a node that ends with its snapshot may take to close its control socket.
const LOOK: Duration = Duration::from_secs(1);

/// Has the node write the file, and prints the outcome.
pub(super) fn save(args: &SnapshotSaveArgs) -> Result<(), Failure> {
    let control = match (&args.control, &args.guest) {
        (Some(path), _) => path.clone(),
        (None, Some(guest)) => config::default_control(guest)?,
        (None, None) => return Err(Failure::usage("of which guest? give --guest NAME or --control PATH; see --help")),
    };
    // The node has a working directory of its own.
    let path = std::path::absolute(&args.file)
        .map_err(|error| Failure::usage(format!("{}: {error}; name a file", args.file.display())))?;
    let timeout = Duration::from_millis(args.timeout_ms);
    let answer = ask(&control, &path, args.stop, timeout).map_err(|error| match error {
        ClientError::TimedOut { .. } => {
            Failure::run(format!("{error}; the node goes on writing: see mcd snapshot info"))
        }
        error => Failure::run(error.to_string()),
    })?;
    print(&if args.json { format!("{answer:#}\n") } else { saved(&path, &answer) })
}

fn ask(control: &Path, path: &Path, stop: bool, timeout: Duration) -> Result<Value, ClientError> {
    let mut client = Client::connect(control, timeout.min(Duration::from_secs(5)))?;
    let answer = client.execute("mc-snapshot", json!({ "path": path, "stop": stop }), timeout)?;
    let deadline = Instant::now() + timeout;
    // It ends now; once it closes this connection its images and its tap are free.
    while stop && Instant::now() < deadline {
        match client.next_event(LOOK) {
            Ok(_) => {}
            Err(_) => break,
        }
    }
    Ok(answer)
}

fn saved(path: &Path, answer: &Value) -> String {
    let number = |key| answer.get(key).and_then(Value::as_u64).unwrap_or(0);
    let paused_ms = answer.get("paused-ms").and_then(Value::as_f64).unwrap_or(0.0);
    let then = match answer.get("stopped").and_then(Value::as_bool) {
        Some(true) => "the guest is stopped, and its disks' images are as they were at that moment",
        _ => "the guest goes on",
    };
    format!(
        "{}: {} bytes, {} pages, g{}/{}; the guest was paused for {paused_ms:.1} ms; {then}\n",
        path.display(),
        number("bytes"),
        number("pages"),
        number("generation"),
        number("epoch"),
    )
}

/// Prints the head of a file, and whether the file is whole.
pub(super) fn info(args: &SnapshotInfoArgs) -> Result<(), Failure> {
    let reader = SnapshotReader::open(&args.file).map_err(|error| failure(&error))?;
    let (head, bytes) = (reader.head().clone(), reader.bytes());
    let checked = reader.check();
    let text = match &checked {
        _ if args.json => format!("{:#}\n", described(&head, bytes, checked.as_ref().ok())),
        Ok(hashes) => human(&head, bytes) + &whole(hashes),
        Err(_) => human(&head, bytes),
    };
    print(&text)?;
    checked.map(|_| ()).map_err(|error| failure(&error))
}

fn described(head: &SnapshotHead, bytes: u64, hashes: Option<&SnapshotChecks>) -> Value {
    let SnapshotHead { id, guest, at, taken_s, stopped, shape, cpu, build } = head;
    let disks = shape
        .disks
        .iter()
        .map(|disk| json!({ "bytes": disk.bytes, "read-only": disk.read_only, "serial": serial(disk.serial) }));
    json!({
        "snapshot": id.to_string(),
        "guest": guest.as_str(),
        "generation": at.generation.0,
        "epoch": at.epoch,
        "taken": taken_s,
        "stopped": stopped,
        "memory": shape.memory_bytes,
        "cpus": shape.cpus,
        "mac": mac_text(shape.mac),
        "rng": shape.rng,
        "disks": disks.collect::<Vec<_>>(),
        "cpu-model": cpu.model.name(),
        "cpu-maker": cpu.maker_name(),
        "cpu-digest": format!("{:016x}", cpu.guest.digest),
        "tsc-khz": cpu.guest.tsc_khz,
        "build": build,
        "bytes": bytes,
        "whole": hashes.is_some(),
        "pages": hashes.map(|hashes| hashes.pages),
        "state-bytes": hashes.map(|hashes| hashes.state_bytes),
        "digest": hashes.map(|hashes| format!("{:08x}", hashes.digest)),
    })
}

fn human(head: &SnapshotHead, bytes: u64) -> String {
    let SnapshotHead { id, guest, at, taken_s, stopped, shape, cpu, build } = head;
    let mut text = format!("guest      {guest}, {at}, {}, by mcd {build}\n", utc(*taken_s));
    // Writing to a string cannot fail.
    let _ = writeln!(text, "snapshot   {id}, {bytes} bytes");
    let (memory, mac) = (shape.memory_bytes >> 20, mac_text(shape.mac));
    let _ = writeln!(text, "machine    {memory} MiB, {} vCPUs, network card {mac}", shape.cpus);
    let _ = writeln!(text, "CPU        {cpu}");
    for (number, disk) in shape.disks.iter().enumerate() {
        let how = if disk.read_only { ", read-only" } else { "" };
        let serial = Some(serial(disk.serial)).filter(|serial| !serial.is_empty());
        let serial = serial.map(|serial| format!(", serial {serial}")).unwrap_or_default();
        let _ = writeln!(text, "disk {number}     {} bytes{how}{serial}; not in the file", disk.bytes);
    }
    let ended = if *stopped { "stopped for good with it" } else { "went on" };
    let _ = writeln!(text, "the guest {ended}");
    text
}

fn whole(hashes: &SnapshotChecks) -> String {
    let SnapshotChecks { pages, state_bytes, digest } = hashes;
    format!("whole: {pages} pages that are not zeros, {state_bytes} bytes of machine state, crc32c {digest:08x}\n")
}

fn serial(serial: [u8; 20]) -> String {
    let text = serial.into_iter().take_while(|byte| *byte != 0);
    text.map(|byte| if byte.is_ascii_graphic() { char::from(byte) } else { '?' }).collect()
}

fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        // The reader has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::run(format!("the result could not be printed: {error}")))
        }
        _ => Ok(()),
    }
}

/// A time of day that is so many seconds after 1970 began, as people write it.
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Counted in years that begin in March, the leap day is a year's last and months follow one
    // rule.
    let from_march = days + 719_468;
    let (era, day) = (from_march / 146_097, from_march % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month < 3);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// The arguments that `mcd snapshot restore FILE FLAGS…` stands for.
pub(super) fn as_primary(
    program: std::ffi::OsString,
    file: &PathBuf,
    flags: &[std::ffi::OsString],
) -> Vec<std::ffi::OsString> {
    let mut arguments = vec![program, "primary".into()];
    arguments.extend_from_slice(flags);
    // Last, so that no file of flags nor another flag takes its place.
    arguments.extend(["--restore".into(), file.into()]);
    arguments
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn times_are_told_as_people_do() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (4_107_542_399, "2100-02-28 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
            (1_795_292_086, "2026-11-21 20:14:46 UTC"),
        ] {
            assert_eq!(utc(seconds), text);
        }
        // A file may say anything.
        assert!(utc(u64::MAX).ends_with("UTC"));
    }
}
