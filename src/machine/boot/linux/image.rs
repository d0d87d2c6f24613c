//! Reads a kernel file: what a bzImage says of itself, and whether the ELF file in it can be
//! loaded.

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::Elf as ElfLoader;
use vm_memory::{ByteValued, GuestAddress};

use super::error::LinuxError;
use super::unpack::unpack;
use crate::machine::memory::GuestRam;

/// Where in a bzImage the setup header starts.
const HEADER: usize = 0x1f1;
/// Where in it the offset of the header's end is, counted from 0x202.
const HEADER_END_FIELD: usize = 0x201;
const HEADER_END_BASE: usize = 0x202;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// The first boot protocol that says whether the kernel has a 64-bit entry.
const PROTOCOL_MIN: u16 = 0x020c;
/// In `xloadflags`: the kernel is a 64-bit one.
const XLF_KERNEL_64: u16 = 1;
const SECTOR_BYTES: usize = 512;
/// Sectors of setup code if the header says 0.
const SETUP_SECTORS_DEFAULT: usize = 4;

/// What a plain vmlinux does not say: the longest command line every x86 kernel takes, and the
/// highest address of an initrd.
const CMDLINE_BYTES_DEFAULT: u32 = 2047;
const INITRD_ADDRESS_MAX_DEFAULT: u32 = 0x7fff_ffff;
const ALIGNMENT_DEFAULT: u32 = 0x20_0000;

/// RAM below this address is not the kernel's: tables and what PCs have always had there.
const LOW_MEMORY_END: u64 = 0x10_0000;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const ELF_MACHINE_X86_64: u16 = 62;
const ELF_CLASS_64: u8 = 2;
const ELF_LITTLE_ENDIAN: u8 = 1;
const SEGMENT_LOAD: u32 = 1;
/// Most segments: a kernel has about five.
const SEGMENTS_MAX: usize = 64;

/// A kernel, unpacked and checked, not yet in memory.
pub(super) struct Kernel {
    /// Its setup header, as it goes into the boot parameters.
    pub(super) header: setup_header,
    elf: Vec<u8>,
    /// One past the highest guest-physical address it takes.
    pub(super) end: u64,
    /// Where its 64-bit entry is.
    pub(super) entry: u64,
}

impl Kernel {
    /// Reads a kernel file.
    ///
    /// # Errors
    /// [`LinuxError`] that says what is wrong with the file.
    pub(super) fn parse(file: &[u8]) -> Result<Kernel, LinuxError> {
        if file.starts_with(&ELF_MAGIC) {
            return Kernel::of_elf(file.to_vec(), plain_header());
        }
        let header = header_of(file)?;
        let payload = payload_of(file, &header)?;
        Kernel::of_elf(unpack(payload)?, header)
    }

    fn of_elf(elf: Vec<u8>, header: setup_header) -> Result<Kernel, LinuxError> {
        let Extent { end, entry } = check_elf(&elf)?;
        Ok(Kernel { header, elf, end, entry })
    }

    /// Copies the kernel into memory that was never written, so that what follows a segment's bytes
    /// is zero.
    ///
    /// # Errors
    /// [`LinuxError::KernelTooLarge`] if it does not fit below `low_end`.
    pub(super) fn copy_to(&self, ram: &GuestRam, low_end: u64) -> Result<(), LinuxError> {
        if self.end > low_end {
            return Err(LinuxError::KernelTooLarge { needed: self.end, given: low_end });
        }
        // An offset of zero is no offset, and spares the loader the notes of the file, of which
        // nothing is needed.
        let offset = Some(GuestAddress(0));
        ElfLoader::load(ram.mmap(), offset, &mut std::io::Cursor::new(&self.elf), None)
            .map_err(|error| LinuxError::damaged(error.to_string()))?;
        Ok(())
    }
}

/// The header of a kernel that comes without one.
fn plain_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL_MIN,
        kernel_alignment: ALIGNMENT_DEFAULT,
        cmdline_size: CMDLINE_BYTES_DEFAULT,
        initrd_addr_max: INITRD_ADDRESS_MAX_DEFAULT,
        ..setup_header::default()
    }
}

