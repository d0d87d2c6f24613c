//! vCPUs: the controller's handle on each, and the thread that runs it.

pub(super) mod gate;
mod run_page;
mod thread;

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{SyncReg, VcpuFd};
use parking_lot::{Mutex, MutexGuard};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

use self::gate::{Gate, Order, SpinLimit, Ticket};
use self::run_page::RunPage;
use self::thread::VcpuThread;
use super::error::{KvmError, MachineError, StateError, kvm};
use super::events::Mailbox;
use super::host::{self, HostCaps};
use super::initial::InitialVcpu;
use super::memory::GuestMmap;
use super::pause::PauseSignal;
use super::state::tsc::ClockInstant;
use super::state::vcpu::VcpuState;
use super::wait::Doorbell;
use crate::device::Bus;

/// How long a vCPU that is out of the guest may take to carry out an order. That takes
/// microseconds; only a stalled host makes it seconds.
const VCPU_ORDER_TIMEOUT: Duration = Duration::from_secs(10);

/// What a vCPU thread does with its slot when it is told to apply.
pub(super) enum Task {
    /// Nothing.
    None,
    /// Put the slot's state into the vCPU, its TSC so far ahead.
    Restore(Duration),
    /// Make the vCPU's TSC fit kvmclock again.
    Align {
        /// The instant, and what kvmclock showed then.
        instant: ClockInstant,
        /// Report to the guest that it was paused (`KVM_KVMCLOCK_CTRL`).
        kvmclock_ctrl: bool,
    },
    /// Put a guest's first state into the vCPU.
    Start(Box<InitialVcpu>),
}

/// Where a vCPU's state passes between its thread and the controller. Allocated once.
pub(super) struct Slot {
    /// The state as of the last park, or to be applied.
    pub(super) state: VcpuState,
    /// How the last harvest or apply went.
    pub(super) result: Result<(), StateError>,
    /// What to apply.
    pub(super) task: Task,
}

/// What all vCPUs of a machine share.
#[derive(Clone)]
pub(super) struct Common {
    pub(super) cpus: u8,
    pub(super) caps: Arc<HostCaps>,
    pub(super) bus: Arc<Bus<GuestMmap>>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) pause_signal: Arc<PauseSignal>,
    pub(super) spin_limit: SpinLimit,
}

/// The controller's handle on one vCPU. Dropping it ends the thread.
pub(super) struct Vcpu {
    cpu: u16,
    gate: Arc<Gate>,
    page: Arc<RunPage>,
    doorbell: Arc<Doorbell>,
    slot: Arc<Mutex<Slot>>,
    thread_id: Arc<AtomicI32>,
    thread: Option<JoinHandle<()>>,
    /// The newest order given.
    ticket: Ticket,
}

