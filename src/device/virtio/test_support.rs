//! A stand-in for the machine's side of a device.

use parking_lot::Mutex;

use crate::device::Signals;

/// Remembers what a device signalled.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) lines: Mutex<Vec<(u32, bool)>>,
    pub(crate) rings: Mutex<u32>,
    pub(crate) broken: Mutex<Vec<String>>,
    pub(crate) quiesced: Mutex<u32>,
}

impl Signals for Recorder {
    fn set_irq(&self, gsi: u32, active: bool) {
        self.lines.lock().push((gsi, active));
    }

    fn ring(&self) {
        *self.rings.lock() += 1;
    }

    fn broken(&self, _device: &'static str, reason: &str) {
        self.broken.lock().push(reason.to_owned());
    }

    fn quiesced(&self) {
        *self.quiesced.lock() += 1;
    }
}
