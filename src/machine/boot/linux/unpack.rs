//! Unpacks the kernel inside a bzImage, whichever way it is packed.
//!
//! A bzImage unpacks itself, but the guest pays for that at each boot, and under emulation it takes
//! minutes. The kernel's build appends the unpacked size (little-endian, 32 bits) to what it
//! packed; gzip has that in its own trailer. So the size is known before anything is allocated, and
//! a result of any other size is damage.

use std::io::{self, Read};

use super::error::LinuxError;

/// Most bytes an unpacked kernel may have: ten times a distribution's.
const KERNEL_BYTES_MAX: u32 = 1 << 30;
/// Most memory the unpackers may take for their window, in bytes: what `zstd -22 --ultra`, as the
/// kernel's build calls it, needs.
const WINDOW_BYTES_MAX: u64 = 128 << 20;
/// Bytes of the size behind the packed kernel.
const SIZE_BYTES: usize = 4;

/// Legacy lz4, which is what the kernel's build makes: blocks of up to 8 MiB, each behind its
/// packed length.
const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const LZ4_BLOCK_BYTES_MAX: usize = 8 << 20;

/// The ways a kernel can be packed, by the first bytes. Those without an unpacker are here to be
/// named.
const PACKINGS: [(&[u8], Packing); 8] = [
    (&[0x1f, 0x8b], Packing::Gzip),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], Packing::Xz),
    (&[0x28, 0xb5, 0x2f, 0xfd], Packing::Zstd),
    (&LZ4_MAGIC, Packing::Lz4),
    (b"\x7fELF", Packing::None),
    (b"BZh", Packing::Other("bzip2")),
    (&[0x5d, 0, 0], Packing::Other("lzma")),
    (&[0x89, b'L', b'Z', b'O'], Packing::Other("lzo")),
];

#[derive(Clone, Copy)]
enum Packing {
    None,
    Gzip,
    Xz,
    Zstd,
    Lz4,
    Other(&'static str),
}

/// The kernel in `payload`, which is a bzImage's payload with the size behind it.
///
/// # Errors
/// [`LinuxError::Packing`] if it is packed in an unknown way, [`LinuxError::Damaged`] if it does
/// not unpack to what it claims.
pub(super) fn unpack(payload: &[u8]) -> Result<Vec<u8>, LinuxError> {
    let found = PACKINGS.iter().find(|(magic, _)| payload.starts_with(magic)).map(|(_, packing)| *packing);
    let Some((packed, size)) = payload.split_last_chunk::<SIZE_BYTES>() else {
        return Err(LinuxError::damaged("its payload is empty"));
    };
    let size = u32::from_le_bytes(*size);
    let checked = |result| finish(result, size);
    match found {
        Some(Packing::None) => Ok(payload.to_vec()),
        // The size is gzip's own trailer.
        Some(Packing::Gzip) => checked(take(flate2::read::GzDecoder::new(payload), size)),
        Some(Packing::Xz) => checked(take(xz(packed), size)),
        Some(Packing::Zstd) => checked(zstd(packed).and_then(|reader| take(reader, size))),
        Some(Packing::Lz4) => checked(lz4(packed, size)),
        Some(Packing::Other(what)) => Err(LinuxError::Packing { what: what.to_owned() }),
        None => {
            let start = payload.get(..4).unwrap_or(payload);
            Err(LinuxError::Packing { what: format!("something unknown (it starts with {start:02x?})") })
        }
    }
}

fn xz(packed: &[u8]) -> impl Read {
    let limit_kb = u32::try_from(WINDOW_BYTES_MAX >> 10).unwrap_or(u32::MAX);
    lzma_rust2::XzReader::new_mem_limit(packed, false, limit_kb)
}

fn zstd(packed: &[u8]) -> io::Result<impl Read> {
    ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, WINDOW_BYTES_MAX).map_err(io::Error::other)
}

/// Reads at most one byte more than `size`: enough to see that it is too much, and to let the
/// unpacker check its own end.
fn take(reader: impl Read, size: u32) -> io::Result<Vec<u8>> {
    let mut unpacked = room(size)?;
    reader.take(u64::from(size) + 1).read_to_end(&mut unpacked)?;
    Ok(unpacked)
}

fn lz4(mut packed: &[u8], size: u32) -> io::Result<Vec<u8>> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut unpacked = room(size)?;
    let mut block = vec![0; LZ4_BLOCK_BYTES_MAX];
    while let Some((word, rest)) = packed.split_first_chunk::<4>() {
        packed = rest;
        if *word == LZ4_MAGIC {
            continue;
        }
        let length = u32::from_le_bytes(*word) as usize;
        let (from, rest) = packed.split_at_checked(length).ok_or_else(|| invalid("a block is cut off"))?;
        packed = rest;
        let bytes = lz4_flex::block::decompress_into(from, &mut block).map_err(io::Error::other)?;
        unpacked.extend_from_slice(block.get(..bytes).unwrap_or_default());
        if unpacked.len() > size as usize {
            break;
        }
    }
    Ok(unpacked)
}

fn room(size: u32) -> io::Result<Vec<u8>> {
    if size > KERNEL_BYTES_MAX {
        return Err(io::Error::other(format!("it claims {size} bytes unpacked, more than any kernel has")));
    }
    let mut room = Vec::new();
    room.try_reserve_exact(size as usize + 1)?;
    Ok(room)
}

