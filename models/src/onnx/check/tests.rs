//! Each fault in a model that is otherwise right.

use buffa::MessageField;

use super::*;
use crate::onnx::attrs::AttributeKind;
use crate::onnx::make::{self, Dim};
use crate::onnx::proto::{AttributeProto, FunctionProto, GraphProto, TensorProto};
use crate::onnx::read_tests::small_model;
use crate::onnx::{ElementType, OnnxFile};

/// `y = d::F(If(c, then: x + w, else: x))`, with a function F(a) = a + a.
fn model() -> ModelProto {
    let mut model = small_model(4);
    model.opset_import.push(make::opset("d", 1));
    let branch = |name: &str, node: NodeProto| GraphProto {
        name: Some(name.into()),
        output: vec![make::value_info(
            &node.output[0],
            ElementType::F32,
            &[Dim::Unknown],
        )],
        node: vec![node],
        ..GraphProto::default()
    };
    let graph = model.graph.get_or_insert_default();
    graph
        .input
        .push(make::value_info("c", ElementType::Bool, &[]));
    graph.node = vec![
        make::node(
            "If",
            "if",
            &["c"],
            &["z"],
            vec![
                make::graph_attribute(
                    "then_branch",
                    branch(
                        "then",
                        make::node("Add", "add", &["x", "w"], &["t"], vec![]),
                    ),
                ),
                make::graph_attribute(
                    "else_branch",
                    branch("else", make::node("Identity", "id", &["x"], &["e"], vec![])),
                ),
            ],
        ),
        make::node_in(
            "d",
            "F",
            "call",
            &["z"],
            &["y"],
            vec![make::float("eps", 0.5)],
        ),
    ];
    model.functions.push(function("F", "Add", ""));
    model
}

fn function(name: &str, op: &str, op_domain: &str) -> FunctionProto {
    FunctionProto {
        name: Some(name.into()),
        domain: Some("d".into()),
        input: vec!["a".into()],
        output: vec!["b".into()],
        attribute: vec!["eps".into()],
        opset_import: vec![make::opset("ai.onnx", 17), make::opset("d", 1)],
        node: vec![make::node_in(
            op_domain,
            op,
            "",
            &["a", "a"],
            &["b"],
            vec![make::reference("scale", AttributeKind::Float, "eps")],
        )],
        ..FunctionProto::default()
    }
}

fn graph(model: &mut ModelProto) -> &mut GraphProto {
    model.graph.get_or_insert_default()
}

fn node(model: &mut ModelProto, index: usize) -> &mut NodeProto {
    &mut graph(model).node[index]
}

fn then_branch(model: &mut ModelProto) -> &mut GraphProto {
    node(model, 0).attribute[0].g.get_or_insert_default()
}

fn tensor(model: &mut ModelProto) -> &mut TensorProto {
    &mut graph(model).initializer[0]
}

#[test]
fn a_model_in_order_passes() {
    let problems = check_model(&model(), None).unwrap();
    assert!(problems.is_empty(), "{problems:?}");
}

type Change = fn(&mut ModelProto);

