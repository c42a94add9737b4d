//! Constants that are proven, and constants that almost are.

use buffa::Message;
use linfusion_models::onnx::make::{
    self, Dim, int, ints, node, opset, string, tensor_f32, tensor_i64, value_info,
};
use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto, TensorProto};
use linfusion_models::onnx::{ElementType, OnnxFile};
use rstest::rstest;

use super::*;
use crate::graph::{Graph, tensor_name};

const SIDE: i64 = 16;

/// A graph from image `x [1, CHANNELS, 16, 16]` to `y`.
fn model(channels: i64, nodes: Vec<NodeProto>, initializers: Vec<TensorProto>) -> OnnxFile {
    let x = [1, channels, SIDE, SIDE].map(Dim::Fixed);
    let graph = GraphProto {
        name: Some("graph".into()),
        node: nodes,
        initializer: initializers,
        input: vec![value_info("x", ElementType::F32, &x)],
        output: vec![value_info("y", ElementType::F32, &[])],
        ..GraphProto::default()
    };
    file(graph)
}

fn file(mut graph: GraphProto) -> OnnxFile {
    // Of unknown rank.
    for output in &mut graph.output {
        output.r#type = buffa::MessageField::some(make::tensor_type(ElementType::F32, None));
    }
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![opset("", 17)],
        graph: buffa::MessageField::some(graph),
        ..ModelProto::default()
    };
    OnnxFile::from_bytes(model.encode_to_vec().into(), None).unwrap()
}

fn sizes(name: &str, values: &[i64]) -> TensorProto {
    tensor_i64(name, &[values.len() as i64], values)
}

fn reshape(name: &str, x: &str, target: &str, y: &str) -> NodeProto {
    node("Reshape", name, &[x, target], &[y], vec![])
}

/// The stored elements at an input of a node.
fn elements(model: &ModelProto, node: &str, slot: usize) -> Vec<i64> {
    let graph = Graph::new(&model.graph);
    let (_, node) = graph
        .nodes()
        .find(|(_, n)| n.name.as_deref() == Some(node))
        .unwrap();
    let tensor = graph.constant(&node.input[slot]).unwrap();
    let raw = tensor.raw_data.as_deref().unwrap();
    raw.chunks_exact(8)
        .map(|c| i64::from_le_bytes(c.try_into().unwrap()))
        .collect()
}

/// Resizes, runs beside the original, and gives the model.
fn proven(file: &OnnxFile) -> ModelProto {
    let resized = resize(file, ImageSize::Dynamic).unwrap();
    let verified = resized.verify(file).unwrap();
    assert_eq!(verified.max_relative_error, Some(0.0));
    resized.model
}

#[test]
fn channels_of_the_images_size_stay_and_its_tokens_become_what_remains() {
    // Sixteen channels, sixteen rows, sixteen columns.
    let nodes = vec![
        reshape("flatten", "x", "flat", "a"),
        node("Relu", "relu", &["a"], &["b"], vec![]),
        reshape("unflatten", "b", "image", "y"),
    ];
    let constants = vec![
        sizes("flat", &[1, 16, 256]),
        sizes("image", &[1, 16, 16, 16]),
    ];
    let model = proven(&super::tests::model(16, nodes, constants));
    assert_eq!(elements(&model, "flatten", 1), [1, 16, -1]);
    let graph = Graph::new(&model.graph);
    assert!(
        graph
            .nodes()
            .any(|(_, n)| n.name.as_deref() == Some("x/Shape"))
    );
}

