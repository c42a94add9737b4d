//! `WindowAttention` through ONNX Runtime's bare C API: the node, its function, its inlined body,
//! and what is said where a node or its inputs are wrong.
//!
//! Needs `LINFUSION_TEST_ORT_DIR`, as `capi.rs` does.

#[path = "support/host.rs"]
mod host;
#[path = "support/onnx_bytes.rs"]
mod onnx_bytes;

use host::{Host, Input};
use linfusion_ops::body::{
    AttributeValue, BodyAttribute, BodySpec, WindowVariant, window_attention_body,
    window_attention_inline,
};
use linfusion_ops::ort::register_in_process;
use linfusion_ops::reference::window_attention;
use linfusion_ops::schema::{Border, TextSide, Window, WindowAttentionAttrs};
use linfusion_ops::{ElementType, Layout};
use ndarray::ArrayD;
use onnx_bytes::{Form, OneNode, Site};
use ort_sys::OrtSessionOptions;

const HEADS: usize = 2;
const WIDTHS: [usize; 2] = [8, 12];
const SPEC: BodySpec = BodySpec {
    opset: 17,
    layout: Layout::Packed,
    element: ElementType::F32,
};

#[test]
fn every_release() {
    host::every_release();
}

#[test]
#[ignore = "run by `every_release` with LINFUSION_TEST_ORT_LIB"]
fn one_release() {
    let host = host::this_release();
    every_form_is_the_reference(&host);
    a_node_needs_the_library(&host);
    attributes_that_mean_nothing(&host);
    inputs_that_do_not_fit(&host);
}

const SQUARE: Window = Window::Rect { rows: 3, cols: 4 };

fn attrs(window: Window, border: Border, text: TextSide) -> WindowAttentionAttrs {
    WindowAttentionAttrs {
        num_heads: HEADS,
        scale: None,
        window,
        border,
        text,
    }
}

fn model(form: Form, attributes: Vec<BodyAttribute>) -> Vec<u8> {
    OneNode {
        opset: SPEC.opset,
        layout: SPEC.layout,
        element: SPEC.element,
        heads: HEADS as i64,
        site: Site::Window { attributes },
        widths: WIDTHS,
        form,
    }
    .encode()
}

fn attributes(attrs: &WindowAttentionAttrs) -> Vec<BodyAttribute> {
    let mut attributes = attrs.attributes();
    attributes.retain(|a| a.name != "num_heads");
    attributes
}

fn with_library(host: &Host) -> *mut OrtSessionOptions {
    let options = host.options();
    // SAFETY: valid options and their table.
    unsafe { register_in_process(options, host.api) }.unwrap();
    options
}

fn inputs(tokens: [usize; 3]) -> [ArrayD<f32>; 3] {
    let fill = |i: usize, width: usize| {
        ArrayD::from_shape_fn(vec![2, tokens[i], HEADS * width], |at| {
            ((at[0] * 977 + at[1] * 31 + at[2] * 7 + 3 * i) % 101) as f32 / 25.0 - 2.0
        })
    };
    [fill(0, WIDTHS[0]), fill(1, WIDTHS[0]), fill(2, WIDTHS[1])]
}

fn every_form_is_the_reference(host: &Host) {
    use Border::{Clamp, Truncate};
    use TextSide::{Prefix, Suffix};
    let [q, k, v] = inputs([67; 3]);
    let circle = Window::Circle { radius: 3 };
    for attrs in [
        attrs(SQUARE, Clamp, Prefix),
        attrs(SQUARE, Truncate, Suffix),
        attrs(circle, Truncate, Prefix),
        WindowAttentionAttrs {
            scale: Some(0.4),
            ..attrs(SQUARE, Clamp, Suffix)
        },
    ] {
        let body = window_attention_body(SPEC, WindowVariant::of(&attrs)).unwrap();
        let inline = window_attention_inline(SPEC, &attrs).unwrap();
        for (form, options) in [
            (Form::Op, with_library(host)),
            (Form::Function(body.clone()), with_library(host)),
            (Form::Function(body), host.options()),
            (Form::Inlined(inline), host.options()),
        ] {
            let session = host
                .session(&model(form, attributes(&attrs)), options)
                .unwrap();
            // No text, some, and another grid of as many tokens: none is written into the model.
            for grid in [[67, 1], [8, 8], [6, 11]] {
                let [a, b, c] = [&q, &k, &v].map(Input::Floats);
                let found = session.run_on(&[a, b, c, Input::Integers(&grid)]).unwrap();
                let exact = window_attention(q.view(), k.view(), v.view(), grid, &attrs).unwrap();
                assert_eq!(found.len(), exact.len());
                // A score, a sum of D products of at most 2·2 times the scale, is off by D
                // roundings of it, and a weight by as much of itself; values reach 2.
                let width = WIDTHS[0] as f64;
                let score = 4.0 * width * f64::from(attrs.scale.unwrap_or(0.4));
                let bound = 2.0 * width * score * f64::from(f32::EPSILON) / 2.0;
                for (f, e) in found.iter().zip(&exact) {
                    let off = (f64::from(*f) - e).abs();
                    assert!(off < bound, "{attrs:?} {grid:?}: {f}, not {e}");
                }
            }
        }
    }
}

