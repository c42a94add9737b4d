//! Compiles the files of `proto` to Rust: `protox` parses them (no protoc needed),
//! `buffa-build` generates the types with `bytes` fields as `bytes::Bytes`.

use std::path::PathBuf;

fn main() {
    for name in ["onnx", "sentencepiece"] {
        compile(name);
    }
}

fn compile(name: &str) {
    let file = format!("{name}.proto");
    println!("cargo:rerun-if-changed=proto/{file}");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let set = protox::Compiler::new(["proto"])
        .expect("the proto folder is there")
        .include_imports(true)
        .open_files([&file])
        .expect("the file in proto parses")
        .encode_file_descriptor_set();
    let set_path = out.join(format!("{name}.fds"));
    std::fs::write(&set_path, set).expect("OUT_DIR is writable");
    // `buffa-build` lets Cargo watch this file, which is younger than the build that writes it: everything
    // would be built again each time.
    let written = std::fs::metadata(PathBuf::from("proto").join(&file))
        .and_then(|proto| proto.modified())
        .and_then(|time| {
            let set = std::fs::File::options().write(true).open(&set_path)?;
            set.set_modified(time)
        });
    written.expect("OUT_DIR keeps times");
    buffa_build::Config::new()
        .files(&[&file])
        .descriptor_set(&set_path)
        .use_bytes_type()
        // Inline, an attribute would take 1.7 KB for the tensors and graphs that it
        // almost never holds, and a UNet has tens of thousands of attributes.
        .box_type(buffa_build::PointerRepr::Box)
        .generate_views(false)
        .include_file(format!("{name}_include.rs"))
        .compile()
        .expect("code generation from proto");
}
