//! Dirty pages: what vCPUs and devices write is reported once; what is applied is not.

use mcd::protocol::pages::PageSet;

use crate::guest_code;
use crate::support::*;

guest_code!(
    write_on_command,
    // Writes the page whose number the host puts at 0x200000, then says so.
    "1: mov rax, [0x200000]",
    "test rax, rax",
    "jz 1b",
    "mov rcx, rax",
    "shl rcx, 12",
    "mov [rcx + 8], rax",
    "mov qword ptr [0x200000], 0",
    "jmp 1b",
);

guest_code!(
    network_driver,
    // Sets both queues up (8 buffers each: tables at 0x300000 and 0x304000), puts one receive
    // buffer at 0x400000, and waits.
    "mov edi, 0xd0000000",
    "mov dword ptr [rdi + 0x70], 1",
    "mov dword ptr [rdi + 0x70], 3",
    "mov dword ptr [rdi + 0x24], 1",
    "mov dword ptr [rdi + 0x20], 1",
    "mov dword ptr [rdi + 0x70], 11",
    "mov dword ptr [rdi + 0x30], 0",
    "mov dword ptr [rdi + 0x38], 8",
    "mov dword ptr [rdi + 0x80], 0x300000",
    "mov dword ptr [rdi + 0x90], 0x301000",
    "mov dword ptr [rdi + 0xa0], 0x302000",
    "mov dword ptr [rdi + 0x44], 1",
    "mov dword ptr [rdi + 0x70], 15",
    "mov qword ptr [0x300000], 0x400000",
    "mov dword ptr [0x300008], 2048",
    "mov dword ptr [0x30000c], 2",
    "mov word ptr [0x301002], 1",
    "mov dword ptr [rdi + 0x50], 0",
    "mov qword ptr [0x200000], 1",
    // Sleeps until the frame is there.
    "2: mov dx, 0x600",
    "mov eax, 0xffffffff",
    "out dx, eax",
    "cmp word ptr [0x302002], 1",
    "jne 2b",
    "mov qword ptr [0x200000], 2",
    "3: jmp 3b",
);

const PAGE: u64 = 4096;

fn pages(set: &PageSet) -> Vec<u64> {
    set.iter().collect()
}

#[test]
fn what_a_vcpu_writes_is_dirty_once() {
    if !have_kvm() {
        return;
    }
    let (mut machine, _wires, _console) = loaded(1, write_on_command());
    let ram = machine.memory().clone();
    machine.track_dirty(true).expect("track");
    machine.resume().expect("resume");
    let mut dirty = PageSet::empty(ram.pages());
    for page in [3_000u64, 3_001, 3_500, 3_000] {
        ram.write(RESULTS, &page.to_le_bytes()).expect("command");
        until("the guest to write", || word(&ram, RESULTS) == 0);
        machine.pause().expect("pause");
        dirty.clear();
        machine.collect_dirty(&mut dirty).expect("collect");
        assert!(dirty.contains(page), "{page} in {:?}", pages(&dirty));
        assert!(dirty.contains(RESULTS / PAGE));
        assert!(dirty.count() <= 4, "{:?}", pages(&dirty));
        dirty.clear();
        machine.collect_dirty(&mut dirty).expect("collect");
        assert_eq!(pages(&dirty), [0u64; 0], "reading clears");
        machine.resume().expect("resume");
    }
    machine.pause().expect("pause");
    machine.track_dirty(false).expect("untrack");
    assert!(machine.collect_dirty(&mut dirty).is_err(), "nothing is tracked");
}

#[test]
fn collecting_adds_to_a_failed_epochs_dirty_pages() {
    if !have_kvm() {
        return;
    }
    let (mut machine, _wires, _console) = loaded(1, write_on_command());
    let ram = machine.memory().clone();
    machine.track_dirty(true).expect("track");
    let mut dirty = PageSet::empty(ram.pages());
    dirty.insert(77);
    ram.write(99 * PAGE, &[1]).expect("device write");
    ram.write_page(98, &[1; 4096]).expect("apply");
    machine.collect_dirty(&mut dirty).expect("collect");
    assert_eq!(pages(&dirty), [77, 99]);
}

#[test]
fn what_a_device_writes_is_dirty() {
    if !have_kvm() {
        return;
    }
    let (mut machine, wires, _console) = loaded(1, network_driver());
    let ram = machine.memory().clone();
    machine.resume().expect("resume");
    until("the driver to be ready", || word(&ram, RESULTS) == 1);
    machine.pause().expect("pause");
    machine.track_dirty(true).expect("track");
    machine.resume().expect("resume");
    wires.send(&[0x5a; 100]);
    until("the frame, and the doorbell that wakes the guest", || word(&ram, RESULTS) == 2);
    machine.pause().expect("pause");
    let mut dirty = PageSet::empty(ram.pages());
    machine.collect_dirty(&mut dirty).expect("collect");
    assert!(dirty.contains(0x40_0000 / PAGE), "the frame: {:?}", pages(&dirty));
    assert!(dirty.contains(0x30_2000 / PAGE), "the used ring: {:?}", pages(&dirty));
    let mut frame = [0; 112];
    ram.read(0x40_0000, &mut frame).expect("read");
    assert_eq!(frame[12..], [0x5a; 100]);
}

#[test]
fn a_frame_wakes_the_guest_in_the_machine_that_took_over() {
    if !have_kvm() {
        return;
    }
    let (mut first, _first_wires, _console) = loaded(1, network_driver());
    let ram = first.memory().clone();
    first.resume().expect("resume");
    until("the driver to be ready", || word(&ram, RESULTS) == 1);
    first.pause().expect("pause");
    let mut state = Vec::new();
    first.save(&mut state).expect("save");
    let (mut second, wires, _console) = empty(1);
    copy_memory(first.memory(), second.memory());
    second.restore(&state).expect("restore");
    second.resume().expect("resume");
    wires.send(&[0x5a; 100]);
    let ram = second.memory().clone();
    until("the frame to wake the guest", || word(&ram, RESULTS) == 2);
    assert_eq!(wires.waiting(), 0);
}
