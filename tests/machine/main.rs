//! Tests of one machine under KVM: pausing, saving and restoring, dirty pages, devices.

mod builtin;
mod clock;
mod dirty_pages;
mod disk;
mod events;
mod fit;
mod interrupts;
mod pause;
mod state;
mod support;
