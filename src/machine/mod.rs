//! Floor 2: one virtual machine. It can be paused, read for dirty pages, saved, restored and
//! resumed, and knows nothing of replication.
//!
//! # A capture, step by step
//!
//! ```text
//! controller                          vCPU thread                       device thread
//! pause()  quiesce disks, then the rest ────────────────────────────→ out of guest memory
//!          ←───────────────────────────────────────────────────────── quiesced
//!          order Park, kick  ───────→ leaves the guest
//!                                     completes pending I/O
//!          ←──────────────── stopped
//!          order Harvest
//! collect_dirty(), copy_pages()        harvests its state into its slot
//! save()   ←──────────────── settled
//!          slots, chips, devices → bytes
//! resume() order Run  ──────────────→ runs the guest
//!          unquiesce devices  ───────────────────────────────────────→ works again
//! ```
//!
//! [`Machine::pause_within`] returns as soon as guest memory no longer changes; the vCPU threads
//! are then still reading their own state, and [`Machine::save`] waits for them. A controller that
//! copies pages in between gets that time for nothing. (Harvesting writes no guest memory, so the
//! dirty log may be read before it is over.)
//!
//! # Rooms
//!
//! `devices` what they can make happen, and which there are · `memory` where RAM lies · `dirty_log`
//! what changed · `events` what its owner hears · `pause` stopping the guest · `vcpu` threads and
//! the pause word · `wait` the wait port · `save_restore` its state out and in · `state` the byte
//! form of everything
//! · `host` what this host can do · `cpuid` which of it a guest is shown · `initial` what a guest
//! starts with · `boot` who gives it that.

pub mod boot;
mod cpuid;
mod devices;
pub mod dirty_log;
mod error;
mod events;
mod futex;
mod host;
mod host_memory;
pub mod initial;
pub mod memory;
mod pause;
mod prefault;
mod save_restore;
mod state;
mod vcpu;
pub mod wait;

use std::io::Write;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

pub use self::boot::BootError;
pub use self::boot::linux::LinuxGuest;
pub use self::cpuid::CpuModel;
pub use self::error::{KvmError, MachineError, StateError};
pub use self::events::MachineEvents;
pub use self::host::{CPUS_MAX, cpu_digest, cpu_maker, host_cpu};
pub use self::initial::{GuestNet, InitialVcpu};
pub use self::memory::{GuestRam, MemoryError};
pub use self::pause::PauseAbort;
pub use self::prefault::prefault_threads;
pub use self::state::FormatError;
pub use crate::device::{BlockBackend, NetBackend, Offloads, Stored, Transmit};

use self::devices::{MachineSignals, check_disks};
use self::dirty_log::DirtyLog;
use self::error::kvm;
use self::events::{Mailbox, MailboxOwner};
use self::host::HostCaps;
use self::memory::GuestMmap;
use self::pause::PauseSignal;
use self::vcpu::gate::{Order, SpinLimit};
use self::vcpu::{Common, Task, Vcpu};
use self::wait::Doorbell;
use crate::device::Bus;
use crate::device::bus::VirtioWindow;
use crate::device::driver_looks::DriverLooks;
use crate::protocol::machine_shape::MachineShape;
use crate::protocol::pages::{PAGE_BYTES, PageSet};

/// Three pages KVM needs on Intel hosts, in the hole, out of every device's way.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One more such page.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// How long the last pause took to stop the guest, and the last save to get its vCPUs' state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PauseTimes {
    /// From the call of `pause` until every vCPU was out of the guest with its I/O complete, in
    /// microseconds.
    pub stop_us: u64,
    /// What `save` waited for vCPUs that were still reading their state, in microseconds.
    pub settle_us: u64,
    /// What `save` took after that, in microseconds.
    pub encode_us: u64,
}

/// One virtual machine. Dropping it ends its threads.
pub struct Machine {
    // Field order is drop order: vCPU threads end before the devices they call and the VM they
    // belong to.
    vcpus: Vec<Vcpu>,
    bus: Arc<Bus<GuestMmap>>,
    vm: Arc<VmFd>,
    ram: GuestRam,
    shape: MachineShape,
    dirty_log: DirtyLog,
    pause_signal: Arc<PauseSignal>,
    mailbox: MailboxOwner,
    running: bool,
    /// A restore failed: what the machine holds is of no guest.
    half_restored: bool,
    times: PauseTimes,
}

