//! What is tried and checked in a Linux guest only: its console, kernel, clocks and disk.

use std::time::{Duration, Instant};

use super::Play;
use crate::disk::GUEST_IMAGE_PATH;
use crate::error::LabError;
use crate::guest::{boot_complaints, complaints};
use crate::guest_report::{Clocks, CpuClocks, DiskSpeed};
use crate::guest_shell::Times;
use crate::lab::Lab;
use crate::report::{ClockFigures, DiskFigures};
use mcd::testbed::load::Phase;
use mcd::testbed::namespaces::HostName;

/// How long two images may take to be read, and a guest to end.
const REST_LIMIT: Duration = Duration::from_secs(120);

/// What a guest was like before anything happened to it.
pub(super) struct Before {
    log: Vec<String>,
    clocksource: String,
}

impl Play {
    /// Makes sure that a person could use the guest, and keeps what it is like.
    pub(super) fn check_boot(&mut self, lab: &mut Lab) -> Result<Before, LabError> {
        let since = Instant::now();
        // The answer is not in the question, which the console shows too.
        lab.ask_console("echo lab-$((6 * 7)) on $(uname -r)", "lab-42 on .*cloud")?;
        self.note("the shell on its console answers", since, None);
        let log = lab.guest_log()?;
        let bad = boot_complaints(&log);
        if !bad.is_empty() {
            return Err(LabError::Wrong(format!("the guest's kernel finds its machine odd:\n  {}", bad.join("\n  "))));
        }
        let clocksource = self.check_clocks(lab, "the boot")?.clocksource;
        self.measure_disk(lab, false)?;
        Ok(Before { log, clocksource })
    }

    /// Measures the guest's disk while its clients rest.
    pub(super) fn measure_disk(&mut self, lab: &mut Lab, protected: bool) -> Result<(), LabError> {
        let since = Instant::now();
        lab.bring_clients_to(Phase::Hold)?;
        let speed = lab.guest_disk_speed()?;
        lab.bring_clients_to(Phase::Run)?;
        let DiskSpeed { write_mib_s, read_mib_s, sync_write, random_read } = &speed;
        let what = if protected { "protected" } else { "solo" };
        self.note(
            format!(
                "its disk, {what}: write {write_mib_s:.1} MiB/s, read {read_mib_s:.1} MiB/s; \
                    4 KiB sync write p50 {} us, read p50 {} us",
                sync_write.p50_us, random_read.p50_us
            ),
            since,
            None,
        );
        self.figures.disk.push(DiskFigures { protected, speed });
        Ok(())
    }

    /// Makes sure that no clock of the guest went back on any vCPU, and keeps what they did.
    pub(super) fn check_clocks(&mut self, lab: &mut Lab, after: &str) -> Result<Clocks, LabError> {
        let Times { clocks, wall_off_ms, wall_unsure_ms } = lab.guest_times()?;
        let kept = ClockFigures { after: after.to_owned(), wall_off_ms, wall_unsure_ms, clocks: clocks.clone() };
        self.figures.clocks.push(kept);
        let went_back = |CpuClocks { monotonic, boottime, realtime, .. }: &CpuClocks| {
            [monotonic, boottime, realtime].iter().any(|steps| steps.back > 0)
        };
        if clocks.cpus.is_empty() || clocks.cpus.iter().any(|cpu| went_back(cpu) || cpu.reads == 0) {
            return Err(LabError::Wrong(format!("after {after} a clock of the guest had gone back: {clocks:?}")));
        }
        Ok(clocks)
    }

    /// Asks the guest's kernel what it noticed: it must be nothing.
    pub(super) fn check_kernel_log(&mut self, lab: &mut Lab, before: &Before) -> Result<(), LabError> {
        let since = Instant::now();
        let clocksource = self.check_clocks(lab, "all of it")?.clocksource;
        if clocksource != before.clocksource {
            let was = &before.clocksource;
            return Err(LabError::Wrong(format!("the guest reads the time from {clocksource}, no more from {was}")));
        }
        expect_no_complaint(lab, before)?;
        lab.ask_console("echo lab-$((7 * 7))", "lab-49")?;
        self.note(
            format!("its kernel has noticed nothing, its clock is {clocksource} still, its console answers"),
            since,
            None,
        );
        Ok(())
    }