#[test]
fn one_constant_is_channels_to_one_node_and_tokens_to_another() {
    // 256 is the tokens of x, and the channels of its quarter of a row.
    let nodes = vec![
        reshape("tokens", "x", "shape", "a"),
        node("MatMul", "weights", &["w", "a"], &["b"], vec![]),
        node(
            "Transpose",
            "turn",
            &["b"],
            &["c"],
            vec![ints("perm", &[0, 2, 1])],
        ),
        reshape("channels", "c", "same", "y"),
    ];
    let constants = vec![
        sizes("shape", &[1, 256, 256]),
        sizes("same", &[1, 256, 256]),
        tensor_f32("w", &[256, 256], &vec![0.01; 256 * 256]),
    ];
    let model = proven(&super::tests::model(256, nodes, constants));
    assert_eq!(elements(&model, "tokens", 1), [1, 256, -1]);
    // As the input has them.
    assert_eq!(elements(&model, "channels", 1), [1, 0, 256]);
}

/// What follows proves it: only as rows and columns of x can a 16 be added to x.
#[rstest]
#[case::expand(
    vec![
        node("GlobalAveragePool", "mean", &["x"], &["m"], vec![]),
        node("Expand", "grow", &["m", "to"], &["a"], vec![]),
    ],
    vec![sizes("to", &[1, 8, 16, 16])]
)]
#[case::crop(
    vec![
        node("Pad", "pad", &["x", "pads"], &["p"], vec![]),
        node("Slice", "crop", &["p", "starts", "ends", "axes"], &["a"], vec![]),
    ],
    vec![
        sizes("pads", &[0, 0, 0, 0, 0, 0, 2, 2]),
        sizes("starts", &[0, 0]), sizes("ends", &[16, 16]), sizes("axes", &[2, 3]),
    ]
)]
#[case::enlarge(
    vec![
        node("MaxPool", "halve", &["x"], &["h"], vec![ints("kernel_shape", &[2, 2]), ints("strides", &[2, 2])]),
        node("Resize", "grow", &["h", "", "", "to"], &["a"], vec![
            string("mode", "nearest"), string("nearest_mode", "floor"),
            string("coordinate_transformation_mode", "asymmetric"),
        ]),
    ],
    vec![sizes("to", &[1, 8, 16, 16])]
)]
fn later_nodes_prove_a_size(#[case] nodes: Vec<NodeProto>, #[case] constants: Vec<TensorProto>) {
    let with_sum = |mut nodes: Vec<NodeProto>| {
        nodes.push(node("Add", "sum", &["a", "x"], &["y"], vec![]));
        nodes
    };
    proven(&model(8, with_sum(nodes.clone()), constants.clone()));
    // Without it, the size may as well be fixed.
    let mut alone = nodes;
    alone.push(node("Relu", "last", &["a"], &["y"], vec![]));
    let name = alone[1].name.clone().unwrap();
    match resize(&model(8, alone, constants), ImageSize::Dynamic) {
        Err(ResizeError::Ambiguous { node, readings, .. }) => {
            assert_eq!(node, name);
            assert!(readings.len() > 1, "{readings:?}");
            assert!(readings.iter().any(|r| r.contains("fixed")), "{readings:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[rstest]
// Rows in windows of 8, or two rows of windows?
#[case::windows(&[1, 4, 2, 8, 2, 8], 4)]
// 64 channels, or 64 tokens?
#[case::mixed(&[1, 4, 64, 4], 4)]
fn a_size_with_several_readings_is_refused(#[case] target: &[i64], #[case] channels: i64) {
    let nodes = vec![reshape("cut", "x", "cut_shape", "y")];
    let file = model(channels, nodes, vec![sizes("cut_shape", target)]);
    let error = resize(&file, ImageSize::Dynamic).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, ResizeError::Ambiguous { .. }), "{text}");
    assert!(
        text.contains("Reshape 'cut'") && text.contains("'cut_shape'"),
        "{text}"
    );
    assert!(
        text.contains("(fixed)") && text.contains("dimension"),
        "{text}"
    );
}

#[test]
fn tensors_of_one_size_are_named() {
    let table = tensor_f32("positions", &[1, 8, 16, 16], &[0.5; 8 * 256]);
    let add = node("Add", "place", &["x", "positions"], &["y"], vec![]);
    let error = resize(&model(8, vec![add], vec![table]), ImageSize::Dynamic).unwrap_err();
    assert!(
        matches!(&error, ResizeError::FixedTensor { tensor, node, .. } if tensor == "positions" && node == "place"),
        "{error}"
    );
    let gather = node(
        "Gather",
        "pick",
        &["x", "rows"],
        &["y"],
        vec![int("axis", 2)],
    );
    let rows: Vec<i64> = (0..SIDE).rev().collect();
    let error = resize(
        &model(8, vec![gather], vec![sizes("rows", &rows)]),
        ImageSize::Dynamic,
    );
    assert!(
        matches!(&error, Err(ResizeError::FixedTensor { tensor, .. }) if tensor == "rows"),
        "{error:?}"
    );
    // One row is a choice that any image has.
    let first = node(
        "Gather",
        "pick",
        &["x", "row"],
        &["y"],
        vec![int("axis", 2)],
    );
    proven(&model(8, vec![first], vec![tensor_i64("row", &[], &[0])]));
}

#[test]
fn a_mean_with_a_stored_count_is_refused() {
    let with = |number: f32| {
        let nodes = vec![
            node("ReduceSum", "sum", &["x", "axes"], &["s"], vec![]),
            node("Mul", "mean", &["s", "number"], &["y"], vec![]),
        ];
        model(
            8,
            nodes,
            vec![sizes("axes", &[2, 3]), tensor_f32("number", &[], &[number])],
        )
    };
    for number in [1.0 / 256.0, 256.0, 1.0 / 16.0] {
        let error = resize(&with(number), ImageSize::Dynamic).unwrap_err();
        assert!(
            matches!(&error, ResizeError::Normaliser { node, constant, count: 256, .. } if node == "mean" && constant == "number"),
            "{error}"
        );
    }
    proven(&with(0.5));
}

#[test]
fn a_size_that_the_network_cannot_halve_is_refused_with_those_that_fit() {
    let halve = || vec![ints("kernel_shape", &[2, 2]), ints("strides", &[2, 2])];
    let nodes = vec![
        node("MaxPool", "half", &["x"], &["a"], halve()),
        node("MaxPool", "quarter", &["a"], &["b"], halve()),
        node("Resize", "grow", &["b", "", "scales"], &["c"], vec![]),
        node("Add", "join", &["c", "x"], &["y"], vec![]),
    ];
    let file = model(
        8,
        nodes,
        vec![tensor_f32("scales", &[4], &[1.0, 1.0, 4.0, 4.0])],
    );
    let fits = ImageSize::Fixed {
        height: 12,
        width: 20,
    };
    let resized = resize(&file, fits).unwrap();
    assert_eq!(resized.report.multiple_of, 4);
    resized.verify(&file).unwrap();
    let error = resize(
        &file,
        ImageSize::Fixed {
            height: 12,
            width: 18,
        },
    )
    .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("12x18") && text.contains("'join'") && text.contains("multiples of 4"),
        "{text}"
    );
}

#[test]
fn another_size_is_written_as_numbers() {
    let nodes = vec![
        reshape("flatten", "x", "flat", "a"),
        reshape("unflatten", "a", "image", "y"),
    ];
    let constants = vec![sizes("flat", &[1, 8, 256]), sizes("image", &[1, 8, 16, 16])];
    let file = model(8, nodes, constants);
    let resized = resize(
        &file,
        ImageSize::Fixed {
            height: 24,
            width: 40,
        },
    )
    .unwrap();
    assert_eq!(elements(&resized.model, "flatten", 1), [1, 8, 960]);
    assert_eq!(elements(&resized.model, "unflatten", 1), [1, 8, 24, 40]);
    assert_eq!(resized.verify(&file).unwrap().also_at, [24, 40]);
    // What only the old size used is gone, and what was not touched is as it was.
    let names: Vec<&str> = resized
        .model
        .graph
        .initializer
        .iter()
        .map(tensor_name)
        .collect();
    assert_eq!(names, ["flatten/size1", "unflatten/size1"]);
}

#[test]
fn an_open_batch_stays_open() {
    let x = [
        Dim::Named("batch".into()),
        Dim::Fixed(8),
        Dim::Fixed(16),
        Dim::Fixed(16),
    ];
    let graph = GraphProto {
        name: Some("graph".into()),
        node: vec![
            node("Shape", "shape", &["x"], &["s"], vec![int("end", 1)]),
            node(
                "Concat",
                "join",
                &["s", "rest"],
                &["to"],
                vec![int("axis", 0)],
            ),
            reshape("flatten", "x", "to", "a"),
            node(
                "Concat",
                "again",
                &["s", "image"],
                &["back"],
                vec![int("axis", 0)],
            ),
            reshape("unflatten", "a", "back", "y"),
        ],
        initializer: vec![sizes("rest", &[8, 256]), sizes("image", &[8, 16, 16])],
        input: vec![value_info("x", ElementType::F32, &x)],
        output: vec![value_info("y", ElementType::F32, &[])],
        ..GraphProto::default()
    };
    let model = proven(&file(graph));
    let declared = make::tensor_type_of(&model.graph.input[0])
        .unwrap()
        .1
        .unwrap();
    let named = |n: &str| Dim::Named(n.to_owned());
    assert_eq!(
        declared,
        [
            named("batch"),
            Dim::Fixed(8),
            named("height"),
            named("width")
        ]
    );
}

#[test]
fn graphs_without_a_fixed_image_are_told_so() {
    let of = |dims: &[Dim]| {
        file(GraphProto {
            node: vec![node("Relu", "relu", &["x"], &["y"], vec![])],
            input: vec![value_info("x", ElementType::F32, dims)],
            output: vec![value_info("y", ElementType::F32, &[])],
            ..GraphProto::default()
        })
    };
    let tokens = of(&[1, 64, 32].map(Dim::Fixed));
    let error = resize(&tokens, ImageSize::Dynamic).unwrap_err();
    assert!(error.to_string().contains("'x' [1, 64, 32]"), "{error}");
    let name = |n: &str| Dim::Named(n.to_owned());
    let open = of(&[name("batch"), Dim::Fixed(4), name("h"), name("w")]);
    let error = resize(&open, ImageSize::Dynamic).unwrap_err();
    assert!(
        matches!(error, ResizeError::AlreadyDynamic { .. }),
        "{error}"
    );
}

#[test]
fn sizes_are_read_from_text() {
    assert_eq!("dynamic".parse(), Ok(ImageSize::Dynamic));
    assert_eq!(
        "64x96".parse(),
        Ok(ImageSize::Fixed {
            height: 64,
            width: 96
        })
    );
    for bad in [
        "",
        "64",
        "64x",
        "0x64",
        "64x-1",
        "64x64x64",
        "9999999x1",
        "dyn",
    ] {
        assert!(bad.parse::<ImageSize>().is_err(), "{bad}");
    }
}

/// An export with an open batch whose constants hold batch 1 runs at batch 1 alone, at any size.
#[test]
fn a_stored_batch_stays() {
    let x = [
        Dim::Named("batch".into()),
        Dim::Fixed(8),
        Dim::Fixed(16),
        Dim::Fixed(16),
    ];
    let graph = GraphProto {
        name: Some("graph".into()),
        node: vec![
            reshape("flatten", "x", "flat", "a"),
            reshape("unflatten", "a", "image", "y"),
        ],
        initializer: vec![sizes("flat", &[1, 8, 256]), sizes("image", &[1, 8, 16, 16])],
        input: vec![value_info("x", ElementType::F32, &x)],
        output: vec![value_info("y", ElementType::F32, &[])],
        ..GraphProto::default()
    };
    let model = proven(&file(graph));
    assert_eq!(elements(&model, "flatten", 1), [1, 8, -1]);
}
