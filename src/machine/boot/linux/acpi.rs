//! The ACPI tables: how a Linux guest finds its processors, its serial port and its virtio devices,
//! and how it switches itself off.
//!
//! ```text
//! 0xE0000   RSDP, then XSDT, FADT, MADT, DSDT, each on 16 bytes
//! 0xFFFF0   the end of their room
//! ```
//!
//! The machine is *hardware-reduced* in ACPI's words: it has no PM registers and no SCI, so there
//! is no state of them to be saved. Power-off is a write to the sleep control register, a reset one
//! to the reset register (see `device::bus`). Every x86 kernel since 2014 knows that.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use super::error::LinuxError;
use crate::device::bus::{
    POWER_PORT, POWER_STATUS_PORT, RESET_PORT, RESET_VALUE, SLEEP_TYPE_OFF, VIRTIO_WINDOW_BYTES, VirtioWindow,
};
use crate::device::serial::{SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS};

/// Where the tables lie: in the first MiB where firmware has them, so that also a kernel that is
/// not told finds them.
pub(super) const TABLES: u64 = 0xE_0000;
/// One past the last byte there is room for: where a PC starts.
const TABLES_END: u64 = super::RESET_VECTOR;
const ALIGNMENT: u64 = 16;

const OEM: [u8; 6] = *b"MCD   ";
const OEM_TABLE: [u8; 8] = *b"MCDGUEST";
const OEM_REVISION: u32 = 1;
/// Revision 2 and up: integers of AML have 64 bits.
const DSDT_REVISION: u8 = 2;
const TABLE_HEADER_BYTES: u32 = 36;

const LOCAL_APIC: u32 = 0xFEE0_0000;
const IO_APIC: u32 = 0xFEC0_0000;
/// What the PC's boot flags of the FADT say: no VGA, no CMOS clock. There is no keyboard controller
/// either, which is a bit not set.
const BOOT_FLAGS: u16 = 1 << 2 | 1 << 5;

/// The tables of a machine with `cpus` vCPUs and virtio devices in `windows`, to be put at
/// [`TABLES`]; the RSDP comes first.
///
/// # Errors
/// [`LinuxError::Tables`] if they are more than there is room for.
pub(super) fn tables(cpus: u8, windows: &[VirtioWindow]) -> Result<Vec<u8>, LinuxError> {
    let mut room = Room { bytes: vec![0; Rsdp::len()] };
    let dsdt = room.add(dsdt(windows).as_slice());
    let fadt = room.add(&bytes_of(&fadt(dsdt)));
    let madt = room.add(&bytes_of(&madt(cpus)));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = room.add(&bytes_of(&xsdt));
    let mut bytes = room.bytes;
    bytes.splice(..Rsdp::len(), bytes_of(&Rsdp::new(OEM, xsdt)));
    let room = (TABLES_END - TABLES) as usize;
    if bytes.len() > room {
        return Err(LinuxError::Tables { cpus, devices: windows.len(), bytes: bytes.len(), room });
    }
    Ok(bytes)
}

/// The tables' bytes, as they will lie from [`TABLES`] on.
struct Room {
    bytes: Vec<u8>,
}

impl Room {
    /// Appends a table; its guest-physical address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let address = (TABLES + self.bytes.len() as u64).next_multiple_of(ALIGNMENT);
        self.bytes.resize((address - TABLES) as usize, 0);
        self.bytes.extend_from_slice(table);
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(number: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, number.into())
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(POWER_PORT);
    fadt.sleep_status_reg = port(POWER_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"MCD\0\0\0\0\0").into();
    fadt.finalize()
}

/// The processors, and the one I/O APIC, whose inputs are the interrupt lines one to one: no line
/// is overridden.
fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    // Its id is what KVM's I/O APIC says of itself.
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

