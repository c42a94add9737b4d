//! What holds for any model: reading and writing lose nothing, and nothing that
//! can be read makes us panic.

use std::collections::BTreeMap;
use std::fs;

use buffa::{Message, MessageField};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use tempfile::TempDir;

use super::check::check_model;
use super::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto,
};
use super::text::{PrintOptions, print_model};
use super::write::{ExternalData, WriteOptions, stage};
use super::*;

fn name() -> impl Strategy<Value = String> {
    "[a-z/:.]{0,12}"
}

/// A tensor in order, of any fixed-size type, with its bytes in `raw_data`.
fn tensor() -> impl Strategy<Value = TensorProto> {
    let fixed: Vec<_> = ElementType::ALL
        .into_iter()
        .filter(|e| e.bits().is_some())
        .collect();
    (name(), select(fixed), vec(0_i64..7, 0..4), any::<u8>()).prop_map(
        |(name, element, dims, seed)| {
            let length = element.byte_len(&dims).unwrap().unwrap();
            let bytes: Vec<u8> = (0..length)
                .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
                .collect();
            make::tensor(&name, element, &dims, bytes)
        },
    )
}

fn attribute() -> impl Strategy<Value = AttributeProto> {
    prop_oneof![
        (name(), any::<i64>()).prop_map(|(n, v)| make::int(&n, v)),
        (
            name(),
            any::<f32>().prop_filter("NaN is not equal to itself", |f| !f.is_nan())
        )
            .prop_map(|(n, v)| make::float(&n, v)),
        (name(), ".{0,8}").prop_map(|(n, v)| make::string(&n, &v)),
        (name(), vec(any::<i64>(), 0..4)).prop_map(|(n, v)| make::ints(&n, &v)),
        (name(), tensor()).prop_map(|(n, v)| make::tensor_attribute(&n, v)),
    ]
}

fn node(attribute: impl Strategy<Value = AttributeProto>) -> impl Strategy<Value = NodeProto> {
    (
        name(),
        name(),
        vec(name(), 0..3),
        vec(name(), 0..3),
        vec(attribute, 0..3),
    )
        .prop_map(|(op, name, input, output, attribute)| NodeProto {
            op_type: Some(op),
            name: Some(name),
            input,
            output,
            attribute,
            ..NodeProto::default()
        })
}

fn value() -> impl Strategy<Value = ValueInfoProto> {
    let dim = prop_oneof![
        (-1_i64..9).prop_map(make::Dim::Fixed),
        "[a-z]{1,3}".prop_map(make::Dim::Named),
        Just(make::Dim::Unknown),
    ];
    (name(), select(&ElementType::ALL[..]), vec(dim, 0..4))
        .prop_map(|(name, element, dims)| make::value_info(&name, element, &dims))
}

fn graph() -> impl Strategy<Value = GraphProto> {
    let flat = (
        vec(node(attribute()), 0..4),
        vec(tensor(), 0..4),
        vec(value(), 0..3),
    );
    let flat = flat.prop_map(|(node, initializer, value_info)| GraphProto {
        node,
        initializer,
        value_info,
        ..GraphProto::default()
    });
    flat.prop_recursive(3, 12, 3, |inner| {
        let body = (name(), inner).prop_map(|(name, graph)| make::graph_attribute(&name, graph));
        (vec(node(body), 0..3), vec(tensor(), 0..4)).prop_map(|(node, initializer)| GraphProto {
            node,
            initializer,
            ..GraphProto::default()
        })
    })
}

fn model() -> impl Strategy<Value = ModelProto> {
    (graph(), vec(node(attribute()), 0..3), any::<Option<i64>>()).prop_map(
        |(graph, node, version)| {
            let mut model = ModelProto {
                ir_version: Some(10),
                model_version: version,
                opset_import: vec![make::opset("", 17)],
                graph: MessageField::some(graph),
                functions: vec![FunctionProto {
                    node,
                    ..FunctionProto::default()
                }],
                ..ModelProto::default()
            };
            // Distinct names, so that tensors can be found again.
            let mut count = 0;
            for_each_tensor_mut(&mut model, &mut |_, tensor| {
                tensor.name = Some(format!("t{count}"));
                count += 1;
            });
            model
        },
    )
}

/// Moves the chosen tensors to one of two data files.
fn externalise(model: &mut ModelProto, choices: &[u8]) -> [Vec<u8>; 2] {
    let mut files = [Vec::new(), Vec::new()];
    let mut choices = choices.iter().cycle();
    for_each_tensor_mut(model, &mut |_, tensor| {
        let choice = *choices.next().unwrap();
        let Some(file) = files.get_mut(usize::from(choice % 4)) else {
            return;
        };
        file.resize(file.len() + usize::from(choice / 4), 0);
        let bytes = tensor.raw_data.take().unwrap();
        ExternalRef {
            location: format!("data{}", choice % 4),
            offset: file.len() as u64,
            length: (choice % 8 < 4).then_some(bytes.len() as u64),
        }
        .apply(tensor);
        file.extend_from_slice(&bytes);
    });
    files
}

fn values(file: &OnnxFile) -> BTreeMap<String, TensorData> {
    let mut all = BTreeMap::new();
    for_each_tensor(&file.model, &mut |_, tensor| {
        all.insert(tensor.name.clone().unwrap(), file.tensor(tensor).unwrap());
    });
    all
}

