//! virtio-blk: one queue of requests, done one after the other by a thread of the device's own.
//!
//! **Who does what.** A notify only wakes the thread. The thread takes a request off the ring, does
//! it in pieces of at most [`PIECE_BYTES`], and answers it. One lock guards the registers, the ring
//! and *everything in guest memory*; it is held while a piece is copied, never while the backend
//! works, so a vCPU that reads a register does not wait for a disk.
//!
//! **Paused.** The device is quiet ([`BlkDevice::is_quiet`]) when its thread is neither in guest
//! memory nor inside a call that changes the disk, and will not be until `unquiesce`. So a write
//! belongs completely to the epoch before the pause or to the one after it, and it is in the
//! backend before the guest can see its completion. How long a write may keep a pause waiting is
//! the machine's decision, which asks its disks before it stops a vCPU. Reads and flushes may be
//! slow: they run without the lock, also through a pause, and what they bring appears in guest
//! memory after it.
//!
//! ```text
//! IN     backend.read  → [ copy to the guest ]                  … next piece … → [ status, used ring, interrupt ]
//! OUT    [ copy from the guest ] → [ backend.write ]            … next piece … → [ status, used ring, interrupt ]
//! FLUSH  backend.flush →                                                         [ status, used ring, interrupt ]
//!        [ … ] a pause waits for it to end and keeps it from beginning
//! ```
//!
//! **Saved** is which requests are in flight, not how far they are: they are done again from
//! scratch (`persist`).
//!
//! **No room.** A backend that is full leaves the request in flight; the thread asks again when
//! `kick` or the guest's next notify wakes it. `kick` takes no lock, so it may come from inside the
//! backend.
//!
//! **Reset in flight.** A request belongs to a round; a reset or a restore begins a new one. The
//! thread looks at the round before it touches guest memory or the disk, and drops a request whose
//! round is over.

mod config;
mod persist;
mod request;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::poll::PollTimeout;
use parking_lot::{Mutex, MutexGuard};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestMemory};

use self::config::{CONFIG_BYTES, QUEUE_SIZE_MAX};
pub use self::persist::BLK_STATE_VERSION;
use self::persist::BlkState;
use self::request::{Range, Request, Status, Work};
use super::chain::{self, ChainError};
use super::interrupt::Interrupt;
use super::mmio::{Effect, Transport};
use super::thread::{self, DeviceThread, ThreadControl};
use crate::device::block::{BlockBackend, Stored};
use crate::device::{DeviceStateError, Signals};
use crate::protocol::machine_shape::DiskShape;

/// virtio device id of a disk.
const DEVICE_ID_BLK: u32 = 2;
/// The request queue, the only one.
const REQUESTS: usize = 0;
/// Most bytes copied or written before a pause can come between: some 30 µs of work.
pub const PIECE_BYTES: usize = 128 << 10;
/// Most bytes discarded or made zero before a pause can come between.
pub const RANGE_PIECE_BYTES: u64 = 4 << 20;

struct Core {
    transport: Transport,
    interrupt: Interrupt,
    /// Goes up when what is in flight is void: at a reset and at a restore.
    round: u64,
    /// The heads of the chains that were taken off the ring and not answered, oldest first. The
    /// first one is being worked on.
    in_flight: VecDeque<u16>,
}

impl Core {
    /// The driver is ready and the device whole.
    fn is_live(&self) -> bool {
        self.transport.is_live() && self.transport.queues.get(REQUESTS).is_some_and(QueueT::ready)
    }

    /// Whatever is in flight is void.
    fn next_round(&mut self, in_flight: VecDeque<u16>) {
        self.round = self.round.wrapping_add(1);
        self.in_flight = in_flight;
    }
}

struct Shared<M> {
    core: Mutex<Core>,
    thread: Arc<ThreadControl>,
    mem: M,
    shape: DiskShape,
    config: [u8; CONFIG_BYTES],
    /// Which disk this is, for people.
    number: u16,
    backend: Arc<dyn BlockBackend>,
    /// The backend had no room.
    stalled: AtomicBool,
    /// The backend failed the last time it was asked.
    failing: AtomicBool,
}

/// A virtio-blk device and its thread.
pub struct BlkDevice<M: GuestMemory + Send + Sync + 'static> {
    // Dropped first: the thread ends before what it uses.
    _thread: DeviceThread,
    shared: Arc<Shared<M>>,
}

/// Guest memory may be touched and the disk changed.
struct Entered<'a> {
    core: MutexGuard<'a, Core>,
    work: thread::Work<'a>,
}

/// The request is no more: the device was reset or restored, or it ends.
struct Gone;