impl Machine {
    /// Builds a machine of `shape` with a CPU of `model`, paused and empty. Its network card is
    /// plugged into `net`, the disks of its shape keep their bytes in `disks`, in the same order;
    /// what it writes to its serial port goes to `console`, which must not block for long.
    ///
    /// # Errors
    /// Without /dev/kvm or what is needed of it, without memory, if the shape is not possible, or
    /// if `disks` are not those of the shape.
    pub fn new(
        shape: &MachineShape,
        model: CpuModel,
        net: Arc<dyn NetBackend>,
        disks: Vec<Arc<dyn BlockBackend>>,
        console: Box<dyn Write + Send>,
    ) -> Result<Machine, MachineError> {
        vcpu::install_kick_handler()?;
        let kvm_fd = host::open()?;
        let caps = Arc::new(HostCaps::ask(&kvm_fd, model)?);
        if shape.cpus == 0 || shape.cpus > caps.cpus_max {
            return Err(MachineError::Cpus { cpus: shape.cpus, max: caps.cpus_max });
        }
        if memory::end_of(shape.memory_bytes) > 1u64.checked_shl(caps.address_bits).unwrap_or(u64::MAX) {
            return Err(MachineError::AddressBits { bytes: shape.memory_bytes, bits: caps.address_bits });
        }
        check_disks(shape, &disks)?;
        let ram = GuestRam::new(shape.memory_bytes)?;
        let vm = Arc::new(create_vm(&kvm_fd)?);
        let mailbox: Arc<Mailbox> = Arc::default();
        let doorbells: Vec<Arc<Doorbell>> = (0..shape.cpus).map(|_| Arc::default()).collect();
        let pause_signal = Arc::new(PauseSignal::default());
        let signals = MachineSignals {
            vm: Arc::clone(&vm),
            doorbells: doorbells.clone(),
            mailbox: Arc::clone(&mailbox),
            pause_signal: Arc::clone(&pause_signal),
        };
        let bus = Bus::new(ram.mmap().clone(), shape, net, disks, console, Arc::new(signals))
            .map_err(|reason| MachineError::Start { what: "the devices", reason })?;
        let bus = Arc::new(bus);
        let common = Common {
            cpus: shape.cpus,
            caps,
            bus: Arc::clone(&bus),
            mailbox: Arc::clone(&mailbox),
            pause_signal: Arc::clone(&pause_signal),
            spin_limit: spin_limit(shape.cpus),
        };
        let mut machine = Machine {
            vcpus: Vec::new(),
            bus,
            vm,
            dirty_log: DirtyLog::new(&ram),
            ram,
            shape: shape.clone(),
            pause_signal,
            mailbox: MailboxOwner(mailbox),
            running: false,
            half_restored: false,
            times: PauseTimes::default(),
        };
        machine.map_memory(false)?;
        for (cpu, doorbell) in (0..shape.cpus).zip(doorbells) {
            let fd = machine.vm.create_vcpu(u64::from(cpu)).map_err(kvm("KVM_CREATE_VCPU"))?;
            machine.vcpus.push(Vcpu::start(cpu, fd, doorbell, &common)?);
        }
        Ok(machine)
    }

    /// Loads the built-in guest and gives the vCPUs their first state; the next resume boots it.
    ///
    /// # Errors
    /// [`MachineError::Boot`] if the machine's shape is not one the guest runs on;
    /// [`MachineError::Running`]; what KVM refuses.
    pub fn boot_builtin(&mut self, net: &GuestNet) -> Result<(), MachineError> {
        self.need_paused("boot it")?;
        let vcpus = boot::builtin::load(&self.ram, &self.shape, net)?;
        self.start_vcpus(vcpus)
    }

    /// Loads a Linux guest and gives the first vCPU its first state; the next resume boots it.
    ///
    /// # Errors
    /// [`MachineError::Boot`] if its files are not what they should be or do not fit;
    /// [`MachineError::Running`]; what KVM refuses.
    pub fn boot_linux(&mut self, guest: &LinuxGuest) -> Result<(), MachineError> {
        self.need_paused("boot it")?;
        let windows = self.virtio_windows();
        let vcpus = boot::linux::load(&self.ram, self.shape.cpus, &windows, guest).map_err(BootError::from)?;
        self.start_vcpus(vcpus)
    }

    /// Gives each vCPU its first state. vCPUs beyond the end of `vcpus` wait for an INIT and a SIPI
    /// from another. Guest memory must be loaded already.
    ///
    /// # Errors
    /// [`MachineError::Running`], or what KVM refuses.
    pub fn start_vcpus(&mut self, vcpus: Vec<InitialVcpu>) -> Result<(), MachineError> {
        self.need_paused("start its vCPUs")?;
        for vcpu in &self.vcpus {
            vcpu.wait_settled("stop")?;
        }
        self.mailbox.0.begin_anew();
        self.apply(vcpus.into_iter().map(|initial| Task::Start(Box::new(initial))))
    }

