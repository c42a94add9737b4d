//! Compiles the kernels as host C++, with the emulator for what they ask of the machine.

use std::fs;
use std::path::Path;

fn main() {
    let kernels = Path::new("../src/cuda/kernels");
    let shim = Path::new("shim");
    for folder in [kernels, shim] {
        println!("cargo::rerun-if-changed={}", folder.display());
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            println!("cargo::rerun-if-changed={}", entry.path().display());
        }
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .include(shim)
        .include(kernels)
        .file(shim.join("emulator.cpp"))
        .file(shim.join("kernels.cpp"))
        .file("tests/kernels.cpp")
        // At the speed of unoptimised code the tests would take minutes.
        .opt_level(2)
        .debug(false)
        .flag("-Wno-unknown-pragmas")
        .compile("linfusion_emulated");
}
