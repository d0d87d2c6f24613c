//! An unmodified Linux kernel: loaded as its boot protocol wants it (64-bit entry), told of the
//! machine by ACPI tables.
//!
//! `image` reads the kernel file, `unpack` unpacks a bzImage's kernel, `acpi` makes the tables,
//! `start` what the entry finds; here the rest of memory is laid out:
//!
//! ```text
//! 0         page tables, boot parameters, command line (see `start`)
//! 0x9FC00   not RAM; ACPI tables from 0xE0000 on, at 0xFFFF0 what restarts the machine
//! 0x100000  RAM: the kernel where it was linked to, the initrd as high as the kernel can reach
//! 3 GiB     the hole: devices, I/O APIC, local APIC
//! 4 GiB     RAM that does not fit below the hole
//! ```
//! The kernel is not moved to a random address: that is done by the code in a bzImage that unpacks
//! it, which does not run.

mod acpi;
mod error;
mod image;
mod start;
#[cfg(test)]
mod tests;
mod unpack;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress};

pub use self::error::LinuxError;

use self::image::Kernel;
use crate::device::bus::VirtioWindow;
use crate::machine::initial::InitialVcpu;
use crate::machine::memory::{GuestRam, HOLE_END, HOLE_START};

/// Most bytes a kernel file may have.
const KERNEL_FILE_BYTES_MAX: u64 = 1 << 30;
/// One past the last byte of RAM in the first MiB: the rest of it is what PCs have there, and the
/// tables.
const LOW_RAM_END: u64 = 0x9_FC00;
/// Where RAM goes on.
const HIGH_RAM: u64 = 0x10_0000;
const PAGE: u64 = 0x1000;

/// Where a PC starts in real mode. Some kernels restart a machine by going there, among them those
/// that find no description of the board.
const RESET_VECTOR: u64 = 0xF_FFF0;
/// What they find: `mov al, 0xfe; out 0x64, al; hlt; jmp` to the hlt: the keyboard controller's
/// reset line.
const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// What the memory map calls RAM, and what nobody may use.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// A boot loader without a number of its own.
const LOADER_UNKNOWN: u8 = 0xff;
/// In `loadflags`: the kernel was loaded at or above 1 MiB.
const LOADED_HIGH: u8 = 1;

/// A Linux guest as the operator names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinuxGuest {
    /// The kernel: a bzImage or a vmlinux.
    pub kernel: PathBuf,
    /// Its first file system, if it needs one.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub append: String,
}

/// Puts the guest into `ram`, which must be new, and says how its first vCPU starts; the others
/// wait to be started by it. It is told of `cpus` vCPUs and of virtio devices in `windows`.
///
/// # Errors
/// [`LinuxError`]: the files cannot be read, are not what they should be, or do not fit.
pub fn load(
    ram: &GuestRam,
    cpus: u8,
    windows: &[VirtioWindow],
    guest: &LinuxGuest,
) -> Result<Vec<InitialVcpu>, LinuxError> {
    let low_end = ram.bytes().min(HOLE_START);
    let kernel = Kernel::parse(&read_kernel(&guest.kernel)?)?;
    kernel.copy_to(ram, low_end)?;
    write_command_line(ram, &guest.append, &kernel.header)?;
    let initrd = match &guest.initrd {
        Some(path) => load_initrd(ram, path, &kernel, low_end)?,
        None => Initrd::default(),
    };
    ram.write(acpi::TABLES, &acpi::tables(cpus, windows)?)?;
    ram.write(RESET_VECTOR, &RESET_CODE)?;
    let params = boot_parameters(kernel.header, initrd, ram.bytes());
    ram.write(start::ZERO_PAGE, params.as_slice())?;
    start::write(ram)?;
    Ok(vec![start::vcpu(kernel.entry)])
}

fn read_kernel(path: &Path) -> Result<Vec<u8>, LinuxError> {
    let (file, bytes) = open("kernel", path, KERNEL_FILE_BYTES_MAX)?;
    let mut kernel = Vec::with_capacity(usize::try_from(bytes).unwrap_or(0));
    file.take(KERNEL_FILE_BYTES_MAX).read_to_end(&mut kernel).map_err(|reason| read_error("kernel", path, reason))?;
    Ok(kernel)
}