impl<M: GuestMemory + Send + Sync + 'static> BlkDevice<M> {
    /// Disk `number` of a guest, of `shape` and on interrupt line `gsi`, kept in `backend`. It
    /// begins paused.
    ///
    /// # Errors
    /// If the backend is not of the shape's size, or the host gives no eventfd or thread.
    pub fn new(
        mem: M,
        number: u16,
        shape: &DiskShape,
        gsi: u32,
        backend: Arc<dyn BlockBackend>,
        signals: Arc<dyn Signals>,
    ) -> io::Result<BlkDevice<M>> {
        if backend.bytes() != shape.bytes || !shape.is_possible() {
            let why = format!("disk {number} is to have {} bytes, its image has {}", shape.bytes, backend.bytes());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let queue = Queue::new(QUEUE_SIZE_MAX).map_err(|e| io::Error::other(e.to_string()))?;
        let core = Core {
            transport: Transport::new(DEVICE_ID_BLK, config::features(shape), vec![queue]),
            interrupt: Interrupt::new(Arc::clone(&signals), gsi, "virtio-blk"),
            round: 0,
            in_flight: VecDeque::with_capacity(usize::from(QUEUE_SIZE_MAX)),
        };
        let shared = Arc::new(Shared {
            core: Mutex::new(core),
            thread: Arc::new(ThreadControl::new(signals)?),
            mem,
            shape: shape.clone(),
            config: config::bytes(shape),
            number,
            backend,
            stalled: AtomicBool::new(false),
            failing: AtomicBool::new(false),
        });
        let _thread = DeviceThread::start(format!("mcd-disk{number}"), Arc::clone(&shared.thread), {
            let shared = Arc::clone(&shared);
            let mut piece = vec![0; PIECE_BYTES];
            move || shared.work(&mut piece)
        })?;
        Ok(BlkDevice { _thread, shared })
    }

    /// The driver reads at `offset` of the device's registers.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.shared.core.lock().transport.read(offset, data, &self.shared.config);
    }

    /// The driver writes at `offset` of the device's registers. Never waits for the disk.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        let shared = &*self.shared;
        let mut core = shared.core.lock();
        let core = &mut *core;
        match core.transport.write(offset, data, &shared.mem) {
            Effect::Notify(queue) if usize::from(queue) == REQUESTS => shared.thread.wake(),
            Effect::Ready => shared.thread.wake(),
            Effect::Acked => core.interrupt.update(&core.transport),
            Effect::Reset => {
                core.next_round(VecDeque::new());
                core.interrupt.update(&core.transport);
                shared.thread.wake();
            }
            Effect::None | Effect::Notify(_) => {}
        }
    }

    /// There may be room in the backend again. Takes no lock and does not block.
    pub fn kick(&self) {
        if self.shared.stalled.load(Ordering::SeqCst) {
            self.shared.thread.ring();
        }
    }

    /// From now on the device's thread begins nothing that a pause must wait for. Takes no lock.
    pub fn begin_quiesce(&self) {
        self.shared.thread.begin_quiesce();
    }

    /// True when the device's thread is out of guest memory and changes nothing on the disk. The
    /// machine hears of it by [`Signals::quiesced`].
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
        BlkState::write(&self.shared.shape, &core.transport, &core.in_flight, out);
    }

    /// Takes over a saved state, and sets the interrupt line as its status demands. What was in
    /// flight is done again at resume. The machine must be paused, its interrupt controllers
    /// restored, and guest memory in place.
    ///
    /// # Errors
    /// [`DeviceStateError`] if `bytes` are no state of this device; it is as it was then.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), DeviceStateError> {
        let shared = &*self.shared;
        let state = BlkState::read(bytes, &shared.shape)?;
        let mut core = shared.core.lock();
        let core = &mut *core;
        state.transport.apply(&mut core.transport, &shared.mem)?;
        core.next_round(state.in_flight);
        core.interrupt.restored(&core.transport);
        shared.thread.wake();
        Ok(())
    }
}

impl<M: GuestMemory> Shared<M> {
    /// Does the next request, or sleeps if there is none.
    fn work(&self, piece: &mut [u8]) {
        match self.next() {
            Some((round, mut request)) => {
                // A request that is gone needs nothing more.
                let _: Result<(), Gone> = self.perform(round, &mut request, piece);
            }
            None => self.sleep(),
        }
    }

    /// Sleeps until somebody wakes the thread. The caller has said that it rests, or waits for a
    /// kick.
    fn sleep(&self) {
        self.thread.sleep(None, PollTimeout::NONE);
    }

