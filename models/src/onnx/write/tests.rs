//! Writing models: what ends up where, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use buffa::Message;
use rstest::rstest;
use tempfile::TempDir;

use super::*;
use crate::onnx::proto::{GraphProto, TensorProto};
use crate::onnx::read_tests::small_model;
use crate::onnx::{ElementType, TensorData};
use crate::onnx::{ExternalRef, for_each_tensor, is_external, make};

const REUSE: WriteOptions = options(ExternalData::Reuse);
const COPY: WriteOptions = options(ExternalData::Copy);
const INLINE: WriteOptions = options(ExternalData::Inline);
const AUTO: WriteOptions = options(ExternalData::Auto);

const fn options(external: ExternalData) -> WriteOptions {
    WriteOptions {
        external,
        overwrite: Overwrite::Refuse,
        min_external_bytes: 1024,
        max_model_bytes: MAX_MODEL_BYTES,
    }
}

fn forced(options: WriteOptions) -> WriteOptions {
    WriteOptions {
        overwrite: Overwrite::Force,
        ..options
    }
}

/// A model file with one inline weight `w`.
fn inline_input(dir: &Path) -> OnnxFile {
    fs::write(dir.join("in.onnx"), small_model(3000).encode_to_vec()).unwrap();
    OnnxFile::open(dir.join("in.onnx")).unwrap()
}

fn external(name: &str, count: i64, offset: u64) -> TensorProto {
    let mut tensor = make::tensor(name, ElementType::F32, &[count], Vec::new());
    ExternalRef {
        location: "in.onnx_data".into(),
        offset,
        length: Some(4 * count as u64),
    }
    .apply(&mut tensor);
    tensor
}

/// A model with the weights `a` (at 0), `b` (at 8192), `twin` (the same bytes as
/// `b`) and `c` (at 8192 + 4 * 2000, unaligned) in `in.onnx_data`.
fn external_model() -> ModelProto {
    let mut model = small_model(16);
    model.graph.get_or_insert_default().initializer.extend([
        external("a", 1500, 0),
        external("b", 2000, 8192),
        external("twin", 2000, 8192),
        external("c", 7, 16192),
    ]);
    model
}

fn external_input(dir: &Path) -> OnnxFile {
    let data: Vec<u8> = (0..20_000_u32).map(|i| (i % 251) as u8).collect();
    fs::write(dir.join("in.onnx_data"), data).unwrap();
    fs::write(dir.join("in.onnx"), external_model().encode_to_vec()).unwrap();
    OnnxFile::open(dir.join("in.onnx")).unwrap()
}

fn write(
    model: &ModelProto,
    source: &OnnxFile,
    out: &Path,
    options: &WriteOptions,
) -> Result<Published, WriteError> {
    stage(model, Some(source), out, options)?.publish()
}

/// Every tensor's values, by name.
fn values(file: &OnnxFile) -> BTreeMap<String, TensorData> {
    let mut all = BTreeMap::new();
    for_each_tensor(&file.model, &mut |_, tensor| {
        all.insert(tensor.name.clone().unwrap(), file.tensor(tensor).unwrap());
    });
    all
}

