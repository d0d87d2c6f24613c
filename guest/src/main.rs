//! The built-in guest of mcd: starts in 64-bit ring 3 on every vCPU, drives one virtio-net device
//! by polling and serves RESP.
//!
//! The host gives each vCPU its number and the address of the boot info page (see
//! [`bare::boot_info`]). vCPU 0 is the server, the others write memory when `DIRTY` asks for it and
//! wait otherwise.
#![no_std]
#![no_main]

extern crate alloc;

mod bare;
