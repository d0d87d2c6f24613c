//! The virtio-mmio transport, version 2: the registers a driver sees, and the rules for when each
//! may be written.
//!
//! The transport is state and rules only: what a write sets in motion comes back as an [`Effect`]
//! for the device to carry out. A driver that breaks a rule is ignored, as the specification has
//! it; only a broken *queue* needs a reset.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemory;

/// The registers (virtio 1.2, 4.2.2).
mod register {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(super) const QUEUE_NUM: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// The driver is ready: the device may work.
    pub const DRIVER_OK: u32 = 4;
    /// Features are agreed on.
    pub const FEATURES_OK: u32 = 8;
    /// The device is broken until it is reset.
    pub const NEEDS_RESET: u32 = 64;
    /// The driver gave up.
    pub const FAILED: u32 = 128;
}

/// Interrupt status bit: a buffer was used.
pub const INTERRUPT_USED: u32 = 1;
/// Interrupt status bit: the configuration (or the status) changed.
pub const INTERRUPT_CONFIG: u32 = 2;
/// The one feature every modern device has.
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;

const MAGIC: u32 = 0x7472_6976;
const VENDOR: u32 = 0x3164_636d; // "mcd1"

/// What a register write sets in motion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing more.
    None,
    /// The driver has put buffers into this queue.
    Notify(u16),
    /// Some interrupt status bits were acknowledged: the line may have to go down.
    Acked,
    /// The driver is ready.
    Ready,
    /// The driver reset the device.
    Reset,
}

/// The registers of one virtio-mmio device.
#[derive(Debug)]
pub struct Transport {
    pub(super) device_id: u32,
    pub(super) device_features: u64,
    pub(super) driver_features: u64,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) queue_sel: u32,
    pub(super) status: u32,
    pub(super) interrupt_status: u32,
    pub(super) config_generation: u32,
    pub(super) queues: Vec<Queue>,
}

impl Transport {
    /// The registers of a device that offers `device_features` (VERSION_1 is added) and has
    /// `queues`.
    pub fn new(device_id: u32, device_features: u64, queues: Vec<Queue>) -> Transport {
        Transport {
            device_id,
            device_features: device_features | VIRTIO_F_VERSION_1,
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            status: 0,
            interrupt_status: 0,
            config_generation: 0,
            queues,
        }
    }

