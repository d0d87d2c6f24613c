//! The guest's way out: frames pass, or are held until their epoch is committed.

use std::collections::VecDeque;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use netbuf::{OutputBuffer, PacketPort, PushError, VNET_HEADER_BYTES};
use parking_lot::{Mutex, MutexGuard};

use crate::device::net::{NET_HEADER_BYTES, NetBackend, Offloads, Transmit};

const _: () = assert!(NET_HEADER_BYTES == VNET_HEADER_BYTES);

/// What the gate tells the driver; called from vCPU threads, so it must not block.
pub trait OutputListener: Send + Sync {
    /// The open epoch has its first frame.
    fn output_waiting(&self);
    /// A frame found the buffer full.
    fn output_full(&self);
}

/// How a release ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseEnd {
    /// All that was due has left.
    Done,
    /// The right to release ran out; the rest is still held.
    Expired,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Nothing goes out or comes in: this node does not run the guest.
    Closed,
    /// Frames leave at once.
    Pass,
    /// Frames wait.
    Hold,
}

struct Held {
    buffer: OutputBuffer,
    mode: Mode,
    /// When the first frame of each epoch that has any was held.
    since_us: VecDeque<(u64, u64)>,
    open_since_us: Option<u64>,
    full_reported: bool,
    was_full: bool,
    first_out_us: Option<u64>,
    lost_frames: u64,
    last_hold_us: u64,
}

/// The output of one machine: its port, and what is held of it.
pub struct OutputGate {
    port: Box<dyn PacketPort>,
    listener: Box<dyn OutputListener>,
    clock_us: fn() -> u64,
    held: Mutex<Held>,
    /// Copies of what `held` has, for whoever must not wait for a release or a frame of the guest.
    shown: Shown,
}

/// Figures as of the newest change, for readers without the lock.
struct Shown {
    packets: AtomicU64,
    bytes: AtomicU64,
    open_packets: AtomicU64,
    lost_frames: AtomicU64,
    /// [`NEVER`] if no frame left yet.
    first_out_us: AtomicU64,
    last_hold_us: AtomicU64,
}

/// In the place of a time that there is none of.
const NEVER: u64 = u64::MAX;

/// The locked buffer; what it holds in the end is shown as soon as it is unlocked.
struct HeldGuard<'a> {
    held: MutexGuard<'a, Held>,
    shown: &'a Shown,
}

impl Deref for HeldGuard<'_> {
    type Target = Held;

    fn deref(&self) -> &Held {
        &self.held
    }
}

impl DerefMut for HeldGuard<'_> {
    fn deref_mut(&mut self) -> &mut Held {
        &mut self.held
    }
}

impl Drop for HeldGuard<'_> {
    fn drop(&mut self) {
        let Shown { packets, bytes, open_packets, lost_frames, first_out_us, last_hold_us } = self.shown;
        packets.store(self.held.buffer.held_packets() as u64, Ordering::Relaxed);
        bytes.store(self.held.buffer.held_bytes() as u64, Ordering::Relaxed);
        open_packets.store(self.held.buffer.open_packets() as u64, Ordering::Relaxed);
        lost_frames.store(self.held.lost_frames, Ordering::Relaxed);
        first_out_us.store(self.held.first_out_us.unwrap_or(NEVER), Ordering::Relaxed);
        last_hold_us.store(self.held.last_hold_us, Ordering::Relaxed);
    }
}

/// What is held, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldFigures {
    /// Frames held.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames the port did not take.
    pub lost_frames: u64,
    /// When the first frame left since the gate opened (the clock the gate was given).
    pub first_out_us: Option<u64>,
}