fn header_of(file: &[u8]) -> Result<setup_header, LinuxError> {
    let end = usize::from(*file.get(HEADER_END_FIELD).ok_or(LinuxError::NotAKernel)?) + HEADER_END_BASE;
    let magic = u32_at(file, HEADER_END_BASE).ok_or(LinuxError::NotAKernel)?;
    if magic != HEADER_MAGIC {
        return Err(LinuxError::NotAKernel);
    }
    let bytes = file.get(HEADER..end).ok_or_else(|| LinuxError::damaged("its header is cut off"))?;
    let mut header = setup_header::default();
    // A newer kernel's header may be longer than what is known here.
    for (to, from) in header.as_mut_slice().iter_mut().zip(bytes) {
        *to = *from;
    }
    let [minor, major] = header.version.to_le_bytes();
    if { header.version } < PROTOCOL_MIN {
        return Err(LinuxError::Protocol { major, minor });
    }
    if { header.boot_flag } != BOOT_FLAG {
        return Err(LinuxError::damaged("its header has no boot flag"));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(LinuxError::Architecture { what: "32-bit x86".to_owned() });
    }
    Ok(header)
}

fn payload_of<'a>(file: &'a [u8], header: &setup_header) -> Result<&'a [u8], LinuxError> {
    let sectors = match header.setup_sects {
        0 => SETUP_SECTORS_DEFAULT,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * SECTOR_BYTES + header.payload_offset as usize;
    let end = start.saturating_add(header.payload_length as usize);
    file.get(start..end)
        .ok_or_else(|| LinuxError::damaged(format!("it has {} bytes and says that it needs {end}", file.len())))
}

/// What of memory an ELF file takes.
struct Extent {
    end: u64,
    entry: u64,
}

/// Checks everything the loader relies on: the loader trusts the file's addresses.
fn check_elf(elf: &[u8]) -> Result<Extent, LinuxError> {
    let cut_off = || LinuxError::damaged("the ELF file in it is cut off");
    let header = elf.get(..ELF_HEADER_BYTES).ok_or_else(cut_off)?;
    if !header.starts_with(&ELF_MAGIC) {
        return Err(LinuxError::damaged("there is no ELF file in it"));
    }
    let machine = u16_at(header, 18).ok_or_else(cut_off)?;
    let is_native = header.get(4..6) == Some(&[ELF_CLASS_64, ELF_LITTLE_ENDIAN]) && machine == ELF_MACHINE_X86_64;
    if !is_native {
        return Err(LinuxError::Architecture { what: machine_name(machine) });
    }
    let entry = u64_at(header, 24).ok_or_else(cut_off)?;
    let table = usize::try_from(u64_at(header, 32).ok_or_else(cut_off)?).map_err(|_| cut_off())?;
    let (size, count) = (u16_at(header, 54).ok_or_else(cut_off)?, usize::from(u16_at(header, 56).ok_or_else(cut_off)?));
    if usize::from(size) != PROGRAM_HEADER_BYTES || count > SEGMENTS_MAX {
        return Err(LinuxError::damaged(format!("its ELF file has {count} segments of {size} bytes each")));
    }
    let table_end = table.checked_add(count * PROGRAM_HEADER_BYTES).ok_or_else(cut_off)?;
    let table = elf.get(table..table_end).ok_or_else(cut_off)?;
    let mut end = 0;
    let mut holds_entry = false;
    for segment in table.chunks_exact(PROGRAM_HEADER_BYTES) {
        if let Some((from, to)) = check_segment(segment, elf.len() as u64)? {
            end = end.max(to);
            holds_entry |= (from..to).contains(&entry);
        }
    }
    if holds_entry { Ok(Extent { end, entry }) } else { Err(LinuxError::damaged("it starts outside itself")) }
}

/// The addresses a segment takes, if it takes any.
fn check_segment(segment: &[u8], file_bytes: u64) -> Result<Option<(u64, u64)>, LinuxError> {
    let damaged = || LinuxError::damaged("a segment of its ELF file lies outside the file or of memory");
    let field = |at| u64_at(segment, at).ok_or_else(damaged);
    if u32_at(segment, 0) != Some(SEGMENT_LOAD) {
        return Ok(None);
    }
    let (offset, address, in_file, in_memory) = (field(8)?, field(24)?, field(32)?, field(40)?);
    if in_memory == 0 && in_file == 0 {
        return Ok(None);
    }
    let end = address.checked_add(in_memory).ok_or_else(damaged)?;
    let fits_file = offset.checked_add(in_file).is_some_and(|end| end <= file_bytes);
    if !fits_file || in_file > in_memory || address < LOW_MEMORY_END {
        return Err(damaged());
    }
    Ok(Some((address, end)))
}

fn machine_name(machine: u16) -> String {
    match machine {
        3 | ELF_MACHINE_X86_64 => "32-bit x86".to_owned(),
        183 => "arm64".to_owned(),
        40 => "arm".to_owned(),
        243 => "RISC-V".to_owned(),
        22 => "s390".to_owned(),
        20 | 21 => "PowerPC".to_owned(),
        other => format!("ELF machine {other}"),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|b| u16::from_le_bytes(*b))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|b| u64::from_le_bytes(*b))
}
