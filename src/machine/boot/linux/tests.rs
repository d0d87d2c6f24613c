//! The loader on whole files: a good one, and every bad one a person or an attacker could give.

use std::path::PathBuf;

use super::*;
use crate::machine::memory::MEMORY_BYTES_MAX;

const MIB: u64 = 1 << 20;
/// Where the test kernels are linked to.
const BASE: u64 = 16 * MIB;
/// What they hold: something to be recognised by.
const CODE: &[u8] = b"kernel code";
const SEGMENT: usize = 0x1000;

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// An ELF file with one segment, which takes `in_memory` bytes.
fn vmlinux(in_memory: u64) -> Vec<u8> {
    let mut elf = vec![0; SEGMENT + CODE.len()];
    put(&mut elf, 0, b"\x7fELF\x02\x01\x01");
    put(&mut elf, 16, &2u16.to_le_bytes());
    put(&mut elf, 18, &62u16.to_le_bytes());
    put(&mut elf, 24, &BASE.to_le_bytes());
    put(&mut elf, 32, &64u64.to_le_bytes());
    put(&mut elf, 54, &56u16.to_le_bytes());
    put(&mut elf, 56, &1u16.to_le_bytes());
    put(&mut elf, 64, &1u32.to_le_bytes());
    put(&mut elf, 64 + 8, &(SEGMENT as u64).to_le_bytes());
    put(&mut elf, 64 + 24, &BASE.to_le_bytes());
    put(&mut elf, 64 + 32, &(CODE.len() as u64).to_le_bytes());
    put(&mut elf, 64 + 40, &in_memory.to_le_bytes());
    put(&mut elf, SEGMENT, CODE);
    elf
}

/// A bzImage around `elf`, packed with gzip.
fn bzimage(elf: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(elf).expect("pack");
    let payload = packer.finish().expect("pack");
    let mut image = vec![0; 2 * 512 + 64];
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1fe, &0xaa55u16.to_le_bytes());
    put(&mut image, 0x200, &[0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020fu16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x248, &64u32.to_le_bytes());
    put(&mut image, 0x24c, &(payload.len() as u32).to_le_bytes());
    image.extend(payload);
    image
}

struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new() -> Files {
        Files { directory: tempfile::tempdir().expect("directory") }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, bytes).expect("write");
        path
    }

    fn guest(&self, kernel: &[u8], initrd: Option<&[u8]>) -> LinuxGuest {
        let initrd = initrd.map(|bytes| self.write("initrd", bytes));
        LinuxGuest { kernel: self.write("kernel", kernel), initrd, append: "console=ttyS0".to_owned() }
    }
}

fn load_into(memory_bytes: u64, guest: &LinuxGuest) -> Result<(GuestRam, InitialVcpu), LinuxError> {
    let ram = GuestRam::new(memory_bytes).expect("map");
    let mut vcpus = load(&ram, 2, &[VirtioWindow::of(0)], guest)?;
    assert_eq!(vcpus.len(), 1, "the others are started by the first");
    Ok((ram, vcpus.remove(0)))
}

fn refused(kernel: &[u8]) -> LinuxError {
    load_into(64 * MIB, &Files::new().guest(kernel, None)).map(|_| ()).expect_err("refused")
}

fn bytes_at(ram: &GuestRam, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    ram.read(address, &mut bytes).expect("RAM");
    bytes
}

#[test]
fn kernel_initrd_and_words_land_where_the_boot_protocol_says() {
    let files = Files::new();
    let initrd = vec![0x5a; 5000];
    for kernel in [vmlinux(MIB), bzimage(&vmlinux(MIB))] {
        let (ram, vcpu) = load_into(64 * MIB, &files.guest(&kernel, Some(&initrd))).expect("load");
        assert_eq!((vcpu.regs.rip, vcpu.regs.rsi), (BASE, start::ZERO_PAGE));
        assert_eq!(bytes_at(&ram, BASE, CODE.len()), CODE);
        let params = bytes_at(&ram, start::ZERO_PAGE, 4096);
        let word = |at: usize| u64::from(u32::from_le_bytes(params[at..at + 4].try_into().expect("four")));
        assert_eq!(&params[0x202..0x206], b"HdrS");
        let (address, length) = (word(0x218), word(0x21c));
        assert_eq!((address, length), (64 * MIB - 8192, 5000));
        assert_eq!(bytes_at(&ram, address, 5000), initrd);
        assert_eq!(bytes_at(&ram, word(0x228), 14), b"console=ttyS0\0");
        assert_eq!(word(0x70), acpi::TABLES);
        assert_eq!(bytes_at(&ram, acpi::TABLES, 8), b"RSD PTR ");
        assert_eq!(bytes_at(&ram, 0xffff0, 7), RESET_CODE);
        assert_eq!(params[0x1e8], 3);
    }
}

