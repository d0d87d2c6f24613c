//! What a kernel's 64-bit entry finds: paging on with the first 4 GiB mapped to themselves, flat
//! segments, interrupts off.
//!
//! ```text
//! 0x0500    GDT
//! 0x7000    boot parameters (the "zero page")
//! 0x9000    page tables: PML4, PDPT, four page directories of large pages
//! 0x20000   command line
//! ```
//! All of it is in what the memory map gives the kernel as RAM: it is done with it before it hands
//! that memory out.

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::machine::boot::long_mode::LongMode;
use crate::machine::initial::InitialVcpu;
use crate::machine::memory::{GuestRam, MemoryError};

const GDT: u64 = 0x500;
/// Where the boot parameters lie.
pub(super) const ZERO_PAGE: u64 = 0x7000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xA000;
const DIRECTORIES: u64 = 0xB000;
/// The stack a kernel may use before it has its own: below the page tables.
const STACK_TOP: u64 = 0x9000;
/// Where the command line lies.
pub(super) const COMMAND_LINE: u64 = 0x2_0000;
/// Room for it.
pub(super) const COMMAND_LINE_BYTES_MAX: usize = 0x1_0000;

const PAGE: u64 = 0x1000;
const LARGE_PAGE: u64 = 0x20_0000;
/// GiB that are mapped, one page directory each.
const MAPPED_GIB: u64 = 4;
const ENTRIES: u64 = 512;
/// Page table bits: present, writable.
const TABLE: u64 = 3;
/// And: a large page.
const LEAF: u64 = 0x83;

/// GDT entries and so selectors / 8, as the boot protocol has them: code 0x10, data 0x18.
const CODE: u16 = 2;
const DATA: u16 = 3;
const TASK: u16 = 4;
const GDT_ENTRIES: usize = 6;
const GDT_WORDS: [u64; GDT_ENTRIES] = [0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067, 0];

/// Writes page tables and GDT.
///
/// # Errors
/// [`MemoryError`] if guest memory ends below them.
pub(super) fn write(ram: &GuestRam) -> Result<(), MemoryError> {
    let bytes = |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
    let pointers: Vec<u64> = (0..MAPPED_GIB).map(|gib| (DIRECTORIES + gib * PAGE) | TABLE).collect();
    let directories: Vec<u64> = (0..MAPPED_GIB * ENTRIES).map(|page| (page * LARGE_PAGE) | LEAF).collect();
    ram.write(GDT, &bytes(&GDT_WORDS))?;
    ram.write(DIRECTORIES, &bytes(&directories))?;
    ram.write(PDPT, &bytes(&pointers))?;
    ram.write(PML4, &bytes(&[PDPT | TABLE]))
}

/// How the first vCPU starts. The others wait for it to start them.
pub(super) fn vcpu(entry: u64) -> InitialVcpu {
    let regs = kvm_regs {
        rip: entry,
        rsp: STACK_TOP,
        rsi: ZERO_PAGE,
        // Bit 1 is always set. Interrupts are off.
        rflags: 2,
        ..kvm_regs::default()
    };
    InitialVcpu { regs, sregs: special_registers(), fpu: None, msrs: Vec::new() }
}

fn special_registers() -> kvm_sregs {
    LongMode {
        code: CODE << 3,
        data: DATA << 3,
        task: (TASK << 3, 0, 0x67),
        gdt: GDT,
        gdt_entries: GDT_ENTRIES,
        page_tables: PML4,
        // PE, ET, PG; PAE; LME, LMA.
        control: (0x8000_0011, 0x20, 0x500),
    }
    .registers()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn four_gib_are_mapped_to_themselves() {
        let ram = GuestRam::new(16 << 20).expect("map");
        write(&ram).expect("write");
        let word = |address: u64| {
            let mut bytes = [0; 8];
            ram.read(address, &mut bytes).expect("RAM");
            u64::from_le_bytes(bytes)
        };
        for address in [0, PAGE, 16 << 20, GIB, 3 * GIB + 5 * LARGE_PAGE, 4 * GIB - 1] {
            let pointer = word((word(PML4) & !0xfff) + (address >> 30) * 8);
            let leaf = word((pointer & !0xfff) + (address >> 21 & 511) * 8);
            assert_eq!(leaf, address & !(LARGE_PAGE - 1) | LEAF, "{address:#x}");
        }
        assert_eq!(word(PML4 + 8), 0);
        assert_eq!(word(PDPT + MAPPED_GIB * 8), 0);
    }

    #[test]
    fn nothing_lies_over_anything_else() {
        const { assert!(GDT as usize + GDT_ENTRIES * 8 <= ZERO_PAGE as usize) };
        const { assert!(ZERO_PAGE + PAGE <= STACK_TOP) };
        const { assert!(DIRECTORIES + MAPPED_GIB * PAGE <= COMMAND_LINE) };
        const { assert!(COMMAND_LINE + COMMAND_LINE_BYTES_MAX as u64 <= super::super::LOW_RAM_END) };
    }
}
