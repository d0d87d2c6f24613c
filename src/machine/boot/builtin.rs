//! The built-in guest: its image is part of this program, and every vCPU starts in it in 64-bit
//! ring 3.
//!
//! Ring 3 because some hosts run only that at full speed; see `guest/` for the guest itself and
//! `tables` for what lies where.

use std::io::Cursor;

use kvm_bindings::{kvm_msr_entry, kvm_regs};
use linux_loader::loader::{Elf, KernelLoader};

use super::{BootError, tables};
use crate::machine::initial::{GuestNet, InitialVcpu};
use crate::machine::memory::GuestRam;
use crate::protocol::machine_shape::MachineShape;

/// The guest's image, built by `build.rs`.
static IMAGE: &[u8] = include_bytes!(env!("MCD_GUEST_ELF"));

/// Least memory the guest runs with: its image, its sockets and some data.
pub const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// Most memory the guest can use.
pub const MEMORY_BYTES_MAX: u64 = tables::MEMORY_MAX;
/// Most vCPUs the guest runs on.
pub const CPUS_MAX: u8 = tables::CPUS_MAX;

/// MSR_KVM_SYSTEM_TIME_NEW: where KVM keeps a vCPU's kvmclock page.
const MSR_KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// In that MSR: on.
const KVM_SYSTEM_TIME_ENABLED: u64 = 1;
/// Bit 1 of RFLAGS is always set. Interrupts stay off: the guest polls.
const RFLAGS_RESERVED: u64 = 2;
/// In RFLAGS: ring 3 may use all ports. The I/O bitmap of the TSS says the same of the guest's
/// ports, and is what counts where KVM drops this. QEMU's software processor, on the other hand,
/// ignores the bitmap of a TSS that is marked busy, as one in use must be.
const RFLAGS_IOPL_3: u64 = 3 << 12;
/// The boot info page's first word and the layout the guest knows.
const BOOT_INFO_MAGIC: u64 = 0x6d63_645f_626f_6f74;
const BOOT_INFO_VERSION: u32 = 1;

/// Puts the guest into `ram` and says how each vCPU starts: all of them at once, vCPU 0 as the
/// server. It gets a random number, because it has no other source of chance.
///
/// # Errors
/// [`BootError`] if the machine's shape is not one the guest runs on, or the host has no random
/// number.
pub fn load(ram: &GuestRam, shape: &MachineShape, net: &GuestNet) -> Result<Vec<InitialVcpu>, BootError> {
    check(ram, shape)?;
    let seed = getrandom::u64().map_err(|error| BootError::Random { reason: error.to_string() })?;
    tables::write(ram)?;
    ram.write(tables::BOOT_INFO, &boot_info(ram, shape, net, seed))?;
    let entry = load_image(ram)?;
    Ok((0..shape.cpus).map(|cpu| start(cpu, entry)).collect())
}

fn check(ram: &GuestRam, shape: &MachineShape) -> Result<(), BootError> {
    let given = ram.bytes();
    if given < MEMORY_BYTES_MIN {
        return Err(BootError::MemoryTooSmall { needed: MEMORY_BYTES_MIN, given });
    }
    if given > MEMORY_BYTES_MAX {
        return Err(BootError::MemoryTooLarge { most: MEMORY_BYTES_MAX, given });
    }
    if !(1..=CPUS_MAX).contains(&shape.cpus) {
        return Err(BootError::Cpus { most: CPUS_MAX, given: shape.cpus });
    }
    Ok(())
}

/// Copies the image's segments; the address it starts at. What follows a segment's bytes is zero,
/// as all new guest memory is.
fn load_image(ram: &GuestRam) -> Result<u64, BootError> {
    let image = |reason: String| BootError::Image { reason };
    let loaded =
        Elf::load(ram.mmap(), None, &mut Cursor::new(IMAGE), None).map_err(|error| image(error.to_string()))?;
    let entry = loaded.kernel_load.0;
    if (tables::IMAGE..loaded.kernel_end).contains(&entry) {
        Ok(entry)
    } else {
        Err(image(format!("it starts at {entry:#x}, outside itself")))
    }
}

