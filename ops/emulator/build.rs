//! Compiles the kernels as host C++, with the emulator for what they ask of the machine: once for the crate, once into
//! a `libcuda.so.1` that runs launches in the emulator.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let kernels = Path::new("../src/cuda/kernels");
    let shim = Path::new("shim");
    for folder in [kernels, shim] {
        println!("cargo::rerun-if-changed={}", folder.display());
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            println!("cargo::rerun-if-changed={}", entry.path().display());
        }
    }
    println!("cargo::rerun-if-changed=tests/kernels.cpp");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .include(shim)
        .include(kernels)
        .file(shim.join("emulator.cpp"))
        .file(shim.join("kernels.cpp"))
        // At the speed of unoptimised code the tests would take minutes.
        .opt_level(2)
        .debug(false)
        .pic(true)
        .flag("-Wno-unknown-pragmas");

    let compiler = build.get_compiler();
    if !compiler
        .to_command()
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success())
    {
        println!(
            "cargo::error=the CUDA kernels' tests need a C++ compiler, {} does not run: install g++ (Debian: apt-get install g++), or set CXX",
            compiler.path().display()
        );
        return;
    }
    let mut driver = build.clone();
    driver.file(shim.join("fake_driver.cpp"));
    let library = PathBuf::from(env::var_os("OUT_DIR").expect("set by Cargo")).join("libcuda.so.1");
    let objects = driver.compile_intermediates();
    let linked = driver
        .get_compiler()
        .to_command()
        .args(["-shared", "-Wl,-soname,libcuda.so.1", "-pthread", "-o"])
        .arg(&library)
        .args(&objects)
        .status();
    assert!(
        linked.is_ok_and(|status| status.success()),
        "the C++ compiler could not link {}",
        library.display()
    );
    println!(
        "cargo::rustc-env=LINFUSION_FAKE_DRIVER={}",
        library.display()
    );

    build
        .file("tests/kernels.cpp")
        .compile("linfusion_emulated");
}