fn listing(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn reference(file: &OnnxFile, name: &str) -> ExternalRef {
    let initializers = &file.model.graph.initializer;
    let tensor = initializers
        .iter()
        .find(|t| t.name.as_deref() == Some(name));
    ExternalRef::of(tensor.unwrap()).unwrap()
}

#[rstest]
#[case::auto(AUTO)]
#[case::reuse(REUSE)]
#[case::copy(COPY)]
#[case::inline(INLINE)]
fn an_untouched_inline_model_keeps_every_byte(#[case] options: WriteOptions) {
    let dir = TempDir::new().unwrap();
    let mut bytes = small_model(3000).encode_to_vec();
    // Field 999, which no schema has: newer exporters' additions survive.
    bytes.extend_from_slice(&[0xba, 0x3e, 3, b'n', b'e', b'w']);
    fs::write(dir.path().join("in.onnx"), &bytes).unwrap();
    let source = OnnxFile::open(dir.path().join("in.onnx")).unwrap();
    let out = dir.path().join("out.onnx");
    let published = write(&source.model, &source, &out, &options).unwrap();
    assert_eq!(published.companions().count(), 0);
    assert_eq!(fs::read(&out).unwrap(), bytes);
    assert_eq!(listing(dir.path()), ["in.onnx", "out.onnx"]);
}

/// Reads models that this repository does not hold: set LINFUSION_ZOO to a folder
/// of .onnx files and run with `--ignored`.
#[test]
#[ignore = "needs a folder of models in LINFUSION_ZOO"]
fn a_folder_of_models_round_trips() {
    let zoo = std::env::var("LINFUSION_ZOO").expect("LINFUSION_ZOO is set");
    let dir = TempDir::new().unwrap();
    let mut different = Vec::new();
    for name in listing(Path::new(&zoo)) {
        if !name.ends_with(".onnx") {
            continue;
        }
        let path = Path::new(&zoo).join(&name);
        let source = OnnxFile::open(&path).unwrap();
        let out = dir.path().join(&name);
        write(&source.model, &source, &out, &AUTO).unwrap();
        if fs::read(&path).unwrap() != fs::read(&out).unwrap() {
            different.push(name);
        }
    }
    assert_eq!(different, Vec::<String>::new());
}

#[test]
fn reuse_leaves_the_data_where_it_is() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    for options in [&REUSE, &AUTO] {
        let out = dir.path().join("out.onnx");
        let published = write(&source.model, &source, &out, &forced(options.clone())).unwrap();
        assert_eq!(published.reused, [dir.path().join("in.onnx_data")]);
        assert_eq!(published.data, None);
        assert_eq!(fs::read(&out).unwrap(), fs::read(source.path()).unwrap());
    }
}

#[test]
fn new_weights_beside_reused_ones_get_their_own_file() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let mut model = source.model.clone();
    let new: Vec<f32> = (0..300).map(|i| i as f32).collect();
    let initializers = &mut model.graph.get_or_insert_default().initializer;
    initializers.push(make::tensor_f32("new", &[300], &new));
    initializers.push(make::tensor_f32("small", &[255], &new[..255]));
    let published = write(&model, &source, &dir.path().join("out.onnx"), &AUTO).unwrap();
    let companions: Vec<_> = published.companions().collect();
    assert_eq!(
        companions,
        [
            dir.path().join("in.onnx_data"),
            dir.path().join("out.onnx_data")
        ]
    );
    let back = OnnxFile::open(&published.model).unwrap();
    assert_eq!(reference(&back, "new").location, "out.onnx_data");
    let small = back.model.graph.initializer.last().unwrap();
    assert!(!is_external(small), "tensors below 1 KiB stay inline");
    let values = values(&back);
    assert_eq!(values["new"].to_f32_vec().unwrap(), new);
    assert_eq!(values["b"], self::values(&source)["b"]);
}

#[test]
fn a_copy_elsewhere_is_self_contained() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let elsewhere = dir.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let published = write(&source.model, &source, &elsewhere.join("out.onnx"), &AUTO).unwrap();
    assert_eq!(published.reused, Vec::<std::path::PathBuf>::new());
    assert_eq!(listing(&elsewhere), ["out.onnx", "out.onnx_data"]);
    let before = values(&source);
    fs::remove_file(dir.path().join("in.onnx_data")).unwrap();
    let back = OnnxFile::open(elsewhere.join("out.onnx")).unwrap();
    assert_eq!(values(&back), before);
    assert_eq!(reference(&back, "b").offset % 4096, 0, "alignment is kept");
    assert_eq!(
        reference(&back, "b"),
        reference(&back, "twin"),
        "shared bytes stay shared"
    );
    assert_eq!(
        reference(&back, "c").offset,
        reference(&back, "b").offset + 8000
    );
}

#[test]
fn a_copy_takes_only_what_the_model_still_uses() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let mut model = source.model.clone();
    let initializers = &mut model.graph.get_or_insert_default().initializer;
    initializers.retain(|t| t.name.as_deref() == Some("c") || !is_external(t));
    let published = write(&model, &source, &dir.path().join("out.onnx"), &COPY).unwrap();
    assert_eq!(fs::metadata(published.data.unwrap()).unwrap().len(), 28);
    let back = OnnxFile::open(dir.path().join("out.onnx")).unwrap();
    assert_eq!(values(&back)["c"], values(&source)["c"]);
}

