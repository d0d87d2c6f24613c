//! What a vCPU in 64-bit ring 3 needs in memory: page tables, a GDT and a TSS.
//!
//! ```text
//! 0x00000   page 0, not mapped: a null pointer faults
//! 0x01000   GDT
//! 0x02000   TSS with the I/O bitmap
//! 0x07000   boot info page
//! 0x08000   kvmclock pages, 64 bytes per vCPU
//! 0x10000   page tables: PML4, PDPT, the first 2 MiB in small pages, then one page directory per GiB
//! 0x80000   stacks of vCPUs 1, 2, ... (16 KiB each, the last page of each not writable)
//! 0xC0000   vCPU 0's stack (256 KiB, the last page not writable)
//! 0x100000  the image
//! ```
//! "Last" is the lowest address: stacks grow down, and one that grows too far faults instead of
//! writing into its neighbour. These pages can be read, because the guest's checksum reads all RAM
//! but page 0.

use kvm_bindings::kvm_sregs;

use super::long_mode::LongMode;
use crate::machine::memory::{GuestRam, HOLE_END, HOLE_START, MemoryError};

const GDT: u64 = 0x1000;
const TSS: u64 = 0x2000;
/// Where the boot info page lies.
pub(super) const BOOT_INFO: u64 = 0x7000;
/// Where vCPU 0's kvmclock page lies.
pub(super) const KVMCLOCK: u64 = 0x8000;
/// Bytes from one vCPU's kvmclock page to the next.
pub(super) const KVMCLOCK_STRIDE: u64 = 64;
const PML4: u64 = 0x1_0000;
const PDPT: u64 = 0x1_1000;
const FIRST_TABLE: u64 = 0x1_2000;
const DIRECTORIES: u64 = 0x1_3000;
const STACKS: u64 = 0x8_0000;
const STACK_BYTES: u64 = 0x4000;
const FIRST_STACK: u64 = 0xC_0000;
/// Where the image starts, and what lies here ends.
pub(super) const IMAGE: u64 = 0x10_0000;

/// Most vCPUs that have a stack.
pub(super) const CPUS_MAX: u8 = 1 + ((FIRST_STACK - STACKS) / STACK_BYTES) as u8;
/// Where the device window lies, in the hole of RAM. One large page of it is mapped.
const DEVICES: u64 = 0xD000_0000;

const PAGE: u64 = 0x1000;
const LARGE_PAGE: u64 = 0x20_0000;
const GIB: u64 = 0x4000_0000;
/// Most memory the directories below the stacks can map: the hole's GiB takes one of them.
pub(super) const MEMORY_MAX: u64 = ((STACKS - DIRECTORIES) / PAGE - 1) * GIB;

/// Page table bits: present, writable, for ring 3, accessed, dirty. The CPU never has to set the
/// last two, so that an idle guest does not dirty its page tables.
const TABLE: u64 = 0x27;
const LEAF: u64 = 0x67;
/// The bit among them that lets the guest write.
const WRITABLE: u64 = 0x02;
const LARGE: u64 = 0x80;
/// No caching, for devices.
const UNCACHED: u64 = 0x18;

/// GDT entries, and so selectors / 8.
const CODE_INDEX: u16 = 1;
const DATA_INDEX: u16 = 2;
const TSS_INDEX: u16 = 3;
const GDT_ENTRIES: usize = 5;
/// Requested privilege level 3, in a selector.
const RING_3: u16 = 3;

/// Bytes of a 64-bit TSS without its I/O bitmap.
const TSS_BYTES: usize = 104;
/// Offset of the field that says where the I/O bitmap starts.
const TSS_BITMAP_FIELD: usize = 102;
/// Ports above this one are forbidden by the bitmap's end.
const PORT_MAX: usize = 0x607;
/// First and last ports the guest may use: serial, wait and event.
const PORTS: [(usize, usize); 2] = [(0x3F8, 0x3FF), (0x600, 0x607)];
const BITMAP_BYTES: usize = PORT_MAX / 8 + 1;