#[test]
fn the_memory_map_leaves_the_hole_out_at_every_size() {
    let gib = 1024 * MIB;
    for memory_bytes in [64 * MIB, 3 * gib - 4096, 3 * gib, 3 * gib + 4096, 16 * gib, 700 * gib, MEMORY_BYTES_MAX] {
        let map = memory_map(memory_bytes);
        assert!(map.windows(2).all(|pair| pair[0].1 <= pair[1].0), "in order, without overlap");
        assert!(map.iter().all(|(from, to, _)| from < to && (*to <= HOLE_START || *from >= HOLE_END)));
        let given: u64 = map.iter().map(|(from, to, _)| to - from).sum();
        assert_eq!(given, memory_bytes);
        assert_eq!(map.len(), if memory_bytes > 3 * gib { 4 } else { 3 });
    }
}

#[test]
fn memory_beyond_the_hole_is_told_and_the_initrd_stays_in_reach() {
    // Mapped without reserve: costs address space only.
    let files = Files::new();
    let (ram, _) = load_into(300 << 30, &files.guest(&bzimage(&vmlinux(MIB)), Some(b"initrd"))).expect("load");
    let params = bytes_at(&ram, start::ZERO_PAGE, 4096);
    let word = |at: usize| u64::from_le_bytes(params[at..at + 8].try_into().expect("eight"));
    assert_eq!(params[0x1e8], 4);
    let last = 0x2d0 + 3 * 20;
    assert_eq!((word(last), word(last + 8)), (HOLE_END, (300 << 30) - HOLE_START));
    assert_eq!(word(0x218) & 0xffff_ffff, 0x8000_0000 - 4096);
}

#[test]
fn what_does_not_fit_is_told_with_numbers() {
    let files = Files::new();
    let small = files.guest(&bzimage(&vmlinux(60 * MIB)), None);
    assert!(
        matches!(load_into(64 * MIB, &small), Err(LinuxError::KernelTooLarge { needed, .. }) if needed == 76 * MIB)
    );
    let large = vec![0; 3 * MIB as usize];
    let guest = files.guest(&bzimage(&vmlinux(46 * MIB)), Some(&large));
    match load_into(64 * MIB, &guest).map(|_| ()) {
        Err(LinuxError::InitrdTooLarge { bytes, room }) => assert_eq!((bytes, room), (3 * MIB, 2 * MIB)),
        other => panic!("{other:?}"),
    }
    let mut guest = files.guest(&bzimage(&vmlinux(MIB)), None);
    guest.append = "x".repeat(2047);
    assert!(load_into(64 * MIB, &guest).is_ok());
    guest.append.push('x');
    assert!(matches!(load_into(64 * MIB, &guest), Err(LinuxError::AppendTooLong { bytes: 2048, most: 2047 })));
    guest.append = "a\nb".to_owned();
    assert!(matches!(load_into(64 * MIB, &guest), Err(LinuxError::AppendText)));
}

#[test]
fn files_that_are_none_are_told_by_name() {
    let files = Files::new();
    let mut guest = files.guest(&bzimage(&vmlinux(MIB)), Some(b""));
    assert!(matches!(load_into(64 * MIB, &guest), Err(LinuxError::Empty { flag: "initrd", .. })));
    guest.initrd = Some(files.directory.path().to_owned());
    assert!(matches!(load_into(64 * MIB, &guest), Err(LinuxError::Read { flag: "initrd", .. })));
    guest.kernel = files.directory.path().join("none");
    let error = load_into(64 * MIB, &guest).map(|_| ()).expect_err("no such file").to_string();
    assert!(error.contains("none") && error.contains("--kernel") && !error.contains('\n'), "{error}");
}