    /// The server is killed and has nothing but its disk: every acknowledged write must be there.
    pub(super) fn start_server_anew(&mut self, lab: &mut Lab) -> Result<(), LabError> {
        let since = Instant::now();
        lab.guest_run("redis-anew", REST_LIMIT)?;
        lab.wait_guest_answers()?;
        let keys = lab.read_back_anew()?;
        self.note(
            format!("the server is killed, its disk mounted anew: {keys} keys are there, from its append-only file"),
            since,
            None,
        );
        Ok(())
    }

    /// The guest ends in order: both hosts' images must be equal then, and the file system in them
    /// whole.
    pub(super) fn compare_images(&mut self, lab: &mut Lab, before: &Before) -> Result<(), LabError> {
        let since = Instant::now();
        expect_no_complaint(lab, before)?;
        let marks = lab.let_nodes_end();
        let end = "kill $(pidof redis-server); until umount /data; do sleep 0.1; done 2>/dev/null; \
            (sleep 2; poweroff -f) >/dev/null 2>&1 </dev/null &";
        lab.guest_run(end, REST_LIMIT)?;
        let mut hashes = Vec::new();
        for name in [lab.runner, lab.runner.other()] {
            let status = lab.wait_node_end(marks, name)?;
            if status != "0" {
                return Err(LabError::Wrong(format!(
                    "the guest switched itself off, and host {name}'s node ended with {status}"
                )));
            }
            let host = lab.host(name)?;
            host.run(&format!("e2fsck -fn {GUEST_IMAGE_PATH}"), REST_LIMIT)?;
            // An image with itself: for its sum.
            let text = host.run(&format!("mcd disk verify {GUEST_IMAGE_PATH} {GUEST_IMAGE_PATH}"), REST_LIMIT)?;
            let line = text.lines().next().unwrap_or_default().to_owned();
            let sum = line.split(", ").find(|part| part.starts_with("crc32c")).map(str::to_owned);
            hashes.push((sum.ok_or_else(|| LabError::Wrong(format!("no sum in: {text}")))?, line));
        }
        let lines: Vec<&str> = hashes.iter().map(|(_, line)| line.as_str()).collect();
        if hashes.iter().any(|(sum, _)| *sum != hashes[0].0) {
            return Err(LabError::Wrong(format!("the images of both hosts differ:\n  {}", lines.join("\n  "))));
        }
        self.note(
            format!("the guest ends; both hosts' images are equal ({}), e2fsck finds nothing", hashes[0].0),
            since,
            None,
        );
        self.start_anew(lab, "primary", "the guest starts again where it ended")
    }

    /// The guest starts from the newest image with every acknowledged write, and from no other.
    fn start_anew(&mut self, lab: &mut Lab, role: &str, what: &str) -> Result<(), LabError> {
        let since = Instant::now();
        let (newest, other) = (lab.runner, lab.runner.other());
        let said = lab.refused_start(other, role)?;
        lab.boot_guest(newest, role)?;
        let keys = lab.read_back_anew()?;
        println!("           host {other}: {said}");
        self.note(format!("{what}, and nowhere else: {keys} keys are there"), since, None);
        Ok(())
    }

    /// Both hosts lose their power at once, while the clients write.
    pub(super) fn lose_both(&mut self, lab: &mut Lab) -> Result<(), LabError> {
        self.protect(lab)?;
        lab.bring_clients_to(Phase::Run)?;
        lab.wait_served(super::REPLIES_BETWEEN_FAULTS)?;
        let since = Instant::now();
        lab.let_nodes_end();
        for name in [HostName::A, HostName::B] {
            lab.cut_power(name)?;
        }
        lab.power_on(&[HostName::A, HostName::B])?;
        self.note("both hosts lose their power at once, and boot", since, None);
        self.start_anew(lab, "cold-start --i-know-both-nodes-are-dead", "the guest starts from the newest image")
    }
}

fn expect_no_complaint(lab: &mut Lab, before: &Before) -> Result<(), LabError> {
    let bad = complaints(&before.log, &lab.guest_log()?);
    if bad.is_empty() {
        return Ok(());
    }
    Err(LabError::Wrong(format!("the guest's kernel noticed:\n  {}", bad.join("\n  "))))
}