impl OutputGate {
    /// A closed gate before `port`.
    pub fn new(
        port: Box<dyn PacketPort>,
        buffer: OutputBuffer,
        listener: Box<dyn OutputListener>,
        clock_us: fn() -> u64,
    ) -> Arc<OutputGate> {
        let held = Held {
            buffer,
            mode: Mode::Closed,
            since_us: VecDeque::new(),
            open_since_us: None,
            full_reported: false,
            was_full: false,
            first_out_us: None,
            lost_frames: 0,
            last_hold_us: 0,
        };
        let shown = Shown {
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            open_packets: AtomicU64::new(0),
            lost_frames: AtomicU64::new(0),
            first_out_us: AtomicU64::new(NEVER),
            last_hold_us: AtomicU64::new(0),
        };
        Arc::new(OutputGate { port, listener, clock_us, held: Mutex::new(held), shown })
    }

    fn lock(&self) -> HeldGuard<'_> {
        HeldGuard { held: self.held.lock(), shown: &self.shown }
    }

    /// Lets all held frames go, in order, and what follows at once.
    pub fn pass(&self) {
        let mut held = self.lock();
        let held = &mut *held;
        // The open epoch is closed under the next free number so that it leaves behind the sealed
        // ones.
        let last = held.buffer.newest_sealed().map_or(0, |newest| newest.saturating_add(1));
        if let Err(error) = held.buffer.seal(last) {
            tracing::error!(%error, "the open epoch's output is lost");
        }
        self.let_go(held, u64::MAX, &mut || true);
        held.mode = Mode::Pass;
        held.forget_times();
    }

    /// Holds every frame from now on. Epochs may be numbered from 0 again.
    pub fn hold(&self) {
        let mut held = self.lock();
        if let Err(error) = held.buffer.restart() {
            // A gate that passes holds nothing, so there is nothing sealed here; if there were, it
            // would never have been released.
            tracing::error!(%error, "old output is thrown away");
            held.buffer.discard();
            let _ = held.buffer.restart();
        }
        held.mode = Mode::Hold;
        held.forget_times();
    }

    /// Throws held frames away; nothing goes out or comes in any more.
    pub fn close(&self) {
        let mut held = self.lock();
        held.buffer.discard();
        held.mode = Mode::Closed;
        held.forget_times();
    }

    /// The frames held since the last seal belong to `epoch`.
    pub fn seal(&self, epoch: u64) {
        let mut held = self.lock();
        if let Err(error) = held.buffer.seal(epoch) {
            // Epochs rise by construction; if they did not, holding on is the safe side.
            tracing::error!(%error, "output of epoch {epoch} stays held");
            return;
        }
        if let Some(since_us) = held.open_since_us.take() {
            held.since_us.push_back((epoch, since_us));
        }
        held.full_reported = false;
    }

    /// Lets the frames of epochs up to `through` go, in order, as long as `may` says so before each
    /// of them.
    pub fn release(&self, through: u64, mut may: impl FnMut() -> bool) -> ReleaseEnd {
        let mut held = self.lock();
        let held = &mut *held;
        let end = self.let_go(held, through, &mut may);
        if end == ReleaseEnd::Done {
            held.note_released(through, (self.clock_us)());
        }
        end
    }

    fn let_go(&self, held: &mut Held, through: u64, may: &mut dyn FnMut() -> bool) -> ReleaseEnd {
        while let Some(first) = held.buffer.first(through) {
            if !may() {
                return ReleaseEnd::Expired;
            }
            self.emit(first.frame(), &mut held.lost_frames, &mut held.first_out_us);
            first.take();
        }
        ReleaseEnd::Done
    }

    fn emit(&self, frame: &[u8], lost: &mut u64, first: &mut Option<u64>) {
        // A port that does not take a frame is a wire that lost it: the guest's own protocols
        // repeat it.
        if self.port.send(frame).is_err() {
            *lost += 1;
        } else if first.is_none() {
            *first = Some((self.clock_us)());
        }
    }

    /// Sends a frame of the node's own as if it were the guest's: it is held while these are, for
    /// this node may not be the one that runs the guest any more. `frame` has no header.
    pub fn send(&self, frame: &[u8]) {
        // An empty header asks for nothing.
        let with_header: Vec<u8>;
        let frame = match self.port.has_headers() {
            true => {
                with_header = [&[0; VNET_HEADER_BYTES], frame].concat();
                &with_header
            }
            false => frame,
        };
        // A buffer without room has frames of the guest, which say where it is as well.
        let _ = self.transmit(frame);
    }

    /// Throws away what the network sent while nobody ran the guest here.
    pub fn drain_input(&self) {
        let mut scratch = [0; 2048];
        // A frame that is longer than the scratch is drained as well, and the count is bounded by
        // the port's queue.
        for _ in 0..65_536 {
            if self.port.recv(&mut scratch).is_err() {
                break;
            }
        }
    }

    /// Frames of the open epoch. Takes no lock, here and below where a figure is read.
    pub fn open_packets(&self) -> u64 {
        self.shown.open_packets.load(Ordering::Relaxed)
    }

    /// True once after a frame was turned away because the buffer was full.
    pub fn take_was_full(&self) -> bool {
        std::mem::take(&mut self.lock().was_full)
    }

    /// How long the first frame of the epoch released last was held.
    pub fn last_hold_us(&self) -> u64 {
        self.shown.last_hold_us.load(Ordering::Relaxed)
    }

    /// What is held.
    pub fn figures(&self) -> HeldFigures {
        let read = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        HeldFigures {
            packets: read(&self.shown.packets),
            bytes: read(&self.shown.bytes),
            lost_frames: read(&self.shown.lost_frames),
            first_out_us: Some(read(&self.shown.first_out_us)).filter(|us| *us != NEVER),
        }
    }
}

