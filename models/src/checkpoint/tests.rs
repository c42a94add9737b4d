//! Good checkpoints open; damaged ones are refused with the values in the message.

use super::synth::{SynthModule, SynthOptions, write_checkpoint};
use super::*;
use bytes::Bytes;
use linfusion_ops::schema::{Border, Window};
use proptest::prelude::*;

fn module(name: &str, mid: MlpWidth) -> SynthModule {
    SynthModule {
        module_name: format!("{name}.attentions.0.transformer_blocks.0.attn1"),
        dim: 8,
        heads: 2,
        mid,
        attention: SiteAttention::Linear,
    }
}

fn modules() -> Vec<SynthModule> {
    vec![
        module("down_blocks.0", MlpWidth::Width(8)),
        module("up_blocks.1", MlpWidth::Width(3)),
        module("mid_block", MlpWidth::Identity),
    ]
}

fn written(modules: &[SynthModule], dtype: FloatType) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(
        folder.path(),
        modules,
        SynthOptions {
            seed: 1,
            dtype,
            ..SynthOptions::default()
        },
    )
    .unwrap();
    folder
}

fn edit_config(folder: &Path, from: &str, to: &str) {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} is in {text}");
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

#[test]
fn opens_a_folder_of_each_float_type() {
    for dtype in [
        FloatType::F16,
        FloatType::BF16,
        FloatType::F32,
        FloatType::F64,
    ] {
        let folder = written(&modules(), dtype);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.modules.len(), 3);
        assert!(checkpoint.unused_tensors().is_empty());
        let first = &checkpoint.modules[0];
        assert_eq!(first.mid, MlpWidth::Width(8));
        let tensor = checkpoint.tensor(first, Part::QWeight).unwrap();
        assert_eq!(
            (tensor.dtype, tensor.shape.as_slice()),
            (dtype, &[8, 8][..])
        );
        let values = tensor.to_f64();
        assert_eq!(values.len(), 64);
        assert!(values.iter().any(|v| *v != 0.0) && values.iter().all(|v| v.abs() <= 0.36));
        let singles: Vec<f64> = tensor.to_f32().into_iter().map(f64::from).collect();
        match dtype {
            FloatType::F64 => assert_ne!(singles, values),
            _ => assert_eq!(singles, values),
        }
    }
}

#[test]
fn the_three_kinds_of_mlp() {
    let folder = written(&modules(), FloatType::F32);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let mids: Vec<_> = checkpoint.modules.iter().map(|m| m.mid).collect();
    assert_eq!(
        mids,
        [MlpWidth::Width(8), MlpWidth::Width(3), MlpWidth::Identity]
    );
    let [_, narrow, identity] = &checkpoint.modules[..] else {
        panic!("three modules");
    };
    let weight = Part::KMlp(MlpPart::OutWeight);
    assert_eq!(checkpoint.tensor(narrow, weight).unwrap().shape, [8, 3]);
    let missing = checkpoint.tensor(identity, weight).unwrap_err();
    assert!(missing.to_string().contains("`2.to_k_.3.weight`"));
    assert!(
        checkpoint
            .optional_tensor(narrow, Part::QBias)
            .unwrap()
            .is_none()
    );
}

#[test]
fn execution_order_is_not_file_order() {
    let folder = written(&modules(), FloatType::F32);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let order: Vec<_> = checkpoint
        .modules_in_execution_order()
        .iter()
        .map(|m| m.index)
        .collect();
    assert_eq!(order, [0, 2, 1]);
}

#[test]
fn the_same_seed_gives_the_same_file() {
    let [a, b] = [0, 1].map(|_| written(&modules(), FloatType::F32));
    let [a, b] = [&a, &b].map(|folder| Checkpoint::open(folder.path()).unwrap());
    assert_eq!(a.sha256(), b.sha256());
    assert_eq!(a.sha256().len(), 64);
}

