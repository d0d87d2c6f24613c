//! Tests of one machine under KVM: pausing, saving and restoring, dirt, devices.

mod builtin;
mod clock;
mod dirt;
mod disk;
mod events;
mod fit;
mod interrupts;
mod pause;
mod state;
mod support;
