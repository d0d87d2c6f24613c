//! Tells the linker how to lay out the guest's image. Only the `mcd-guest` binary is affected; the
//! library also builds for a host.

fn main() {
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=guest.ld");
    let script = format!("-Wl,-T,{here}/guest.ld");
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-n", &script] {
        println!("cargo:rustc-link-arg-bin=mcd-guest={argument}");
    }
}