impl Vcpu {
    /// Starts the thread of vCPU `cpu`, which parks at once.
    pub(super) fn start(
        cpu: u8,
        mut fd: VcpuFd,
        doorbell: Arc<Doorbell>,
        common: &Common,
    ) -> Result<Vcpu, MachineError> {
        fd.set_cpuid2(&common.caps.cpuid_of(cpu, common.cpus)).map_err(kvm("KVM_SET_CPUID2"))?;
        host::power_on(&fd).map_err(|error| MachineError::State { part: format!("vCPU {cpu}"), error })?;
        for reg in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
            fd.set_sync_valid_reg(reg);
        }
        let tsc_khz = fd.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))?;
        let cpu = u16::from(cpu);
        let state = VcpuState::new(&common.caps, tsc_khz)
            .map_err(|error| MachineError::State { part: format!("vCPU {cpu}"), error })?;
        // SAFETY: `fd` is open for the duration of the call.
        let page = RunPage::map(unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) })
            .map_err(|errno| KvmError { call: "mmap of kvm_run", errno })?;
        let page = Arc::new(page);
        let gate = Arc::new(Gate::new(common.spin_limit, Arc::clone(&common.pause_signal)));
        let slot = Arc::new(Mutex::new(Slot { state, result: Ok(()), task: Task::None }));
        let thread_id = Arc::new(AtomicI32::new(0));
        let ticket = gate.current();
        let body = VcpuThread {
            cpu,
            alone: common.cpus == 1,
            fd,
            page: Arc::clone(&page),
            gate: Arc::clone(&gate),
            doorbell: Arc::clone(&doorbell),
            slot: Arc::clone(&slot),
            caps: Arc::clone(&common.caps),
            bus: Arc::clone(&common.bus),
            mailbox: Arc::clone(&common.mailbox),
        };
        let thread = std::thread::Builder::new()
            .name(format!("mcd-vcpu{cpu}"))
            .spawn({
                let thread_id = Arc::clone(&thread_id);
                move || {
                    // Without the kick signal a pause would wait for the guest's next exit; it is
                    // only blocked if whoever started this process blocked it.
                    let _ = unblock_signal(kick_signal());
                    // Waits of the guest end on time, not up to 50 µs later.
                    // SAFETY: changes nothing but this thread's timer slack.
                    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
                    // SAFETY: gettid has no preconditions.
                    thread_id.store(unsafe { libc::gettid() }, Ordering::SeqCst);
                    body.run();
                }
            })
            .map_err(|reason| MachineError::Start { what: "a vCPU thread", reason })?;
        let mut vcpu = Vcpu { cpu, gate, page, doorbell, slot, thread_id, thread: Some(thread), ticket };
        if !vcpu.gate.wait_stopped(vcpu.ticket, VCPU_ORDER_TIMEOUT) {
            return Err(vcpu.stuck("start"));
        }
        vcpu.order(Order::Harvest);
        vcpu.wait_settled("start")?;
        Ok(vcpu)
    }

    /// Gives an order; a vCPU in the guest is kicked out of it.
    pub(super) fn order(&mut self, order: Order) {
        let was_running = self.ticket.order() == Order::Run;
        self.ticket = self.gate.give(order);
        if was_running && order != Order::Run {
            self.kick();
        }
    }

    /// Steps 2 to 4 of the kick that cannot be lost (see `gate`).
    fn kick(&self) {
        self.page.set_immediate_exit(true);
        self.doorbell.probe();
        let thread_id = self.thread_id.load(Ordering::SeqCst);
        // SAFETY: a signal with a handler that does nothing, to a thread of this process; if the
        // thread is gone the call fails.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread_id, kick_signal()) };
    }

    /// True when the vCPU is out of the guest with its I/O complete, as the newest order demands.
    pub(super) fn has_stopped(&self) -> bool {
        self.gate.has_stopped(self.ticket)
    }

    /// For how long a controller that waits for that is to look before it sleeps.
    pub(super) fn spin_max(&self) -> Duration {
        self.gate.spin_limit().controller
    }

    /// Waits until the newest order is carried out. `what` names it in the error.
    pub(super) fn wait_settled(&self, what: &'static str) -> Result<(), MachineError> {
        match self.gate.wait_settled(self.ticket, VCPU_ORDER_TIMEOUT) {
            true => Ok(()),
            false => Err(self.stuck(what)),
        }
    }

    fn stuck(&self, what: &'static str) -> MachineError {
        MachineError::Stuck { cpu: self.cpu, what, limit_s: VCPU_ORDER_TIMEOUT.as_secs() }
    }

    /// The slot. Only while the vCPU is settled is its content the vCPU's.
    pub(super) fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock()
    }

    /// The error of the last harvest or apply, if it failed.
    pub(super) fn check(&self) -> Result<(), MachineError> {
        self.slot().result.clone().map_err(|error| MachineError::State { part: format!("vCPU {}", self.cpu), error })
    }

    /// The vCPU's number.
    pub(super) fn number(&self) -> u16 {
        self.cpu
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.order(Order::Quit);
        // The thread may be in the middle of a start that failed; a kick more does no harm.
        self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The signal that gets a vCPU thread out of the guest.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Installs the kick signal's handler, which does nothing: a signal with a handler ends KVM_RUN, an
/// ignored one does not.
pub(super) fn install_kick_handler() -> Result<(), MachineError> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(kick_signal(), nothing).map_err(|error| MachineError::Start {
        what: "the signal handler of the vCPU kick",
        reason: std::io::Error::from_raw_os_error(error.errno()),
    })
}
