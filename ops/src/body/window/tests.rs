use std::collections::HashSet;

use super::*;
use crate::schema::{AttrError, Layout};

fn every_spec() -> Vec<BodySpec> {
    let mut specs = Vec::new();
    for opset in MIN_WINDOW_OPSET..=MAX_OPSET {
        for layout in [Layout::Packed, Layout::Heads] {
            for element in ElementType::ALL {
                specs.push(BodySpec {
                    opset,
                    layout,
                    element,
                });
            }
        }
    }
    specs
}

fn every_attrs() -> Vec<WindowAttentionAttrs> {
    let mut all = Vec::new();
    for text in [TextSide::Prefix, TextSide::Suffix] {
        for scale in [None, Some(0.25)] {
            for (window, border) in [
                (Window::Rect { rows: 3, cols: 5 }, Border::Clamp),
                (Window::Rect { rows: 4, cols: 2 }, Border::Truncate),
                (Window::Circle { radius: 3 }, Border::Truncate),
            ] {
                all.push(WindowAttentionAttrs {
                    num_heads: 4,
                    scale,
                    window,
                    border,
                    text,
                });
            }
        }
    }
    all
}

/// Every body there is, with what it was made for.
fn every_body() -> Vec<(BodySpec, BodyFunction)> {
    let mut bodies = Vec::new();
    for spec in every_spec() {
        for attrs in every_attrs() {
            bodies.push((spec, window_attention_inline(spec, &attrs).unwrap()));
            let variant = WindowVariant::of(&attrs);
            bodies.push((spec, window_attention_body(spec, variant).unwrap()));
        }
    }
    bodies
}

fn subgraphs(node: &BodyNode) -> impl Iterator<Item = &BodyGraph> {
    node.attributes.iter().filter_map(|a| match &a.value {
        AttributeValue::Graph(graph) => Some(graph),
        _ => None,
    })
}

/// All nodes, those of subgraphs included.
fn all_nodes(nodes: &[BodyNode]) -> Vec<&BodyNode> {
    nodes
        .iter()
        .flat_map(|node| {
            let inner = subgraphs(node).flat_map(|graph| all_nodes(&graph.nodes));
            std::iter::once(node).chain(inner).collect::<Vec<_>>()
        })
        .collect()
}

/// Checks that names are written before they are read, and once in the whole function: a name of
/// a subgraph must not hide one of the body around it, and splicing renames them all in one map.
fn check_names<'a>(nodes: &'a [BodyNode], visible: &HashSet<&'a str>, all: &mut HashSet<&'a str>) {
    let mut visible = visible.clone();
    for node in nodes {
        for input in &node.inputs {
            assert!(visible.contains(input.as_str()), "{input} is not there");
        }
        for graph in subgraphs(node) {
            let mut inner = visible.clone();
            for input in &graph.inputs {
                assert!(all.insert(&input.name), "{} twice", input.name);
                inner.insert(&input.name);
            }
            check_names(&graph.nodes, &inner, all);
            let written: HashSet<&str> = graph
                .nodes
                .iter()
                .flat_map(|n| &n.outputs)
                .map(String::as_str)
                .collect();
            for output in &graph.outputs {
                assert!(written.contains(output.name.as_str()), "{}", output.name);
            }
        }
        for output in &node.outputs {
            assert!(all.insert(output), "{output} twice");
            visible.insert(output);
        }
    }
}

#[test]
fn every_name_is_written_once_and_before_it_is_read() {
    for (spec, body) in every_body() {
        assert_eq!(body.inputs, WINDOW_INPUT_NAMES, "{spec:?}");
        let inputs: HashSet<&str> = body.inputs.iter().map(String::as_str).collect();
        let mut all = inputs.clone();
        check_names(&body.nodes, &inputs, &mut all);
        let last = body.nodes.last().map(|n| n.outputs.as_slice());
        assert_eq!(last, Some(&[OUTPUT_NAME.to_owned()][..]), "{spec:?}");
    }
}

/// The opset from which on an operator has the inputs, attributes and types that bodies use.
fn since(op_type: &str) -> Option<i64> {
    Some(match op_type {
        "CastLike" => 15,
        // Softmax along one axis is of 13; the others are older in the types used here.
        "Add" | "And" | "Cast" | "Concat" | "Constant" | "Div" | "Equal" | "Expand"
        | "GreaterOrEqual" | "Identity" | "Less" | "Loop" | "MatMul" | "Max" | "Min" | "Mul"
        | "Pad" | "Range" | "Reshape" | "Shape" | "Slice" | "Softmax" | "Sqrt" | "Sub"
        | "Transpose" => 13,
        _ => return None,
    })
}

