//! Files that are not raw images, known by their first or last bytes.
//!
//! Taken as raw, such a file would be a disk of garbage to the guest, and the first write to it
//! would destroy it for every other program.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::protocol::machine_shape::SECTOR_BYTES;

/// A format that is not raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// QEMU's, which distributions offer their cloud images in.
    Qcow2,
    /// QEMU's older one.
    Qed,
    /// VMware's.
    Vmdk,
    /// Hyper-V's.
    Vhdx,
    /// Virtual PC's and Azure's.
    Vhd,
    /// VirtualBox's.
    Vdi,
    /// Parallels'.
    Parallels,
    /// A compressed file, whatever is in it: what unpacks it.
    Compressed(&'static str),
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImageFormat::Qcow2 => "a qcow2 image",
            ImageFormat::Qed => "a QED image",
            ImageFormat::Vmdk => "a VMDK image",
            ImageFormat::Vhdx => "a VHDX image",
            ImageFormat::Vhd => "a VHD image",
            ImageFormat::Vdi => "a VDI image",
            ImageFormat::Parallels => "a Parallels image",
            ImageFormat::Compressed(_) => "a compressed file",
        })
    }
}

/// What a format's files have in common.
struct Signature {
    /// Where: from the beginning of the file.
    at: usize,
    bytes: &'static [u8],
    format: ImageFormat,
}

const fn starts(bytes: &'static [u8], format: ImageFormat) -> Signature {
    Signature { at: 0, bytes, format }
}

const SIGNATURES: &[Signature] = &[
    starts(b"QFI\xfb", ImageFormat::Qcow2),
    starts(b"QED\0", ImageFormat::Qed),
    starts(b"KDMV", ImageFormat::Vmdk),
    starts(b"COWD", ImageFormat::Vmdk),
    starts(b"# Disk DescriptorFile", ImageFormat::Vmdk),
    starts(b"vhdxfile", ImageFormat::Vhdx),
    starts(b"conectix", ImageFormat::Vhd),
    Signature { at: 0x40, bytes: b"\x7f\x10\xda\xbe", format: ImageFormat::Vdi },
    starts(b"WithoutFreeSpace", ImageFormat::Parallels),
    starts(b"WithouFreSpacExt", ImageFormat::Parallels),
    starts(b"\x1f\x8b\x08", ImageFormat::Compressed("gunzip")),
    starts(b"\xfd7zXZ\0", ImageFormat::Compressed("unxz")),
    starts(b"\x28\xb5\x2f\xfd", ImageFormat::Compressed("unzstd")),
    starts(b"BZh", ImageFormat::Compressed("bunzip2")),
];

/// The footer of a VHD of fixed size, which is raw but for its last sector.
const VHD_FOOTER: &[u8] = b"conectix";

/// The format of what is at `path`, if it is one that is not raw. What is neither a file nor a
/// block device has none.
///
/// # Errors
/// What the system says.
pub fn format_of(path: &Path) -> io::Result<Option<ImageFormat>> {
    // Without O_NONBLOCK a pipe would be waited for.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Ok(None);
    }
    let mut sector = [0; SECTOR_BYTES as usize];
    let length = read_up_to(&file, &mut sector, 0)?;
    let head = sector.get(..length).unwrap_or_default();
    let has = |s: &&Signature| head.get(s.at..).is_some_and(|rest| rest.starts_with(s.bytes));
    if let Some(signature) = SIGNATURES.iter().find(has) {
        return Ok(Some(signature.format));
    }
    let end = (&file).seek(SeekFrom::End(0))?;
    let Some(last) = end.checked_sub(SECTOR_BYTES) else { return Ok(None) };
    let length = read_up_to(&file, &mut sector, last)?;
    let is_vhd = sector.get(..length).is_some_and(|tail| tail.starts_with(VHD_FOOTER));
    Ok(is_vhd.then_some(ImageFormat::Vhd))
}

fn read_up_to(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut length = 0;
    while let Some(rest) = into.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + length as u64) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(reason) if reason.kind() == io::ErrorKind::Interrupted => {}
            Err(reason) => return Err(reason),
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format_of_bytes(bytes: &[u8]) -> Option<ImageFormat> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), bytes).expect("written");
        format_of(file.path()).expect("read")
    }

    /// A file of two sectors with `bytes` at an offset.
    fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut all = vec![0; 1024];
        all[at..at + bytes.len()].copy_from_slice(bytes);
        all
    }

    #[test]
    fn each_format_is_known_by_its_signature() {
        for Signature { at, bytes, format } in SIGNATURES {
            assert_eq!(format_of_bytes(&with(*at, bytes)), Some(*format));
            // Anywhere else, or in part, it is data.
            assert_eq!(format_of_bytes(&with(at + 1, bytes)), None, "{format:?}");
            let other = [&bytes[..bytes.len() - 1], &[0xee]].concat();
            assert_eq!(format_of_bytes(&with(*at, &other)), None, "{format:?}");
        }
        assert_eq!(format_of_bytes(&with(512, b"conectix")), Some(ImageFormat::Vhd));
    }

    #[test]
    fn what_is_raw_or_no_image_has_no_format() {
        assert_eq!(format_of_bytes(&[]), None);
        assert_eq!(format_of_bytes(&[0; 100]), None);
        // A boot sector, an ext4 file system, a whole disk that the guest encrypts.
        assert_eq!(format_of_bytes(&with(510, b"\x55\xaa")), None);
        assert_eq!(format_of_bytes(&with(0, b"LUKS\xba\xbe")), None);
        assert_eq!(format_of(Path::new("/")).expect("read"), None);
        assert_eq!(format_of(Path::new("/dev/null")).expect("read"), None);
        assert!(format_of(Path::new("/nonexistent")).is_err());
    }
}