    /// True while the driver is ready and the device whole: queues may be worked on.
    pub fn is_live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET | status::FAILED) == status::DRIVER_OK
    }

    /// Puts everything back to how a driver first finds it.
    pub fn reset(&mut self) {
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.status = 0;
        self.interrupt_status = 0;
        for queue in &mut self.queues {
            queue.reset();
        }
    }

    /// The driver reads `data.len()` bytes at `offset`; `config` is the device's configuration
    /// space.
    ///
    /// Registers are 32 bits wide and read only so; other accesses below the configuration space
    /// give zeros.
    pub fn read(&self, offset: u64, data: &mut [u8], config: &[u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            let from = usize::try_from(at).ok().and_then(|at| config.get(at..)).unwrap_or_default();
            for (to, from) in data.iter_mut().zip(from) {
                *to = *from;
            }
            return;
        }
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => 2,
            register::DEVICE_ID => self.device_id,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => word_of(self.device_features, self.device_features_sel),
            register::QUEUE_NUM_MAX => queue.map_or(0, |q| u32::from(q.max_size())),
            register::QUEUE_READY => queue.map_or(0, |q| u32::from(q.ready())),
            register::INTERRUPT_STATUS => self.interrupt_status,
            register::STATUS => self.status,
            register::CONFIG_GENERATION => self.config_generation,
            // There is no shared memory: length and base read as all ones.
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    /// The driver writes `data` at `offset`. `mem` is there to check a queue that becomes ready.
    pub fn write<M: GuestMemory>(&mut self, offset: u64, data: &[u8], mem: &M) -> Effect {
        // No device here has configuration that a driver may write, and registers are written 32
        // bits at a time.
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return Effect::None };
        let value = u32::from_le_bytes(bytes);
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.write_driver_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NOTIFY => return self.write_notify(value),
            register::INTERRUPT_ACK => {
                self.interrupt_status &= !value;
                return Effect::Acked;
            }
            register::STATUS => return self.write_status(value),
            register::QUEUE_READY => self.write_queue_ready(value, mem),
            _ => self.write_queue_setup(offset, value),
        }
        Effect::None
    }

    fn write_notify(&self, value: u32) -> Effect {
        match u16::try_from(value) {
            Ok(queue) if self.is_live() => Effect::Notify(queue),
            _ => Effect::None,
        }
    }

    /// Features may be written from DRIVER until FEATURES_OK.
    fn write_driver_features(&mut self, value: u32) {
        if self.status & (status::DRIVER | status::FEATURES_OK) != status::DRIVER {
            return;
        }
        let (shift, value) = match self.driver_features_sel {
            0 => (0, u64::from(value)),
            1 => (32, u64::from(value)),
            _ => return,
        };
        self.driver_features = self.driver_features & !(0xffff_ffff << shift) | value << shift;
    }

    /// Status bits only ever grow, until a 0 resets the device.
    fn write_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            self.reset();
            return Effect::Reset;
        }
        let known = status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK | status::FEATURES_OK | status::FAILED;
        let mut added = value & known & !self.status;
        if added & status::FEATURES_OK != 0 && !self.features_acceptable() {
            added &= !status::FEATURES_OK;
        }
        let agreed = (self.status | added) & status::FEATURES_OK != 0;
        if added & status::DRIVER_OK != 0 && !agreed {
            added &= !status::DRIVER_OK;
        }
        self.status |= added;
        if added & status::DRIVER_OK != 0 { Effect::Ready } else { Effect::None }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.device_features == 0 && self.driver_features & VIRTIO_F_VERSION_1 != 0
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK.
    fn queue_setup_allowed(&self) -> bool {
        self.status & (status::FEATURES_OK | status::DRIVER_OK | status::FAILED) == status::FEATURES_OK
    }

    /// Makes the selected queue ready if what the driver set up lies in memory; the driver reads
    /// back whether it is.
    fn write_queue_ready<M: GuestMemory>(&mut self, value: u32, mem: &M) {
        let allowed = self.queue_setup_allowed();
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else { return };
        if value == 0 {
            queue.set_ready(false);
        } else if value == 1 && allowed {
            queue.set_ready(true);
            let valid = queue.is_valid(mem);
            queue.set_ready(valid);
        }
    }

    fn write_queue_setup(&mut self, offset: u64, value: u32) {
        let allowed = self.queue_setup_allowed();
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize).filter(|q| allowed && !q.ready()) else {
            return;
        };
        match offset {
            register::QUEUE_NUM => {
                if let Ok(size) = u16::try_from(value) {
                    queue.set_size(size);
                }
            }
            register::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }
}

