//! The first roots of the hosts and of the Linux guest, put together from this system's own
//! programs and Debian's kernel modules.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mcd::testbed::namespaces::find_tool;

use crate::cpio::Archive;
use crate::error::LabError;
use crate::kernel::Kernel;

/// What a host's kernel must load: KVM, the devices QEMU gives it, what guests' networks are made
/// of, and its disk's file system (with the checksum that ext4 asks for by name).
const HOST_MODULES: [&str; 10] = [
    "kvm-amd",
    "virtio_pci",
    "virtio_net",
    "virtio-rng",
    "virtio_blk",
    "tun",
    "bridge",
    "veth",
    "crc32c_generic",
    "ext4",
];
/// What the guest's kernel must load for the devices mcd gives it.
const GUEST_MODULES: [&str; 6] = ["virtio_mmio", "virtio_net", "virtio_blk", "virtio-rng", "crc32c_generic", "ext4"];

/// Where the hosts have the guest's kernel.
pub const GUEST_KERNEL: &str = "/guest/vmlinuz";
/// Where the hosts have the guest's first root.
pub const GUEST_INITRD: &str = "/guest/initrd";

/// Everything a lab boots.
#[derive(Debug)]
pub struct Images {
    /// The hosts' kernel.
    pub host_kernel: PathBuf,
    /// The hosts' first root.
    pub host_initrd: PathBuf,
}

impl Images {
    /// Builds what is missing or older than what it is made of, in `directory`, with the node's
    /// program `mcd`.
    pub fn build(directory: &Path, mcd: &Path) -> Result<Images, LabError> {
        let eyes = eyes()?;
        let host = Kernel::open(&directory.join("host-kernel"))?;
        let guest = Kernel::open(&directory.join("guest-kernel"))?;
        let guest_initrd = directory.join("guest.cpio");
        write(&guest_archive(&guest, &eyes)?, &guest_initrd)?;
        let images = Images { host_kernel: host.image.clone(), host_initrd: directory.join("host.cpio") };
        let mut archive = host_archive(&host, mcd, &eyes)?;
        archive.file(GUEST_KERNEL, &guest.image, 0o644);
        archive.file(GUEST_INITRD, &guest_initrd, 0o644);
        write(&archive, &images.host_initrd)?;
        Ok(images)
    }
}

/// The lab's own program for guests, which is built beside this one.
fn eyes() -> Result<PathBuf, LabError> {
    let this = std::env::current_exe().map_err(LabError::io("find the lab's own program"))?;
    let eyes = this.with_file_name("mcd-lab-guest");
    if eyes.exists() { Ok(eyes) } else { Err(LabError::Missing(format!("{} (cargo build)", eyes.display()))) }
}

fn write(archive: &Archive, path: &Path) -> Result<(), LabError> {
    let written = archive.write_if_changed(path).map_err(LabError::io(format!("write {}", path.display())))?;
    if written {
        let size = fs::metadata(path).map_or(0, |meta| meta.len());
        println!("built {} ({} MiB)", path.display(), size >> 20);
    }
    Ok(())
}

/// What every root has: busybox under all its names, the places where the kernel's own file systems
/// go, and `init`.
fn base(init: &str) -> Result<Archive, LabError> {
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "run", "tmp", "root", "var", "sbin", "usr/bin", "usr/sbin"] {
        archive.directory(directory);
    }
    let busybox = find_tool("busybox").ok_or_else(|| LabError::Missing("busybox".to_owned()))?;
    archive.file("bin/busybox", &busybox, 0o755);
    archive.link("bin/sh", "busybox");
    archive.link("var/run", "/run");
    archive.text("init", init, 0o755);
    Ok(archive)
}

fn host_archive(kernel: &Kernel, mcd: &Path, eyes: &Path) -> Result<Archive, LabError> {
    let mut archive = base(include_str!("../init/host"))?;
    add_modules(&mut archive, kernel, &HOST_MODULES)?;
    add_program(&mut archive, "bin/mcd", mcd)?;
    // mcd demo speaks to the real `ip`; busybox's lacks its batches.
    let ip = find_tool("ip").ok_or_else(|| LabError::Missing("ip (iproute2)".to_owned()))?;
    add_program(&mut archive, "sbin/ip", &ip)?;
    let e2fsck = find_tool("e2fsck").ok_or_else(|| LabError::Missing("e2fsck (e2fsprogs)".to_owned()))?;
    add_program(&mut archive, "sbin/e2fsck", &e2fsck)?;
    add_program(&mut archive, "bin/mcd-lab-guest", eyes)?;
    archive.text("bin/ask-console", include_str!("../init/ask-console"), 0o755);
    Ok(archive)
}

fn guest_archive(kernel: &Kernel, eyes: &Path) -> Result<Archive, LabError> {
    let mut archive = base(include_str!("../init/guest"))?;
    add_modules(&mut archive, kernel, &GUEST_MODULES)?;
    // Debian's redis-tools hold the server's program too: it is a server when it is called by that
    // name.
    let redis = find_tool("redis-server").or_else(|| find_tool("redis-check-rdb"));
    let redis = redis.ok_or_else(|| LabError::Missing("redis-server (redis-tools)".to_owned()))?;
    let redis = fs::canonicalize(&redis).map_err(LabError::io(format!("find {}", redis.display())))?;
    add_program(&mut archive, "bin/redis-server", &redis)?;
    add_program(&mut archive, "bin/mcd-lab-guest", eyes)?;
    archive.text("bin/redis", include_str!("../init/redis"), 0o755);
    archive.text("bin/redis-anew", include_str!("../init/redis-anew"), 0o755);
    Ok(archive)
}

/// Adds modules and what they need, numbered in the order in which init loads them.
fn add_modules(archive: &mut Archive, kernel: &Kernel, names: &[&str]) -> Result<(), LabError> {
    archive.directory("modules");
    for (number, path) in kernel.load_order(names)?.iter().enumerate() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("modules/{number:02}-{name}"), path, 0o644);
    }
    Ok(())
}

/// Adds a program with the shared libraries it is linked with, each where the program looks for it.
fn add_program(archive: &mut Archive, path: &str, program: &Path) -> Result<(), LabError> {
    archive.file(path, program, 0o755);
    let ldd = || LabError::io(format!("list the libraries of {}", program.display()));
    let output = Command::new("ldd").arg(program).output().map_err(ldd())?;
    for library in libraries(&String::from_utf8_lossy(&output.stdout)) {
        let file = fs::canonicalize(&library).map_err(ldd())?;
        archive.file(&library.to_string_lossy(), &file, 0o755);
    }
    Ok(())
}

/// The files that `ldd` names: `name => /path (0x…)`, or `/path (0x…)` for the loader.
fn libraries(ldd: &str) -> Vec<PathBuf> {
    let files = ldd.lines().filter_map(|line| {
        let line = line.split_once("=>").map_or(line, |(_, file)| file).trim();
        line.split_whitespace().next().filter(|file| file.starts_with('/'))
    });
    files.map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_is_understood() {
        let text = "\tlinux-vdso.so.1 (0x00007ffb)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x0000)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00)\n\tlibgone.so => not found\n";
        let found = ["/lib/x86_64-linux-gnu/libm.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(libraries(text), found);
        assert!(libraries("\tstatically linked\n").is_empty());
    }
}
