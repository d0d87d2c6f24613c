//! `mcd disk`: whether two images of a disk are equal, while a guest runs on them or while no node
//! uses them.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::args::{DiskCommand, VerifyArgs};
use super::config;
use super::exit::{ExitStatus, Failure};
use crate::checkpoint::stamp::Stamp;
use crate::control::verify::{VerifyReport, VerifyState};
use crate::control::{Client, ClientError};
use crate::device::BlockBackend;
use crate::device::image::RawImage;
use crate::protocol::pages::PAGE_BYTES;

/// Bytes read of each image at a time.
const PIECE_BYTES: usize = 1 << 20;
/// The images could not be compared: the number that `cmp` and `diff` have for it.
const PROBLEM: ExitStatus = ExitStatus::Usage;
/// Time between two questions how far a verify is.
const ASK_INTERVAL: Duration = Duration::from_millis(200);

/// What `mcd disk --help` ends with.
pub(super) const HELP: &str = "\
Examples:
  mcd disk verify --guest web              the primary's images against the secondary's, while the guest runs
  mcd disk verify --guest web --disk 1     its second disk only
  mcd disk verify /var/lib/mcd/web.img /mnt/other-host/web.img

Exit codes of verify:
  0  equal
  1  different
  2  they could not be compared";

/// Does what is asked.
pub(super) fn run(command: &DiskCommand) -> Result<(), Failure> {
    let DiskCommand::Verify(args) = command;
    match (&args.control, &args.guest, &args.images[..]) {
        (Some(control), ..) => verify_running(control, args),
        (None, Some(guest), _) => verify_running(&config::default_control(guest)?, args),
        (None, None, [one, other]) => verify(one, other),
        (None, None, _) => Err(Failure::usage("give --guest NAME, --control PATH or two images")),
    }
}

fn failure(error: impl ToString) -> Failure {
    Failure { status: PROBLEM, line: error.to_string() }
}

/// Has the nodes compare, and waits for it.
fn verify_running(control: &Path, args: &VerifyArgs) -> Result<(), Failure> {
    let report = ask_for_verify(control, args).map_err(failure)?;
    let text = match args.json {
        true => format!("{:#}\n", serde_json::to_value(&report).map_err(failure)?),
        false => report.to_string(),
    };
    print(&text)?;
    match report.state {
        VerifyState::Equal => Ok(()),
        VerifyState::Different => {
            Err(Failure::run("the images of the guest's disks differ on its two nodes: see docs/operating/disks.md"))
        }
        VerifyState::Running | VerifyState::Failed => {
            Err(failure(format!("the disks were not compared to the end: {}", report.why.unwrap_or_default())))
        }
    }
}

fn ask_for_verify(control: &Path, args: &VerifyArgs) -> Result<VerifyReport, ClientError> {
    let timeout = Duration::from_millis(args.timeout_ms);
    let mut client = Client::connect(control, timeout)?;
    let choice = args.disk.as_ref().map(|disk| match disk.parse::<u64>() {
        Ok(number) => json!({ "disk": number }),
        Err(_) => json!({ "disk": disk }),
    });
    client.execute("mc-disk-verify", choice.unwrap_or(Value::Null), timeout)?;
    let mut told_percent = None;
    loop {
        let report: VerifyReport = client.execute_as("mc-query-disk-verify", Value::Null, timeout)?;
        if report.state != VerifyState::Running {
            return Ok(report);
        }
        let (done, all) = report.progress();
        let percent = done.saturating_mul(100).checked_div(all);
        if io::stderr().is_terminal() && told_percent != percent {
            // Nobody is left to tell if this fails.
            let _ = writeln!(io::stderr(), "{} % of {} MiB", percent.unwrap_or(0), (all * report.block_bytes) >> 20);
            told_percent = percent;
        }
        std::thread::park_timeout(ASK_INTERVAL);
    }
}

fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        // The reader has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(failure(format!("the result could not be printed: {error}")))
        }
        _ => Ok(()),
    }
}

fn verify(one: &Path, other: &Path) -> Result<(), Failure> {
    let open = |path: &Path| RawImage::open(path, true).map_err(failure);
    let (a, b) = (open(one)?, open(other)?);
    let compared = compare(&a, &b)
        .map_err(|error| failure(format!("an image cannot be read ({error}): look after its storage")))?;
    let mut text = String::new();
    for (path, image, sum) in [(one, &a, compared.hashes[0]), (other, &b, compared.hashes[1])] {
        let stamp = match Stamp::read(path).map_err(failure)? {
            Some(stamp) => format!("guest {}, {}, {}", stamp.guest, stamp.at, stamp.state),
            None => "no stamp".to_owned(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}: {} bytes, crc32c {sum:08x}, {stamp}", path.display(), image.bytes());
    }
    let differs = match compared.first_difference {
        None if a.bytes() == b.bytes() => None,
        None => Some("one goes on where the other ends".to_owned()),
        Some(at) => Some(format!("first at byte {at}, in block {}", at / PAGE_BYTES as u64)),
    };
    if differs.is_none() {
        text.push_str("equal\n");
    }
    print(&text)?;
    differs.map_or(Ok(()), |how| Err(Failure::run(format!("the images differ: {how}"))))
}

/// What a comparison found.
struct Compared {
    /// The CRC32C of each image.
    hashes: [u32; 2],
    /// The first byte that differs, among those both have.
    first_difference: Option<u64>,
}

fn compare(a: &dyn BlockBackend, b: &dyn BlockBackend) -> io::Result<Compared> {
    let mut compared = Compared { hashes: [0; 2], first_difference: None };
    let mut pieces = [vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]];
    let mut at = 0;
    while at < a.bytes().max(b.bytes()) {
        let mut lengths = [0; 2];
        for (((image, piece), sum), length) in
            [a, b].into_iter().zip(&mut pieces).zip(&mut compared.hashes).zip(&mut lengths)
        {
            let left = usize::try_from(image.bytes().saturating_sub(at)).unwrap_or(usize::MAX).min(PIECE_BYTES);
            let piece = piece.get_mut(..left).unwrap_or_default();
            image.read(at, piece)?;
            *sum = crc32c::crc32c_append(*sum, piece);
            *length = left;
        }
        let both = lengths[0].min(lengths[1]);
        let [x, y] = &pieces;
        if compared.first_difference.is_none() && x.get(..both) != y.get(..both) {
            let place = x.iter().zip(y).position(|(x, y)| x != y);
            compared.first_difference = place.map(|place| at + place as u64);
        }
        at += PIECE_BYTES as u64;
    }
    Ok(compared)
}
