//! The arbiter's environment: where each kind of arbiter is, and how it is made unreachable.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use mcd::testbed::namespaces::HostName;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::fault_matrix::Fault;

/// An arbiter that fails on demand.
pub trait ArbiterEnvironment {
    /// What `--arbiter` is given on a host.
    fn flag(&self, host: HostName) -> String;
    /// How long a question to it may take, in ms; `None` for what mcd takes by itself.
    fn question_ms(&self) -> Option<u64> {
        None
    }
    /// Whether it remembers who has the guest when all nodes are dead.
    fn keeps_record(&self) -> bool {
        true
    }
    /// Whether this can happen to it.
    fn knows(&self, fault: Fault) -> bool {
        // Only a directory has a disk that a pair sees fill up.
        !matches!(fault, Fault::ArbiterFullThenKillPrimary | Fault::ArbiterFullThenDrop)
    }
    /// A node's process was started on a host.
    fn started(&mut self, host: HostName, pid: u32) -> io::Result<()> {
        let _ = (host, pid);
        Ok(())
    }
    /// Puts it out of reach of both nodes.
    fn partition(&mut self) -> io::Result<()>;
    /// Fills its disk.
    fn fill(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Brings it back and makes room.
    fn heal(&mut self) -> io::Result<()>;
    /// Stops and starts it.
    fn restart(&mut self) -> io::Result<()> {
        self.partition()?;
        self.heal()
    }
}

/// `file:`: a directory on a tiny filesystem of its own, shared by both hosts as a cluster's
/// storage is.
pub struct FileEnvironment {
    disk: PathBuf,
}

impl FileEnvironment {
    /// Makes it inside `directory`. The process must be in a mount namespace of its own.
    pub fn new(directory: &Path) -> io::Result<FileEnvironment> {
        let disk = directory.join("storage");
        fs::create_dir(&disk)?;
        let options = Some("size=64k,mode=700");
        mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, options)?;
        let environment = FileEnvironment { disk };
        fs::create_dir(environment.directory())?;
        Ok(environment)
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

impl ArbiterEnvironment for FileEnvironment {
    fn flag(&self, _: HostName) -> String {
        format!("file:{}", self.directory().display())
    }

    fn knows(&self, _: Fault) -> bool {
        true
    }

    fn partition(&mut self) -> io::Result<()> {
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

    fn heal(&mut self) -> io::Result<()> {
        remove(&self.filler())?;
        if self.away().exists() { fs::rename(self.away(), self.directory()) } else { Ok(()) }
    }
}

impl Drop for FileEnvironment {
    fn drop(&mut self) {
        // It ends with the mount namespace at the latest.
        let _ = umount2(&self.disk, MntFlags::MNT_DETACH);
    }
}

/// `command:`: a script per host that ends the other host's node, as a power switch would, one at a
/// time.
pub struct CommandEnvironment {
    directory: PathBuf,
}

impl CommandEnvironment {
    /// Writes the scripts into `directory`.
    pub fn new(directory: &Path) -> io::Result<CommandEnvironment> {
        use std::os::unix::fs::PermissionsExt;
        let environment = CommandEnvironment { directory: directory.to_owned() };
        for host in [HostName::A, HostName::B] {
            let (path, here) = (environment.script(host), directory.display());
            let other = host.other();
            let script = format!(
                "#!/bin/sh\n\
                 # The power switch of host {other}: whoever comes first ends the other, and who was ended hears \
                 nothing any more.\n\
                 cd '{here}' || exit 2\n\
                 [ ! -e away ] || exit 2\n\
                 [ \"$MCD_QUESTION\" != start ] || exit 0\n\
                 exec 9>switch.lock; flock 9 || exit 2\n\
                 [ ! -e off-{host} ] || exit 1\n\
                 pid=$(cat pid-{other}) || exit 2\n\
                 : >off-{other} || exit 2\n\
                 kill -KILL \"$pid\" 2>/dev/null\n\
                 while [ -e \"/proc/$pid\" ] && ! grep -q '^State:.[ZX]' \"/proc/$pid/status\" 2>/dev/null; \
                 do sleep 0.001; done\n\
                 exit 0\n"
            );
            fs::write(&path, script)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(environment)
    }

    fn script(&self, host: HostName) -> PathBuf {
        self.directory.join(format!("fence-from-{host}"))
    }
}

impl ArbiterEnvironment for CommandEnvironment {
    fn flag(&self, host: HostName) -> String {
        format!("command:{}", self.script(host).display())
    }

    fn keeps_record(&self) -> bool {
        false
    }

    fn started(&mut self, host: HostName, pid: u32) -> io::Result<()> {
        fs::write(self.directory.join(format!("pid-{host}")), format!("{pid}\n"))?;
        remove(&self.directory.join(format!("off-{host}")))
    }

    fn partition(&mut self) -> io::Result<()> {
        File::create(self.directory.join("away")).map(|_| ())
    }

    fn heal(&mut self) -> io::Result<()> {
        remove(&self.directory.join("away"))
    }
}

fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