    /// Runs the guest.
    ///
    /// # Errors
    /// [`MachineError::HalfRestored`].
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if self.half_restored {
            return Err(MachineError::HalfRestored);
        }
        if !self.running {
            self.running = true;
            self.run_guest();
        }
        Ok(())
    }

    /// True between `resume` and `pause`.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Gives each vCPU its task, as long as there are any, and waits until all are done.
    fn apply(&mut self, tasks: impl Iterator<Item = Task>) -> Result<(), MachineError> {
        let mut given = 0;
        for (vcpu, task) in self.vcpus.iter_mut().zip(tasks) {
            (vcpu.slot().task, given) = (task, given + 1);
            vcpu.order(Order::Apply);
        }
        for vcpu in self.vcpus.iter().take(given) {
            vcpu.wait_settled("take its state")?;
            vcpu.check()?;
        }
        Ok(())
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestRam {
        &self.ram
    }

    /// Switches tracking of written pages on or off; from now on, or from here on no more.
    ///
    /// # Errors
    /// What KVM refuses.
    pub fn track_dirty(&mut self, on: bool) -> Result<(), MachineError> {
        dirty_log::clear_bitmaps(&self.ram);
        self.map_memory(on)
    }

    /// Adds every page written since the last call (or since tracking was switched on) to `into`.
    /// **Reading clears**: see [`dirty_log`].
    ///
    /// # Errors
    /// What KVM refuses; pages may be missing from its log and present in `into` then.
    pub fn collect_dirty(&mut self, into: &mut PageSet) -> Result<(), MachineError> {
        self.dirty_log
            .collect(&self.vm, &self.ram, into)
            .map_err(|errno| KvmError { call: "KVM_GET_DIRTY_LOG", errno }.into())
    }

    /// Output has room again: a network device that had to leave frames in its queue looks again.
    /// Never blocks.
    pub fn kick_net(&self) {
        self.bus.kick_net();
    }

    /// The way in for what a person types at the serial console. It does not keep the machine
    /// alive.
    pub fn console_input(&self) -> ConsoleInput {
        ConsoleInput { bus: Arc::downgrade(&self.bus) }
    }

    /// A backend of a disk has room again: a disk whose request had to wait asks again. Never
    /// blocks.
    pub fn kick_disks(&self) {
        self.bus.kick_disks();
    }

    /// Which virtio devices a driver of the guest has looked at.
    pub fn driver_looks(&self) -> Arc<DriverLooks> {
        self.bus.driver_looks()
    }

    /// Where the guest finds its virtio devices: the network card, the disks, the source of random
    /// bytes.
    pub fn virtio_windows(&self) -> Vec<VirtioWindow> {
        self.bus.virtio_windows()
    }

    /// What becomes of the guest. Every receiver shares one mailbox.
    pub fn events(&self) -> MachineEvents {
        MachineEvents::of(&self.mailbox.0)
    }

    /// How long the last pause and save took.
    pub fn pause_times(&self) -> PauseTimes {
        self.times
    }

    /// The machine's shape.
    pub fn shape(&self) -> &MachineShape {
        &self.shape
    }

    fn need_paused(&self, what: &'static str) -> Result<(), MachineError> {
        if self.running { Err(MachineError::Running { what }) } else { Ok(()) }
    }

    /// Tells KVM where RAM is, and whether it is to log writes to it. Slot n is region n.
    fn map_memory(&self, log: bool) -> Result<(), MachineError> {
        for (slot, region) in (0u32..).zip(self.ram.regions()) {
            let slot_region = kvm_userspace_memory_region {
                slot,
                flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.address,
                memory_size: region.pages * PAGE_BYTES as u64,
                userspace_addr: region.host.0 as u64,
            };
            // SAFETY: the region is a mapping of that size which lives as long as `self.ram`, which
            // lives as long as the VM is used; regions do not overlap.
            unsafe { self.vm.set_user_memory_region(slot_region) }.map_err(kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }
}

/// The input of a machine's serial console.
pub struct ConsoleInput {
    bus: Weak<Bus<GuestMmap>>,
}

impl ConsoleInput {
    /// Hands bytes to the guest as fast as it takes them. Never blocks; a guest that takes none
    /// loses what is beyond 64 KiB.
    pub fn push(&self, bytes: &[u8]) {
        if let Some(bus) = self.bus.upgrade() {
            bus.console_input(bytes);
        }
    }
}

fn create_vm(kvm_fd: &kvm_ioctls::Kvm) -> Result<VmFd, MachineError> {
    let vm = kvm_fd.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
    vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(TSS_ADDRESS).map_err(kvm("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(kvm("KVM_CREATE_PIT2"))?;
    Ok(vm)
}

/// Looking before sleeping pays only where the other side has a core of its own.
fn spin_limit(cpus: u8) -> SpinLimit {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores > usize::from(cpus) {
        SpinLimit { controller: Duration::from_micros(50), vcpu: Duration::from_micros(100) }
    } else {
        SpinLimit { controller: Duration::ZERO, vcpu: Duration::ZERO }
    }
}

fn state_error<E: Into<StateError>>(part: &'static str) -> impl Fn(E) -> MachineError {
    move |error| MachineError::State { part: part.to_owned(), error: error.into() }
}

fn elapsed_us(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