/// Writes page tables, GDT and TSS.
///
/// # Errors
/// [`MemoryError`] if guest memory ends below them.
pub(super) fn write(ram: &GuestRam) -> Result<(), MemoryError> {
    write_page_tables(ram)?;
    ram.write(GDT, &as_bytes(&descriptors()))?;
    ram.write(TSS, &task_state())
}

/// The top of vCPU `cpu`'s stack.
pub(super) fn stack_top(cpu: u8) -> u64 {
    if cpu == 0 { IMAGE } else { STACKS + u64::from(cpu) * STACK_BYTES }
}

/// Segments, control registers and descriptor tables of a vCPU in 64-bit ring 3.
pub(super) fn special_registers() -> kvm_sregs {
    LongMode {
        code: CODE_INDEX << 3 | RING_3,
        data: DATA_INDEX << 3 | RING_3,
        task: (TSS_INDEX << 3, TSS, (TSS_BYTES + BITMAP_BYTES) as u32),
        gdt: GDT,
        gdt_entries: GDT_ENTRIES,
        page_tables: PML4,
        // PE, MP, ET, NE, WP, AM, PG; PAE, OSFXSR, OSXMMEXCPT; SCE, LME, LMA, NXE.
        control: (0x8005_0033, 0x620, 0xD01),
    }
    .registers()
}

/// The GDT in memory says the same as the segments above.
fn descriptors() -> [u64; GDT_ENTRIES] {
    let limit = (TSS_BYTES + BITMAP_BYTES) as u64;
    let task = limit | TSS << 16 | 0x8B << 40;
    // Accessed code or data for ring 3, flat; long mode for code.
    [0, 0x00AF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF, task, 0]
}

/// A TSS whose I/O bitmap allows the guest's ports. A byte of ones ends the bitmap, as the CPU
/// wants it.
fn task_state() -> Vec<u8> {
    let mut bytes = vec![0; TSS_BYTES];
    bytes.splice(TSS_BITMAP_FIELD..TSS_BITMAP_FIELD + 2, (TSS_BYTES as u16).to_le_bytes());
    let allowed = |port: usize| PORTS.iter().any(|(first, last)| (*first..=*last).contains(&port));
    bytes.extend(
        (0..BITMAP_BYTES)
            .map(|byte| (0..8).filter(|bit| !allowed(byte * 8 + bit)).fold(0, |bits, bit| bits | 1u8 << bit)),
    );
    bytes.push(0xFF);
    bytes
}

/// Maps all RAM and the devices, each address to itself: the first 2 MiB in small pages, the rest
/// in large ones.
fn write_page_tables(ram: &GuestRam) -> Result<(), MemoryError> {
    let low_end = ram.bytes().min(HOLE_START);
    let high_end = HOLE_END + (ram.bytes() - low_end);
    let last_gib = if high_end > HOLE_END { high_end.div_ceil(GIB) } else { HOLE_END / GIB };
    let entry = |address: u64| -> u64 {
        let is_ram = address < low_end || (HOLE_END..high_end).contains(&address);
        match address {
            0 => FIRST_TABLE | TABLE,
            DEVICES => address | LEAF | LARGE | UNCACHED,
            _ if is_ram => address | LEAF | LARGE,
            _ => 0,
        }
    };
    let directories: Vec<u64> = (0..last_gib * (GIB / LARGE_PAGE)).map(|page| entry(page * LARGE_PAGE)).collect();
    let pointers: Vec<u64> = (0..last_gib).map(|gib| (DIRECTORIES + gib * PAGE) | TABLE).collect();
    let first: Vec<u64> = (0..LARGE_PAGE / PAGE)
        .map(|page| page * PAGE)
        .map(|address| match address {
            0 => 0,
            _ if is_guard(address) => address | LEAF & !WRITABLE,
            _ => address | LEAF,
        })
        .collect();
    ram.write(DIRECTORIES, &as_bytes(&directories))?;
    ram.write(PDPT, &as_bytes(&pointers))?;
    ram.write(FIRST_TABLE, &as_bytes(&first))?;
    ram.write(PML4, &as_bytes(&[PDPT | TABLE]))
}

