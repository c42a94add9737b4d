//! Embeds the CUDA kernels where `LINFUSION_KERNELS` says that they are (`make cuda lib`).

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(linfusion_kernels)");
    println!("cargo::rerun-if-env-changed=LINFUSION_KERNELS");
    println!("cargo::rerun-if-changed=build.rs");
    let Some(path) = env::var_os("LINFUSION_KERNELS").filter(|path| !path.is_empty()) else {
        return;
    };
    let path = PathBuf::from(path);
    println!("cargo::rerun-if-changed={}", path.display());
    match path.canonicalize() {
        Ok(path) => {
            println!("cargo::rustc-cfg=linfusion_kernels");
            println!("cargo::rustc-env=LINFUSION_KERNELS_PATH={}", path.display());
        }
        Err(error) => println!(
            "cargo::error=LINFUSION_KERNELS={}: {error}; `make cuda` makes it, unset it for a library without CUDA",
            path.display()
        ),
    }
}
