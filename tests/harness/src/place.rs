//! Where the arbiter lives, and how it is taken away.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// An arbiter that can fail on demand.
pub trait Place {
    /// What `--arbiter` is given.
    fn flag(&self) -> String;
    /// Puts it out of reach of both nodes.
    fn cut(&mut self) -> io::Result<()>;
    /// Fills its disk.
    fn fill(&mut self) -> io::Result<()>;
    /// Brings it back and makes room.
    fn mend(&mut self) -> io::Result<()>;
    /// Stops and starts it.
    fn restart(&mut self) -> io::Result<()>;
}

/// `file:`: a directory on a tiny filesystem of its own, shared by both hosts as a cluster's storage is.
pub struct FilePlace {
    disk: PathBuf,
}

impl FilePlace {
    /// Makes it inside `directory`. The process must be in a mount namespace of its own.
    pub fn new(directory: &Path) -> io::Result<FilePlace> {
        let disk = directory.join("storage");
        fs::create_dir(&disk)?;
        let options = Some("size=64k,mode=700");
        mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, options)?;
        let place = FilePlace { disk };
        fs::create_dir(place.directory())?;
        Ok(place)
    }

    fn directory(&self) -> PathBuf {
        self.disk.join("arbiter")
    }

    fn away(&self) -> PathBuf {
        self.disk.join("away")
    }

    fn filler(&self) -> PathBuf {
        self.disk.join("filler")
    }
}

impl Place for FilePlace {
    fn flag(&self) -> String {
        format!("file:{}", self.directory().display())
    }

    fn cut(&mut self) -> io::Result<()> {
        fs::rename(self.directory(), self.away())
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut file = File::create(self.filler())?;
        loop {
            match file.write(&[0; 4096]) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn mend(&mut self) -> io::Result<()> {
        match fs::remove_file(self.filler()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if self.away().exists() { fs::rename(self.away(), self.directory()) } else { Ok(()) }
    }

    fn restart(&mut self) -> io::Result<()> {
        self.cut()?;
        self.mend()
    }
}

impl Drop for FilePlace {
    fn drop(&mut self) {
        // It ends with the mount namespace at the latest.
        let _ = umount2(&self.disk, MntFlags::MNT_DETACH);
    }
}