#[test]
fn inline_takes_all_weights_in() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let published = write(
        &source.model,
        &source,
        &dir.path().join("out.onnx"),
        &INLINE,
    )
    .unwrap();
    assert_eq!(published.companions().count(), 0);
    let back = OnnxFile::open(&published.model).unwrap();
    for_each_tensor(&back.model, &mut |_, tensor| assert!(!is_external(tensor)));
    assert_eq!(values(&back), values(&source));
}

#[rstest]
#[case::inline_weights(false)]
#[case::external_weights(true)]
fn what_exceeds_the_limit_goes_into_a_data_file(#[case] has_external: bool) {
    let dir = TempDir::new().unwrap();
    let source = if has_external {
        external_input(dir.path())
    } else {
        inline_input(dir.path())
    };
    let options = WriteOptions {
        max_model_bytes: 4000,
        ..INLINE
    };
    let published = write(
        &source.model,
        &source,
        &dir.path().join("out.onnx"),
        &options,
    )
    .unwrap();
    assert_eq!(published.notes, [Note::TooLargeForOneFile]);
    assert!(published.model.metadata().unwrap().len() <= 4000);
    let back = OnnxFile::open(&published.model).unwrap();
    assert_eq!(values(&back), values(&source));
}

#[test]
fn constants_go_out_only_when_nothing_else_helps() {
    let dir = TempDir::new().unwrap();
    let mut model = small_model(2000);
    let values: Vec<f32> = (0..2000).map(|i| i as f32).collect();
    let value = make::tensor_f32("k", &[2000], &values);
    let constant = make::node(
        "Constant",
        "k",
        &[],
        &["k"],
        vec![make::tensor_attribute("value", value)],
    );
    model.graph.get_or_insert_default().node.insert(0, constant);
    let placed = |max_model_bytes| {
        let options = WriteOptions {
            max_model_bytes,
            ..forced(AUTO)
        };
        let staged = stage(&model, None, &dir.path().join("out.onnx"), &options)?;
        let file = staged.open().unwrap();
        let mut places = Vec::new();
        for_each_tensor(&file.model, &mut |_, t| places.push(is_external(t)));
        assert_eq!(self::values(&file)["k"].to_f32_vec().unwrap(), values);
        Ok::<_, WriteError>(places)
    };
    assert_eq!(placed(20_000).unwrap(), [false, false]);
    assert_eq!(placed(10_000).unwrap(), [true, false]);
    assert_eq!(placed(1000).unwrap(), [true, true]);
    assert!(matches!(placed(100), Err(WriteError::TooLarge { .. })));
    assert_eq!(listing(dir.path()), Vec::<String>::new());
}

#[test]
fn the_hugging_face_cache_is_read_and_copied_from() {
    let dir = TempDir::new().unwrap();
    let blobs = dir.path().join("blobs");
    let snapshot = dir.path().join("snapshots/0123");
    let out = dir.path().join("out");
    for folder in [&blobs, &snapshot, &out] {
        fs::create_dir_all(folder).unwrap();
    }
    external_input(&blobs);
    fs::rename(blobs.join("in.onnx"), blobs.join("aa")).unwrap();
    fs::rename(blobs.join("in.onnx_data"), blobs.join("bb")).unwrap();
    symlink("../../blobs/aa", snapshot.join("in.onnx")).unwrap();
    symlink("../../blobs/bb", snapshot.join("in.onnx_data")).unwrap();
    let source = OnnxFile::open(snapshot.join("in.onnx")).unwrap();
    let before = values(&source);
    // Beside the snapshot too: a model must not depend on links into the cache.
    for target in [out.join("out.onnx"), snapshot.join("out.onnx")] {
        let published = write(&source.model, &source, &target, &AUTO).unwrap();
        assert_eq!(published.reused, Vec::<std::path::PathBuf>::new());
        assert_eq!(values(&OnnxFile::open(&target).unwrap()), before);
    }
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let mut results = Vec::new();
    for _ in 0..2 {
        let published = write(
            &source.model,
            &source,
            &dir.path().join("o.onnx"),
            &forced(COPY),
        )
        .unwrap();
        results.push((
            fs::read(published.model).unwrap(),
            fs::read(published.data.unwrap()).unwrap(),
        ));
    }
    assert_eq!(results[0], results[1]);
}

