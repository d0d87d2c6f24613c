//! virtio-rng: a queue of buffers that the host's random source fills.
//!
//! It has no thread: getrandom does not block once the host is up, so buffers are filled in the
//! vCPU thread that notified, at most [`REQUEST_BYTES_MAX`] bytes of each; the guest asks again for
//! more. A pause waits for one buffer of them: the rest is filled after it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemory;

mod persist;

pub use self::persist::RNG_STATE_VERSION;
use super::chain::{self, ChainError};
use super::interrupt::Interrupt;
use super::mmio::{Effect, Transport};
use crate::device::{DeviceStateError, Signals};

/// virtio device id of a source of random bytes.
const DEVICE_ID_RNG: u32 = 4;
/// Most buffers in the queue.
pub const QUEUE_SIZE_MAX: u16 = 16;
/// Most bytes put into one chain.
pub const REQUEST_BYTES_MAX: usize = 1024;

struct Core {
    transport: Transport,
    interrupt: Interrupt,
    /// The queue may hold chains that no notify will follow: it was restored, or a pause came.
    look_again: bool,
}

/// A virtio-rng device.
pub struct RngDevice<M: GuestMemory> {
    core: Mutex<Core>,
    /// A pause waits for the vCPU that fills buffers, or the machine is paused.
    paused: AtomicBool,
    mem: M,
}

impl<M: GuestMemory> RngDevice<M> {
    /// A device on interrupt line `gsi`.
    ///
    /// # Errors
    /// Never by what the host does: only if the queue's size were none.
    pub fn new(mem: M, gsi: u32, signals: Arc<dyn Signals>) -> io::Result<RngDevice<M>> {
        let queue = Queue::new(QUEUE_SIZE_MAX).map_err(|e| io::Error::other(e.to_string()))?;
        let transport = Transport::new(DEVICE_ID_RNG, 0, vec![queue]);
        let interrupt = Interrupt::new(signals, gsi, "virtio-rng");
        let core = Core { transport, interrupt, look_again: false };
        Ok(RngDevice { core: Mutex::new(core), paused: AtomicBool::new(false), mem })
    }

    /// The driver reads at `offset` of the device's registers.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.core.lock().transport.read(offset, data, &[]);
    }

    /// The driver writes at `offset` of the device's registers. A notify fills the buffers before
    /// this returns.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        let mut core = self.core.lock();
        let core = &mut *core;
        match core.transport.write(offset, data, &self.mem) {
            Effect::Notify(0) => self.fill(core),
            Effect::Acked | Effect::Reset => core.interrupt.update(&core.transport),
            Effect::None | Effect::Ready | Effect::Notify(_) => {}
        }
    }

    /// A pause is coming: a vCPU that fills buffers is to stop after the one it is at.
    pub fn begin_quiesce(&self) {
        self.paused.store(true, Ordering::SeqCst);
    }

    /// The machine runs again: looks at the queue if it was restored or left for a pause.
    pub fn unquiesce(&self) {
        self.paused.store(false, Ordering::SeqCst);
        let mut core = self.core.lock();
        let core = &mut *core;
        if std::mem::take(&mut core.look_again) {
            self.fill(core);
        }
    }

    /// Appends the saved state. The machine must be paused.
    pub fn save(&self, out: &mut Vec<u8>) {
        persist::write(&self.core.lock().transport, out);
    }

    /// Takes over a saved state, and sets the interrupt line as its status demands. The machine
    /// must be paused, its interrupt controllers restored, and guest memory in place.
    ///
    /// # Errors
    /// [`DeviceStateError`] if `bytes` are no state of this device; it is as it was then.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), DeviceStateError> {
        let state = persist::read(bytes)?;
        let mut core = self.core.lock();
        let core = &mut *core;
        state.apply(&mut core.transport, &self.mem)?;
        core.interrupt.restored(&core.transport);
        core.look_again = true;
        Ok(())
    }

    /// Fills the buffers in the queue: at most a queue's worth, since what the guest adds meanwhile
    /// comes with a notify.
    fn fill(&self, core: &mut Core) {
        if !core.transport.is_live() {
            return;
        }
        let mut used = false;
        for _ in 0..QUEUE_SIZE_MAX {
            if used && self.paused.load(Ordering::SeqCst) {
                core.look_again = true;
                break;
            }
            match self.fill_one(&mut core.transport) {
                Ok(true) => used = true,
                Ok(false) => break,
                Err(error) => {
                    core.interrupt.broken(&mut core.transport, &format!("request queue: {error}"));
                    return;
                }
            }
        }
        if used {
            core.interrupt.used(&mut core.transport, 0, &self.mem, true);
        }
    }

    /// Fills one chain; false if there is none.
    fn fill_one(&self, transport: &mut Transport) -> Result<bool, ChainError> {
        let Some(queue) = transport.queues.first_mut().filter(|q| q.ready()) else { return Ok(false) };
        let Some(head) = chain::pop(queue, &self.mem)? else { return Ok(false) };
        let mut found = chain::buffers(&self.mem, queue, head, false)?;
        if found.readable.bytes_left() > 0 {
            return Err(ChainError::Direction);
        }
        let mut bytes = [0; REQUEST_BYTES_MAX];
        let most = usize::try_from(found.writable.bytes_left()).unwrap_or(usize::MAX).min(REQUEST_BYTES_MAX);
        let random = bytes.get_mut(..most).unwrap_or_default();
        let length = match getrandom::fill(random) {
            Ok(()) => most as u32,
            Err(error) => {
                // The guest gets its buffer back with nothing in it, and goes on with the entropy
                // it has.
                tracing::warn!(%error, "the host gave no random bytes");
                0
            }
        };
        if length > 0 {
            found.writable.write(&self.mem, random)?;
        }
        queue.add_used(&self.mem, head, length).map_err(|_| ChainError::Ring)?;
        Ok(true)
    }
}
