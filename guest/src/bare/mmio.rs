//! One device of virtio-mmio, version 2: its registers, and the handshake every driver begins with.

/// Where device 0 answers; the others follow.
const BASE: u64 = 0xD000_0000;
/// Bytes from one device to the next.
const STRIDE: u64 = 0x1000;

/// Offsets of the registers.
mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_ADDRESSES: [u64; 3] = [0x080, 0x090, 0x0A0];
    pub const CONFIG: u64 = 0x100;
}

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// Status bits: acknowledged, driver, features agreed, driver works.
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
/// Status bit: the device has given up.
const NEEDS_RESET: u32 = 64;
/// Feature bit in the upper word: the modern interface.
const FEATURE_VERSION_1: u32 = 1;

/// A device by its number.
#[derive(Clone, Copy)]
pub struct Registers {
    base: u64,
}

impl Registers {
    /// The registers of device `number`.
    pub const fn of(number: u64) -> Registers {
        Registers { base: BASE + number * STRIDE }
    }

    /// Whether there is a modern device of kind `device_id`. Where no device is, every register
    /// reads as ones.
    pub fn is(&self, device_id: u32) -> bool {
        self.read(register::MAGIC) == MAGIC
            && self.read(register::VERSION) == 2
            && self.read(register::DEVICE_ID) == device_id
    }

    /// Resets the device and agrees on those features of `wanted` (the lower word) that it has;
    /// these.
    pub fn begin(&self, wanted: u32) -> Result<u32, &'static str> {
        self.write(register::STATUS, 0);
        self.write(register::STATUS, ACKNOWLEDGE);
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER);
        self.write(register::DEVICE_FEATURES_SELECT, 1);
        if self.read(register::DEVICE_FEATURES) & FEATURE_VERSION_1 == 0 {
            return Err("a device is a legacy one");
        }
        self.write(register::DEVICE_FEATURES_SELECT, 0);
        let low = self.read(register::DEVICE_FEATURES) & wanted;
        self.write(register::DRIVER_FEATURES_SELECT, 0);
        self.write(register::DRIVER_FEATURES, low);
        self.write(register::DRIVER_FEATURES_SELECT, 1);
        self.write(register::DRIVER_FEATURES, FEATURE_VERSION_1);
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.read(register::STATUS) & FEATURES_OK == 0 {
            return Err("a device refused the features");
        }
        Ok(low)
    }

    /// Gives queue `number` its size and its rings.
    pub fn set_up_queue(&self, number: u32, size: usize, addresses: [u64; 3]) -> Result<(), &'static str> {
        self.write(register::QUEUE_SELECT, number);
        if (self.read(register::QUEUE_SIZE_MAX) as usize) < size {
            return Err("a device's queues are too short");
        }
        self.write(register::QUEUE_SIZE, size as u32);
        for (place, address) in register::QUEUE_ADDRESSES.into_iter().zip(addresses) {
            self.write(place, address as u32);
            self.write(place + 4, (address >> 32) as u32);
        }
        self.write(register::QUEUE_READY, 1);
        Ok(())
    }

    /// The driver is ready.
    pub fn start(&self) {
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Whether the device has given up on us.
    pub fn is_broken(&self) -> bool {
        self.read(register::STATUS) & NEEDS_RESET != 0
    }

    /// Tells the device that queue `number` has something for it.
    pub fn notify(&self, number: u32) {
        self.write(register::QUEUE_NOTIFY, number);
    }

    /// The 64-bit field at `offset` of the device's own configuration.
    pub fn config(&self, offset: u64) -> u64 {
        let at = register::CONFIG + offset;
        u64::from(self.read(at)) | u64::from(self.read(at + 4)) << 32
    }

    fn read(&self, offset: u64) -> u32 {
        // SAFETY: a place in the device window, all of which the host maps for every vCPU.
        unsafe { ((self.base + offset) as *const u32).read_volatile() }
    }

    fn write(&self, offset: u64, value: u32) {
        // SAFETY: a place in the device window, all of which the host maps for every vCPU. Not
        // reordered with the ring writes: those are volatile or releasing stores.
        unsafe { ((self.base + offset) as *mut u32).write_volatile(value) }
    }
}
