//! virtio-net: one receive and one transmit queue, and the offloads that its backend can carry
//! (`offload`).
//!
//! **Who does what.** A transmit happens in the vCPU thread that notified the queue. A receive, and
//! a transmit that had to wait for room or for a pause, happen in the device's own thread, which
//! sleeps in `poll` on the backend's descriptor and an eventfd. One lock keeps them apart; it is
//! held for a bounded batch, never while sleeping.
//!
//! **No room outside.** If the backend is full, the frame stays in the queue (the pop is undone)
//! and the device is *stalled* until the guest notifies again or the owner calls `kick`. The kick
//! takes no lock, so it may come from inside the backend.
//!
//! **No room inside.** If the guest has put no receive buffers, frames stay in the backend: the
//! thread stops looking at its descriptor, asks the guest to notify, and sleeps. While there are
//! buffers the guest is asked *not* to notify: each notify would cost it an exit for nothing.
//!
//! **Paused.** The device is quiet ([`NetDevice::is_quiet`]) when its thread is not in guest memory
//! and will not be until `unquiesce`. A frame that arrives meanwhile wakes the thread once; then it
//! stops looking, so a pause stays quiet. A pause waits for at most one frame: once it is asked
//! for, the thread takes no other, and a vCPU that transmits leaves the rest of its queue to the
//! thread, which goes on after the pause. (Both also when the machine is another one by then: a
//! restored device looks at its queues.) So each frame belongs completely to the epoch before the
//! pause or to the one after it.
//!
//! **A guest that breaks the rules** gets DEVICE_NEEDS_RESET and a dead device until it resets it;
//! the machine is told.

mod offload;
mod persist;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::poll::PollTimeout;
use parking_lot::Mutex;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemory;

pub use self::persist::NET_STATE_VERSION;
use self::persist::NetState;
use super::chain::{self, ChainError, Scatter};
use super::interrupt::Interrupt;
use super::mmio::{Effect, Transport, status};
use super::thread::{DeviceThread, ThreadControl};
use crate::device::net::NET_HEADER_BYTES as HEADER_BYTES;
use crate::device::{DeviceStateError, NetBackend, Offloads, Signals, Transmit};

/// virtio device id of a network card.
const DEVICE_ID_NET: u32 = 1;
/// The device has a MAC address.
const VIRTIO_NET_F_MAC: u64 = 1 << 5;
/// Index of the receive queue.
const RX: usize = 0;
/// Index of the transmit queue.
const TX: usize = 1;
/// Most buffers in each queue.
pub const QUEUE_SIZE_MAX: u16 = 256;
/// Most bytes of a chain: the header and the largest frame any driver may hand over.
const CHAIN_BYTES_MAX: usize = 65_562;
/// Fewest bytes of an Ethernet frame: its header.
const FRAME_BYTES_MIN: usize = 14;
/// Most frames delivered before the lock is given up once.
const RECEIVE_BATCH: usize = 32;
/// How long a backend that fails is left alone, in milliseconds.
const BACKEND_RETRY_MS: u16 = 100;

/// What the device's thread should wait for next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// More to do at once.
    None,
    /// A frame, or the eventfd.
    Frame,
    /// The eventfd only: the machine is paused, the driver not ready, or out of receive buffers.
    Event,
    /// The backend failed: the eventfd, or a while.
    Retry,
}

struct Core {
    transport: Transport,
    interrupt: Interrupt,
    /// Room for one chain's bytes, kept.
    buffer: Vec<u8>,
}

impl Core {
    fn update_line(&mut self) {
        self.interrupt.update(&self.transport);
    }
}

struct Shared<M> {
    core: Mutex<Core>,
    thread: Arc<ThreadControl>,
    mem: M,
    mac: [u8; 6],
    backend: Arc<dyn NetBackend>,
    /// Frames have a header in the backend too.
    has_headers: bool,
    /// A frame waits in the transmit queue for room outside.
    stalled: AtomicBool,
    /// There may be room again: look at the transmit queue.
    kicked: AtomicBool,
    /// The backend failed the last time it was read.
    failing: AtomicBool,
}

/// A virtio-net device and its thread.
pub struct NetDevice<M: GuestMemory + Send + Sync + 'static> {
    // Dropped first: the thread ends before what it uses.
    _thread: DeviceThread,
    shared: Arc<Shared<M>>,
}

