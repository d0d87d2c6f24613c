//! The virtio-net driver: modern virtio-mmio, two queues, polled. Frames go to and come from
//! smoltcp without a copy.

use alloc::alloc::{Layout, alloc, handle_alloc_error};

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use super::mmio::Registers;
use super::virtqueue::{DESCRIPTOR_WRITE, Virtqueue};

/// Receive buffers. Few are enough: what finds none waits in the host's tap, and each one in use is
/// half a dirty page.
const RECEIVE_BUFFERS: usize = 64;
/// Frames that can be on their way out at once.
const TRANSMIT_BUFFERS: usize = 128;
/// Largest Ethernet frame, without its checksum.
const FRAME_BYTES_MAX: usize = 1514;
/// `struct virtio_net_hdr_v1`, before every frame. We use no offload, so ours is all zero.
const HEADER_BYTES: usize = 12;
/// Bytes from one buffer to the next.
const BUFFER_STRIDE: usize = 1536;

/// The queues' numbers.
const RECEIVE: u32 = 0;
/// See [`RECEIVE`].
const TRANSMIT: u32 = 1;

const NETWORK_DEVICE: u32 = 1;
/// Feature bit: the device's own Ethernet address.
const FEATURE_MAC: u32 = 1 << 5;
/// Device 0 is the network.
const REGISTERS: Registers = Registers::of(0);

/// The network device as smoltcp drives it.
pub struct Net {
    receiver: Receiver,
    transmitter: Transmitter,
}

struct Receiver {
    queue: Virtqueue<RECEIVE_BUFFERS>,
    buffers: *mut u8,
}

struct Transmitter {
    queue: Virtqueue<TRANSMIT_BUFFERS>,
    buffers: *mut u8,
    /// Buffers at hand; the one used last is used next, so that a quiet guest dirties few.
    free: [u16; TRANSMIT_BUFFERS],
    free_count: usize,
}

impl Net {
    /// Takes the device into use.
    pub fn new() -> Result<Net, &'static str> {
        if !REGISTERS.is(NETWORK_DEVICE) {
            return Err("device 0 is no modern virtio network device");
        }
        REGISTERS.begin(FEATURE_MAC)?;
        let mut receiver = Receiver { queue: Virtqueue::new(), buffers: buffers(RECEIVE_BUFFERS) };
        let transmitter = Transmitter {
            queue: Virtqueue::new(),
            buffers: buffers(TRANSMIT_BUFFERS),
            free: core::array::from_fn(|i| i as u16),
            free_count: TRANSMIT_BUFFERS,
        };
        REGISTERS.set_up_queue(RECEIVE, RECEIVE_BUFFERS, receiver.queue.addresses())?;
        REGISTERS.set_up_queue(TRANSMIT, TRANSMIT_BUFFERS, transmitter.queue.addresses())?;
        for id in 0..RECEIVE_BUFFERS as u16 {
            receiver.give(id);
        }
        REGISTERS.start();
        let mut net = Net { receiver, transmitter };
        net.flush();
        Ok(net)
    }

    /// Tells the device of frames to send and of buffers to fill, where it wants to be told.
    pub fn flush(&mut self) {
        self.transmitter.flush();
        if self.receiver.queue.wants_notice() {
            REGISTERS.notify(RECEIVE);
        }
    }
}

impl Receiver {
    /// Gives buffer `id` to the device.
    fn give(&mut self, id: u16) {
        let address = self.buffers as u64 + (usize::from(id) * BUFFER_STRIDE) as u64;
        self.queue.publish(id, address, (HEADER_BYTES + FRAME_BYTES_MAX) as u32, DESCRIPTOR_WRITE);
    }
}

impl Transmitter {
    fn flush(&mut self) {
        if self.queue.wants_notice() {
            REGISTERS.notify(TRANSMIT);
        }
    }

    /// Takes back what the device has sent.
    fn reclaim(&mut self) {
        while let Some((id, _)) = self.queue.take_used() {
            if self.free_count < TRANSMIT_BUFFERS {
                self.free[self.free_count] = id;
                self.free_count += 1;
            }
        }
    }

    /// Whether a frame can be sent now. If all buffers are with the device it is told and asked
    /// once more.
    fn has_room(&mut self) -> bool {
        if self.free_count == 0 {
            self.flush();
        }
        self.reclaim();
        self.free_count > 0
    }

    /// Fills a buffer with `fill` and gives it to the device.
    fn send<R>(&mut self, bytes: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let bytes = bytes.min(FRAME_BYTES_MAX);
        // smoltcp asks for a token, which has_room() granted, before it sends.
        self.free_count -= 1;
        let id = self.free[self.free_count];
        // SAFETY: buffer `id` lies inside our allocation and is not with the device. Its header was
        // zeroed at start and neither side writes it again.
        let frame = unsafe {
            let start = self.buffers.add(usize::from(id) * BUFFER_STRIDE);
            core::slice::from_raw_parts_mut(start.add(HEADER_BYTES), bytes)
        };
        let result = fill(frame);
        let address = self.buffers as u64 + (usize::from(id) * BUFFER_STRIDE) as u64;
        self.queue.publish(id, address, (HEADER_BYTES + bytes) as u32, 0);
        result
    }
}

/// A received frame.
pub struct Received<'a> {
    receiver: &'a mut Receiver,
    id: u16,
    bytes: usize,
}

/// Room for a frame to send.
pub struct Room<'a>(&'a mut Transmitter);

impl Device for Net {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Room<'_>)> {
        // Answers need room: without any, frames stay with the device.
        if !self.receiver.queue.has_used() || !self.transmitter.has_room() {
            return None;
        }
        let (id, bytes) = self.receiver.queue.take_used()?;
        let bytes = (bytes as usize).clamp(HEADER_BYTES, HEADER_BYTES + FRAME_BYTES_MAX) - HEADER_BYTES;
        Some((Received { receiver: &mut self.receiver, id, bytes }, Room(&mut self.transmitter)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Room<'_>> {
        self.transmitter.has_room().then_some(Room(&mut self.transmitter))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_BYTES_MAX;
        capabilities
    }
}

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        // SAFETY: buffer `id` lies inside our allocation and came back from the device, which does
        // not touch it until it is given again below. It was zeroed at start, so every byte is
        // initialised.
        let frame = unsafe {
            let start = self.receiver.buffers.add(usize::from(self.id) * BUFFER_STRIDE);
            core::slice::from_raw_parts(start.add(HEADER_BYTES), self.bytes)
        };
        let result = f(frame);
        self.receiver.give(self.id);
        result
    }
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, f: F) -> R {
        self.0.send(bytes, f)
    }
}

/// Zeroed memory for `count` buffers, kept for ever.
fn buffers(count: usize) -> *mut u8 {
    let Ok(layout) = Layout::from_size_align(count * BUFFER_STRIDE, 4096) else {
        panic!("{count} buffers have no layout");
    };
    // SAFETY: the layout is not empty; the memory is zeroed over its whole length before anyone
    // reads it.
    unsafe {
        let start = alloc(layout);
        if start.is_null() {
            handle_alloc_error(layout);
        }
        start.write_bytes(0, layout.size());
        start
    }
}
