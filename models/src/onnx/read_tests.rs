//! Opening models: what is read, and what is refused.

use std::path::Path;

use buffa::Message;
use bytes::Bytes;

use super::proto::{GraphProto, ModelProto, TensorProto};
use super::*;

/// A model with one initializer of `count` f32 and one node.
pub(super) fn small_model(count: usize) -> ModelProto {
    let values: Vec<f32> = (0..count).map(|i| i as f32).collect();
    let dims = [count as i64];
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![make::opset("", 17)],
        graph: buffa::MessageField::some(GraphProto {
            name: Some("g".into()),
            initializer: vec![make::tensor_f32("w", &dims, &values)],
            node: vec![make::node("Add", "add", &["x", "w"], &["y"], vec![])],
            input: vec![make::value_info(
                "x",
                ElementType::F32,
                &[make::Dim::Fixed(dims[0])],
            )],
            output: vec![make::value_info(
                "y",
                ElementType::F32,
                &[make::Dim::Fixed(dims[0])],
            )],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    }
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> std::path::PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn weights_stay_in_the_map() {
    let dir = tempfile::tempdir().unwrap();
    let model = small_model(10_000);
    let path = write(dir.path(), "m.onnx", &model.encode_to_vec());
    let file = OnnxFile::open(&path).unwrap();
    assert_eq!(file.model, model);
    let weight = &file.model.graph.initializer[0];
    let raw = weight.raw_data.as_ref().unwrap();
    let source = file.source().unwrap();
    let range = source
        .map
        .locate(raw)
        .expect("raw_data is a slice of the map");
    let stored = std::fs::read(&path).unwrap();
    assert_eq!(&stored[range.start as usize..range.end as usize], &raw[..]);
    assert!(
        source
            .map
            .locate(&file.tensor_bytes(weight).unwrap())
            .is_some()
    );
}

#[test]
fn a_model_from_memory_shares_its_buffer() {
    let bytes = Bytes::from(small_model(1000).encode_to_vec());
    let file = OnnxFile::from_bytes(bytes.clone(), None).unwrap();
    let raw = file.model.graph.initializer[0].raw_data.as_ref().unwrap();
    assert!(bytes.as_ptr_range().contains(&raw.as_ptr()));
}

#[test]
fn files_that_are_no_models() {
    let dir = tempfile::tempdir().unwrap();
    let good = small_model(100).encode_to_vec();
    let no_graph = ModelProto::default().with_ir_version(8).encode_to_vec();
    let data = TensorProto::default().with_name("x").encode_to_vec();
    let cases: [(&str, &[u8], &str); 6] = [
        ("empty.onnx", b"", "empty file"),
        (
            "lfs.onnx",
            b"version https://git-lfs.github.com/spec/v1\n",
            "git lfs pull",
        ),
        ("short.onnx", &good[..good.len() - 1], "ends early"),
        ("bare.onnx", &no_graph, "no graph"),
        ("tensor.onnx", &data, "not an ONNX model"),
        ("noise.onnx", &[0xff; 100], "not an ONNX model"),
    ];
    for (name, bytes, words) in cases {
        let error = OnnxFile::open(write(dir.path(), name, bytes))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(words) && error.contains(name),
            "{name}: {error}"
        );
    }
}

#[test]
fn paths_that_are_no_files() {
    let dir = tempfile::tempdir().unwrap();
    let unet = dir.path().join("unet");
    std::fs::create_dir(&unet).unwrap();
    write(&unet, "model.onnx", &small_model(1).encode_to_vec());
    let said = OnnxFile::open(dir.path()).unwrap_err().to_string();
    assert!(
        said.contains("did you mean") && said.contains("unet/model.onnx"),
        "{said}"
    );

    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let said = OnnxFile::open(&fifo).unwrap_err().to_string();
    assert!(said.contains("not a regular file"), "{said}");

    let dangling = dir.path().join("dangling.onnx");
    std::os::unix::fs::symlink("blobs/nothing", &dangling).unwrap();
    let said = OnnxFile::open(&dangling).unwrap_err().to_string();
    assert!(said.contains("download interrupted"), "{said}");
}

#[test]
fn a_file_beyond_two_gib_is_not_decoded() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "big.onnx", &small_model(10).encode_to_vec());
    // Sparse: takes no space.
    std::fs::File::options()
        .write(true)
        .open(&path)
        .and_then(|f| f.set_len(MAX_MODEL_BYTES + 1))
        .unwrap();
    let error = OnnxFile::open(&path).unwrap_err();
    assert!(matches!(error, ReadError::TooLarge { .. }), "{error}");
}

#[test]
fn limits_hold() {
    let dir = tempfile::tempdir().unwrap();
    let mut nested = small_model(1);
    for _ in 0..6 {
        let inner = std::mem::take(&mut nested.graph).into_option().unwrap();
        let body = vec![make::graph_attribute("then_branch", inner)];
        nested.graph = buffa::MessageField::some(GraphProto {
            node: vec![make::node("If", "if", &["c"], &["y"], body)],
            ..GraphProto::default()
        });
    }
    let path = write(dir.path(), "nested.onnx", &nested.encode_to_vec());
    let with = |limits: Limits| OnnxFile::open_with(&path, &limits);
    let all = Limits::default();
    assert!(
        with(Limits {
            graph_depth: 7,
            nodes: 7,
            name_bytes: 11,
            ..all
        })
        .is_ok()
    );
    assert!(matches!(
        with(Limits {
            graph_depth: 6,
            ..all
        }),
        Err(ReadError::TooDeep { limit: 6 })
    ));
    assert!(matches!(
        with(Limits { nodes: 6, ..all }),
        Err(ReadError::TooManyNodes { limit: 6 })
    ));
    assert!(matches!(
        with(Limits {
            name_bytes: 10,
            ..all
        }),
        Err(ReadError::NameTooLong { length: 11, .. })
    ));
    for limits in [
        Limits {
            message_depth: 10,
            ..all
        },
        Limits {
            structure_bytes: 1000,
            ..all
        },
    ] {
        assert!(matches!(with(limits), Err(ReadError::Decode { .. })));
    }
}