#[test]
fn a_kernel_cut_off_anywhere_is_refused() {
    let image = bzimage(&vmlinux(MIB));
    for cut in (1..image.len()).step_by(7).chain([image.len() - 1]) {
        let error = refused(&image[..cut]);
        assert!(matches!(error, LinuxError::NotAKernel | LinuxError::Damaged { .. }), "cut to {cut}: {error}");
    }
    let elf = vmlinux(MIB);
    for cut in [4, 63, 64, 100, 119, SEGMENT, elf.len() - 1] {
        assert!(matches!(refused(&elf[..cut]), LinuxError::Damaged { .. }), "cut to {cut}");
    }
}

#[test]
fn headers_that_claim_too_much_are_refused() {
    let image = bzimage(&vmlinux(MIB));
    for (at, value) in [(0x248, u32::MAX), (0x24c, u32::MAX), (0x24c, 0), (0x1f1, 0xff)] {
        let mut bad = image.clone();
        put(&mut bad, at, &value.to_le_bytes()[..if at == 0x1f1 { 1 } else { 4 }]);
        assert!(matches!(refused(&bad), LinuxError::Damaged { .. } | LinuxError::Packing { .. }), "{at:#x}");
    }
    // Segments: offset, address, bytes in the file, bytes in memory, and how many there are.
    for (at, value) in [
        (64 + 8, u64::MAX),
        (64 + 24, u64::MAX - 5),
        (64 + 24, 0x1000),
        (64 + 32, u64::MAX),
        (64 + 40, u64::MAX),
        (64 + 40, 1),
        (32, u64::MAX),
        (24, 0),
        (24, BASE + MIB),
    ] {
        let mut bad = vmlinux(MIB);
        put(&mut bad, at, &value.to_le_bytes());
        assert!(matches!(refused(&bad), LinuxError::Damaged { .. }), "{at} {value:#x}");
    }
    for (at, value) in [(56, u16::MAX), (56, 0), (54, 55)] {
        let mut bad = vmlinux(MIB);
        put(&mut bad, at, &value.to_le_bytes());
        assert!(matches!(refused(&bad), LinuxError::Damaged { .. }), "{at} {value}");
    }
    let mut far = vmlinux(MIB);
    put(&mut far, 64 + 24, &(1u64 << 40).to_le_bytes());
    put(&mut far, 24, &(1u64 << 40).to_le_bytes());
    assert!(matches!(refused(&far), LinuxError::KernelTooLarge { .. }));
}

#[test]
fn kernels_for_others_are_told_apart_from_damage() {
    let mut other = vmlinux(MIB);
    put(&mut other, 18, &183u16.to_le_bytes());
    assert!(matches!(refused(&other), LinuxError::Architecture { what } if what == "arm64"));
    put(&mut other, 18, &3u16.to_le_bytes());
    put(&mut other, 4, &[1]);
    assert!(matches!(refused(&other), LinuxError::Architecture { what } if what == "32-bit x86"));
    let mut old = bzimage(&vmlinux(MIB));
    put(&mut old, 0x206, &0x0207u16.to_le_bytes());
    assert!(refused(&old).to_string().contains("protocol 2.07"));
    let mut narrow = bzimage(&vmlinux(MIB));
    put(&mut narrow, 0x236, &[0, 0]);
    assert!(matches!(refused(&narrow), LinuxError::Architecture { .. }));
    assert!(matches!(refused(b"#!/bin/sh\n"), LinuxError::NotAKernel));
    assert!(matches!(refused(&vec![0; 100_000]), LinuxError::NotAKernel));
}

/// A kernel of the system this runs on, if it has one, is read whole.
#[test]
fn a_distributions_kernel_is_read() {
    let found = std::fs::read_dir("/boot").into_iter().flatten().flatten().map(|entry| entry.path());
    let Some(path) =
        found.into_iter().find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-")))
    else {
        println!("skipped: no kernel in /boot");
        return;
    };
    let kernel = Kernel::parse(&std::fs::read(&path).expect("read")).expect("a kernel");
    assert!(kernel.end > kernel.entry && kernel.entry >= BASE);
}
