//! Compiles `proto/onnx.proto` to Rust: `protox` parses it (no protoc needed),
//! `buffa-build` generates the types with `bytes` fields as `bytes::Bytes`.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=proto/onnx.proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let set = protox::Compiler::new(["proto"])
        .expect("the proto folder is there")
        .include_imports(true)
        .open_files(["onnx.proto"])
        .expect("proto/onnx.proto parses")
        .encode_file_descriptor_set();
    let set_path = out.join("onnx.fds");
    std::fs::write(&set_path, set).expect("OUT_DIR is writable");
    buffa_build::Config::new()
        .files(&["onnx.proto"])
        .descriptor_set(&set_path)
        .use_bytes_type()
        // Inline, an attribute would take 1.7 KB for the tensors and graphs that it
        // almost never holds, and a UNet has tens of thousands of attributes.
        .box_type(buffa_build::PointerRepr::Box)
        .generate_views(false)
        .include_file("onnx_include.rs")
        .compile()
        .expect("code generation from proto/onnx.proto");
}
