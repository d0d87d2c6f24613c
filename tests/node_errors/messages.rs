//! What a node says of a guest without drivers, and where it listens before its address is there.

use std::fs;

use mcd::control::status::State;

use super::environment::run;
use super::process::Node;

/// A kernel that halts at once: it has a driver for nothing.
fn kernel_without_drivers() -> Vec<u8> {
    const BASE: u64 = 16 << 20;
    const SEGMENT: usize = 0x1000;
    // cli; hlt; jmp to the hlt
    const CODE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
    let mut elf = vec![0; SEGMENT + CODE.len()];
    let mut put = |at: usize, value: &[u8]| elf[at..at + value.len()].copy_from_slice(value);
    put(0, b"\x7fELF\x02\x01\x01");
    // An executable for x86-64, its entry, its one program header.
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(24, &BASE.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    // A segment to load: where in the file, where to, how much.
    put(64, &1u32.to_le_bytes());
    put(64 + 8, &(SEGMENT as u64).to_le_bytes());
    put(64 + 24, &BASE.to_le_bytes());
    put(64 + 32, &(CODE.len() as u64).to_le_bytes());
    put(64 + 40, &4096u64.to_le_bytes());
    put(SEGMENT, &CODE);
    elf
}

#[test]
fn devices_that_no_driver_looks_at_are_in_the_status() {
    run("messages::devices_that_no_driver_looks_at_are_in_the_status", |host| {
        let (kernel, disk) = (host.path("kernel"), host.path("disk.img"));
        fs::write(&kernel, kernel_without_drivers()).expect("a file");
        fs::write(&disk, vec![0; 1 << 20]).expect("a file");
        let flags = [format!("--kernel={}", kernel.display()), format!("--disk={}", disk.display())];
        let mut primary = Node::start(host.primary_command(&[&flags[0], &flags[1], "--memory=64M"]));
        primary.wait_guest();
        let status = primary.status();
        assert_eq!(status.unused_devices, ["network card", "disk 0", "random source"], "{status}");
        assert!(status.to_string().contains("no driver has looked at: network card, disk 0"), "{status}");
        primary.quit();
        primary.ends_well();
    });
}

#[test]
fn a_guest_with_drivers_has_none_of_its_devices_unused() {
    run("messages::a_guest_with_drivers_has_none_of_its_devices_unused", |host| {
        let primary = host.primary();
        primary.wait_status("using its network card", |status| status.unused_devices.is_empty());
        // After a takeover its drivers are as they were, and look at nothing anew.
        let secondary = host.secondary(&[]);
        primary.wait_state(State::Protected);
        primary.quit();
        let status = secondary.wait_status("running", |status| status.running);
        assert!(status.unused_devices.is_empty(), "{status}");
    });
}

#[test]
fn an_address_to_listen_on_may_come_later() {
    run("messages::an_address_to_listen_on_may_come_later", |host| {
        let mut primary = Node::start(host.primary_command(&["--listen=10.55.0.1:7401"]));
        primary.wait_warning("this host does not have the address to listen on yet");
        primary.wait_guest();
        let mut secondary = host.secondary(&["--peer=10.55.0.1:7401", "--listen=[fd00::55]:7401"]);
        secondary.wait_warning("this host does not have the address to listen on yet");
        secondary.wait_warning("MC_NO_PRIMARY");
        host.ip("addr add 10.55.0.1/32 dev lo");
        secondary.wait_line("protected in g");
        // An address that is there and taken is an error as before.
        let taken = std::net::TcpListener::bind("127.0.0.1:7501").expect("a port");
        let control = format!("--control={}", host.path("other.sock").display());
        let flags = ["--listen=127.0.0.1:7501", "--tap=tap2", &control];
        host.ip("tuntap add dev tap2 mode tap");
        host.ip("link set tap2 up");
        Node::start(host.primary_command(&flags))
            .fails(super::environment::FAILURE, &["cannot listen on 127.0.0.1:7501"]);
        drop(taken);
    });
}