#[test]
fn a_staged_model_can_be_read_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let before = listing(dir.path());
    let staged = stage(
        &source.model,
        Some(&source),
        &dir.path().join("out.onnx"),
        &COPY,
    )
    .unwrap();
    assert_eq!(values(&staged.open().unwrap()), values(&source));
    drop(staged);
    assert_eq!(listing(dir.path()), before);
}

#[test]
fn the_input_is_never_the_output() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let path = |name: &str| dir.path().join(name);
    fs::hard_link(path("in.onnx"), path("hard.onnx")).unwrap();
    symlink("in.onnx", path("soft.onnx")).unwrap();
    symlink(".", path("loop")).unwrap();
    // The data file of this one would be named like the input's.
    symlink("in.onnx_data", path("other.onnx_data")).unwrap();
    let before = listing(dir.path());
    let mut accepted = Vec::new();
    for out in [
        "in.onnx",
        "./in.onnx",
        "loop/in.onnx",
        "hard.onnx",
        "soft.onnx",
        "in.onnx_data",
        "other.onnx",
    ] {
        let error = write(&source.model, &source, &path(out), &forced(COPY));
        if !matches!(error, Err(WriteError::OutputIsInput { .. })) {
            accepted.push((out, error));
        }
    }
    assert!(accepted.is_empty(), "{accepted:?}");
    assert_eq!(listing(dir.path()), before);
    assert_eq!(
        fs::read(path("in.onnx")).unwrap(),
        external_model().encode_to_vec()
    );
}

#[test]
fn existing_files_are_kept_unless_forced() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let path = |name: &str| dir.path().join(name);
    for occupied in ["out.onnx", "out.onnx_data"] {
        fs::write(path(occupied), "precious").unwrap();
        let error = write(&source.model, &source, &path("out.onnx"), &COPY).unwrap_err();
        assert!(
            matches!(&error, WriteError::Exists { path: p } if *p == path(occupied)),
            "{error}"
        );
        assert_eq!(fs::read(path(occupied)).unwrap(), b"precious");
        if occupied == "out.onnx" {
            fs::remove_file(path(occupied)).unwrap();
        }
    }
    fs::write(path("out.onnx"), "precious too").unwrap();
    write(&source.model, &source, &path("out.onnx"), &forced(COPY)).unwrap();
    assert_eq!(
        listing(dir.path()),
        ["in.onnx", "in.onnx_data", "out.onnx", "out.onnx_data"]
    );
    assert_eq!(
        values(&OnnxFile::open(path("out.onnx")).unwrap()),
        values(&source)
    );
}

#[test]
fn a_name_taken_between_staging_and_publishing_is_respected() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let out = dir.path().join("out.onnx");
    let staged = stage(&source.model, Some(&source), &out, &COPY).unwrap();
    fs::write(&out, "precious").unwrap();
    assert!(matches!(staged.publish(), Err(WriteError::Exists { .. })));
    assert_eq!(fs::read(&out).unwrap(), b"precious");
    assert_eq!(listing(dir.path()), ["in.onnx", "in.onnx_data", "out.onnx"]);
}

