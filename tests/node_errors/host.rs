//! What the host lacks: taps, devices, ports.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::environment::{Environment, FAILURE, HOST, Mount, PRIMARY, mount, run};
use super::process::Node;

#[test]
fn a_missing_or_occupied_tap_ends_the_node() {
    run("host::a_missing_or_occupied_tap_ends_the_node", |host| {
        let _first = host.primary();
        let control = format!("--control={}", host.path("other.sock").display());
        let other = host.primary_command(&["--listen=127.0.0.1:7501", &control]);
        Node::start(other).fails(HOST, &["tap tap0 is occupied", "name another tap"]);
        host.secondary(&["--tap=tap0"]).fails(HOST, &["tap tap0 is occupied"]);
        host.secondary(&["--tap=nosuch0"]).fails(HOST, &["there is no tap nosuch0", "ip tuntap add"]);
        host.secondary(&["--tap=lo"]).fails(HOST, &["lo is not a tap"]);
    });
}

/// Everything under /dev that a node uses, but for what is left out.
fn dev_without(host: &Environment, left_out: &str) -> Vec<Mount> {
    let dev = host.path("dev");
    fs::create_dir_all(dev.join("net")).expect("a directory");
    let mut mounts = Vec::new();
    for name in ["null", "kvm", "net/tun"].into_iter().filter(|name| *name != left_out) {
        fs::write(dev.join(name), "").expect("a file");
        mounts.push(Mount::Bind(format!("/dev/{name}").into(), dev.join(name)));
    }
    mounts.push(Mount::Bind(dev, "/dev".into()));
    mounts
}

#[track_caller]
fn lacks(host: &Environment, mounts: &[Mount], parts: &[&str]) {
    for mut node in [host.primary_command(&[]), host.secondary_command(&[])] {
        mount(&mut node.0, mounts, None);
        Node::start(node).fails(HOST, parts);
    }
}

#[test]
fn a_missing_kvm_device_ends_the_node() {
    run("host::a_missing_kvm_device_ends_the_node", |host| {
        lacks(host, &dev_without(host, "kvm"), &["/dev/kvm"]);
    });
}

#[test]
fn another_device_at_the_path_of_kvm_ends_the_node() {
    run("host::another_device_at_the_path_of_kvm_ends_the_node", |host| {
        lacks(host, &[Mount::Bind("/dev/null".into(), "/dev/kvm".into())], &["/dev/kvm"]);
    });
}

#[test]
fn a_missing_tun_device_ends_the_node() {
    run("host::a_missing_tun_device_ends_the_node", |host| {
        lacks(host, &dev_without(host, "net/tun"), &["tap", "/dev/net/tun is missing", "modprobe tun"]);
    });
}

#[test]
fn ports_and_control_sockets_in_use_end_the_node() {
    run("host::ports_and_control_sockets_in_use_end_the_node", |host| {
        let taken = std::net::TcpListener::bind(PRIMARY[1]).expect("a port");
        Node::start(host.primary_command(&[])).fails(FAILURE, &["cannot listen on 127.0.0.1:7402", "in use"]);
        drop(taken);
        let _first = host.primary();
        host.secondary(&[&format!("--control={}", host.path("p.sock").display())])
            .fails(FAILURE, &["control socket", "p.sock", "another process answers there"]);
    });
}

#[test]
fn more_memory_than_the_host_or_its_control_group_has_is_refused_untouched() {
    run("host::more_memory_than_the_host_or_its_control_group_has_is_refused_untouched", |host| {
        Node::start(host.primary_command(&["--memory=900G"]))
            .fails(HOST, &["921600 MiB", "the host has", "give the guest less"]);
        // A system in which every control group may have 24 MiB, of either hierarchy.
        let groups = host.path("groups");
        fs::create_dir_all(groups.join("memory")).expect("a directory");
        for limit in ["memory.max", "memory/memory.limit_in_bytes"] {
            fs::write(groups.join(limit), "25165824\n").expect("a file");
        }
        let limited = |(mut command, control): (Command, PathBuf)| {
            mount(&mut command, &[Mount::Bind(groups.clone(), "/sys/fs/cgroup".into())], None);
            Node::start((command, control))
        };
        let parts = ["64 MiB", "control group /sys/fs/cgroup", "leaves 24 MiB", "memory.max"];
        limited(host.primary_command(&["--memory=64M"])).fails(HOST, &parts);
        let mut primary = Node::start(host.primary_command(&["--memory=64M"]));
        primary.wait_guest();
        limited(host.secondary_command(&[])).fails(HOST, &parts);
        primary.assert_serves_alone();
        // Less than that is given.
        let control = format!("--control={}", host.path("other.sock").display());
        limited(host.primary_command(&[
            "--memory=16M",
            &control,
            "--guest=small",
            "--tap=tap1",
            "--listen=127.0.0.1:7501",
        ]))
        .wait_guest();
    });
}
