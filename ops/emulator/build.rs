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
    let mut plain = cc::Build::new();
    plain
        .cpp(true)
        .std("c++17")
        .include(shim)
        .include(kernels)
        // At the speed of unoptimised code the tests would take minutes.
        .opt_level(2)
        .debug(false)
        .pic(true)
        .flag("-Wno-unknown-pragmas");

    let compiler = plain.get_compiler();
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

    // A function is called before each load and store; `watch.cpp` defines them in place of the sanitizer's library.
    let mut watched = plain.clone();
    watched.flag("-fsanitize=thread");
    watched
        .file(shim.join("watched.cpp"))
        .compile("linfusion_watched");

    for file in ["emulator.cpp", "watch.cpp", "kernels.cpp"] {
        plain.file(shim.join(file));
    }
    link_driver(plain.clone().file(shim.join("fake_driver.cpp")));
    plain
        .file("tests/kernels.cpp")
        .compile("linfusion_emulated");
}

/// Builds the driver that runs launches in the emulator, and tells the crate where it is.
fn link_driver(build: &cc::Build) {
    let library = PathBuf::from(env::var_os("OUT_DIR").expect("set by Cargo")).join("libcuda.so.1");
    let objects = build.compile_intermediates();
    let linked = build
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
}
