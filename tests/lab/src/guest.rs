//! Which guest is protected, and the flags of its nodes.

use std::time::Duration;

use mcd::testbed::namespaces::{GUEST_IPV4, GUEST_PREFIX_LEN};

use crate::disk::GUEST_IMAGE_PATH;
use crate::image::{GUEST_INITRD, GUEST_KERNEL};
use crate::time_server;

/// A guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// mcd's own.
    BuiltIn,
    /// Debian's unmodified cloud kernel with a redis-server.
    Linux {
        /// Its processors.
        cpus: u8,
        /// A loop on each of them that never rests, and one that writes files.
        stress: bool,
    },
}

impl Guest {
    /// The flags that describe its machine to the node that boots it.
    pub fn boot_flags(self) -> String {
        match self {
            Guest::BuiltIn => "--memory 64M".to_owned(),
            Guest::Linux { cpus, stress } => {
                let stress = if stress { " lab.stress" } else { "" };
                let lab = format!("lab.ip={GUEST_IPV4}/{GUEST_PREFIX_LEN} lab.time={}{stress}", time_server::address());
                let append = format!("console=ttyS0 panic=-1 mitigations=off {lab}");
                format!(
                    "--memory 192M --cpus {cpus} --kernel {GUEST_KERNEL} --initrd {GUEST_INITRD} --append \"{append}\""
                )
            }
        }
    }

    /// The flags that both of its nodes are given.
    pub fn node_flags(self) -> String {
        // QEMU's emulation lets a guest's XSETBV change its host's XCR0 and tells KVM nothing: so
        // the guest gets a CPU without XSAVE.
        let linux = match self {
            Guest::BuiltIn => String::new(),
            Guest::Linux { .. } => format!(" --cpu baseline --disk {GUEST_IMAGE_PATH},serial=lab"),
        };
        format!("--guest-ip {GUEST_IPV4}/{GUEST_PREFIX_LEN}{linux}")
    }

    /// How long it may take to boot and serve.
    pub fn boot_limit(self) -> Duration {
        match self {
            Guest::BuiltIn => Duration::from_secs(60),
            Guest::Linux { .. } => Duration::from_secs(240),
        }
    }

    /// How often the host that runs it loses its power in a row, if nobody says so.
    pub fn power_cuts(self) -> u32 {
        if self.is_linux() { 5 } else { 2 }
    }

    /// How many requests of each kind a redis-benchmark sends it: more than it serves before the
    /// next fault.
    pub fn benchmark_requests(self) -> u32 {
        match self {
            Guest::BuiltIn => 1000,
            Guest::Linux { stress: false, .. } => 300,
            Guest::Linux { stress: true, .. } => 150,
        }
    }

    /// Whether it is a Linux, which has a kernel log.
    pub fn is_linux(self) -> bool {
        matches!(self, Guest::Linux { .. })
    }
}

/// What a kernel logs when its machine has not gone on as machines do: parts of lines, in small
/// letters.
const COMPLAINTS: [&str; 15] = [
    "lockup",
    "rcu: info",
    "self-detected stall",
    "switched to clocksource",
    "clocksource: timekeeping",
    "marking tsc unstable",
    "i/o error",
    "ext4-fs error",
    "ext4-fs warning",
    "remounting filesystem read-only",
    "blocked for more than",
    "call trace",
    "bug:",
    "nobody cared",
    "transmit timed out",
];

/// What a kernel logs when it finds its machine odd as it boots: parts of lines, in small letters.
const BOOT_COMPLAINTS: [&str; 8] =
    ["warning:", "bug:", "call trace", "firmware bug", "acpi error", "acpi warning", "acpi bios error", "oops:"];

/// The lines of a kernel's log of its boot that are complaints about its machine.
pub fn boot_complaints(log: &[String]) -> Vec<String> {
    let is_bad = |line: &&String| {
        let line = line.to_lowercase();
        BOOT_COMPLAINTS.iter().any(|part| line.contains(part))
    };
    log.iter().filter(is_bad).cloned().collect()
}

/// The lines of a kernel's log that were not there `before` and that are complaints.
pub fn complaints(before: &[String], now: &[String]) -> Vec<String> {
    let is_bad = |line: &String| {
        let line = line.to_lowercase();
        COMPLAINTS.iter().any(|part| line.contains(part))
    };
    now.iter().filter(|line| !before.contains(line) && is_bad(line)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_is_to_be_without_complaint() {
        let good = "[1.8] PCI: Using host bridge windows from ACPI; if necessary, use \"pci=nocrs\" and report a bug";
        let bad = "[1.4] WARNING: CPU: 0 PID: 0 at arch/x86/kernel/fpu/xstate.c:606";
        assert_eq!(boot_complaints(&[good.to_owned(), bad.to_owned()]), [bad]);
    }

    #[test]
    fn only_new_complaints_count() {
        let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
        let before = lines(&["[1] clocksource: Switched to clocksource kvm-clock", "[2] eth0 up"]);
        let mut now = before.clone();
        now.extend(lines(&[
            "[8] EXT4-fs mounted",
            "[9] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
            "[9] EXT4-fs error (device vda): no",
        ]));
        assert_eq!(complaints(&before, &now), now[3..]);
        assert!(complaints(&now, &now).is_empty());
    }
}