fn start(cpu: u8, entry: u64) -> InitialVcpu {
    let regs = kvm_regs {
        rip: entry,
        rsp: tables::stack_top(cpu),
        rdi: cpu.into(),
        rsi: tables::BOOT_INFO,
        rflags: RFLAGS_RESERVED | RFLAGS_IOPL_3,
        ..kvm_regs::default()
    };
    let clock_page = tables::KVMCLOCK + u64::from(cpu) * tables::KVMCLOCK_STRIDE;
    let clock = kvm_msr_entry {
        index: MSR_KVM_SYSTEM_TIME,
        data: clock_page | KVM_SYSTEM_TIME_ENABLED,
        ..kvm_msr_entry::default()
    };
    InitialVcpu { regs, sregs: tables::special_registers(), fpu: None, msrs: vec![clock] }
}

/// The boot info page, as `guest/src/bare/boot_info.rs` reads it.
fn boot_info(ram: &GuestRam, shape: &MachineShape, net: &GuestNet, seed: u64) -> Vec<u8> {
    let mut page = Vec::new();
    page.extend(BOOT_INFO_MAGIC.to_le_bytes());
    page.extend(BOOT_INFO_VERSION.to_le_bytes());
    page.extend(u32::from(shape.cpus).to_le_bytes());
    page.extend(ram.bytes().to_le_bytes());
    page.extend(shape.mac);
    page.extend([0; 2]);
    page.extend(net.ipv4.octets());
    page.push(net.prefix_len);
    page.extend([0; 3]);
    page.extend(net.gateway.map_or([0; 4], |gateway| gateway.octets()));
    page.extend([0; 4]);
    page.extend(tables::KVMCLOCK.to_le_bytes());
    page.extend(seed.to_le_bytes());
    page
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const NET: GuestNet = GuestNet { ipv4: Ipv4Addr::new(10, 0, 0, 2), prefix_len: 24, gateway: None };

    fn shape(memory_bytes: u64, cpus: u8) -> MachineShape {
        MachineShape::bare(memory_bytes, cpus, [2, 0, 0, 0, 0, 1])
    }

    #[test]
    fn the_image_lands_behind_the_tables() {
        let ram = GuestRam::new(MEMORY_BYTES_MIN).expect("map");
        let vcpus = load(&ram, &shape(MEMORY_BYTES_MIN, 3), &NET).expect("load");
        assert_eq!(vcpus.len(), 3);
        let mut code = [0; 16];
        ram.read(vcpus[0].regs.rip, &mut code).expect("RAM");
        assert_ne!(code, [0; 16]);
        assert!(vcpus.iter().enumerate().all(|(cpu, vcpu)| vcpu.regs.rdi == cpu as u64));
        let stacks: std::collections::HashSet<u64> = vcpus.iter().map(|vcpu| vcpu.regs.rsp).collect();
        assert_eq!(stacks.len(), 3);
    }

    #[test]
    fn shapes_it_cannot_run_on_are_refused() {
        let refused = |memory_bytes, cpus| {
            let ram = GuestRam::new(memory_bytes).expect("map");
            load(&ram, &shape(memory_bytes, cpus), &NET).err()
        };
        assert!(matches!(refused(4 << 20, 1), Some(BootError::MemoryTooSmall { .. })));
        assert!(matches!(refused(MEMORY_BYTES_MAX + 4096, 1), Some(BootError::MemoryTooLarge { .. })));
        assert!(matches!(refused(MEMORY_BYTES_MIN, 0), Some(BootError::Cpus { .. })));
        assert!(matches!(refused(MEMORY_BYTES_MIN, CPUS_MAX + 1), Some(BootError::Cpus { .. })));
    }

    #[test]
    fn the_boot_info_page_has_the_layout_the_guest_reads() {
        let ram = GuestRam::new(MEMORY_BYTES_MIN).expect("map");
        let net = GuestNet { gateway: Some(Ipv4Addr::new(10, 0, 0, 1)), ..NET };
        let page = boot_info(&ram, &shape(MEMORY_BYTES_MIN, 2), &net, 0x0102_0304_0506_0708);
        assert_eq!(page.len(), 64);
        assert_eq!(&page[..8], b"toob_dcm");
        assert_eq!(&page[24..30], &[2, 0, 0, 0, 0, 1]);
        assert_eq!(&page[32..37], &[10, 0, 0, 2, 24]);
        assert_eq!(&page[40..44], &[10, 0, 0, 1]);
        assert_eq!(&page[44..48], &[0; 4]);
    }
}
