//! The registers with which a vCPU is in 64-bit mode from its first instruction on. What a boot
//! writes into memory must say the same: the CPU reads it as soon as a segment is loaded.

use kvm_bindings::{kvm_dtable, kvm_segment, kvm_sregs};

/// What the boots have different.
pub(super) struct LongMode {
    /// Selector of the code segment; its lowest bits are the privilege level.
    pub(super) code: u16,
    /// Selector of all data segments.
    pub(super) data: u16,
    /// Selector, address and last byte of the task state.
    pub(super) task: (u16, u64, u32),
    /// Address of the GDT.
    pub(super) gdt: u64,
    /// Its entries.
    pub(super) gdt_entries: usize,
    /// Address of the top page table.
    pub(super) page_tables: u64,
    /// CR0, CR4 and EFER.
    pub(super) control: (u64, u64, u64),
}

impl LongMode {
    /// The registers: flat segments, and no interrupt table, for no handler is there yet: a fault
    /// shows as a shutdown.
    pub(super) fn registers(self) -> kvm_sregs {
        let (code, data) = (flat(self.code, true), flat(self.data, false));
        let (selector, base, limit) = self.task;
        let (cr0, cr4, efer) = self.control;
        kvm_sregs {
            cs: code,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: kvm_segment { base, limit, selector, type_: 11, present: 1, ..kvm_segment::default() },
            ldt: kvm_segment { type_: 2, present: 1, unusable: 1, ..kvm_segment::default() },
            gdt: kvm_dtable { base: self.gdt, limit: (self.gdt_entries * 8 - 1) as u16, ..kvm_dtable::default() },
            idt: kvm_dtable::default(),
            cr0,
            cr3: self.page_tables,
            cr4,
            efer,
            ..kvm_sregs::default()
        }
    }
}

/// A segment of all addresses: executable and readable code in 64-bit mode, or writable data.
fn flat(selector: u16, is_code: bool) -> kvm_segment {
    const RING: u16 = 3;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: if is_code { 11 } else { 3 },
        present: 1,
        dpl: (selector & RING) as u8,
        db: u8::from(!is_code),
        s: 1,
        l: u8::from(is_code),
        g: 1,
        ..kvm_segment::default()
    }
}