impl<M: GuestMemory + Send + Sync + 'static> NetDevice<M> {
    /// A device with address `mac` on interrupt line `gsi`, plugged into `backend`. It begins
    /// paused.
    ///
    /// # Errors
    /// If the host gives no eventfd or thread.
    pub fn new(
        mem: M,
        mac: [u8; 6],
        gsi: u32,
        backend: Arc<dyn NetBackend>,
        signals: Arc<dyn Signals>,
    ) -> io::Result<NetDevice<M>> {
        let queue = || Queue::new(QUEUE_SIZE_MAX).map_err(|e| io::Error::other(e.to_string()));
        let offloads = backend.offloads();
        let features = VIRTIO_NET_F_MAC | offload::features(offloads);
        let transport = Transport::new(DEVICE_ID_NET, features, vec![queue()?, queue()?]);
        let core = Core {
            transport,
            interrupt: Interrupt::new(Arc::clone(&signals), gsi, "virtio-net"),
            buffer: Vec::with_capacity(CHAIN_BYTES_MAX),
        };
        let shared = Arc::new(Shared {
            core: Mutex::new(core),
            thread: Arc::new(ThreadControl::new(signals)?),
            mem,
            mac,
            backend,
            has_headers: offloads != Offloads::NONE,
            stalled: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
            failing: AtomicBool::new(false),
        });
        let _thread = DeviceThread::start("mcd-net".into(), Arc::clone(&shared.thread), {
            let shared = Arc::clone(&shared);
            move || match shared.work() {
                Rest::None => {}
                rest => shared.sleep(rest),
            }
        })?;
        Ok(NetDevice { _thread, shared })
    }

    /// The driver reads at `offset` of the device's registers.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.shared.core.lock().transport.read(offset, data, &self.shared.mac);
    }

    /// The driver writes at `offset` of the device's registers. A notify of the transmit queue
    /// sends before this returns.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        let shared = &*self.shared;
        let mut core = shared.core.lock();
        match core.transport.write(offset, data, &shared.mem) {
            Effect::None => {}
            Effect::Notify(queue) if usize::from(queue) == TX => shared.transmit(&mut core, false),
            Effect::Notify(queue) if usize::from(queue) == RX => shared.thread.wake(),
            Effect::Notify(_) => {}
            Effect::Ready => {
                shared.backend.agreed(offload::agreed(core.transport.driver_features));
                shared.thread.wake();
            }
            Effect::Acked => core.update_line(),
            Effect::Reset => {
                shared.stalled.store(false, Ordering::SeqCst);
                shared.backend.agreed(Offloads::NONE);
                core.update_line();
            }
        }
    }

    /// There may be room outside again: a stalled device looks at its transmit queue. Takes no lock
    /// and does not block.
    pub fn kick(&self) {
        if self.shared.stalled.load(Ordering::SeqCst) {
            self.shared.look_later();
        }
    }

    /// From now on the device's thread stays out of guest memory, and a vCPU transmits at most the
    /// frame it is at. Takes no lock.
    pub fn begin_quiesce(&self) {
        self.shared.thread.begin_quiesce();
    }

    /// True when the device's thread is out of guest memory. The machine hears of it by
    /// [`Signals::quiesced`].
    pub fn is_quiet(&self) -> bool {
        self.shared.thread.is_quiet()
    }

    /// Lets the device's thread work again. Takes no lock.
    pub fn unquiesce(&self) {
        self.shared.thread.unquiesce();
    }

    /// Appends the saved state. The machine must be paused.
    pub fn save(&self, out: &mut Vec<u8>) {
        let core = self.shared.core.lock();
        NetState::write(&core.transport, self.shared.mac, self.shared.stalled.load(Ordering::SeqCst), out);
    }

    /// Takes over a saved state, and sets the interrupt line as its status demands. The machine
    /// must be paused, its interrupt controllers restored, and guest memory in place.
    ///
    /// # Errors
    /// [`DeviceStateError`] if `bytes` are no state of this device; it is as it was then.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), DeviceStateError> {
        let shared = &*self.shared;
        let state = NetState::read(bytes)?;
        if state.mac != shared.mac {
            return Err(DeviceStateError::new("the state is of a device with another MAC address"));
        }
        let mut core = shared.core.lock();
        let core = &mut *core;
        state.transport.apply(&mut core.transport, &shared.mem)?;
        core.interrupt.restored(&core.transport);
        // What a driver agrees to counts from DRIVER_OK on.
        let begun = core.transport.status & status::DRIVER_OK != 0;
        let features = if begun { core.transport.driver_features } else { 0 };
        shared.backend.agreed(offload::agreed(features));
        // Whatever stood in the queues when the state was saved is looked at again at resume.
        shared.stalled.store(state.transmit_stalled, Ordering::SeqCst);
        shared.look_later();
        Ok(())
    }
}

