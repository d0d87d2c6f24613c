//! What a vCPU thread does: run the guest, serve its exits, park when told.
//!
//! **Parking is exact.** A vCPU that left the guest for port or memory I/O is in the middle of an
//! instruction: a read has not reached its register yet, and the instruction pointer has not moved.
//! Only the next KVM_RUN completes it. So the thread parks only after a KVM_RUN that returned
//! EINTR: with `immediate_exit` set, KVM completes what is pending and comes back without running a
//! single instruction of the guest. Saving earlier would lose a read or do a write twice after a
//! restore.
//!
//! **The thread harvests its own state**, in two parts. KVM moves a vCPU's state to whichever
//! thread asks for it; the thread that ran it asks cheapest, and several vCPUs are saved at the
//! same time. What only the vCPU itself can change is read as soon as it is parked. What others can
//! change (another vCPU by an interrupt, an NMI or an INIT it sends; a device by its line) is read
//! when none of them runs any more. Read earlier, an interrupt that was sent in between would be in
//! nobody's state: its sender has sent it and the I/O APIC may wait for its end, but it never
//! comes.

use std::sync::Arc;

use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::errno::Errno;
use parking_lot::Mutex;

use super::gate::{Gate, Order, Ticket};
use super::run_page::RunPage;
use super::{Slot, Task};
use crate::device::bus::{Bus, PortEffect};
use crate::machine::error::StateError;
use crate::machine::events::Mailbox;
use crate::machine::host::HostCaps;
use crate::machine::initial;
use crate::machine::memory::GuestMmap;
use crate::machine::state::vcpu::VcpuState;
use crate::machine::wait::{Doorbell, EVENT_PORT, WAIT_PORT, Wait, Woken};
use crate::protocol::guest_event::GuestEvent;

/// Event port codes.
const EVENT_BOOTED: u32 = 1;
const EVENT_SHUTDOWN: u32 = 2;
const EVENT_PANIC: u32 = 3;
/// KVM_EXIT_SYSTEM_EVENT types.
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const SYSTEM_EVENT_RESET: u32 = 2;

/// What the thread owns or shares.
pub(super) struct VcpuThread {
    pub(super) cpu: u16,
    /// It is the only vCPU.
    pub(super) alone: bool,
    pub(super) fd: VcpuFd,
    pub(super) page: Arc<RunPage>,
    pub(super) gate: Arc<Gate>,
    pub(super) doorbell: Arc<Doorbell>,
    pub(super) slot: Arc<Mutex<Slot>>,
    pub(super) caps: Arc<HostCaps>,
    pub(super) bus: Arc<Bus<GuestMmap>>,
    pub(super) mailbox: Arc<Mailbox>,
}

/// What the thread remembers between exits.
struct Progress {
    /// The last KVM_RUN returned EINTR (or never will again): no I/O is pending.
    complete: bool,
    /// The guest ended this vCPU: it is not entered again.
    ended: bool,
    /// The guest sleeps in the wait port.
    wait: Option<Wait>,
    /// Doorbell rings that waits have answered.
    rings_seen: u32,
}

/// What came of one KVM_RUN.
enum Exit {
    /// Served: run again.
    Served,
    /// Interrupted: no I/O is pending.
    Interrupted,
    /// The guest waits.
    Wait(Wait),
    /// The vCPU is not entered again, and its owner hears why; `true` if KVM can complete pending
    /// I/O for it.
    Ended(GuestEvent, bool),
}

impl VcpuThread {
    /// The thread's life.
    pub(super) fn run(mut self) {
        let mut progress = Progress { complete: false, ended: false, wait: None, rings_seen: 0 };
        loop {
            let ticket = self.gate.current();
            match ticket.order() {
                Order::Quit => {
                    self.gate.stop(ticket);
                    self.gate.settle(ticket);
                    return;
                }
                Order::Run if progress.ended => self.gate.wait_after(ticket),
                Order::Run => self.advance(&mut progress),
                Order::Park | Order::Apply if !progress.complete => {
                    self.page.set_immediate_exit(true);
                    self.enter(&mut progress);
                }
                Order::Park => self.park(ticket),
                Order::Harvest => self.harvest(ticket, &progress),
                Order::Apply => self.apply(ticket, &mut progress),
            }
        }
    }

    /// Runs the guest until its next exit, or sleeps on where it sleeps.
    fn advance(&mut self, progress: &mut Progress) {
        if let Some(wait) = progress.wait {
            let wanted = || self.gate.current().order() != Order::Run;
            match self.doorbell.wait(wait, &mut progress.rings_seen, wanted) {
                Woken::Done => progress.wait = None,
                Woken::Wanted => return,
            }
        }
        self.enter(progress);
    }

    fn enter(&mut self, progress: &mut Progress) {
        progress.complete = false;
        match self.run_once() {
            Exit::Served => {}
            Exit::Interrupted => {
                progress.complete = true;
                self.allow_entry();
            }
            Exit::Wait(wait) => progress.wait = Some(wait),
            Exit::Ended(event, completable) => {
                progress.ended = true;
                progress.complete = !completable;
                self.mailbox.put(event);
            }
        }
    }

    /// Parked: what nobody else changes goes into the slot; then waits for the next order.
    fn park(&mut self, ticket: Ticket) {
        self.gate.stop(ticket);
        {
            let mut slot = self.slot.lock();
            slot.result = slot.state.harvest_own(&self.fd);
        }
        self.leave(ticket);
    }

