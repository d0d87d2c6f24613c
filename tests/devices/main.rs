//! Disks and the source of random bytes from the driver's side. Needs no KVM.

mod blk;
mod driver;
mod hostile;
mod pause;
mod rig;
mod rng;
