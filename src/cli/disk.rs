//! `mcd disk`: what can be done to disk images while no node uses them.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;

use super::args::DiskCommand;
use super::exit::{ExitStatus, Failure};
use crate::checkpoint::stamp::Stamp;
use crate::device::BlockBackend;
use crate::device::image::RawImage;
use crate::protocol::pages::PAGE_BYTES;

/// Bytes read of each image at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Does what is asked.
pub(super) fn run(command: &DiskCommand) -> Result<(), Failure> {
    match command {
        DiskCommand::Verify { one, other } => verify(one, other),
    }
}

fn verify(one: &Path, other: &Path) -> Result<(), Failure> {
    let host = |error: String| Failure { status: ExitStatus::Host, line: error };
    let open = |path: &Path| RawImage::open(path, true).map_err(|error| host(error.to_string()));
    let (a, b) = (open(one)?, open(other)?);
    let compared =
        compare(&a, &b).map_err(|error| host(format!("an image cannot be read ({error}): look after its storage")))?;
    let mut text = String::new();
    for (path, image, sum) in [(one, &a, compared.sums[0]), (other, &b, compared.sums[1])] {
        let stamp = match Stamp::read(path).map_err(|error| host(error.to_string()))? {
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
    match io::stdout().write_all(text.as_bytes()) {
        // The reader has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            return Err(Failure::run(format!("the result could not be printed: {error}")));
        }
        _ => {}
    }
    differs.map_or(Ok(()), |how| Err(Failure::run(format!("the images differ: {how}"))))
}

/// What a comparison found.
struct Compared {
    /// The CRC32C of each image.
    sums: [u32; 2],
    /// The first byte that differs, among those both have.
    first_difference: Option<u64>,
}

fn compare(a: &dyn BlockBackend, b: &dyn BlockBackend) -> io::Result<Compared> {
    let mut compared = Compared { sums: [0; 2], first_difference: None };
    let mut pieces = [vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]];
    let mut at = 0;
    while at < a.bytes().max(b.bytes()) {
        let mut lengths = [0; 2];
        for (((image, piece), sum), length) in
            [a, b].into_iter().zip(&mut pieces).zip(&mut compared.sums).zip(&mut lengths)
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