/// Whether the page at `address` is the end of a stack.
fn is_guard(address: u64) -> bool {
    let is_stack_end = (STACKS..FIRST_STACK).contains(&address) && (address - STACKS).is_multiple_of(STACK_BYTES);
    is_stack_end || address == FIRST_STACK
}

fn as_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(ram: &GuestRam, address: u64) -> u64 {
        let mut bytes = [0; 8];
        ram.read(address, &mut bytes).expect("RAM");
        u64::from_le_bytes(bytes)
    }

    /// Walks the tables as the CPU does; the physical address behind `address`, if it is mapped and
    /// can be written.
    fn walk(ram: &GuestRam, address: u64) -> Option<u64> {
        let mut table = PML4;
        for shift in [39, 30, 21, 12] {
            let entry = word(ram, table + (address >> shift & 511) * 8);
            if entry & 1 == 0 || entry & WRITABLE == 0 {
                return None;
            }
            assert_eq!(entry & 0x27, 0x27, "present, writable, for ring 3, accessed");
            let base = entry & 0x000F_FFFF_FFFF_F000;
            if shift == 12 || entry & LARGE != 0 {
                assert_eq!(entry & 0x40, 0x40, "dirty is set beforehand");
                return Some(base | address & ((1 << shift) - 1));
            }
            table = base;
        }
        None
    }

    #[test]
    fn all_ram_and_the_devices_are_mapped_to_themselves() {
        let ram = GuestRam::new(HOLE_START + 5 * GIB + 3 * LARGE_PAGE).expect("map");
        write(&ram).expect("write");
        for address in
            [PAGE, IMAGE, LARGE_PAGE, GIB + 5, HOLE_START - 1, DEVICES + 0x1050, HOLE_END, HOLE_END + 5 * GIB]
        {
            assert_eq!(walk(&ram, address), Some(address), "{address:#x}");
        }
        for address in [0, 0xFFF, FIRST_STACK, STACKS, HOLE_START, HOLE_END - 1, HOLE_END + 6 * GIB] {
            assert_eq!(walk(&ram, address), None, "{address:#x}");
        }
    }

    #[test]
    fn nothing_lies_over_anything_else() {
        const { assert!(KVMCLOCK + CPUS_MAX as u64 * KVMCLOCK_STRIDE <= PML4) };
        const { assert!(TSS as usize + TSS_BYTES + BITMAP_BYTES < BOOT_INFO as usize) };
        assert!(stack_top(CPUS_MAX - 1) <= FIRST_STACK);
        let ram = GuestRam::new(MEMORY_MAX).expect("map");
        write(&ram).expect("write");
        assert_eq!(word(&ram, STACKS), 0, "the largest memory's directories end below the stacks");
        assert_eq!(
            walk(&ram, HOLE_END + (MEMORY_MAX - HOLE_START) - 1),
            Some(HOLE_END + (MEMORY_MAX - HOLE_START) - 1)
        );
    }

    #[test]
    fn the_bitmap_allows_the_guest_its_ports_only() {
        let bytes = task_state();
        let forbidden = |port: usize| bytes[TSS_BYTES + port / 8] >> (port % 8) & 1 == 1;
        for port in [0x3F8, 0x3FF, 0x600, 0x607] {
            assert!(!forbidden(port), "{port:#x}");
        }
        for port in [0, 0x60, 0x3F7, 0x400, 0x5FF] {
            assert!(forbidden(port), "{port:#x}");
        }
        assert_eq!(bytes.last(), Some(&0xFF));
        assert_eq!(bytes.len(), TSS_BYTES + BITMAP_BYTES + 1);
    }
}
