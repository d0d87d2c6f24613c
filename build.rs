//! Builds the built-in guest (`guest/`) with a cargo of its own, and tells the crate where the ELF
//! is.
//!
//! The guest needs other flags than this crate, so nothing that was meant for this crate reaches
//! it: not the caller's RUSTFLAGS, not clippy's wrapper, not a profile from the environment. It is
//! built in release form always, under `OUT_DIR`, so that cargo leaves it alone until one of its
//! files changes.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The guest runs on the bare machine, but the host's target will do: nothing of the host's
/// libraries is linked.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Fixed address, no vector instructions beyond the ones every x86-64 has, and no stack protector's
/// or unwinder's tables.
const FLAGS: &[&str] = &["-Crelocation-model=static", "-Ctarget-cpu=x86-64", "-Cforce-unwind-tables=no"];
/// Variables of cargo's that the guest's cargo needs too.
const KEPT: &[&str] = &[
    "CARGO_HOME",
    "CARGO_MAKEFLAGS",
    "CARGO_NET_",
    "CARGO_HTTP_",
    "CARGO_REGISTRY_",
    "CARGO_REGISTRIES_",
    "CARGO_SOURCE_",
];

fn main() -> ExitCode {
    match build() {
        Ok(elf) => {
            println!("cargo:rustc-env=MCD_GUEST_ELF={}", elf.display());
            ExitCode::SUCCESS
        }
        Err(reason) => {
            eprintln!("error: the built-in guest was not built: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<PathBuf, String> {
    let guest = directory("CARGO_MANIFEST_DIR")?.join("guest");
    let target = directory("OUT_DIR")?.join("guest");
    println!("cargo:rerun-if-changed=build.rs");
    for watched in ["Cargo.toml", "Cargo.lock", "build.rs", "guest.ld", "src"] {
        println!("cargo:rerun-if-changed={}", guest.join(watched).display());
    }
    let status = command(&guest, &target)
        .status()
        .map_err(|error| format!("cargo could not be started ({error}); is it installed?"))?;
    if !status.success() {
        return Err(format!("cargo ended with {status}; see its messages above"));
    }
    let elf = target.join(TARGET).join("release").join("mcd-guest");
    if elf.is_file() { Ok(elf) } else { Err(format!("cargo left no {}", elf.display())) }
}

/// The cargo that builds the guest.
fn command(guest: &Path, target: &Path) -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let is_cargo = text.starts_with("CARGO") && !KEPT.iter().any(|kept| text.starts_with(kept));
        let is_wrapper = matches!(text, "RUSTFLAGS" | "RUSTDOCFLAGS" | "RUSTC_WRAPPER" | "RUSTC_WORKSPACE_WRAPPER");
        if is_cargo || is_wrapper {
            command.env_remove(&name);
        }
    }
    command
        .current_dir(guest)
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"))
        .args(["build", "--release", "--locked", "--quiet", "--bin", "mcd-guest", "--target", TARGET, "--target-dir"])
        .arg(target);
    command
}

fn directory(name: &str) -> Result<PathBuf, String> {
    env::var_os(name).map(PathBuf::from).ok_or_else(|| format!("{name} is not set; run this through cargo"))
}