fn finish(result: io::Result<Vec<u8>>, size: u32) -> Result<Vec<u8>, LinuxError> {
    let unpacked = result.map_err(|error| LinuxError::damaged(format!("it does not unpack: {error}")))?;
    if unpacked.len() == size as usize {
        Ok(unpacked)
    } else {
        Err(LinuxError::damaged(format!("it does not unpack to the {size} bytes it claims")))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    /// Something that packs, but not to nothing.
    fn kernel() -> Vec<u8> {
        let mut word = 1u32;
        let mut bytes = b"\x7fELF".to_vec();
        for _ in 0..40_000 {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bytes.extend_from_slice(&[word.to_be_bytes()[0] & 0x1f, 0x90, 0xe8]);
        }
        bytes
    }

    fn with_size(mut packed: Vec<u8>, kernel: &[u8]) -> Vec<u8> {
        packed.extend((kernel.len() as u32).to_le_bytes());
        packed
    }

    fn gzip(kernel: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(kernel).expect("gzip");
        encoder.finish().expect("gzip")
    }

    fn legacy_lz4(kernel: &[u8]) -> Vec<u8> {
        let mut packed = LZ4_MAGIC.to_vec();
        for block in kernel.chunks(50_000) {
            let block = lz4_flex::block::compress(block);
            packed.extend((block.len() as u32).to_le_bytes());
            packed.extend(block);
        }
        packed
    }

    /// Packs with a program of the system, as the kernel's build does; nothing if it is not
    /// installed.
    fn by_program(program: &str, flags: &[&str], kernel: &[u8]) -> Option<Vec<u8>> {
        let child = Command::new(program).args(flags).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut child) = child else {
            println!("skipped: {program} is not installed");
            return None;
        };
        let mut stdin = child.stdin.take().expect("piped");
        let kernel = kernel.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&kernel));
        let output = child.wait_with_output().expect("output");
        writer.join().expect("writer").expect("write");
        assert!(output.status.success());
        Some(output.stdout)
    }

    fn all() -> Vec<(&'static str, Vec<u8>)> {
        let kernel = kernel();
        let mut all = vec![("gzip", gzip(&kernel)), ("lz4", with_size(legacy_lz4(&kernel), &kernel))];
        let xz = ["--check=crc32", "--x86", "--lzma2=,dict=32MiB", "-c"];
        all.extend(by_program("xz", &xz, &kernel).map(|packed| ("xz", with_size(packed, &kernel))));
        let zstd = ["-22", "--ultra", "-q", "-c"];
        all.extend(by_program("zstd", &zstd, &kernel).map(|packed| ("zstd", with_size(packed, &kernel))));
        let lz4 = ["-l", "-9", "-q", "-c"];
        all.extend(by_program("lz4", &lz4, &kernel).map(|packed| ("lz4 by program", with_size(packed, &kernel))));
        all
    }

    #[test]
    fn every_packing_comes_out_as_it_went_in() {
        let kernel = kernel();
        for (name, payload) in all() {
            assert!(unpack(&payload).is_ok_and(|unpacked| unpacked == kernel), "{name}");
        }
        assert_eq!(unpack(&kernel).expect("not packed"), kernel);
    }

    #[test]
    fn cut_off_and_damaged_payloads_are_refused() {
        let kernel = kernel();
        for (name, payload) in all() {
            for cut in [5, 6, 20, payload.len() / 2, payload.len() - 1] {
                assert!(unpack(&payload[..cut]).is_err(), "{name} cut to {cut}");
            }
            for at in (0..payload.len()).step_by(payload.len() / 61) {
                let mut bad = payload.clone();
                bad[at] ^= 0x55;
                // Legacy lz4 has no checksum: a flipped bit may unpack to another kernel of the
                // same size.
                if let Ok(unpacked) = unpack(&bad) {
                    assert!(unpacked.len() == kernel.len(), "{name} at {at}");
                }
            }
        }
    }

    #[test]
    fn claims_are_capped_and_checked() {
        for (name, payload) in all() {
            for claim in [0, 1, kernel().len() as u32 - 1, kernel().len() as u32 + 1, KERNEL_BYTES_MAX + 1, u32::MAX] {
                let mut bad = payload.clone();
                let end = bad.len();
                bad[end - 4..].copy_from_slice(&claim.to_le_bytes());
                assert!(matches!(unpack(&bad), Err(LinuxError::Damaged { .. })), "{name} claims {claim}");
            }
        }
    }

    #[test]
    fn a_bomb_stops_at_its_claim() {
        // 64 MiB of zeroes in 64 KiB, said to be 1 MiB.
        let mut payload = gzip(&vec![0; 64 << 20]);
        let end = payload.len();
        payload[end - 4..].copy_from_slice(&(1u32 << 20).to_le_bytes());
        assert!(matches!(unpack(&payload), Err(LinuxError::Damaged { .. })));
    }

    #[test]
    fn other_packings_are_named() {
        for (payload, name) in [(&b"BZh91AY&SY"[..], "bzip2"), (b"\x89LZO\0\r\n", "lzo"), (b"\0\0\0\0\0\0", "unknown")]
        {
            let error = unpack(payload).expect_err("not unpacked").to_string();
            assert!(error.contains(name), "{error}");
        }
        assert!(matches!(unpack(b""), Err(LinuxError::Damaged { .. })));
    }
}