fn a_node_needs_the_library(host: &Host) {
    let attrs = attrs(SQUARE, Border::Clamp, TextSide::Prefix);
    let model = model(Form::Op, attributes(&attrs));
    assert!(host.session(&model, host.options()).is_err());
}

fn attributes_that_mean_nothing(host: &Host) {
    let options = with_library(host);
    let ints = |name: &str, value: &[i64]| (name.to_owned(), AttributeValue::Ints(value.into()));
    let int = |name: &str, value: i64| (name.to_owned(), AttributeValue::Int(value));
    let float = |name: &str, value: f32| (name.to_owned(), AttributeValue::Float(value));
    let text = |name: &str, value: &str| (name.to_owned(), AttributeValue::String(value.into()));
    let square = || ints("window", &[3, 3]);
    for (found, parts) in [
        (
            vec![],
            ["`window` of two numbers", "window None", "radius None"],
        ),
        (
            vec![square(), int("radius", 2)],
            ["an int attribute `radius`", "Some([3, 3])", "Some(2)"],
        ),
        (
            vec![ints("window", &[3])],
            ["two numbers", "Some([3])", "radius None"],
        ),
        (
            vec![ints("window", &[3, 0])],
            ["`window`", "sides from 1", "found 3x0"],
        ),
        (
            vec![ints("window", &[-3, 3])],
            ["`window`", "sides from 1", "found 0x3"],
        ),
        (vec![int("radius", 0)], ["`radius`", "from 1", "found 0"]),
        (
            vec![int("radius", 2), text("border", "clamp")],
            ["`border`", "`truncate` for a circular", "found `clamp`"],
        ),
        (
            vec![square(), text("border", "wrap")],
            ["`border`", "clamp or truncate", "found `wrap`"],
        ),
        (
            vec![square(), text("text", "middle")],
            ["`text`", "prefix or suffix", "found `middle`"],
        ),
        (
            vec![square(), float("scale", f32::INFINITY)],
            ["`scale`", "finite", "found inf"],
        ),
        (
            vec![square(), int("scale", 1)],
            ["`scale`", "a float", "found an int"],
        ),
    ] {
        let attributes = found
            .into_iter()
            .map(|(name, value)| BodyAttribute { name, value })
            .collect();
        let message = host
            .session(&model(Form::Op, attributes), options)
            .err()
            .unwrap_or_else(|| panic!("{parts:?}: no error"));
        for part in ["node `the_site` (WindowAttention)"].iter().chain(&parts) {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }
}

fn inputs_that_do_not_fit(host: &Host) {
    let attrs = attrs(SQUARE, Border::Clamp, TextSide::Prefix);
    let model = model(Form::Op, attributes(&attrs));
    let session = host.session(&model, with_library(host)).unwrap();
    for (tokens, grid, parts) in [
        (
            [20; 3],
            [5, 5],
            ["`grid`", "rows * columns <= 20", "found [5, 5]"],
        ),
        ([20; 3], [0, 4], ["`grid`", "at least 1", "found [0, 4]"]),
        (
            [20; 3],
            [-4, -5],
            ["`grid`", "at least 1", "found [-4, -5]"],
        ),
        (
            [20; 3],
            [i64::MAX, 2],
            [
                "`grid`",
                "rows * columns <= 20",
                "found [9223372036854775807, 2]",
            ],
        ),
        (
            [20, 19, 19],
            [4, 5],
            ["`k`", "the number of keys (dimension 1) = 20", "found 19"],
        ),
        (
            [20, 20, 19],
            [4, 5],
            ["`v`", "the number of keys (dimension 1) = 20", "found 19"],
        ),
    ] {
        let [q, k, v] = inputs(tokens);
        let [a, b, c] = [&q, &k, &v].map(Input::Floats);
        let message = session
            .run_on(&[a, b, c, Input::Integers(&grid)])
            .unwrap_err();
        for part in ["node `the_site` (WindowAttention)"].iter().chain(&parts) {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }
    // The grid may cover fewer tokens: the others are text.
    let [q, k, v] = inputs([20; 3]);
    let [a, b, c] = [&q, &k, &v].map(Input::Floats);
    let out = session.run_on(&[a, b, c, Input::Integers(&[4, 4])]);
    assert!(out.is_ok(), "{out:?}");
}