#[test]
fn opens_a_single_file_with_the_config_beside_it_or_inside() {
    let folder = written(&modules(), FloatType::F32);
    let tensors = folder.path().join("diffusion_pytorch_model.safetensors");
    assert_eq!(Checkpoint::open(&tensors).unwrap().modules.len(), 3);

    let config = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    let alone = tempfile::tempdir().unwrap();
    let inside = alone.path().join("x.linfusion.safetensors");
    let bytes = std::fs::read(&tensors).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let metadata = [("config".to_owned(), config)].into();
    safetensors::serialize_to_file(file.tensors(), Some(metadata), &inside).unwrap();
    assert_eq!(Checkpoint::open(&inside).unwrap().modules.len(), 3);

    let bare = alone.path().join("bare.safetensors");
    safetensors::serialize_to_file(file.tensors(), None, &bare).unwrap();
    let error = Checkpoint::open(&bare).unwrap_err();
    assert!(matches!(error, CheckpointError::NoConfig { .. }), "{error}");
}

#[test]
fn config_and_tensors_must_agree() {
    // (config text, its replacement, what the message must say)
    let cases = [
        (
            "\"projection_mid_dim\": 3",
            "\"projection_mid_dim\": 4",
            "MLP of width 4, but its tensors have an MLP of width 3",
        ),
        (
            "\"projection_mid_dim\": 3",
            "\"projection_mid_dim\": null",
            "MLP of width 8, but its tensors have an MLP of width 3",
        ),
        (
            "\"projection_mid_dim\": 3",
            "\"projection_mid_dim\": -1",
            "no MLP (identity), but its tensors have an MLP of width 3",
        ),
        (
            "\"projection_mid_dim\": -1",
            "\"projection_mid_dim\": 5",
            "MLP of width 5, but its tensors have no MLP",
        ),
        (
            "\"projection_mid_dim\": 3",
            "\"projection_mid_dim\": \"3\"",
            "expected null, -1 or a width",
        ),
        ("\"dim_n\": 8", "\"dim_n\": 12", "expected [12, 12]"),
        (
            "\"dim_n\": 8",
            "\"dim_n\": 18446744073709551615",
            "dim_n is",
        ),
        ("\"heads\": 2", "\"heads\": 3", "no multiple of heads 3"),
        ("\"heads\": 2", "\"heads\": 0", "heads is 0"),
        ("mid_block", "up_blocks.1", "there twice"),
        ("modules_list", "modules", "modules_list"),
    ];
    let mut wrong = Vec::new();
    for (from, to, expected) in cases {
        let folder = written(&modules(), FloatType::F32);
        edit_config(folder.path(), from, to);
        match Checkpoint::open(folder.path()) {
            Ok(_) => wrong.push(format!("{to}: opened")),
            Err(e) if e.to_string().contains(expected) => {}
            Err(e) => wrong.push(format!("{to}: {e}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_width_of_an_entry_without_one_is_the_tensors() {
    let folder = written(&modules(), FloatType::F32);
    edit_config(folder.path(), "\"projection_mid_dim\": 3", "\"note\": 3");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.modules[1].mid, MlpWidth::Width(3));
}

#[test]
fn missing_parts_are_named() {
    let folder = written(&modules(), FloatType::F32);
    let list = "\"modules_list\": [";
    let extra = format!(
        "{list} {},",
        r#"{"module_name": "other", "dim_n": 8, "heads": 2}"#
    );
    edit_config(folder.path(), list, &extra);
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    // The last entry has no tensors now that every index moved by one.
    assert!(
        error.contains("MLP of width 8, but its tensors have"),
        "{error}"
    );

    let empty = tempfile::tempdir().unwrap();
    std::fs::write(empty.path().join("model.bin"), "").unwrap();
    for path in [empty.path().to_owned(), empty.path().join("model.bin")] {
        assert!(Checkpoint::open(path).is_err());
    }
    assert!(Checkpoint::open(empty.path().join("absent")).is_err());
}

fn safetensors_with(header: &str, data: usize) -> Bytes {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(vec![0; data]);
    bytes.into()
}

#[test]
fn hostile_headers_are_errors() {
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"t": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
    };
    let max = u64::MAX;
    let cases = [
        ("no header", Bytes::from_static(b"1234567")),
        ("only a length", Bytes::from_static(&[255; 8])),
        ("length past the end", {
            let mut bytes = 100_u64.to_le_bytes().to_vec();
            bytes.extend(b"{}");
            bytes.into()
        }),
        ("no JSON", safetensors_with("{", 0)),
        ("a list", safetensors_with("[]", 0)),
        (
            "past the end",
            safetensors_with(&entry("F32", "[2]", "[0, 8]"), 7),
        ),
        (
            "backwards",
            safetensors_with(&entry("F32", "[0]", "[8, 0]"), 8),
        ),
        (
            "huge end",
            safetensors_with(&entry("F32", "[2]", &format!("[0, {max}]")), 8),
        ),
        (
            "huge both",
            safetensors_with(&entry("F32", "[0]", &format!("[{max}, {max}]")), 8),
        ),
        (
            "negative",
            safetensors_with(&entry("F32", "[2]", "[-8, 0]"), 8),
        ),
        (
            "wrong size",
            safetensors_with(&entry("F16", "[2]", "[0, 8]"), 8),
        ),
        (
            "overflowing shape",
            safetensors_with(
                &entry("F32", &format!("[{max}, {max}, {max}]"), "[0, 8]"),
                8,
            ),
        ),
        (
            "metadata no text",
            safetensors_with(r#"{"__metadata__": {"a": 1}}"#, 0),
        ),
    ];
    for (case, bytes) in cases {
        let found = TensorFile::parse(Path::new("x"), bytes);
        assert!(
            matches!(found, Err(CheckpointError::Header { .. })),
            "{case}"
        );
    }
}

#[test]
fn integer_tensors_are_refused_by_name() {
    let header = r#"{"t": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}"#;
    let file = TensorFile::parse(Path::new("x"), safetensors_with(header, 2)).unwrap();
    let error = file.tensor("t").unwrap_err().to_string();
    assert_eq!(
        error,
        "tensor `t` has element type I8; expected F16, BF16, F32 or F64"
    );
}

proptest! {
    #[test]
    fn a_damaged_file_never_panics(position in 0_usize..4096, value: u8, cut in 0_usize..4096) {
        let folder = written(&modules(), FloatType::F16);
        let path = folder.path().join("diffusion_pytorch_model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let position = position % bytes.len();
        bytes[position] = value;
        bytes.truncate(bytes.len().saturating_sub(cut / 64));
        std::fs::write(&path, bytes).unwrap();
        let _ = Checkpoint::open(folder.path());
    }
}

#[test]
fn the_official_codes_own_checkpoints_open_and_name_their_architecture() {
    use crate::catalogue::{Architecture, Evidence, SiteEvidence, recognise};
    let cases = [
        ("sd15-tiny", Architecture::Sd15, MlpWidth::Width(4)),
        ("sdxl-tiny", Architecture::Sdxl, MlpWidth::Width(4)),
        ("sd15-identity", Architecture::Sd15, MlpWidth::Identity),
        ("sd21-narrow", Architecture::Sd21, MlpWidth::Width(1)),
    ];
    for (case, architecture, first_mid) in cases {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures")
            .join(case);
        let checkpoint = Checkpoint::open(folder.join("linfusion")).unwrap();
        assert_eq!(checkpoint.modules[0].mid, first_mid, "{case}");
        assert!(checkpoint.unused_tensors().is_empty(), "{case}");
        let evidence = Evidence {
            self_sites: checkpoint
                .modules
                .iter()
                .map(|module| SiteEvidence {
                    module: Some(module.module_name.clone()),
                    width: Some(module.dim),
                    heads: Some(module.heads),
                })
                .collect(),
            context_width: Some(12),
            ..Evidence::default()
        };
        let found = recognise(&evidence).unwrap();
        assert_eq!(found.architecture, architecture, "{case}");
        let order: Vec<_> = checkpoint
            .modules_in_execution_order()
            .iter()
            .map(|m| m.module_name.clone())
            .collect();
        let expected: Vec<_> = found.sites.iter().map(|s| s.module.clone()).collect();
        assert_eq!(order, expected, "{case}");
    }
}

fn rect(rows: usize, cols: usize) -> Option<WindowSpec> {
    Some(WindowSpec {
        window: Window::Rect { rows, cols },
        border: Border::Truncate,
    })
}

#[test]
fn hybrid_and_window_modules_keep_their_windows() {
    let circle = Some(WindowSpec {
        window: Window::Circle { radius: 5 },
        border: Border::Truncate,
    });
    let forms = [
        SiteAttention::Hybrid(rect(3, 5)),
        SiteAttention::Hybrid(None),
        SiteAttention::Window(circle),
        SiteAttention::Linear,
    ];
    let modules: Vec<_> = forms
        .into_iter()
        .enumerate()
        .map(|(i, attention)| SynthModule {
            attention,
            ..module(&format!("down_blocks.{i}"), MlpWidth::Width(3))
        })
        .collect();
    // Window attention has no MLP: what the config says of one does not matter.
    let folder = written(&modules, FloatType::F32);
    let tensors = folder.path().join("diffusion_pytorch_model.safetensors");
    assert!(tensors.is_file());
    let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("`2.to_q_.0.weight`") && error.contains("window attention"),
        "{error}"
    );

    let modules: Vec<_> = modules
        .into_iter()
        .map(|m| match m.attention {
            SiteAttention::Window(_) => SynthModule {
                mid: MlpWidth::Identity,
                ..m
            },
            _ => m,
        })
        .collect();
    let folder = written(&modules, FloatType::F32);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let found: Vec<_> = checkpoint.modules.iter().map(|m| m.attention).collect();
    assert_eq!(found, forms);
    let scale = checkpoint
        .tensor(&checkpoint.modules[0], Part::LocalScale)
        .unwrap();
    assert_eq!(scale.shape, [2]);
    assert!(scale.to_f64().iter().all(|s| (0.3..=0.7).contains(s)));
    for part in [
        Part::LocalScale,
        Part::QWeight,
        Part::QMlp(MlpPart::InWeight),
    ] {
        let none = checkpoint.optional_tensor(&checkpoint.modules[2], part);
        assert!(none.unwrap().is_none(), "{part:?}");
    }
}

#[test]
fn windows_that_contradict_themselves() {
    let hybrid = [SynthModule {
        attention: SiteAttention::Hybrid(rect(3, 5)),
        ..module("down_blocks.0", MlpWidth::Width(3))
    }];
    let cases = [
        ("\"hybrid\"", "\"linear\"", "attention is linear"),
        (
            "\"hybrid\"",
            "\"softmax\"",
            "expected linear, hybrid or window",
        ),
        ("\"hybrid\"", "\"window\"", "`0.local_scale`"),
        ("\"truncate\"", "\"wrap\"", "expected clamp or truncate"),
        (
            "\"border\"",
            "\"radius\": 3, \"border\"",
            "both window and radius",
        ),
        ("\"window\": [", "\"radius\": 0, \"w\": [", "radius is 0"),
        (
            "\"window\": [",
            "\"window\": [4, ",
            "expected a number or [rows, columns]",
        ),
        (
            "\"window\": [",
            "\"w\": [",
            "border is given without window",
        ),
    ];
    for (from, to, message) in cases {
        let folder = written(&hybrid, FloatType::F32);
        edit_config(folder.path(), from, to);
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(message), "{to}: {error}");
    }
}