impl Held {
    fn forget_times(&mut self) {
        self.since_us.clear();
        self.open_since_us = None;
        self.full_reported = false;
    }

    fn note_released(&mut self, through: u64, now_us: u64) {
        while let Some((_, since_us)) = self.since_us.pop_front_if(|(epoch, _)| *epoch <= through) {
            self.last_hold_us = now_us.saturating_sub(since_us);
        }
    }
}

impl NetBackend for OutputGate {
    fn transmit(&self, frame: &[u8]) -> Transmit {
        let mut guard = self.lock();
        let held = &mut *guard;
        match held.mode {
            Mode::Closed => Transmit::Accepted,
            Mode::Pass => {
                self.emit(frame, &mut held.lost_frames, &mut held.first_out_us);
                Transmit::Accepted
            }
            Mode::Hold => {
                match held.buffer.push(frame) {
                    Ok(()) => {}
                    Err(PushError::Full { .. }) => {
                        held.was_full = true;
                        let tell = !std::mem::replace(&mut held.full_reported, true);
                        drop(guard);
                        if tell {
                            self.listener.output_full();
                        }
                        return Transmit::Full;
                    }
                    Err(PushError::TooLarge { .. } | PushError::Empty) => {
                        held.lost_frames += 1;
                        return Transmit::Accepted;
                    }
                }
                if held.open_since_us.is_none() {
                    held.open_since_us = Some((self.clock_us)());
                    drop(guard);
                    self.listener.output_waiting();
                }
                Transmit::Accepted
            }
        }
    }

