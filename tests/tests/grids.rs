//! Where the image's rows and columns are read off a graph, and where they must not be:
//! tokens of a video, of text, of two images; and numbers that hold at one size only.

use buffa::Message;
use linfusion_convert::analysis::Analysis;
use linfusion_convert::attention::plain::Plain;
use linfusion_convert::attention::site::Site;
use linfusion_convert::attention::stream::TextSide;
use linfusion_convert::grid::GridSize;
use linfusion_models::onnx::make::{
    Dim, float, int, ints, node, opset, tensor_f32, tensor_i64, value_info,
};
use linfusion_models::onnx::proto::{
    GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto,
};
use linfusion_models::onnx::{ElementType, OnnxFile};
use rstest::rstest;

const WIDTH: i64 = 8;

/// One attention of a head over the value `tokens`, `[B, N, 8]`, which a test makes.
struct Sketch {
    inputs: Vec<ValueInfoProto>,
    nodes: Vec<NodeProto>,
    stored: Vec<TensorProto>,
}

impl Sketch {
    /// Of these inputs.
    fn new(inputs: &[(&str, &[Dim])]) -> Self {
        let weights = ["wq", "wk", "wv", "wo"].map(|name| {
            let values: Vec<f32> = (0..WIDTH * WIDTH).map(|i| i as f32 * 0.01).collect();
            tensor_f32(name, &[WIDTH, WIDTH], &values)
        });
        let inputs = inputs.iter();
        Sketch {
            inputs: inputs
                .map(|(name, dims)| value_info(name, ElementType::F32, dims))
                .chain([value_info("t", ElementType::F32, &[])])
                .collect(),
            nodes: Vec::new(),
            stored: weights.to_vec(),
        }
    }

    fn op(mut self, op: &str, inputs: &[&str], output: &str) -> Self {
        self.nodes.push(node(op, output, inputs, &[output], vec![]));
        self
    }

    fn axis(mut self, op: &str, axis: i64, inputs: &[&str], output: &str) -> Self {
        let axis = vec![int("axis", axis)];
        self.nodes.push(node(op, output, inputs, &[output], axis));
        self
    }

    fn turned(mut self, perm: &[i64], input: &str, output: &str) -> Self {
        let perm = vec![ints("perm", perm)];
        self.nodes
            .push(node("Transpose", output, &[input], &[output], perm));
        self
    }

    fn shaped(mut self, to: &[i64], input: &str, output: &str) -> Self {
        let shape = format!("{output}/shape");
        self.stored.push(tensor_i64(&shape, &[to.len() as i64], to));
        self.op("Reshape", &[input, &shape], output)
    }

    /// A convolution over patches of 2 on every axis of space.
    fn patches(mut self, input: &str, axes: usize, output: &str) -> Self {
        let weight = format!("{output}/weight");
        let mut dims = vec![WIDTH, 4];
        dims.extend(vec![2; axes]);
        let count = usize::try_from(dims.iter().product::<i64>()).unwrap();
        self.stored
            .push(tensor_f32(&weight, &dims, &vec![0.1; count]));
        let strides = vec![ints("strides", &vec![2; axes])];
        self.nodes
            .push(node("Conv", output, &[input, &weight], &[output], strides));
        self
    }

    /// The tokens of `[B, 8, rows, cols]`.
    fn flat(self, input: &str, output: &str) -> Self {
        let rows = format!("{output}/rows");
        self.shaped(&[0, WIDTH, -1], input, &rows)
            .turned(&[0, 2, 1], &rows, output)
    }

    /// The attention: `scale` is what its scores are multiplied by.
    fn attention(mut self, scale: &str, product: NodeProto) -> Self {
        for (name, weight) in [("q", "wq"), ("k", "wk"), ("v", "wv")] {
            self = self.op("MatMul", &["tokens", weight], name);
        }
        self = self
            .turned(&[0, 2, 1], "k", "k_turned")
            .op("MatMul", &["q", "k_turned"], "scores")
            .op("Mul", &["scores", scale], "scaled")
            .axis("Softmax", -1, &["scaled"], "softmax");
        self.nodes.push(product);
        self.op("MatMul", &["attended", "wo"], "y")
    }