/// The model without where its tensors' bytes are.
fn structure(model: &ModelProto) -> ModelProto {
    let mut model = model.clone();
    for_each_tensor_mut(&mut model, &mut |_, tensor| {
        tensor.raw_data = None;
        tensor.data_location = None;
        tensor.external_data.clear();
    });
    model
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn an_inline_model_keeps_every_byte(model in model(), extra in vec(any::<u8>(), 0..20)) {
        let dir = TempDir::new().unwrap();
        let mut bytes = model.encode_to_vec();
        // An unknown field: number 2000, length-delimited.
        bytes.extend([0x82, 0x7d, extra.len() as u8]);
        bytes.extend(extra);
        fs::write(dir.path().join("in.onnx"), &bytes).unwrap();
        let source = OnnxFile::open(dir.path().join("in.onnx")).unwrap();
        let out = dir.path().join("out.onnx");
        stage(&source.model, Some(&source), &out, &WriteOptions::default()).unwrap().publish().unwrap();
        prop_assert_eq!(fs::read(out).unwrap(), bytes);
    }

    #[test]
    fn wherever_weights_go_they_and_the_structure_stay_the_same(
        model in model(),
        choices in vec(any::<u8>(), 1..9),
        external in select(vec![ExternalData::Auto, ExternalData::Reuse, ExternalData::Copy, ExternalData::Inline]),
        max_model_bytes in select(vec![MAX_MODEL_BYTES, 6000, 3000]),
    ) {
        let dir = TempDir::new().unwrap();
        let mut model = model;
        let data = externalise(&mut model, &choices);
        for (index, bytes) in data.iter().enumerate() {
            fs::write(dir.path().join(format!("data{index}")), bytes).unwrap();
        }
        fs::write(dir.path().join("in.onnx"), model.encode_to_vec()).unwrap();
        let source = OnnxFile::open(dir.path().join("in.onnx")).unwrap();
        let options = WriteOptions { external, min_external_bytes: 16, max_model_bytes, ..WriteOptions::default() };
        let out = dir.path().join("out.onnx");
        match stage(&source.model, Some(&source), &out, &options) {
            Ok(staged) => {
                let before = values(&source);
                prop_assert_eq!(&values(&staged.open().unwrap()), &before);
                staged.publish().unwrap();
                let back = OnnxFile::open(&out).unwrap();
                prop_assert!(back.size() <= max_model_bytes);
                prop_assert_eq!(values(&back), before);
                prop_assert_eq!(structure(&back.model), structure(&source.model));
            }
            Err(error) => {
                let is_too_large = matches!(error, super::write::WriteError::TooLarge { .. });
                prop_assert!(is_too_large && max_model_bytes < MAX_MODEL_BYTES, "{}", error);
                prop_assert!(!out.exists());
            }
        }
    }

    #[test]
    fn damaged_models_never_panic(model in model(), damage in vec((any::<Index>(), any::<u8>()), 1..8)) {
        let mut bytes = model.encode_to_vec();
        for (index, value) in damage {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        if let Ok(file) = OnnxFile::from_bytes(bytes.into(), None) {
            // Either answer is right; neither may panic.
            let _ = check_model(&file.model, Some(&file));
            let text = print_model(&file.model, PrintOptions::default()).to_string();
            prop_assert!(!text.is_empty());
        }
    }

    #[test]
    fn typed_fields_and_raw_data_mean_the_same(values in vec(any::<i16>(), 0..9)) {
        use ElementType::*;
        let dims = [values.len() as i64];
        let typed = |element: ElementType, fill: &dyn Fn(&mut TensorProto)| {
            let mut tensor = TensorProto {
                data_type: Some(element.onnx()),
                dims: dims.to_vec(),
                ..TensorProto::default()
            };
            fill(&mut tensor);
            TensorData::inline(&tensor).map_err(|e| TestCaseError::fail(e.to_string()))
        };
        let wide: Vec<i64> = values.iter().map(|v| i64::from(*v)).collect();
        let exact: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        let int32 = |t: &mut TensorProto| t.int32_data = values.iter().map(|v| i32::from(*v)).collect();
        prop_assert_eq!(typed(I32, &int32)?.to_i64_vec().unwrap(), wide.clone());
        prop_assert_eq!(typed(I16, &int32)?.to_i64_vec().unwrap(), wide.clone());
        prop_assert_eq!(typed(I64, &|t| t.int64_data = wide.clone())?.to_i64_vec().unwrap(), wide.clone());
        prop_assert_eq!(typed(F64, &|t| t.double_data = exact.clone())?.to_f64_vec().unwrap(), exact.clone());
        let single = |t: &mut TensorProto| t.float_data = values.iter().map(|v| f32::from(*v)).collect();
        prop_assert_eq!(typed(F32, &single)?.to_f64_vec().unwrap(), exact.clone());
        for element in [F16, Bf16] {
            let singles: Vec<f32> = values.iter().map(|v| f32::from(*v)).collect();
            let encoded = make::encode_f32(element, &singles).unwrap().bytes;
            let bits = encoded.chunks(2).map(|b| i32::from(u16::from_le_bytes([b[0], b[1]])));
            let halves = typed(element, &|t| t.int32_data = bits.clone().collect())?;
            prop_assert_eq!(&halves.bytes, &encoded);
        }
        // Six-bit floats: a value in each field entry, a bit stream in raw form.
        let six = typed(F6E3M2, &|t| t.int32_data = values.iter().map(|v| i32::from(*v & 63)).collect())?;
        for (index, value) in values.iter().enumerate() {
            let bit = |b: usize| six.bytes[(6 * index + b) / 8] >> ((6 * index + b) % 8) & 1;
            let unpacked: u8 = (0..6).map(|b| bit(b) << b).sum();
            prop_assert_eq!(i16::from(unpacked), value & 63);
        }
        prop_assert_eq!(six.bytes.len(), (6 * values.len()).div_ceil(8));
    }
}