#[test]
fn every_operator_is_of_the_opset() {
    for (spec, body) in every_body() {
        for node in all_nodes(&body.nodes) {
            let since = since(&node.op_type);
            assert!(
                since.is_some_and(|s| s <= spec.opset),
                "{spec:?}: {} at {since:?}",
                node.op_type
            );
        }
        let narrow = spec.element != spec.element.accumulator();
        let restored = body.nodes.iter().any(|n| n.op_type == "CastLike");
        assert_eq!(restored, narrow && spec.opset >= 15, "{spec:?}");
    }
}

#[test]
fn references_are_to_formal_attributes_and_only_in_functions() {
    for (spec, body) in every_body() {
        let mut used = HashSet::new();
        for attribute in all_nodes(&body.nodes).iter().flat_map(|n| &n.attributes) {
            if let AttributeValue::Ref { attribute, kind } = &attribute.value {
                let expected = match attribute.as_str() {
                    ATTR_NUM_HEADS | ATTR_RADIUS => RefKind::Int,
                    ATTR_WINDOW => RefKind::Ints,
                    ATTR_SCALE => RefKind::Float,
                    other => panic!("{spec:?}: {other}"),
                };
                assert_eq!(*kind, expected, "{spec:?}: {attribute}");
                used.insert(attribute.as_str());
            }
        }
        let formal: HashSet<&str> = body.attributes.iter().map(|a| a.name.as_str()).collect();
        assert!(used.is_subset(&formal), "{spec:?}: {used:?} of {formal:?}");
        // Attributes that differ from the function's variant can't be served, so all of them
        // must be formal; these must count besides.
        if !formal.is_empty() {
            assert!(used.contains(ATTR_SCALE), "{spec:?}");
            assert!(formal.contains(ATTR_BORDER) && formal.contains(ATTR_TEXT));
            let window = used.contains(ATTR_WINDOW);
            assert_ne!(window, used.contains(ATTR_RADIUS), "{spec:?}");
        }
    }
}

#[test]
fn what_there_is_no_body_for() {
    let spec = |opset| BodySpec {
        opset,
        layout: Layout::Packed,
        element: ElementType::F32,
    };
    let good = every_attrs()[0];
    let variant = WindowVariant::of(&good);
    for opset in [i64::MIN, 0, MIN_WINDOW_OPSET - 1, MAX_OPSET + 1, i64::MAX] {
        let expected = BodyError::Opset {
            opset,
            min: MIN_WINDOW_OPSET,
            max: MAX_OPSET,
        };
        let body = window_attention_body(spec(opset), variant);
        assert_eq!(body, Err(expected.clone()));
        assert_eq!(window_attention_inline(spec(opset), &good), Err(expected));
    }
    let message = window_attention_body(spec(12), variant).unwrap_err();
    assert!(
        message
            .to_string()
            .contains("12 is outside the range served, 13 to 28")
    );
    let zero = Window::Rect { rows: 3, cols: 0 };
    let circle = Window::Circle { radius: 2 };
    for (attrs, expected) in [
        (
            WindowAttentionAttrs {
                num_heads: 0,
                ..good
            },
            AttrError::NumHeads(0),
        ),
        (
            WindowAttentionAttrs {
                window: zero,
                ..good
            },
            AttrError::Window { rows: 3, cols: 0 },
        ),
        (
            WindowAttentionAttrs {
                window: Window::Circle { radius: 0 },
                border: Border::Truncate,
                ..good
            },
            AttrError::Radius(0),
        ),
        (
            WindowAttentionAttrs {
                window: circle,
                ..good
            },
            AttrError::CircleClamp,
        ),
        (
            WindowAttentionAttrs {
                scale: Some(f32::INFINITY),
                ..good
            },
            AttrError::Scale(f32::INFINITY),
        ),
    ] {
        let found = window_attention_inline(spec(17), &attrs);
        assert_eq!(found, Err(BodyError::Attr(expected)));
    }
}

#[test]
fn one_loop_whose_inputs_are_typed() {
    for (spec, body) in every_body() {
        let graphs: Vec<_> = body.nodes.iter().flat_map(subgraphs).collect();
        let [graph] = graphs[..] else {
            panic!("{spec:?}: {} graphs", graphs.len());
        };
        let types = |values: &[GraphValue]| -> Vec<(i32, usize)> {
            values.iter().map(|v| (v.element, v.rank)).collect()
        };
        let compute = spec.element.accumulator().onnx_code();
        assert_eq!(types(&graph.inputs), [(7, 0), (9, 0)], "{spec:?}");
        assert_eq!(types(&graph.outputs), [(9, 0), (compute, 4)], "{spec:?}");
    }
}