    /// The request to work on next and its round; `None` if there is none, and then the thread is
    /// to sleep.
    fn next(&self) -> Option<(u64, Request)> {
        let mut core = self.core.lock();
        let core = &mut *core;
        let _work = self.thread.begin_work()?;
        if core.is_live() {
            match self.take(core) {
                Ok(Some(request)) => return Some((core.round, request)),
                Ok(None) => {}
                Err(error) => self.break_down(core, error),
            }
        }
        self.thread.rest();
        None
    }

    /// The first request in flight, or else the next one off the ring. While there are requests the
    /// guest is asked not to notify: each notify would cost it an exit for nothing.
    fn take(&self, core: &mut Core) -> Result<Option<Request>, ChainError> {
        let indirect_agreed = core.transport.driver_features & config::F_INDIRECT_DESC != 0;
        let Some(queue) = core.transport.queues.get_mut(REQUESTS) else { return Ok(None) };
        while core.in_flight.is_empty() {
            match chain::pop(queue, &self.mem)? {
                Some(head) => core.in_flight.push_back(head),
                // Asked first and looked again after: a request put in between would otherwise come
                // without a notify.
                None if queue.enable_notification(&self.mem).map_err(|_| ChainError::Ring)? => {}
                None => return Ok(None),
            }
        }
        queue.disable_notification(&self.mem).map_err(|_| ChainError::Ring)?;
        let Some(head) = core.in_flight.front() else { return Ok(None) };
        Request::read(&self.mem, queue, *head, indirect_agreed, &self.shape).map(Some)
    }

    /// Does a request and answers it.
    fn perform(&self, round: u64, request: &mut Request, piece: &mut [u8]) -> Result<(), Gone> {
        let flushes = self.core.lock().transport.driver_features & config::F_FLUSH != 0;
        let room = request.data.bytes_left();
        let done = match &request.work {
            Work::Read { offset } => self.read(round, *offset, &mut request.data, piece)?,
            Work::Write { offset } => self.write(round, *offset, &mut request.data, piece)?,
            Work::Flush => self.status_of("flush", self.backend.flush()),
            Work::Discard(ranges) => {
                self.change_ranges(round, "discard", ranges, |r| self.backend.discard(r.offset, r.bytes))?
            }
            Work::WriteZeroes(ranges) => self.change_ranges(round, "write zeroes", ranges, |r| {
                self.backend.write_zeroes(r.offset, r.bytes, r.may_unmap)
            })?,
            Work::Identify => self.identify(round, &mut request.data)?,
            Work::Answer(status) => *status,
        };
        let changes = matches!(request.work, Work::Write { .. } | Work::Discard(_) | Work::WriteZeroes(_));
        let done = match done {
            // A driver that did not agree to flush relies on what it wrote.
            Status::Ok if changes && !flushes => self.status_of("flush", self.backend.flush()),
            other => other,
        };
        let written = match request.work {
            Work::Read { .. } | Work::Identify => room - request.data.bytes_left(),
            _ => 0,
        };
        self.answer(round, request, done, written)
    }

    /// Fills the guest's buffers from the disk.
    fn read(&self, round: u64, mut offset: u64, data: &mut chain::Stream, piece: &mut [u8]) -> Result<Status, Gone> {
        while data.bytes_left() > 0 {
            let part = part_of(piece, data.bytes_left());
            // Without the lock: a slow disk delays neither a pause nor a vCPU.
            if self.status_of("read", self.backend.read(offset, part)) != Status::Ok {
                return Ok(Status::IoError);
            }
            offset += part.len() as u64;
            let mut entered = self.enter(round)?;
            data.write(&self.mem, part).map_err(|error| self.give_up(&mut entered.core, error))?;
        }
        Ok(Status::Ok)
    }

    /// Writes the guest's buffers to the disk.
    fn write(&self, round: u64, mut offset: u64, data: &mut chain::Stream, piece: &mut [u8]) -> Result<Status, Gone> {
        while data.bytes_left() > 0 {
            let part = part_of(piece, data.bytes_left());
            let mut entered = self.enter(round)?;
            data.read(&self.mem, part).map_err(|error| self.give_up(&mut entered.core, error))?;
            drop(entered);
            if self.store(round, "write", || self.backend.write(offset, part))? != Status::Ok {
                return Ok(Status::IoError);
            }
            offset += part.len() as u64;
        }
        Ok(Status::Ok)
    }