impl<M: GuestMemory> Shared<M> {
    fn sleep(&self, rest: Rest) {
        // SAFETY: the backend promises that its descriptor stays open as long as the device, which
        // holds the backend.
        let frame = unsafe { BorrowedFd::borrow_raw(self.backend.readable_fd()) };
        let timeout = if rest == Rest::Retry { PollTimeout::from(BACKEND_RETRY_MS) } else { PollTimeout::NONE };
        self.thread.sleep((rest == Rest::Frame).then_some(frame), timeout);
    }

    /// One bounded piece of work; says what to wait for next.
    fn work(&self) -> Rest {
        let mut core = self.core.lock();
        let Some(_work) = self.thread.begin_work() else { return Rest::Event };
        if !core.transport.is_live() {
            self.thread.rest();
            return Rest::Event;
        }
        if self.kicked.swap(false, Ordering::SeqCst) {
            self.transmit(&mut core, true);
        }
        let rest = self.receive(&mut core);
        if matches!(rest, Rest::Event | Rest::Retry) {
            self.thread.rest();
        }
        rest
    }

    /// The device's thread is to look at the transmit queue, after a pause if there is one. It must
    /// be rung for that even if it does not rest: it may be waiting for a frame.
    fn look_later(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.thread.ring();
    }

    /// Sends what stands in the transmit queue: at most a queue's worth, since whatever the guest
    /// adds meanwhile comes with a notify of its own, and only one frame if a pause is waiting.
    /// `ring_always`: the guest does not know that
    /// this happens, so its doorbell rings whatever it asked for.
    fn transmit(&self, core: &mut Core, ring_always: bool) {
        if !core.transport.is_live() {
            return;
        }
        let mut used = false;
        for _ in 0..QUEUE_SIZE_MAX {
            if used && self.thread.is_paused() {
                self.look_later();
                break;
            }
            match self.transmit_one(core) {
                Ok(true) => used = true,
                Ok(false) => break,
                Err(error) => {
                    self.break_down(core, &format!("transmit queue: {error}"));
                    return;
                }
            }
        }
        if used {
            core.interrupt.used(&mut core.transport, TX, &self.mem, ring_always);
        }
    }

    /// Sends one frame; false if there is none or no room for it.
    fn transmit_one(&self, core: &mut Core) -> Result<bool, ChainError> {
        let Core { transport, buffer, .. } = core;
        let Some(queue) = transport.queues.get_mut(TX).filter(|q| q.ready()) else { return Ok(false) };
        let Some(head) = chain::pop(queue, &self.mem)? else { return Ok(false) };
        buffer.clear();
        chain::gather(&self.mem, queue, head, buffer, CHAIN_BYTES_MAX)?;
        let (header, frame) = buffer.split_first_chunk_mut::<HEADER_BYTES>().ok_or(ChainError::Empty)?;
        // A stub that is no Ethernet frame is dropped, like a switch would; so is what asks for
        // work that was not agreed on.
        let whole = frame.len() >= FRAME_BYTES_MIN;
        let sent = match self.has_headers {
            _ if !whole => true,
            true if !offload::from_guest(header, transport.driver_features) => true,
            true => self.hand_over(buffer),
            false => self.hand_over(frame),
        };
        if !sent {
            queue.set_next_avail(queue.next_avail().wrapping_sub(1));
            return Ok(false);
        }
        queue.add_used(&self.mem, head, 0).map_err(|_| ChainError::Ring)?;
        Ok(true)
    }

    /// Gives a frame to the backend; false if it is full, and then `stalled` says so.
    fn hand_over(&self, frame: &[u8]) -> bool {
        if self.backend.transmit(frame) == Transmit::Accepted {
            self.stalled.store(false, Ordering::SeqCst);
            return true;
        }
        // Between that answer and this store a kick would find nothing stalled, so ask once more
        // after it.
        self.stalled.store(true, Ordering::SeqCst);
        let accepted = self.backend.transmit(frame) == Transmit::Accepted;
        if accepted {
            self.stalled.store(false, Ordering::SeqCst);
        }
        accepted
    }