/// Opens a file that must be a regular one of 1 to `most` bytes.
fn open(flag: &'static str, path: &Path, most: u64) -> Result<(File, u64), LinuxError> {
    let file = File::open(path).map_err(|reason| read_error(flag, path, reason))?;
    let meta = file.metadata().map_err(|reason| read_error(flag, path, reason))?;
    if !meta.is_file() {
        return Err(read_error(flag, path, std::io::Error::other("it is no regular file")));
    }
    match meta.len() {
        0 => Err(LinuxError::Empty { flag, path: path.to_owned() }),
        bytes if bytes > most => Err(LinuxError::FileTooLarge { flag, path: path.to_owned(), bytes, most }),
        bytes => Ok((file, bytes)),
    }
}

fn read_error(flag: &'static str, path: &Path, reason: std::io::Error) -> LinuxError {
    LinuxError::Read { flag, path: path.to_owned(), reason }
}

fn write_command_line(ram: &GuestRam, append: &str, header: &setup_header) -> Result<(), LinuxError> {
    // One byte of the room is the zero at the end, which the kernel's own number does not count.
    let most = (header.cmdline_size as usize).min(start::COMMAND_LINE_BYTES_MAX - 1);
    if append.len() > most {
        return Err(LinuxError::AppendTooLong { bytes: append.len(), most });
    }
    if append.chars().any(char::is_control) {
        return Err(LinuxError::AppendText);
    }
    ram.write(start::COMMAND_LINE, append.as_bytes())?;
    ram.write(start::COMMAND_LINE + append.len() as u64, &[0])?;
    Ok(())
}

/// Where an initrd lies.
#[derive(Clone, Copy, Default)]
struct Initrd {
    address: u32,
    bytes: u32,
}

/// Puts the initrd as high as the kernel can reach it, on a page of its own.
fn load_initrd(ram: &GuestRam, path: &Path, kernel: &Kernel, low_end: u64) -> Result<Initrd, LinuxError> {
    let (mut file, bytes) = open("initrd", path, u64::MAX)?;
    let reach = u64::from(kernel.header.initrd_addr_max) + 1;
    let (from, to) = (kernel.end.next_multiple_of(PAGE), low_end.min(reach) / PAGE * PAGE);
    let room = to.saturating_sub(from);
    let too_large = || LinuxError::InitrdTooLarge { bytes, room };
    if bytes > room {
        return Err(too_large());
    }
    let address = (to - bytes) / PAGE * PAGE;
    let length = usize::try_from(bytes).map_err(|_| too_large())?;
    ram.mmap()
        .read_exact_volatile_from(GuestAddress(address), &mut file, length)
        .map_err(|_| LinuxError::InitrdChanged { path: path.to_owned() })?;
    // Below 3 GiB, so both fit.
    Ok(Initrd { address: address as u32, bytes: bytes as u32 })
}

fn boot_parameters(header: setup_header, initrd: Initrd, memory_bytes: u64) -> boot_params {
    let mut params = boot_params { hdr: header, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNKNOWN;
    params.hdr.loadflags |= LOADED_HIGH;
    params.hdr.cmd_line_ptr = start::COMMAND_LINE as u32;
    params.hdr.ramdisk_image = initrd.address;
    params.hdr.ramdisk_size = initrd.bytes;
    params.acpi_rsdp_addr = acpi::TABLES;
    for (entry, (addr, end, kind)) in params.e820_table.iter_mut().zip(memory_map(memory_bytes)) {
        *entry = boot_e820_entry { addr, size: end - addr, r#type: kind };
        params.e820_entries += 1;
    }
    params
}

/// The memory map: start, end and type of each piece.
fn memory_map(memory_bytes: u64) -> Vec<(u64, u64, u32)> {
    let low_end = memory_bytes.min(HOLE_START);
    let mut map =
        vec![(0, LOW_RAM_END, E820_RAM), (LOW_RAM_END, HIGH_RAM, E820_RESERVED), (HIGH_RAM, low_end, E820_RAM)];
    if memory_bytes > HOLE_START {
        map.push((HOLE_END, HOLE_END + (memory_bytes - HOLE_START), E820_RAM));
    }
    map
}