    fn change_ranges(
        &self,
        round: u64,
        what: &str,
        ranges: &[Range],
        change: impl Fn(Range) -> io::Result<Stored>,
    ) -> Result<Status, Gone> {
        for range in ranges {
            let mut left = *range;
            while left.bytes > 0 {
                let now = Range { bytes: left.bytes.min(RANGE_PIECE_BYTES), ..left };
                if self.store(round, what, || change(now))? != Status::Ok {
                    return Ok(Status::IoError);
                }
                left = Range { offset: left.offset + now.bytes, bytes: left.bytes - now.bytes, ..left };
            }
        }
        Ok(Status::Ok)
    }

    fn identify(&self, round: u64, data: &mut chain::Stream) -> Result<Status, Gone> {
        let mut entered = self.enter(round)?;
        let room = usize::try_from(data.bytes_left()).unwrap_or(usize::MAX).min(self.shape.serial.len());
        let serial = self.shape.serial.get(..room).unwrap_or_default();
        data.write(&self.mem, serial).map_err(|error| self.give_up(&mut entered.core, error))?;
        Ok(Status::Ok)
    }

    /// Puts the answer where the driver looks for it.
    fn answer(&self, round: u64, request: &Request, status: Status, written: u64) -> Result<(), Gone> {
        let mut entered = self.enter(round)?;
        let core = &mut *entered.core;
        // The status is written too; no request moves as much as a u32 holds.
        let written = u32::try_from(written).unwrap_or(u32::MAX).saturating_add(1);
        let answered = self.mem.write_obj(status as u8, request.status).map_err(|_| ChainError::Outside);
        let queue = core.transport.queues.get_mut(REQUESTS).ok_or(Gone)?;
        let used =
            answered.and_then(|()| queue.add_used(&self.mem, request.head, written).map_err(|_| ChainError::Ring));
        used.map_err(|error| self.give_up(core, error))?;
        core.in_flight.pop_front();
        core.interrupt.used(&mut core.transport, REQUESTS, &self.mem, true);
        Ok(())
    }

    /// Waits until guest memory and the disk may be touched for a request of `round`: while what is
    /// returned is held.
    fn enter(&self, round: u64) -> Result<Entered<'_>, Gone> {
        loop {
            let core = self.core.lock();
            if core.round != round || !core.is_live() || self.thread.is_ending() {
                return Err(Gone);
            }
            match self.thread.begin_work() {
                Some(work) => return Ok(Entered { core, work }),
                None => {
                    drop(core);
                    self.sleep();
                }
            }
        }
    }

    /// Makes a change to the disk, when the machine is not paused, and again for as long as the
    /// backend has no room.
    fn store(&self, round: u64, what: &str, change: impl Fn() -> io::Result<Stored>) -> Result<Status, Gone> {
        loop {
            let Entered { core, work } = self.enter(round)?;
            drop(core);
            let outcome = change();
            drop(work);
            match outcome {
                // Between that answer and this mark a kick would find nothing stalled, so ask once
                // more after it.
                Ok(Stored::Full) if !self.stalled.swap(true, Ordering::SeqCst) => {}
                Ok(Stored::Full) => {
                    // Under the lock: a reset that comes first is seen, one that comes after wakes.
                    let core = self.core.lock();
                    if core.round != round {
                        return Err(Gone);
                    }
                    self.thread.rest();
                    drop(core);
                    self.sleep();
                }
                other => {
                    self.stalled.store(false, Ordering::SeqCst);
                    return Ok(self.status_of(what, other.map(|_| ())));
                }
            }
        }
    }

    /// The status that the guest reads. The first failure in a row is logged.
    fn status_of(&self, what: &str, outcome: io::Result<()>) -> Status {
        match outcome {
            Ok(()) => {
                self.failing.store(false, Ordering::Relaxed);
                Status::Ok
            }
            Err(error) => {
                if !self.failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        disk = self.number,
                        what,
                        %error,
                        "disk error: the guest got an I/O error; check its image"
                    );
                }
                Status::IoError
            }
        }
    }

    /// The guest broke the rules in the middle of a request.
    fn give_up(&self, core: &mut Core, error: ChainError) -> Gone {
        self.break_down(core, error);
        Gone
    }

    /// Marks the device broken until the guest resets it.
    fn break_down(&self, core: &mut Core, error: ChainError) {
        core.next_round(VecDeque::new());
        core.interrupt.broken(&mut core.transport, &format!("disk {}: {error}", self.number));
    }
}

/// The part of `piece` that the next of `bytes_left` bytes need.
fn part_of(piece: &mut [u8], bytes_left: u64) -> &mut [u8] {
    let length = usize::try_from(bytes_left).unwrap_or(usize::MAX).min(piece.len());
    piece.get_mut(..length).unwrap_or_default()
}
