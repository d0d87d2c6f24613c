//! The hosts' disks, and on one of them the guest's. They are files here, which outlive the power
//! cuts of their hosts as disks do: what a host has written to its disk stays, what it had only in
//! its memory is gone.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mcd::testbed::namespaces::{HostName, find_tool};

use crate::error::LabError;

/// How large a host's disk is, in bytes. It takes the space that is written.
const HOST_DISK_BYTES: u64 = 256 << 20;
/// How large the guest's disk is, in bytes.
const GUEST_DISK_BYTES: u64 = 32 << 20;
/// The guest's image on a host's disk.
const GUEST_IMAGE: &str = "guest.img";
/// Where a host has the guest's image.
pub const GUEST_IMAGE_PATH: &str = "/disk/guest.img";

/// The disks of a scenario's hosts.
#[derive(Debug)]
pub struct Disks {
    directory: PathBuf,
}

impl Disks {
    /// Makes them anew in `directory`: on `first`'s lies an image with an empty file system for the
    /// guest, the other one is empty.
    pub fn make(directory: &Path, first: HostName) -> Result<Disks, LabError> {
        let disks = Disks { directory: directory.to_owned() };
        // Nothing of an earlier run, whose images would be stamped.
        match fs::remove_dir_all(directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(LabError::io(format!("remove {}", directory.display()))(error));
            }
            _ => {}
        }
        let content = directory.join("content");
        fs::create_dir_all(&content).map_err(LabError::io(format!("make {}", content.display())))?;
        make_image(&content.join(GUEST_IMAGE), GUEST_DISK_BYTES, None)?;
        make_image(&disks.of(first), HOST_DISK_BYTES, Some(&content))?;
        make_image(&disks.of(first.other()), HOST_DISK_BYTES, None)?;
        fs::remove_dir_all(&content).map_err(LabError::io(format!("remove {}", content.display())))?;
        Ok(disks)
    }

    /// The disk of a host.
    pub fn of(&self, host: HostName) -> PathBuf {
        self.directory.join(format!("{host}.img"))
    }
}

/// Makes an image with an ext4 file system in which lies what is in `content`; no root is needed
/// for that.
fn make_image(path: &Path, bytes: u64, content: Option<&Path>) -> Result<(), LabError> {
    let action = || LabError::io(format!("make {}", path.display()));
    File::create(path).and_then(|file| file.set_len(bytes)).map_err(action())?;
    let program = find_tool("mke2fs").ok_or_else(|| LabError::Missing("mke2fs (e2fsprogs)".to_owned()))?;
    let mut command = Command::new(program);
    // What is left for later would be written by the guest's kernel while it is being tried.
    command.args(["-q", "-F", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"]);
    if let Some(content) = content {
        command.arg("-d").arg(content);
    }
    let output = command.arg(path).stdin(Stdio::null()).output().map_err(action())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(action()(io::Error::other(format!("mke2fs ended with {}: {said}", output.status))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_disk_has_the_guests_image_and_both_are_file_systems() {
        if find_tool("mke2fs").is_none() {
            println!("skipped: there is no mke2fs");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("disks");
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("b.img"), "of an earlier run").unwrap();
        let disks = Disks::make(&place, HostName::B).unwrap();
        let magic = |host| {
            let bytes = fs::read(disks.of(host)).unwrap();
            assert_eq!(bytes.len() as u64, HOST_DISK_BYTES);
            bytes[1080..1082].to_vec()
        };
        assert_eq!([magic(HostName::A), magic(HostName::B)], [[0x53, 0xef]; 2]);
        let used = |host| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(disks.of(host)).unwrap());
        assert!(used(HostName::B) > used(HostName::A), "the image is on the first host's disk");
        let mut names: Vec<_> = fs::read_dir(&place).unwrap().flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        assert_eq!(names, ["a.img", "b.img"]);
    }
}
