//! Tests of one machine under KVM: pausing, saving and restoring, dirt, devices.

mod builtin;
mod dirt;
mod events;
mod pause;
mod state;
mod support;