#[test]
fn an_error_while_replacing_puts_the_old_files_back() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let out = dir.path().join("out.onnx");
    fs::write(&out, "old model").unwrap();
    fs::write(dir.path().join("out.onnx_data"), "old data").unwrap();
    let mut staged = stage(&source.model, Some(&source), &out, &forced(COPY)).unwrap();
    // A name that is free, yet cannot be given: the data file is placed by then.
    staged.model.name = OsString::from("nowhere/out.onnx");
    let error = staged.publish().unwrap_err();
    assert!(
        matches!(
            &error,
            WriteError::Io {
                action: "create",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(fs::read(&out).unwrap(), b"old model");
    assert_eq!(
        fs::read(dir.path().join("out.onnx_data")).unwrap(),
        b"old data"
    );
    assert_eq!(
        listing(dir.path()),
        ["in.onnx", "in.onnx_data", "out.onnx", "out.onnx_data"]
    );
}

#[test]
fn impossible_outputs() {
    let dir = TempDir::new().unwrap();
    let source = inline_input(dir.path());
    fs::create_dir(dir.path().join("folder.onnx")).unwrap();
    type Expectation = fn(&WriteError) -> bool;
    let cases: [(&str, Expectation); 6] = [
        ("missing/out.onnx", |e| matches!(e, WriteError::Io { .. })),
        ("in.onnx/out.onnx", |e| matches!(e, WriteError::Io { .. })),
        ("/proc/out.onnx", |e| matches!(e, WriteError::Io { .. })),
        ("folder.onnx", |e| matches!(e, WriteError::NotAFile { .. })),
        ("folder.onnx/", |e| {
            matches!(e, WriteError::NoFileName { .. })
        }),
        ("..", |e| matches!(e, WriteError::NoFileName { .. })),
    ];
    let before = listing(dir.path());
    for (out, expected) in cases {
        let error =
            write(&source.model, &source, &dir.path().join(out), &forced(AUTO)).unwrap_err();
        assert!(expected(&error), "{out}: {error}");
    }
    assert_eq!(listing(dir.path()), before);
}

#[test]
fn reuse_from_another_folder_is_refused() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let other = TempDir::new().unwrap();
    let error = write(
        &source.model,
        &source,
        &other.path().join("out.onnx"),
        &REUSE,
    )
    .unwrap_err();
    assert!(
        matches!(error, WriteError::ReuseElsewhere { .. }),
        "{error}"
    );
    assert_eq!(listing(other.path()), Vec::<String>::new());
}

#[test]
fn external_tensors_without_a_source_are_refused() {
    let dir = TempDir::new().unwrap();
    let error = stage(&external_model(), None, &dir.path().join("o.onnx"), &AUTO).unwrap_err();
    assert!(
        matches!(&error, WriteError::NoSource { tensor } if tensor == "a"),
        "{error}"
    );
}

#[rstest]
#[case::model("in.onnx")]
#[case::data("in.onnx_data")]
fn a_source_truncated_meanwhile_is_an_error(#[case] victim: &str) {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let before = values(&source);
    assert_eq!(before.len(), 5);
    let file = fs::File::options()
        .write(true)
        .open(dir.path().join(victim))
        .unwrap();
    file.set_len(100).unwrap();
    let error = write(&source.model, &source, &dir.path().join("out.onnx"), &COPY).unwrap_err();
    assert!(
        matches!(&error, WriteError::SourceChanged { path } if path.ends_with(victim)),
        "{error}"
    );
    assert_eq!(listing(dir.path()), ["in.onnx", "in.onnx_data"]);
}

#[test]
fn outputs_have_the_permissions_that_the_umask_leaves() {
    let dir = TempDir::new().unwrap();
    let source = external_input(dir.path());
    let published = write(&source.model, &source, &dir.path().join("out.onnx"), &COPY).unwrap();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let umask = status
        .lines()
        .find_map(|l| l.strip_prefix("Umask:"))
        .unwrap();
    let umask = u32::from_str_radix(umask.trim(), 8).unwrap();
    for path in [published.model, published.data.unwrap()] {
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o666 & !umask, "{}", path.display());
    }
}

#[test]
fn typed_fields_are_left_as_they_are() {
    let dir = TempDir::new().unwrap();
    let mut model = small_model(4);
    let graph: &mut GraphProto = model.graph.get_or_insert_default();
    graph.initializer.push(TensorProto {
        name: Some("typed".into()),
        data_type: Some(ElementType::F32.onnx()),
        dims: vec![300],
        float_data: vec![0.5; 300],
        ..TensorProto::default()
    });
    let out = dir.path().join("out.onnx");
    stage(&model, None, &out, &AUTO).unwrap().publish().unwrap();
    assert_eq!(fs::read(&out).unwrap(), model.encode_to_vec());
}