    fn plain_attention(mut self) -> Self {
        self.stored.push(tensor_f32("scale", &[], &[0.3]));
        self.attention("scale", weighted(vec![]))
    }

    /// The image among the attention's tokens, or why there is none.
    fn image(self) -> Result<(String, GridSize, Option<TextSide>), String> {
        self.image_in_order(|nodes| nodes)
    }

    fn image_in_order(
        self,
        order: impl Fn(Vec<NodeProto>) -> Vec<NodeProto>,
    ) -> Result<(String, GridSize, Option<TextSide>), String> {
        self.with_site(order, |site| {
            let image = site.image.as_ref().map_err(ToString::to_string)?;
            Ok((image.grid.source.to_string(), image.grid.size, image.text))
        })
    }

    fn with_site<T>(
        self,
        order: impl Fn(Vec<NodeProto>) -> Vec<NodeProto>,
        look: impl Fn(&Site<'_>) -> T,
    ) -> T {
        let model = ModelProto {
            ir_version: Some(8),
            opset_import: vec![opset("", 17), opset("com.microsoft", 1)],
            graph: GraphProto {
                name: Some("sketch".to_owned()),
                node: order(self.nodes),
                initializer: self.stored,
                input: self.inputs,
                output: vec![value_info(
                    "y",
                    ElementType::F32,
                    &[Dim::Unknown, Dim::Unknown, Dim::Unknown],
                )],
                ..GraphProto::default()
            }
            .into(),
            ..ModelProto::default()
        };
        let file = OnnxFile::from_bytes(model.encode_to_vec().into(), None).unwrap();
        let analysis = Analysis::of(&file);
        let [site] = &analysis.sites[..] else {
            panic!("{} sites", analysis.sites.len());
        };
        look(site)
    }
}

fn weighted(attributes: Vec<linfusion_models::onnx::proto::AttributeProto>) -> NodeProto {
    let mut product = node(
        "MatMul",
        "weighted",
        &["softmax", "v"],
        &["attended"],
        vec![],
    );
    if !attributes.is_empty() {
        product.op_type = Some("FusedMatMul".to_owned());
        product.domain = Some("com.microsoft".to_owned());
        product.attribute = attributes;
    }
    product
}

fn any_image() -> Vec<Dim> {
    vec![Dim::Unknown, Dim::Fixed(4), Dim::Unknown, Dim::Unknown]
}

/// 4 × 6 tokens.
fn image() -> Vec<Dim> {
    [2, 4, 8, 12].map(Dim::Fixed).to_vec()
}

fn text(tokens: i64) -> [Dim; 3] {
    [Dim::Fixed(2), Dim::Fixed(tokens), Dim::Fixed(WIDTH)]
}

fn image_sketch(dims: &[Dim]) -> Sketch {
    Sketch::new(&[("sample", dims)]).patches("sample", 2, "patches")
}

#[rstest]
#[case(any_image(), [8, 24])]
#[case(image(), [4, 6])]
fn patches_of_an_image(#[case] dims: Vec<Dim>, #[case] grid: [i64; 2]) {
    let [rows, cols] = grid;
    let found = image_sketch(&dims)
        .flat("patches", "tokens")
        .plain_attention()
        .image();
    let size = GridSize { rows, cols };
    assert_eq!(found, Ok(("shape of 'patches'".to_owned(), size, None)));
}

/// ONNX wants nodes in order, ONNX Runtime sorts them.
#[test]
fn nodes_in_any_order() {
    let sketch = image_sketch(&image())
        .flat("patches", "tokens")
        .plain_attention();
    let found = sketch.image_in_order(|mut nodes| {
        nodes.reverse();
        nodes
    });
    let size = GridSize { rows: 4, cols: 6 };
    assert_eq!(found, Ok(("shape of 'patches'".to_owned(), size, None)));
}

/// Tokens down the columns: rows and columns are those of the turned image.
#[test]
fn tokens_by_columns() {
    let found = image_sketch(&any_image())
        .turned(&[0, 1, 3, 2], "patches", "turned")
        .flat("turned", "tokens")
        .plain_attention()
        .image();
    let size = GridSize { rows: 24, cols: 8 };
    assert_eq!(found, Ok(("shape of 'turned'".to_owned(), size, None)));
}

/// Patches cut by moving elements, without a convolution.
#[test]
fn patches_by_reshaping() {
    let found = Sketch::new(&[("sample", &image())])
        .shaped(&[2, 4, 4, 2, 6, 2], "sample", "cut")
        .turned(&[0, 2, 4, 1, 3, 5], "cut", "ordered")
        .shaped(&[2, 24, 16], "ordered", "wide");
    let mut found = found.op("MatMul", &["wide", "w_in"], "tokens");
    found
        .stored
        .push(tensor_f32("w_in", &[16, WIDTH], &[0.1; 128]));
    let size = GridSize { rows: 4, cols: 6 };
    let expected = Ok(("shape of 'ordered'".to_owned(), size, None));
    assert_eq!(found.plain_attention().image(), expected);
}

#[test]
fn text_before_and_behind() {
    // Three times as many as the image: together as many as the image has latent pixels.
    for (order, side) in [
        (["image", "text"], TextSide::Suffix),
        (["text", "image"], TextSide::Prefix),
    ] {
        let found = Sketch::new(&[("sample", &image()), ("text", &text(72))])
            .patches("sample", 2, "patches")
            .flat("patches", "image")
            .axis("Concat", 1, &order, "tokens")
            .plain_attention()
            .image();
        let size = GridSize { rows: 4, cols: 6 };
        let expected = Ok(("shape of 'patches'".to_owned(), size, Some(side)));
        assert_eq!(found, expected, "{order:?}");
    }
}

#[test]
fn what_is_no_image() {
    let video = [2, 4, 4, 8, 12].map(Dim::Fixed);
    // As many tokens as a latent image of the model has pixels.
    let cases: Vec<(&str, Sketch, &str)> = vec![
        (
            "a video",
            Sketch::new(&[("sample", &video)])
                .patches("sample", 3, "patches")
                .flat("patches", "tokens"),
            "more than two axes",
        ),
        (
            "frames of flattened images",
            Sketch::new(&[("sample", &video)])
                .patches("sample", 3, "patches")
                .shaped(&[2, WIDTH, 2, 24], "patches", "frames")
                .flat("frames", "tokens"),
            "more than two axes",
        ),
        (
            "text",
            Sketch::new(&[("sample", &image()), ("text", &text(96))]).op(
                "Identity",
                &["text"],
                "tokens",
            ),
            "those of input 'text'",
        ),
        (
            "two images",
            image_sketch(&image())
                .flat("patches", "image")
                .op("Neg", &["image"], "other")
                .axis("Concat", 1, &["image", "other"], "tokens"),
            "several images",
        ),
        (
            "text on both sides",
            Sketch::new(&[("sample", &image()), ("text", &text(5))])
                .patches("sample", 2, "patches")
                .flat("patches", "image")
                .axis("Concat", 1, &["text", "image", "text"], "tokens"),
            "both sides",
        ),
        (
            "shuffled",
            {
                let mut sketch = image_sketch(&image()).flat("patches", "image");
                let order: Vec<i64> = (0..24).rev().collect();
                sketch.stored.push(tensor_i64("order", &[24], &order));
                sketch.axis("Gather", 1, &["image", "order"], "tokens")
            },
            "nothing above",
        ),
    ];
    for (what, sketch, reason) in cases {
        let found = sketch.plain_attention().image();
        assert!(
            found.as_ref().is_err_and(|e| e.contains(reason)),
            "{what}: {found:?}"
        );
    }
}

/// What the scores are scaled by, from the number of tokens by `steps`, is refused.
fn refused(steps: &[(&str, &[&str], &str)]) {
    let mut sketch = image_sketch(&any_image())
        .flat("patches", "tokens")
        .op("Shape", &["tokens"], "shape")
        .op("Gather", &["shape", "one"], "count");
    sketch.stored.push(tensor_i64("one", &[], &[1]));
    sketch.stored.push(tensor_i64("many", &[], &[1_000_000]));
    for (op, inputs, output) in steps {
        sketch = sketch.op(op, inputs, output);
    }
    for cast in &mut sketch.nodes {
        if cast.op_type.as_deref() == Some("Cast") {
            cast.attribute = vec![int("to", i64::from(ElementType::F32.onnx()))];
        }
    }
    let found = sketch.attention("scale", weighted(vec![])).image();
    assert!(
        found.as_ref().is_err_and(|e| e.contains("run time")),
        "{found:?}"
    );
}

/// A scale of √N is known at each probe, and another at any other size.
#[test]
fn a_scale_that_depends_on_the_size() {
    refused(&[
        ("Cast", &["count"], "number"),
        ("Sqrt", &["number"], "scale"),
    ]);
}

/// Whether there are more tokens than some comes out alike at both.
#[test]
fn a_scale_from_a_comparison_of_sizes() {
    refused(&[
        ("Greater", &["count", "many"], "large"),
        ("Cast", &["large"], "scale"),
    ]);
}

#[test]
fn a_factor_on_the_weighted_sum() {
    let of_factor = |alpha: f32| {
        let mut sketch = image_sketch(&image()).flat("patches", "tokens");
        sketch.stored.push(tensor_f32("scale", &[], &[0.3]));
        let product = weighted(vec![float("alpha", alpha)]);
        sketch.attention("scale", product).image()
    };
    let found = of_factor(3.0);
    assert!(
        found.as_ref().is_err_and(|e| e.contains("scaled by 3")),
        "{found:?}"
    );
    assert!(of_factor(1.0).is_ok());
}

/// As many text tokens as image tokens: the layers are told apart by what they read.
#[test]
fn streams_of_equal_length() {
    for order in [["image", "words"], ["words", "image"]] {
        let mut sketch = Sketch::new(&[("sample", &image()), ("text", &text(24))])
            .patches("sample", 2, "patches")
            .flat("patches", "image")
            .op("Identity", &["text"], "words");
        let layers = [("q", "wq", "wk"), ("k", "wk", "wv"), ("v", "wv", "wq")];
        for (name, of_image, of_text) in layers {
            let weight = |stream: &str| if stream == "image" { of_image } else { of_text };
            let parts = order.map(|stream| format!("{name}/{stream}"));
            for (stream, part) in order.iter().zip(&parts) {
                sketch = sketch.op("MatMul", &[stream, weight(stream)], part);
            }
            sketch = sketch.axis("Concat", 1, &[&parts[0], &parts[1]], name);
        }
        sketch.stored.push(tensor_f32("scale", &[], &[0.3]));
        let sketch = sketch
            .turned(&[0, 2, 1], "k", "k_turned")
            .op("MatMul", &["q", "k_turned"], "scores")
            .op("Mul", &["scores", "scale"], "scaled")
            .axis("Softmax", -1, &["scaled"], "softmax")
            .op("MatMul", &["softmax", "v"], "attended")
            .op("MatMul", &["attended", "wo"], "y");
        let read = sketch.with_site(
            |nodes| nodes,
            |site| {
                let image = site.image.as_ref().unwrap();
                let x = |stream: &Result<Plain<'_>, String>| {
                    stream
                        .as_ref()
                        .map(|p| p.x.to_owned())
                        .map_err(String::clone)
                };
                (image.text, x(&image.stream), x(&image.text_stream))
            },
        );
        let side = match order {
            ["image", _] => TextSide::Suffix,
            _ => TextSide::Prefix,
        };
        let expected = (Some(side), Ok("image".to_owned()), Ok("words".to_owned()));
        assert_eq!(read, expected, "{order:?}");
    }
}