fn dsdt(windows: &[VirtioWindow]) -> Sdt {
    // Put together first: the table hashes itself up again at each piece it is given.
    let mut code = Vec::new();
    serial_port(&mut code);
    for (number, window) in windows.iter().enumerate() {
        virtio_device(&mut code, number, *window);
    }
    let off = aml::Package::new(vec![&SLEEP_TYPE_OFF, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    aml::Name::new("_S5_".into(), &off).to_aml_bytes(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", TABLE_HEADER_BYTES, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&code);
    dsdt
}

fn serial_port(code: &mut Vec<u8>) {
    let ports = aml::IO::new(SERIAL_PORT, SERIAL_PORT, 0, SERIAL_PORTS as u8);
    let interrupt = aml::Interrupt::new(true, true, false, false, SERIAL_GSI);
    let resources = aml::ResourceTemplate::new(vec![&ports, &interrupt]);
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_DDN".into(), &"COM1"),
            &aml::Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(code);
}

/// A virtio-mmio device, as Linux's driver looks for it.
fn virtio_device(code: &mut Vec<u8>, number: usize, window: VirtioWindow) {
    // The windows are in the hole below 4 GiB; the bus says so by their base.
    let address = window.address as u32;
    let registers = aml::Memory32Fixed::new(true, address, VIRTIO_WINDOW_BYTES as u32);
    let interrupt = aml::Interrupt::new(true, false, false, false, window.gsi);
    let resources = aml::ResourceTemplate::new(vec![&registers, &interrupt]);
    let path = format!("_SB_.V{:03X}", number & 0xfff);
    aml::Device::new(
        path.as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &number),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn windows(count: u8) -> Vec<VirtioWindow> {
        (0..count).map(VirtioWindow::of).collect()
    }

    fn word(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four")) as usize
    }

    /// The table at a guest-physical address, its checksum checked.
    fn table(bytes: &[u8], address: usize) -> &[u8] {
        let at = address - TABLES as usize;
        let table = &bytes[at..at + word(bytes, at + 4)];
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "{:?}", &table[..4]);
        table
    }

    /// Every table but the RSDP, found as a guest finds them.
    fn found(bytes: &[u8]) -> Vec<&[u8]> {
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let xsdt = table(bytes, word(bytes, 24));
        let mut tables = vec![xsdt];
        tables.extend(xsdt[36..].chunks_exact(8).map(|entry| table(bytes, word(entry, 0))));
        let fadt = tables.iter().find(|t| t.starts_with(b"FACP")).expect("FADT");
        let dsdt = table(bytes, word(fadt, 140));
        tables.push(dsdt);
        tables
    }

    #[test]
    fn a_guest_finds_every_table_from_the_first_on() {
        for (cpus, devices) in [(1, 1), (2, 3), (64, 8)] {
            let bytes = tables(cpus, &windows(devices)).expect("tables");
            let tables = found(&bytes);
            let names: Vec<&[u8]> = tables.iter().map(|t| &t[..4]).collect();
            assert_eq!(names, [b"XSDT", b"FACP", b"APIC", b"DSDT"]);
            let madt = tables[2];
            assert_eq!(madt.len(), 44 + 8 * usize::from(cpus) + 12);
            let dsdt = tables[3];
            let count = |what: &[u8]| dsdt.windows(what.len()).filter(|w| *w == what).count();
            assert_eq!((count(b"LNRO0005"), count(b"COM1\x08")), (usize::from(devices), 1));
            for window in windows(devices) {
                assert_eq!(count(&(window.address as u32).to_le_bytes()), 1, "{window:?}");
            }
        }
    }

    #[test]
    fn more_devices_than_there_is_room_for_are_refused() {
        let many = vec![VirtioWindow::of(0); 4000];
        assert!(matches!(tables(1, &many), Err(LinuxError::Tables { devices: 4000, .. })));
    }

    /// The reference compiler takes every table apart and finds nothing wrong in what it would put
    /// together again.
    #[test]
    fn iasl_finds_no_fault() {
        let Ok(version) = Command::new("iasl").arg("-v").output() else {
            println!("skipped: iasl is not installed (Debian package acpica-tools)");
            return;
        };
        assert!(version.status.success());
        let directory = tempfile::tempdir().expect("directory");
        let bytes = tables(3, &windows(20)).expect("tables");
        for table in found(&bytes) {
            let name = String::from_utf8_lossy(&table[..4]).to_lowercase();
            let file = |extension: &str| directory.path().join(format!("{name}.{extension}"));
            std::fs::write(file("dat"), table).expect("write");
            let run = |flag: &str, extension: &str| {
                let output = Command::new("iasl").arg(flag).arg(file(extension)).output().expect("iasl");
                let text = [output.stdout, output.stderr].concat();
                let text = String::from_utf8_lossy(&text).into_owned();
                assert!(output.status.success(), "{name}: {text}");
                assert!(!text.contains("Invalid") && !text.contains("ncorrect checksum"), "{name}: {text}");
                text
            };
            run("-d", "dat");
            let text = run("-ve", "dsl");
            assert!(text.contains("0 Errors"), "{name}: {text}");
        }
    }
}
