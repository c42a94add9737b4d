//! The textual form. `onnx.parser` (1.23) reads the expected texts.

use buffa::MessageField;

use super::*;
use crate::onnx::ElementType;
use crate::onnx::make::{self, Dim};
use crate::onnx::proto::{GraphProto, TensorProto};
use crate::onnx::read_tests::small_model;

fn initializer(tensor: TensorProto) -> String {
    let graph = GraphProto {
        name: Some("g".into()),
        initializer: vec![tensor],
        ..GraphProto::default()
    };
    let text = print_graph(&graph, PrintOptions::default()).to_string();
    let line = text.lines().nth(2).unwrap();
    line.trim().to_owned()
}

#[test]
fn a_whole_model() {
    let mut model = small_model(2);
    model.producer_name = Some("a \"quoted\" tool".into());
    model.metadata_props = vec![make::metadata("key", "value")];
    model.opset_import.push(make::opset("d", 1));
    let graph = model.graph.get_or_insert_default();
    graph
        .initializer
        .push(make::tensor_f32("big", &[3, 3], &[1.0; 9]));
    graph.value_info = vec![make::value_info(
        "/a/b",
        ElementType::F16,
        &[Dim::Named("batch".into()), Dim::Fixed(4), Dim::Unknown],
    )];
    let branch = GraphProto {
        name: Some("then".into()),
        node: vec![make::node("Identity", "", &["x"], &["t"], vec![])],
        output: vec![make::value_info("t", ElementType::F32, &[])],
        ..GraphProto::default()
    };
    graph.node.push(make::node(
        "If",
        "",
        &["c"],
        &["z"],
        vec![make::graph_attribute("then_branch", branch)],
    ));
    graph.node.push(make::node_in(
        "d",
        "F",
        "/f",
        &["z", "", "0"],
        &["v"],
        vec![
            make::int("i", -1),
            make::float("f", 1e-4),
            make::string("s", "a\\b"),
            make::ints("is", &[1, 2]),
            make::floats("fs", &[0.5]),
            make::tensor_attribute("t", make::tensor_i64("", &[2], &[7, 8])),
            make::tensor_attribute("u", make::tensor_f32("", &[9], &[0.0; 9])),
        ],
    ));
    model.functions.push(FunctionProto {
        name: Some("F".into()),
        domain: Some("d".into()),
        input: vec!["a".into()],
        output: vec!["b".into()],
        attribute: vec!["eps".into()],
        attribute_proto: vec![make::int("k", 3)],
        opset_import: vec![make::opset("", 17)],
        node: vec![make::node(
            "LayerNormalization",
            "",
            &["a"],
            &["b"],
            vec![make::reference("epsilon", AttributeKind::Float, "eps")],
        )],
        ..FunctionProto::default()
    });
    let expected = r#"<
  ir_version: 8,
  opset_import: ["": 17, "d": 1],
  producer_name: "a \"quoted\" tool",
  metadata_props: ["key": "value"]
>
g (float[2] x) => (float[2] y)
<
  float[2] w = {0.0, 1.0},
  float[3,3] big = ...,  # 36 bytes, sha256 535918286916675b
  float16[batch,4,?] "/a/b"
>
{
  [add] y = Add (x, w)
  z = If (c) <then_branch: graph = then () => (float t)
  {
    t = Identity (x)
  }>
  ["/f"] v = d.F <i: int = -1, f: float = 0.0001, s: string = "a\\b", is: ints = [1, 2], fs: floats = [0.5], t: tensor = int64[2] {7, 8}, u: tensor = float[9] ... /* 36 bytes, sha256 6db65fd59fd356f6 */> (z, "", "0")
}
<
  domain: "d",
  opset_import: ["": 17]
>
F <eps, k: int = 3> (a) => (b)
{
  b = LayerNormalization <epsilon: float = @eps> (a)
}
"#;
    let text = print_model(&model, PrintOptions::default()).to_string();
    assert_eq!(text, expected, "{text}");
}

#[test]
fn values_of_all_kinds() {
    let half = make::tensor("h", ElementType::F16, &[2], vec![0, 0x3c, 0, 0xbc]);
    let bools = make::tensor("b", ElementType::Bool, &[2], vec![1, 0]);
    let odd = make::tensor_f32("o", &[4], &[f32::NAN, f32::NEG_INFINITY, -0.0, 1e-30]);
    let double = make::tensor("d", ElementType::F64, &[], 0.1_f64.to_le_bytes().to_vec());
    let four = make::tensor("q", ElementType::U4, &[3], vec![0x21, 0x03]);
    let strings = TensorProto {
        string_data: vec!["a\"".into()],
        dims: vec![1],
        data_type: Some(8),
        ..TensorProto::default()
    };
    let broken = make::tensor("x", ElementType::F32, &[3], vec![0; 4]);
    let cases = [
        (half, "float16[2] h = {15360, 48128}"),
        (bools, "bool[2] b = {1, 0}"),
        (odd, "float[4] o = {nan, -inf, -0.0, 1e-30}"),
        (double, "double d = {0.1}"),
        (four, "uint4[3] q = ...  # 2 bytes, sha256 3bd9484dd8e6405b"),
        (strings, r#"string[1] = {"a\""}"#),
        (
            broken,
            "float[3] x = ...  # unreadable: it holds 4 bytes, but float [3] takes 12",
        ),
    ];
    for (tensor, expected) in cases {
        let said = initializer(tensor);
        assert_eq!(said, expected);
    }
}

#[test]
fn a_changed_weight_changes_the_text() {
    let line = |last: f32| {
        let mut values = [0.5; 100];
        values[99] = last;
        initializer(make::tensor_f32("w", &[100], &values))
    };
    assert_ne!(line(0.5), line(0.25));
}

#[test]
fn external_data_without_its_file_is_shown_as_a_reference() {
    let mut tensor = make::tensor("w", ElementType::F32, &[4], Vec::new());
    tensor.raw_data = None;
    tensor.data_location = Some(1);
    tensor.external_data = vec![
        make::metadata("location", "w.bin"),
        make::metadata("offset", "0"),
    ];
    assert_eq!(
        initializer(tensor),
        r#"float[4] w = ["location": "w.bin", "offset": "0"]"#
    );
}

#[test]
fn nesting_without_end_is_cut() {
    let mut model = small_model(1);
    for _ in 0..200 {
        let inner = std::mem::take(&mut model.graph).into_option().unwrap();
        model.graph = MessageField::some(GraphProto {
            node: vec![make::node(
                "Loop",
                "",
                &[],
                &[],
                vec![make::graph_attribute("body", inner)],
            )],
            ..GraphProto::default()
        });
    }
    let text = print_model(&model, PrintOptions::default()).to_string();
    assert_eq!(text.matches("Loop").count(), MAX_DEPTH);
}
