//! A lab host: a QEMU process whose emulated processor has SVM, so that KVM in it is the ordinary
//! one.

use std::fs::File;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mcd::control::Client;
use mcd::testbed::error::TestbedError;
use mcd::testbed::namespaces::{HostName, Namespace, find_tool};
use mcd::testbed::nodes::die_with_parent;
use serde_json::json;

use crate::channel::{Channel, Output};
use crate::console::Console;
use crate::error::LabError;
use crate::image::Images;
use crate::net;
use crate::time_server;

/// How long QEMU may take to open its side of the serial lines.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long the monitor may take to answer.
const MONITOR_LIMIT: Duration = Duration::from_secs(10);
/// How long a command may be silent that is not expected to take time.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// What a host's machine is like.
#[derive(Clone, Debug)]
pub struct HostSettings {
    /// Its memory, in MiB.
    pub memory_mib: u32,
    /// Its processors.
    pub cpus: u32,
    /// How fast their counters run, in kHz.
    pub tsc_khz: u64,
}

/// What hosts are made of, and where they are put.
#[derive(Debug)]
pub struct Site {
    /// Their machines.
    pub settings: HostSettings,
    /// What they boot.
    pub images: Images,
    /// What they are plugged into.
    pub network: Arc<Namespace>,
    /// Where their sockets are: a short path.
    pub sockets: PathBuf,
    /// Where their disks are.
    pub disks: PathBuf,
    /// Where the text of their consoles goes.
    pub logs: PathBuf,
}

/// A running host. Dropping it cuts its power.
#[derive(Debug)]
pub struct Host {
    name: HostName,
    child: Child,
    monitor: PathBuf,
    log: PathBuf,
    console: Console,
    channel: Channel,
}