    /// The machine is stopped: completes the slot, then waits for the next order.
    fn harvest(&mut self, ticket: Ticket, progress: &Progress) {
        {
            let mut slot = self.slot.lock();
            slot.state.ended = progress.ended;
            if slot.result.is_ok() {
                slot.result = slot.state.harvest_rest(&self.fd, self.alone);
            }
        }
        self.gate.settle(ticket);
        self.leave(ticket);
    }

    /// Puts what the slot holds into the vCPU, and reads it back.
    fn apply(&mut self, ticket: Ticket, progress: &mut Progress) {
        let slot = Arc::clone(&self.slot);
        {
            let mut slot = slot.lock();
            let applied = match std::mem::replace(&mut slot.task, Task::None) {
                Task::None => Ok(()),
                Task::Restore(ahead) => slot.state.apply(&self.fd, &self.caps, ahead),
                Task::Align { instant, kvmclock_ctrl } => {
                    slot.state.align(&self.fd, instant);
                    if kvmclock_ctrl {
                        VcpuState::kvmclock_ctrl(&self.fd);
                    }
                    Ok(())
                }
                Task::Start(initial) => initial::apply(&initial, &self.fd),
            };
            progress.ended = slot.state.ended;
            progress.wait = None;
            // The saved guest may have polled before a device used a buffer: its first wait here
            // must not sleep.
            progress.rings_seen = self.doorbell.count().wrapping_sub(1);
            slot.result = match applied {
                Ok(()) => self.read_back(&mut slot.state),
                Err(error) => Err(error),
            };
        }
        self.gate.stop(ticket);
        self.gate.settle(ticket);
        self.leave(ticket);
    }

    /// Enters KVM without running the guest, which synchronises the registers into the run page,
    /// and harvests.
    fn read_back(&mut self, state: &mut VcpuState) -> Result<(), StateError> {
        self.page.set_immediate_exit(true);
        let _ = self.fd.run();
        state.harvest_own(&self.fd)?;
        state.harvest_rest(&self.fd, self.alone)
    }

    /// Waits for the next order, and lets the vCPU into the guest again only then.
    fn leave(&mut self, ticket: Ticket) {
        self.gate.wait_after(ticket);
        self.allow_entry();
    }

    /// Clears `immediate_exit` if the order is to run. The caller's loop reads the order again
    /// afterwards: one that came in between would find its flag cleared.
    fn allow_entry(&self) {
        if self.gate.current().order() == Order::Run {
            self.page.set_immediate_exit(false);
        }
    }

    /// One KVM_RUN and what it asks for.
    fn run_once(&mut self) -> Exit {
        let failed =
            |cpu: u16, reason: String, completable| Exit::Ended(GuestEvent::VcpuFailed { cpu, reason }, completable);
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => serve_port_write(&self.bus, &self.mailbox, port, data),
            Ok(VcpuExit::IoIn(port, data)) => {
                self.bus.port_read(port, data);
                Exit::Served
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.bus.mmio_read(address, data);
                Exit::Served
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.bus.mmio_write(address, data);
                Exit::Served
            }
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            Ok(VcpuExit::Shutdown) => {
                tracing::warn!(cpu = self.cpu, "a triple fault resets the guest");
                Exit::Ended(GuestEvent::Reset, false)
            }
            Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_SHUTDOWN, _)) => Exit::Ended(GuestEvent::Shutdown, false),
            Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_RESET, _)) => Exit::Ended(GuestEvent::Reset, false),
            Ok(VcpuExit::SystemEvent(..)) => Exit::Ended(GuestEvent::Panicked, false),
            Ok(VcpuExit::IoapicEoi(_) | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr) => Exit::Served,
            Ok(VcpuExit::FailEntry(reason, _)) => {
                failed(self.cpu, format!("the CPU refused to enter the guest ({reason:#x})"), false)
            }
            Ok(other) => {
                let exit = format!("{other:?}");
                let rip = self.fd.sync_regs().regs.rip;
                failed(self.cpu, format!("KVM stopped with {exit} at {rip:#x}"), false)
            }
            Err(error) => match Errno::from_raw(error.errno()) {
                Errno::EINTR => Exit::Interrupted,
                Errno::EAGAIN => Exit::Served,
                errno => failed(self.cpu, format!("KVM_RUN failed: {errno}"), false),
            },
        }
    }
}

fn serve_port_write(bus: &Bus<GuestMmap>, mailbox: &Mailbox, port: u16, data: &[u8]) -> Exit {
    match port {
        WAIT_PORT => Exit::Wait(Wait::begin(last_word(data))),
        EVENT_PORT => match last_word(data) {
            EVENT_BOOTED => {
                mailbox.put(GuestEvent::Booted);
                Exit::Served
            }
            EVENT_SHUTDOWN => Exit::Ended(GuestEvent::Shutdown, true),
            EVENT_PANIC => Exit::Ended(GuestEvent::Panicked, true),
            _ => Exit::Served,
        },
        _ => match bus.port_write(port, data) {
            PortEffect::None => Exit::Served,
            PortEffect::Reset => Exit::Ended(GuestEvent::Reset, true),
            PortEffect::Off => Exit::Ended(GuestEvent::Shutdown, true),
        },
    }
}

/// The last 32 bits of a port write (a string instruction hands over several), or what there is of
/// them.
fn last_word(data: &[u8]) -> u32 {
    let start = data.len().saturating_sub(4);
    let mut word = [0; 4];
    for (to, from) in word.iter_mut().zip(data.get(start..).unwrap_or_default()) {
        *to = *from;
    }
    u32::from_le_bytes(word)
}