/// The 32 bits of `value` that `selector` names.
fn word_of(value: u64, selector: u32) -> u32 {
    match selector {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    type Memory = GuestMemoryMmap<()>;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).expect("memory")
    }

    fn transport() -> Transport {
        let queues = vec![Queue::new(256).expect("queue"), Queue::new(256).expect("queue")];
        Transport::new(1, 1 << 5, queues)
    }

    fn get(t: &Transport, offset: u64) -> u32 {
        let mut data = [0; 4];
        t.read(offset, &mut data, &[]);
        u32::from_le_bytes(data)
    }

    fn set(t: &mut Transport, offset: u64, value: u32) -> Effect {
        t.write(offset, &value.to_le_bytes(), &memory())
    }

    fn agree(t: &mut Transport) {
        set(t, register::STATUS, 1);
        set(t, register::STATUS, 3);
        set(t, register::DRIVER_FEATURES_SEL, 1);
        set(t, register::DRIVER_FEATURES, 1);
        set(t, register::STATUS, 11);
    }

    #[test]
    fn the_identity_is_that_of_a_modern_device() {
        let mut t = transport();
        assert_eq!([get(&t, 0), get(&t, 4), get(&t, 8)], [0x7472_6976, 2, 1]);
        assert_eq!(get(&t, register::DEVICE_FEATURES), 1 << 5);
        set(&mut t, register::DEVICE_FEATURES_SEL, 1);
        assert_eq!(get(&t, register::DEVICE_FEATURES), 1);
        set(&mut t, register::DEVICE_FEATURES_SEL, 2);
        assert_eq!(get(&t, register::DEVICE_FEATURES), 0);
        assert_eq!(get(&t, register::SHM_LEN_LOW), u32::MAX);
    }

    #[test]
    fn features_are_agreed_on_or_refused() {
        let mut t = transport();
        set(&mut t, register::DRIVER_FEATURES, 1 << 5);
        assert_eq!(t.driver_features, 0, "no features before DRIVER");
        set(&mut t, register::STATUS, 3);
        set(&mut t, register::DRIVER_FEATURES, 1 << 6);
        set(&mut t, register::STATUS, 11);
        assert_eq!(get(&t, register::STATUS), 3, "a feature that was not offered");
        set(&mut t, register::DRIVER_FEATURES, 1 << 5);
        set(&mut t, register::STATUS, 11);
        assert_eq!(get(&t, register::STATUS), 3, "no VERSION_1");
        set(&mut t, register::DRIVER_FEATURES_SEL, 1);
        set(&mut t, register::DRIVER_FEATURES, 1);
        assert_eq!(set(&mut t, register::STATUS, 7), Effect::None, "DRIVER_OK needs FEATURES_OK");
        set(&mut t, register::STATUS, 11);
        assert_eq!(get(&t, register::STATUS), 11);
        set(&mut t, register::DRIVER_FEATURES, 0);
        assert_eq!(t.driver_features, 1 << 32 | 1 << 5, "features are fixed after FEATURES_OK");
        assert_eq!(set(&mut t, register::STATUS, 15), Effect::Ready);
        assert!(t.is_live());
        assert_eq!(set(&mut t, register::STATUS, 0), Effect::Reset);
        assert_eq!(get(&t, register::STATUS), 0);
        assert_eq!(t.driver_features, 0);
    }

    #[test]
    fn queues_are_set_up_in_their_time_and_inside_memory() {
        let mut t = transport();
        set(&mut t, register::QUEUE_NUM, 8);
        assert_eq!(t.queues[0].size(), 256, "too early");
        agree(&mut t);
        for (offset, value) in [(0x38, 8), (0x80, 0x1000), (0x90, 0x2000), (0xa0, 0xffff_0000)] {
            set(&mut t, offset, value);
        }
        set(&mut t, register::QUEUE_READY, 1);
        assert_eq!(get(&t, register::QUEUE_READY), 0, "the used ring is outside memory");
        set(&mut t, 0xa0, 0x3000);
        set(&mut t, register::QUEUE_READY, 1);
        assert_eq!(get(&t, register::QUEUE_READY), 1);
        set(&mut t, 0x80, 0x4000);
        assert_eq!(t.queues[0].desc_table(), 0x1000, "a ready queue does not move");
        set(&mut t, register::QUEUE_NUM, 7);
        assert_eq!(t.queues[0].size(), 8);
        set(&mut t, register::QUEUE_SEL, 7);
        assert_eq!(get(&t, register::QUEUE_NUM_MAX), 0);
        set(&mut t, register::QUEUE_READY, 1);
        assert_eq!(set(&mut t, register::QUEUE_NOTIFY, 0), Effect::None, "not live yet");
        set(&mut t, register::STATUS, 15);
        assert_eq!(set(&mut t, register::QUEUE_NOTIFY, 0), Effect::Notify(0));
        assert_eq!(set(&mut t, register::QUEUE_NOTIFY, 0x1_0000), Effect::None);
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let mut t = transport();
        let mut byte = [0xaa];
        t.read(0, &mut byte, &[]);
        assert_eq!(byte, [0]);
        assert_eq!(t.write(register::STATUS, &[1], &memory()), Effect::None);
        assert_eq!(t.write(register::STATUS, &[1; 8], &memory()), Effect::None);
        assert_eq!(t.status, 0);
        let mut config = [0xaa; 4];
        t.read(0x104, &mut config, &[1, 2, 3, 4, 5, 6]);
        assert_eq!(config, [5, 6, 0, 0]);
        t.read(u64::MAX, &mut config, &[1]);
        assert_eq!(config, [0; 4]);
        t.interrupt_status = 3;
        assert_eq!(set(&mut t, register::INTERRUPT_ACK, 1), Effect::Acked);
        assert_eq!(get(&t, register::INTERRUPT_STATUS), 2);
    }
}