impl Host {
    /// Switches it on with its `disk`. `number` tells its lives apart.
    pub fn power_on(name: HostName, number: u32, site: &Site, disk: &Path) -> Result<Host, LabError> {
        let Site { settings, images, network, sockets: directory, logs, .. } = site;
        let file = |what: &str| directory.join(format!("{name}-{number}.{what}"));
        let lines = ["console", "channel"].map(file);
        let listeners = lines.each_ref().map(|path| listen(path));
        let [console, channel] = listeners;
        let (console, channel) = (console?, channel?);
        let qemu = find_tool("qemu-system-x86_64");
        let qemu = qemu.ok_or_else(|| LabError::Missing("qemu-system-x86_64 (qemu-system-x86)".to_owned()))?;
        let mut command = network.command(qemu);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "pc"]);
        command.args(["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,+svm"]);
        command.args(["-m", &settings.memory_mib.to_string(), "-smp", &settings.cpus.to_string()]);
        command.arg("-kernel").arg(&images.host_kernel).arg("-initrd").arg(&images.host_initrd);
        command.args(["-append", &command_line(name, settings.tsc_khz)]);
        for (id, path) in ["console", "channel"].iter().zip(&lines) {
            command.args(["-chardev", &format!("socket,id={id},path={}", path.display())]);
            command.args(["-serial", &format!("chardev:{id}")]);
        }
        let served = |id: &str| format!("socket,id={id},path={},server=on,wait=off", file(id).display());
        command.args(["-chardev", &served("shell"), "-serial", "chardev:shell"]);
        command.args(["-chardev", &served("monitor"), "-mon", "chardev=monitor,mode=control"]);
        for (kind, last) in [("lan", 1), ("wire", 2)] {
            let host = if name == HostName::A { 0xa } else { 0xb };
            command.args(["-netdev", &format!("tap,id={kind},ifname={kind}-{name},script=no,downscript=no")]);
            let device = format!("virtio-net-pci,netdev={kind},id=nic-{kind},mac=52:54:00:6c:{host:02x}:{last:02x}");
            command.args(["-device", &format!("{device},romfile=")]);
        }
        command.args(["-device", "virtio-rng-pci"]);
        // What the host has flushed is on this machine's disk; what it has not even written is lost
        // with its power.
        command.args(["-drive", &format!("if=none,id=disk,format=raw,cache=writeback,file={}", disk.display())]);
        command.args(["-device", "virtio-blk-pci,drive=disk"]);
        let output = File::create(file("qemu.log")).map_err(LabError::io("make a log for QEMU"))?;
        let copy = output.try_clone().map_err(LabError::io("make a log for QEMU"))?;
        command.stdin(Stdio::null()).stdout(copy).stderr(output);
        // A Ctrl-C at the terminal is for the lab, which then ends its hosts.
        command.process_group(0);
        die_with_parent(&mut command);
        let mut child = command.spawn().map_err(LabError::io("start QEMU"))?;
        let mut accept = |listener: &UnixListener| accept(listener, &mut child, name, &file("qemu.log"));
        let (console, channel) = (accept(&console)?, accept(&channel)?);
        let console = Console::listen(console, &logs.join(format!("{name}-{number}.log")))
            .map_err(LabError::io("follow a console"))?;
        let channel = Channel::new(channel);
        Ok(Host { name, child, monitor: file("monitor"), log: file("qemu.log"), console, channel })
    }

    /// Whether it has said that it is up.
    pub fn is_up(&self) -> bool {
        self.console.find(0, |line| line.starts_with("lab: host")).is_some()
    }

    /// What it says if it cannot come up.
    pub fn fault(&self) -> Option<String> {
        self.console.find(0, |line| line.starts_with("lab: fault:"))
    }

    /// Waits until it takes commands; ask [`Host::is_up`] first.
    pub fn wait_shell(&mut self) -> Result<(), LabError> {
        let ready = self.channel.wait_ready(COMMAND_LIMIT);
        ready.map_err(|error| LabError::Garbled { host: self.name.to_string(), what: format!("no shell: {error}") })
    }

    /// Sets its wall clock by the lab's time server, as hosts do.
    pub fn set_clock(&mut self) -> Result<(), LabError> {
        self.run(&format!("mcd-lab-guest set-clock {}", time_server::address()), COMMAND_LIMIT).map(drop)
    }

    /// An error if its QEMU has ended.
    pub fn check_power(&mut self) -> Result<(), LabError> {
        let how = match self.child.try_wait() {
            Ok(None) => return Ok(()),
            Ok(Some(status)) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let said = std::fs::read_to_string(&self.log).unwrap_or_default();
        // A host that restarts ends its QEMU well: nobody asked it to, so it had a triple fault or
        // a panic.
        let last = format!(" ({how}; it said \"{}\"){}", said.trim(), self.console.tail());
        Err(LabError::HostGone { host: self.name.to_string(), last })
    }

    /// Its name.
    pub fn name(&self) -> HostName {
        self.name
    }

    /// What it says on its console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The socket on which it has a shell for people.
    pub fn shell_path(&self) -> PathBuf {
        self.monitor.with_extension("shell")
    }

    /// Cuts its power and returns at once: nothing in it runs any more.
    pub fn cut_power(mut self) -> Result<(), LabError> {
        self.child.kill().map_err(LabError::io("kill a QEMU"))
    }

    /// Runs a command and tells what came of it.
    pub fn try_run(&mut self, command: &str, limit: Duration) -> Result<Output, LabError> {
        self.channel.run(command, limit).map_err(|error| {
            let (host, last) = (self.name.to_string(), self.console.tail());
            let garbled = || LabError::Garbled { host, what: format!("`{command}`: {error}{last}") };
            self.check_power().err().unwrap_or_else(garbled)
        })
    }

    /// Runs a command that must succeed; its output.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<String, LabError> {
        let Output { code, text } = self.try_run(command, limit)?;
        let (host, command) = (self.name.to_string(), command.to_owned());
        if code == 0 { Ok(text) } else { Err(LabError::Command { host, command, code, output: text }) }
    }

    /// Plugs or unplugs the cable of the link between the hosts.
    pub fn plug_wire(&mut self, plugged: bool) -> Result<(), LabError> {
        let monitor = |source| LabError::Monitor { host: self.name.to_string(), source };
        let mut client = Client::connect(&self.monitor, MONITOR_LIMIT).map_err(monitor)?;
        let arguments = json!({"name": "nic-wire", "up": plugged});
        client.execute("set_link", arguments, MONITOR_LIMIT).map_err(monitor)?;
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may have ended by itself; either way it must be waited for, or it stays in the process
        // table.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The kernel's command line. The emulated processors' counters are this machine's own, so they run
/// together and at one speed; by itself the kernel would measure another speed in each host, and a
/// guest's TSC would not do on the other one.
fn command_line(name: HostName, tsc_khz: u64) -> String {
    let (lan, wire) = (net::lan_address(name), name.link_ipv4());
    let clock = format!("tsc=reliable tsc_early_khz={tsc_khz}");
    format!("console=ttyS0 mitigations=off panic=-1 {clock} lab.name={name} lab.lan={lan} lab.wire={wire}/30")
}

/// How fast this machine's TSC runs, in kHz, to about 10 ppm.
pub fn tsc_khz() -> u64 {
    const WATCH: Duration = Duration::from_millis(200);
    // SAFETY: every x86-64 processor has the instruction, and Linux lets programs use it.
    let read = || (unsafe { std::arch::x86_64::_rdtsc() }, Instant::now());
    let (first, began) = read();
    std::thread::sleep(WATCH);
    let (last, ended) = read();
    let ns = u64::try_from((ended - began).as_nanos()).unwrap_or(u64::MAX).max(1);
    // 2 s at 10 GHz would still fit.
    last.wrapping_sub(first).saturating_mul(1_000_000) / ns
}

fn listen(path: &Path) -> Result<UnixListener, LabError> {
    let action = || LabError::io(format!("listen on {}", path.display()));
    let listener = UnixListener::bind(path).map_err(action())?;
    listener.set_nonblocking(true).map_err(action())?;
    Ok(listener)
}

/// Waits until QEMU has connected, or has ended.
fn accept(listener: &UnixListener, child: &mut Child, name: HostName, log: &Path) -> Result<UnixStream, LabError> {
    let action = || LabError::io("wait for QEMU");
    let deadline = Instant::now() + START_LIMIT;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(action())?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(action()(error)),
        }
        let last = || format!(": {}", std::fs::read_to_string(log).unwrap_or_default().trim());
        if child.try_wait().map_err(action())?.is_some() {
            return Err(LabError::HostGone { host: name.to_string(), last: last() });
        }
        if Instant::now() >= deadline {
            let what = format!("the QEMU of host {name} to open its consoles");
            return Err(TestbedError::TooLate { what, limit_s: START_LIMIT.as_secs(), logs: last() }.into());
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
}