#[test]
fn every_fault_is_found_and_named() {
    let cases: Vec<(Change, &str)> = vec![
        (
            |m| m.graph = MessageField::none(),
            "model: there is no graph",
        ),
        (|m| m.ir_version = Some(15), "model: IR version 15"),
        (|m| m.ir_version = None, "model: IR version 0"),
        (|m| m.opset_import[0].version = Some(10), "model: opset 10"),
        (
            |m| drop(m.opset_import.remove(0)),
            "model: there is no opset_import",
        ),
        (
            |m| m.opset_import.push(make::opset("ai.onnx", 17)),
            "model: the domain `` is imported twice",
        ),
        (
            |m| drop(m.opset_import.remove(1)),
            "node `call` (F): its domain `d`",
        ),
        (
            |m| m.functions[0].opset_import.clear(),
            "node 0 (Add): its domain ``",
        ),
        (
            |m| node(m, 1).input[0] = "q".into(),
            "node `call` (F): its input `q` is not defined",
        ),
        (
            |m| graph(m).node.swap(0, 1),
            "node `call` (F): its input `z` is computed only by a later",
        ),
        (
            |m| node(m, 0).input[0] = "y".into(),
            "graph `g`: its nodes depend on each other in a cycle",
        ),
        (
            |m| node(m, 1).output[0] = "z".into(),
            "node `call` (F): the value `z` is defined twice",
        ),
        (
            |m| node(m, 1).output[0] = "w".into(),
            "node `call` (F): the value `w` is defined twice",
        ),
        (
            |m| node(m, 1).op_type = None,
            "node `call` (): it has no op_type",
        ),
        (
            |m| node(m, 1).output[0] = "other".into(),
            "graph `g`: the output `y` is not computed",
        ),
        (
            |m| {
                let output = graph(m).output[0].clone();
                graph(m).output.push(output);
            },
            "graph `g`: the output `y` is listed twice",
        ),
        (
            |m| graph(m).input[0].name = None,
            "graph `g`: an input or output has no name",
        ),
        (
            |m| {
                let input = graph(m).input[0].clone();
                graph(m).input.push(input);
            },
            "graph `g`: the value `x` is defined twice",
        ),
        (
            |m| {
                let twice = tensor(m).clone();
                graph(m).initializer.push(twice);
            },
            "graph `g`: the value `w` is defined twice",
        ),
        (
            |m| then_branch(m).node[0].input[1] = "z".into(),
            "node `add` (Add): its input `z` is computed only by",
        ),
        (
            |m| then_branch(m).node[0].input[1] = "e".into(),
            "node `add` (Add): its input `e` is not defined",
        ),
        (
            |m| then_branch(m).output[0].name = Some("q".into()),
            "graph `then`: the output `q`",
        ),
        (
            |m| node(m, 1).input[0] = "t".into(),
            "node `call` (F): its input `t` is not defined",
        ),
        (
            |m| node(m, 1).attribute.push(make::int("eps", 1)),
            "node `call` (F): the attribute `eps` occurs twice",
        ),
        (
            |m| node(m, 1).attribute[0].r#type = None,
            "the attribute `eps` has the unknown type 0",
        ),
        (
            |m| node(m, 1).attribute[0].r#type = Some(99),
            "the attribute `eps` has the unknown type 99",
        ),
        (
            |m| node(m, 1).attribute[0].r#type = Some(2),
            "the attribute `eps` is of type int",
        ),
        (
            |m| node(m, 1).attribute[0].i = Some(1),
            "the attribute `eps` is of type float",
        ),
        (
            |m| node(m, 0).attribute[0].g = MessageField::none(),
            "the attribute `then_branch` is of type graph",
        ),
        (
            |m| node(m, 1).attribute[0].ref_attr_name = Some("a".into()),
            "the attribute `eps` refers to `a`",
        ),
        (
            |m| m.functions[0].attribute.clear(),
            "node 0 (Add): the attribute `scale` refers to `eps`",
        ),
        (
            |m| m.functions[0].attribute.push("eps".into()),
            "function `d::F`: it lists `eps` twice",
        ),
        (
            |m| m.functions[0].name = None,
            "function `d::`: it has no name",
        ),
        (
            |m| m.functions.push(function("F", "Add", "")),
            "function `d::F`: it is defined twice",
        ),
        (
            |m| m.functions[0].output[0] = "c".into(),
            "function `d::F`: the output `c`",
        ),
        (
            |m| m.functions[0].node[0].input[1] = "x".into(),
            "node 0 (Add): its input `x` is not defined",
        ),
        (
            |m| m.functions[0].input.push("a".into()),
            "function `d::F`: the value `a` is defined twice",
        ),
        (
            |m| m.functions[0] = function("F", "F", "d"),
            "function `d::F`: it calls itself: d::F → d::F",
        ),
        (
            |m| {
                m.functions = vec![
                    function("F", "G", "d"),
                    function("G", "H", "d"),
                    function("H", "G", "d"),
                ];
            },
            "function `d::G`: it calls itself: d::F → d::G → d::H → d::G",
        ),
        (
            |m| tensor(m).dims = vec![-4],
            "tensor `w`: its shape dimension 0 of [-4] is negative",
        ),
        (
            |m| tensor(m).dims = vec![1 << 40, 1 << 40],
            "tensor `w`: its shape",
        ),
        (
            |m| tensor(m).dims = vec![5],
            "tensor `w`: it holds 16 bytes, but float [5] takes 20",
        ),
        (
            |m| tensor(m).data_type = Some(77),
            "tensor `w`: its element type 77",
        ),
        (
            |m| tensor(m).float_data.push(0.0),
            "tensor `w`: its values are in more than one place",
        ),
        (
            |m| tensor(m).segment = MessageField::some(Default::default()),
            "tensor `w`: it is only a segment",
        ),
        (
            |m| tensor(m).data_location = Some(1),
            "tensor `w`: its external data has no location",
        ),
        (
            |m| tensor(m).data_type = Some(8),
            "tensor `w`: it holds strings",
        ),
        (
            |m| {
                for _ in 0..30 {
                    let inner = std::mem::take(&mut m.graph).into_option().unwrap();
                    let body = vec![make::graph_attribute("body", inner)];
                    graph(m).node = vec![make::node("Loop", "", &[], &[], body)];
                }
            },
            "model: its subgraphs are nested more than 24 deep",
        ),
    ];
    let mut wrong = Vec::new();
    for (change, expected) in cases {
        let mut model = model();
        change(&mut model);
        let problems = check_model(&model, None).err().unwrap_or_default();
        let said: Vec<String> = problems.iter().map(Problem::to_string).collect();
        if !said.iter().any(|s| s.contains(expected)) {
            wrong.push(format!("{expected:?} not among {said:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_unusual_but_right_passes() {
    let cases: Vec<(&str, Change)> = vec![
        ("an initializer as an input's default", |m| {
            graph(m)
                .input
                .push(make::value_info("w", ElementType::F32, &[Dim::Fixed(4)]));
        }),
        ("an omitted optional input and output", |m| {
            node(m, 1).input.insert(0, String::new());
            node(m, 1).output.push(String::new());
            node(m, 1).output.push(String::new());
        }),
        ("an input returned", |m| {
            graph(m).output[0].name = Some("x".into())
        }),
        ("the same name in two branches", |m| {
            let branch = node(m, 0).attribute[1].g.get_or_insert_default();
            branch.node[0].output[0] = "t".into();
            branch.output[0].name = Some("t".into());
        }),
        ("a zero left out, as proto3 writers do", |m| {
            let zero = AttributeProto::default().with_name("axis").with_type(2);
            node(m, 1).attribute.push(zero);
        }),
        ("zeros in other fields, as some writers do", |m| {
            node(m, 1).attribute[0].i = Some(0);
            node(m, 1).attribute[0].s = Some(bytes::Bytes::new());
        }),
        ("an empty tensor", |m| {
            tensor(m).dims = vec![0, 4];
            tensor(m).raw_data = None;
        }),
        ("functions that share a callee", |m| {
            m.functions = vec![
                function("F", "H", "d"),
                function("G", "H", "d"),
                function("H", "Add", ""),
            ];
        }),
        ("an overload", |m| {
            let mut overload = function("F", "Add", "");
            overload.overload = Some("other".into());
            m.functions.push(overload);
        }),
    ];
    let mut wrong = Vec::new();
    for (name, change) in cases {
        let mut model = model();
        change(&mut model);
        match check_model(&model, None) {
            Ok(warnings) if warnings.is_empty() => {}
            other => wrong.push(format!("{name}: {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_doubtful_is_a_warning() {
    let cases: Vec<(Change, &str)> = vec![
        (
            |m| m.opset_import[0].version = Some(29),
            "opset 29 is newer",
        ),
        (
            |m| then_branch(m).node[0].output[0] = "w".into(),
            "hides one",
        ),
        (
            |m| then_branch(m).output[0].name = Some("x".into()),
            "is a value of an outer graph",
        ),
        (
            |m| graph(m).input[0] = make::value_info("x", ElementType::F32, &[Dim::Fixed(-1)]),
            "the negative size -1",
        ),
    ];
    for (change, expected) in cases {
        let mut model = model();
        change(&mut model);
        if expected == "hides one" {
            then_branch(&mut model).output[0].name = Some("w".into());
        }
        let warnings = check_model(&model, None).unwrap();
        let said: Vec<String> = warnings.iter().map(Problem::to_string).collect();
        assert!(
            said.len() == 1 && said[0].contains(expected),
            "{expected}: {said:?}"
        );
    }
}

/// A cycle is named even when other nodes merely wait for it.
#[test]
fn the_cycle_itself_is_named() {
    let mut model = model();
    graph(&mut model).node = vec![
        make::node("Identity", "behind", &["p"], &["y"], vec![]),
        make::node("Add", "one", &["q", "x"], &["p"], vec![]),
        make::node("Identity", "two", &["p"], &["q"], vec![]),
    ];
    let problems = check_model(&model, None).unwrap_err();
    let cycle = problems.iter().find_map(|p| match &p.fault {
        Fault::Cycle(name) => Some(name.as_str()),
        _ => None,
    });
    assert!(matches!(cycle, Some("p" | "q")), "{problems:?}");
}

/// Checks models that this repository does not hold: set LINFUSION_ZOO to a folder
/// of .onnx files and run with `--ignored`.
#[test]
#[ignore = "needs a folder of models in LINFUSION_ZOO"]
fn a_folder_of_models_passes() {
    let zoo = std::env::var("LINFUSION_ZOO").expect("LINFUSION_ZOO is set");
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(zoo).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "onnx") {
            let file = OnnxFile::open(&path).unwrap();
            match check_model(&file.model, Some(&file)) {
                Ok(warnings) if warnings.is_empty() => {}
                Ok(problems) | Err(problems) => {
                    wrong.push(format!("{path:?}: {:?}", problems.first()))
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