    fn receive(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        match self.port.recv(buf) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn readable_fd(&self) -> RawFd {
        self.port.as_raw_fd()
    }

    fn offloads(&self) -> Offloads {
        let all = Offloads { checksum: true, segmentation: true, guest_checksum: true };
        if self.port.has_headers() { all } else { Offloads::NONE }
    }

    fn agreed(&self, offloads: Offloads) {
        // If it fails, frames without a checksum are dropped by the device (and come again), or all
        // have one: slow, not wrong.
        if let Err(error) = self.port.receive_unchecked(offloads.guest_checksum) {
            tracing::warn!(%error, "the tap cannot be told which checksums the guest needs");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    /// A port that remembers.
    struct Port {
        has_headers: bool,
        sent: Arc<Mutex<Vec<Vec<u8>>>>,
        unchecked: Arc<Mutex<Vec<bool>>>,
    }

    impl PacketPort for Port {
        fn send(&self, frame: &[u8]) -> io::Result<()> {
            self.sent.lock().push(frame.to_vec());
            Ok(())
        }
        fn recv(&self, _buf: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }
        fn as_raw_fd(&self) -> RawFd {
            io::stdin().as_raw_fd()
        }
        fn has_headers(&self) -> bool {
            self.has_headers
        }
        fn receive_unchecked(&self, allowed: bool) -> io::Result<()> {
            self.unchecked.lock().push(allowed);
            Ok(())
        }
    }

    struct Deaf;

    impl OutputListener for Deaf {
        fn output_waiting(&self) {}
        fn output_full(&self) {}
    }

    #[test]
    fn figures_are_read_without_the_output_lock() {
        let (sent, unchecked) = (Arc::new(Mutex::default()), Arc::new(Mutex::default()));
        let port = Port { has_headers: false, sent: Arc::clone(&sent), unchecked };
        let buffer = OutputBuffer::new(netbuf::Limits { bytes_max: 1 << 20, packets_max: 3 });
        let gate = OutputGate::new(Box::new(port), buffer, Box::new(Deaf), || 7);
        gate.hold();
        gate.transmit(&[1; 60]);
        gate.seal(0);
        gate.transmit(&[2; 50]);
        let figures = |packets, bytes, first_out_us| HeldFigures { packets, bytes, lost_frames: 0, first_out_us };
        {
            let _busy = gate.held.lock();
            assert_eq!((gate.figures(), gate.open_packets()), (figures(2, 110, None), 1));
        }
        gate.release(0, || true);
        assert_eq!(gate.figures(), figures(1, 50, Some(7)));
        gate.close();
        assert_eq!((gate.figures(), gate.open_packets()), (figures(0, 0, Some(7)), 0));
        assert_eq!(*sent.lock(), [[1; 60]]);
    }

    #[test]
    fn frames_of_the_nodes_own_are_held_and_released_with_the_guests() {
        let (sent, unchecked) = (Arc::new(Mutex::default()), Arc::new(Mutex::default()));
        let port = Port { has_headers: false, sent: Arc::clone(&sent), unchecked };
        let buffer = OutputBuffer::new(netbuf::Limits { bytes_max: 1 << 20, packets_max: 10 });
        let gate = OutputGate::new(Box::new(port), buffer, Box::new(Deaf), || 0);
        gate.send(&[1; 60]);
        gate.hold();
        gate.transmit(&[2; 60]);
        gate.send(&[3; 60]);
        assert_eq!((gate.open_packets(), sent.lock().len()), (2, 0));
        gate.seal(0);
        gate.send(&[4; 60]);
        gate.release(0, || true);
        assert_eq!(*sent.lock(), [[2; 60], [3; 60]]);
        // Without a commit it never leaves.
        gate.close();
        gate.send(&[5; 60]);
        assert_eq!(sent.lock().len(), 2);
    }

    #[test]
    fn headers_are_where_the_port_has_them() {
        for has_headers in [false, true] {
            let (sent, unchecked) = (Arc::new(Mutex::default()), Arc::new(Mutex::default()));
            let port = Port { has_headers, sent: Arc::clone(&sent), unchecked: Arc::clone(&unchecked) };
            let buffer = OutputBuffer::new(netbuf::Limits { bytes_max: 1 << 20, packets_max: 10 });
            let gate = OutputGate::new(Box::new(port), buffer, Box::new(Deaf), || 0);
            gate.pass();
            gate.send(&[7; 60]);
            let header = vec![0; if has_headers { VNET_HEADER_BYTES } else { 0 }];
            assert_eq!(*sent.lock(), [[header, vec![7; 60]].concat()]);
            assert_eq!(gate.offloads() != Offloads::NONE, has_headers);
            // What a device hands over goes as it is.
            gate.transmit(&[9; 72]);
            assert_eq!(sent.lock().last(), Some(&vec![9; 72]));
            gate.agreed(Offloads { guest_checksum: true, ..Offloads::NONE });
            gate.agreed(Offloads::NONE);
            assert_eq!(*unchecked.lock(), [true, false]);
        }
    }
}
