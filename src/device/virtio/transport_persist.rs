//! The saved state of a device's registers and queues, which every virtio device has.

use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestMemory;

use super::mmio::{Transport, status};
use crate::device::{DeviceStateError, StateReader};

/// The registers and queues of one device.
pub(super) struct TransportState {
    status: u32,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    interrupt_status: u32,
    config_generation: u32,
    queues: Vec<QueueState>,
}

impl TransportState {
    /// Appends the state of `transport`.
    pub(super) fn write(transport: &Transport, out: &mut Vec<u8>) {
        out.extend_from_slice(&transport.status.to_le_bytes());
        out.extend_from_slice(&transport.driver_features.to_le_bytes());
        out.extend_from_slice(&transport.device_features_sel.to_le_bytes());
        out.extend_from_slice(&transport.driver_features_sel.to_le_bytes());
        out.extend_from_slice(&transport.queue_sel.to_le_bytes());
        out.extend_from_slice(&transport.interrupt_status.to_le_bytes());
        out.extend_from_slice(&transport.config_generation.to_le_bytes());
        out.push(transport.queues.len() as u8);
        for queue in &transport.queues {
            write_queue(&queue.state(), out);
        }
    }

    /// Reads a state off the front of `reader`.
    pub(super) fn read(reader: &mut StateReader<'_>) -> Result<TransportState, DeviceStateError> {
        let mut state = TransportState {
            status: reader.u32()?,
            driver_features: reader.u64()?,
            device_features_sel: reader.u32()?,
            driver_features_sel: reader.u32()?,
            queue_sel: reader.u32()?,
            interrupt_status: reader.u32()?,
            config_generation: reader.u32()?,
            queues: Vec::new(),
        };
        for _ in 0..reader.u8()? {
            state.queues.push(read_queue(reader)?);
        }
        Ok(state)
    }

    /// How many buffers queue `number` has.
    pub(super) fn queue_size(&self, number: usize) -> u16 {
        self.queues.get(number).map_or(0, |queue| queue.size)
    }

    /// Puts the state into `transport`, after checking that it is one that `transport` could have
    /// come into by itself.
    pub(super) fn apply<M: GuestMemory>(&self, transport: &mut Transport, mem: &M) -> Result<(), DeviceStateError> {
        let bad = |what: &str| Err(DeviceStateError::new(what));
        if self.driver_features & !transport.device_features != 0 {
            return bad("the guest uses features that this build's device does not offer");
        }
        if self.queues.len() != transport.queues.len() {
            return bad("another number of queues");
        }
        let mut queues = Vec::with_capacity(self.queues.len());
        for (saved, own) in self.queues.iter().zip(&transport.queues) {
            if saved.max_size != own.max_size() || saved.event_idx_enabled {
                return bad("queues of another kind");
            }
            let queue = Queue::try_from(*saved).map_err(|e| DeviceStateError::new(e.to_string()))?;
            if queue.ready() && !queue.is_valid(mem) {
                return bad("a queue outside guest memory");
            }
            queues.push(queue);
        }
        let known = status::ACKNOWLEDGE
            | status::DRIVER
            | status::DRIVER_OK
            | status::FEATURES_OK
            | status::NEEDS_RESET
            | status::FAILED;
        if self.status & !known != 0 || self.interrupt_status & !3 != 0 {
            return bad("status bits that do not exist");
        }
        transport.status = self.status;
        transport.driver_features = self.driver_features;
        transport.device_features_sel = self.device_features_sel;
        transport.driver_features_sel = self.driver_features_sel;
        transport.queue_sel = self.queue_sel;
        transport.interrupt_status = self.interrupt_status;
        transport.config_generation = self.config_generation;
        transport.queues = queues;
        Ok(())
    }
}

fn write_queue(state: &QueueState, out: &mut Vec<u8>) {
    for field in [state.max_size, state.size, state.next_avail, state.next_used] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.push(u8::from(state.event_idx_enabled));
    out.push(u8::from(state.ready));
    for field in [state.desc_table, state.avail_ring, state.used_ring] {
        out.extend_from_slice(&field.to_le_bytes());
    }
}

fn read_queue(reader: &mut StateReader<'_>) -> Result<QueueState, DeviceStateError> {
    Ok(QueueState {
        max_size: reader.u16()?,
        size: reader.u16()?,
        next_avail: reader.u16()?,
        next_used: reader.u16()?,
        event_idx_enabled: reader.flag()?,
        ready: reader.flag()?,
        desc_table: reader.u64()?,
        avail_ring: reader.u64()?,
        used_ring: reader.u64()?,
    })
}