    /// Delivers a batch of frames.
    fn receive(&self, core: &mut Core) -> Rest {
        if !core.transport.is_live() {
            return Rest::Event;
        }
        let mut used = false;
        let mut rest = Rest::None;
        for _ in 0..RECEIVE_BATCH {
            // The thread's next look finds the pause and rests.
            if self.thread.is_paused() {
                break;
            }
            match self.receive_one(core) {
                Ok(Delivery::Delivered) => used = true,
                Ok(Delivery::Dropped) => {}
                Ok(Delivery::Rest(wait)) => {
                    rest = wait;
                    break;
                }
                Err(error) => {
                    self.break_down(core, &format!("receive queue: {error}"));
                    return Rest::Event;
                }
            }
        }
        if used {
            core.interrupt.used(&mut core.transport, RX, &self.mem, true);
        }
        rest
    }

    fn receive_one(&self, core: &mut Core) -> Result<Delivery, ChainError> {
        let Core { transport, buffer, .. } = core;
        let Some(queue) = transport.queues.get_mut(RX).filter(|q| q.ready()) else {
            return Ok(Delivery::Rest(Rest::Event));
        };
        if !self.has_buffer(queue)? {
            return Ok(Delivery::Rest(Rest::Event));
        }
        buffer.resize(CHAIN_BYTES_MAX, 0);
        let bare_from = if self.has_headers { 0 } else { HEADER_BYTES };
        let room = buffer.get_mut(bare_from..).ok_or(ChainError::TooLong)?;
        let length = match self.backend.receive(room) {
            Ok(Some(length)) => bare_from + length.min(room.len()),
            Ok(None) => return Ok(Delivery::Rest(Rest::Frame)),
            Err(error) => {
                if !self.failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "network backend cannot be read, trying every {BACKEND_RETRY_MS} ms");
                }
                return Ok(Delivery::Rest(Rest::Retry));
            }
        };
        self.failing.store(false, Ordering::Relaxed);
        let header = buffer.first_chunk_mut::<HEADER_BYTES>().ok_or(ChainError::TooShort)?;
        if !self.has_headers {
            header.fill(0);
        }
        if length < HEADER_BYTES || !offload::to_guest(header, transport.driver_features) {
            return Ok(Delivery::Dropped);
        }
        let Some(head) = chain::pop(queue, &self.mem)? else { return Ok(Delivery::Dropped) };
        let bytes = buffer.get(..length).ok_or(ChainError::TooLong)?;
        match chain::scatter(&self.mem, queue, head, bytes)? {
            Scatter::Written(written) => {
                queue.add_used(&self.mem, head, written).map_err(|_| ChainError::Ring)?;
                Ok(Delivery::Delivered)
            }
            // A frame larger than the buffers the driver promised is dropped; the buffer stays for
            // the next one.
            Scatter::TooSmall => {
                queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                Ok(Delivery::Dropped)
            }
        }
    }

    /// True if the guest has put a receive buffer. If not, the guest is asked to notify when it
    /// does; else, not to.
    fn has_buffer(&self, queue: &mut Queue) -> Result<bool, ChainError> {
        if self.buffers_waiting(queue)? {
            queue.disable_notification(&self.mem).map_err(|_| ChainError::Ring)?;
            return Ok(true);
        }
        // Asked first and looked again after: a buffer put in between would otherwise come without
        // a notify.
        queue.enable_notification(&self.mem).map_err(|_| ChainError::Ring)
    }

    fn buffers_waiting(&self, queue: &Queue) -> Result<bool, ChainError> {
        let driver_index = queue.avail_idx(&self.mem, Ordering::Acquire).map_err(|_| ChainError::Ring)?;
        Ok(driver_index.0 != queue.next_avail())
    }

    /// Marks the device broken until the guest resets it.
    fn break_down(&self, core: &mut Core, reason: &str) {
        self.stalled.store(false, Ordering::SeqCst);
        core.interrupt.broken(&mut core.transport, reason);
    }
}

/// What became of one receive.
enum Delivery {
    /// A frame is with the guest.
    Delivered,
    /// A frame did not fit and is gone.
    Dropped,
    /// There is nothing to do.
    Rest(Rest),
}
