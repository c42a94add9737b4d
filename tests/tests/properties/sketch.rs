//! Random self-attention graphs in the forms that exporters write.

use linfusion_models::onnx::ElementType;
use linfusion_models::onnx::make::{self, Dim, int, ints, opset, string};
use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto, TensorProto};
use ndarray::{Array1, Array2};
use proptest::prelude::*;

/// How q, k and v come from x and how heads are split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// MatMul, `[B, H, N, D]`, MatMul.
    FourD,
    /// MatMul, `[B·H, N, D]`: the heads in the batch.
    HeadsInBatch,
    /// One MatMul for all three, taken apart by Split.
    FusedSplit,
    /// One MatMul for all three, taken apart by Slice.
    FusedSlice,
    /// `[B, C, N]`, 1×1 Conv, Einsum over `[B, H, D, N]`.
    ConvEinsum,
    /// `[B, C, rows, columns]`, 1×1 Conv, Einsum over `[B, H, D, N]`.
    ImageEinsum,
    /// `[B, C, N]`, the weight on the left of MatMul, Transpose and MatMul.
    LeftMatMul,
    /// `[B, N, D, H]`: a head's columns are not adjacent.
    StridedHeads,
    /// Gemm on `[B·N, C]`.
    Rows,
}

impl Form {
    /// Every form.
    pub const ALL: [Form; 9] = [
        Form::FourD,
        Form::HeadsInBatch,
        Form::FusedSplit,
        Form::FusedSlice,
        Form::ConvEinsum,
        Form::ImageEinsum,
        Form::LeftMatMul,
        Form::StridedHeads,
        Form::Rows,
    ];
}

/// Where the scores are scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Nowhere.
    One,
    /// `scores * s`.
    Mul,
    /// `s * scores`.
    MulLeft,
    /// `scores / s`.
    Div,
    /// q alone.
    Query,
    /// The root on q and k each.
    Both,
}

/// What lies around the Softmax besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Around {
    /// Nothing.
    Nothing,
    /// A mask of zeros is added.
    Zeros,
    /// Casts to f32 and back.
    Casts,
}

/// Whether sizes are in the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// They are.
    Fixed,
    /// Batch and tokens are symbols; reshapes compute them, and so does an output.
    Computed,
}

/// Whether the projections of q, k and v add a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// They do not.
    Without,
    /// They do.
    With,
}

/// One graph.
#[derive(Clone, Debug)]
pub struct Case {
    pub form: Form,
    pub batch: usize,
    /// Rows and columns of the image; their product is the number of tokens.
    pub grid: [usize; 2],
    pub heads: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub width: usize,
    pub element: ElementType,
    pub opset: i64,
    pub scale: Scale,
    pub around: Around,
    pub sizes: Sizes,
    pub bias: Bias,
    pub seed: u64,
}

/// Any graph of a form.
pub fn cases(form: Form) -> impl Strategy<Value = Case> {
    let elements = match form {
        // ONNX Runtime convolves no f64.
        Form::ConvEinsum | Form::ImageEinsum => vec![ElementType::F32, ElementType::F16],
        _ => vec![ElementType::F32, ElementType::F64, ElementType::F16],
    };
    let shape = (1..4_usize, 1..6_usize, 1..5_usize, 1..4_usize, 2..6_usize);
    // From two on: a tensor of one element is taken for a scale.
    let widths = (2..6_usize, 2..13_usize);
    let scales = vec![
        Scale::One,
        Scale::Mul,
        Scale::MulLeft,
        Scale::Div,
        Scale::Query,
        Scale::Both,
    ];
    let around = vec![Around::Nothing, Around::Zeros, Around::Casts];
    let sizes = vec![Sizes::Fixed, Sizes::Computed];
    let rest = (
        prop::sample::select(elements),
        prop::sample::select(vec![13_i64, 17, 20]),
        prop::sample::select(scales),
        prop::sample::select(around),
        prop::sample::select(sizes),
        prop::sample::select(vec![Bias::Without, Bias::With]),
        any::<u64>(),
    );
    (shape, widths, rest).prop_map(move |(shape, widths, rest)| {
        let (batch, rows, columns, heads, head_dim) = shape;
        let (element, opset, scale, around, sizes, bias, seed) = rest;
        Case {
            form,
            batch,
            grid: [rows, columns],
            heads,
            head_dim,
            value_dim: widths.0,
            width: widths.1,
            element,
            opset,
            scale,
            around,
            sizes,
            bias,
            seed,
        }
    })
}

/// A linear layer's weight `[in, out]` and bias, in values that every element type holds.
pub struct Layer {
    pub weight: Array2<f64>,
    pub bias: Option<Array1<f64>>,
}

/// A graph, and the numbers in it.
pub struct Sketch {
    pub model: ModelProto,
    /// q, k, v, out.
    pub layers: [Layer; 4],
    /// x as `[B·N, C]`.
    pub x: Array2<f64>,
    /// The shape of the input called `x`.
    pub x_shape: Vec<usize>,
}

/// Path of the attention module in the names of the nodes.
pub const MODULE: &str = "mid.blocks.0.attn1";

impl Case {
    pub fn tokens(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    /// The same with the widths that a checkpoint's module has.
    pub fn square(&self) -> Case {
        Case {
            value_dim: self.head_dim,
            width: self.heads * self.head_dim,
            ..self.clone()
        }
    }

    pub fn is_channels_first(&self) -> bool {
        matches!(
            self.form,
            Form::ConvEinsum | Form::ImageEinsum | Form::LeftMatMul
        )
    }

    /// Builds the graph.
    pub fn sketch(&self) -> Sketch {
        let mut random = Random(self.seed);
        let (qk, v) = (self.heads * self.head_dim, self.heads * self.value_dim);
        let mut layer = |rows, columns, bias| Layer {
            weight: random.matrix(rows, columns),
            bias: (bias == Bias::With).then(|| random.matrix(1, columns).row(0).to_owned()),
        };
        let layers = [
            layer(self.width, qk, self.bias),
            layer(self.width, qk, self.bias),
            layer(self.width, v, self.bias),
            layer(v, self.width, Bias::With),
        ];
        let x = random.matrix(self.batch * self.tokens(), self.width);
        let mut b = Builder {
            case: self,
            nodes: Vec::new(),
            initializers: Vec::new(),
        };
        b.build(&layers);
        let [rows, columns] = self.grid;
        let x_shape = match self.form {
            Form::ImageEinsum => vec![self.batch, self.width, rows, columns],
            _ if self.is_channels_first() => vec![self.batch, self.width, self.tokens()],
            _ => vec![self.batch, self.tokens(), self.width],
        };
        let model = b.model(&x_shape);
        Sketch {
            model,
            layers,
            x,
            x_shape,
        }
    }
}

/// Multiples of 1/32 in [-1, 1), from a SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 58) as f64 / 32.0 - 1.0
    }

    fn matrix(&mut self, rows: usize, columns: usize) -> Array2<f64> {
        Array2::from_shape_simple_fn((rows, columns), || self.next())
    }
}

struct Builder<'a> {
    case: &'a Case,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
}

const BATCH: i64 = -7;
const TOKENS: i64 = -8;
const BATCH_HEADS: i64 = -9;

impl Builder<'_> {
    fn op(
        &mut self,
        op: &str,
        at: &str,
        inputs: &[&str],
        attributes: Vec<linfusion_models::onnx::proto::AttributeProto>,
    ) -> String {
        let name = format!("/{}/{at}", MODULE.replace('.', "/").replace("/0", ".0"));
        let out = format!("{name}_output_0");
        self.nodes
            .push(make::node(op, &name, inputs, &[&out], attributes));
        out
    }

    fn floats(&mut self, name: &str, dims: &[usize], values: &[f64]) -> String {
        let dims: Vec<i64> = dims.iter().map(|&d| d as i64).collect();
        let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        let bytes = make::encode_f32(self.case.element, &values).unwrap().bytes;
        self.initializers
            .push(make::tensor(name, self.case.element, &dims, bytes));
        name.to_owned()
    }

    fn integers(&mut self, name: &str, values: &[i64]) -> String {
        self.initializers
            .push(make::tensor_i64(name, &[values.len() as i64], values));
        name.to_owned()
    }

    /// A reshape to sizes, of which the negative names above stand for what x has.
    fn reshape(&mut self, value: &str, at: &str, sizes: &[i64]) -> String {
        let c = self.case;
        let fixed = |s: &i64| match *s {
            BATCH => c.batch as i64,
            TOKENS => c.tokens() as i64,
            BATCH_HEADS => (c.batch * c.heads) as i64,
            s => s,
        };
        let shape = if c.sizes == Sizes::Fixed {
            let sizes: Vec<i64> = sizes.iter().map(fixed).collect();
            self.integers(&format!("{at}/shape"), &sizes)
        } else {
            let parts: Vec<String> = sizes
                .iter()
                .enumerate()
                .map(|(i, s)| match *s {
                    BATCH => "batch".to_owned(),
                    TOKENS => "tokens".to_owned(),
                    BATCH_HEADS => "batch_heads".to_owned(),
                    s => self.integers(&format!("{at}/size{i}"), &[s]),
                })
                .collect();
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            self.op(
                "Concat",
                &format!("{at}/Concat"),
                &parts,
                vec![int("axis", 0)],
            )
        };
        self.op(
            "Reshape",
            &format!("{at}/Reshape"),
            &[value, &shape],
            vec![],
        )
    }

    fn transpose(&mut self, value: &str, at: &str, perm: &[i64]) -> String {
        let perm = vec![ints("perm", perm)];
        self.op("Transpose", &format!("{at}/Transpose"), &[value], perm)
    }

    fn einsum(&mut self, at: &str, equation: &str, a: &str, b: &str) -> String {
        self.op("Einsum", at, &[a, b], vec![string("equation", equation)])
    }

    fn build(&mut self, layers: &[Layer; 4]) {
        self.sizes();
        let [q, k, v] = self.heads(layers);
        let (q, k) = self.scale_operands(q, k);
        let first = self.case.is_channels_first();
        let four = self.case.form != Form::HeadsInBatch;
        let einsum = matches!(self.case.form, Form::ConvEinsum | Form::ImageEinsum);
        let scores = if einsum {
            self.einsum("scores", "bhdn,bhdm->bhnm", &q, &k)
        } else if first {
            let q = self.transpose(&q, "q", &[0, 1, 3, 2]);
            self.op("MatMul", "scores", &[&q, &k], vec![])
        } else {
            let perm: &[i64] = if four { &[0, 1, 3, 2] } else { &[0, 2, 1] };
            let k = self.transpose(&k, "k", perm);
            self.op("MatMul", "scores", &[&q, &k], vec![])
        };
        let weights = self.softmax(&scores);
        let out = if einsum {
            self.einsum("weighted", "bhnm,bhdm->bhdn", &weights, &v)
        } else if first {
            let v = self.transpose(&v, "v", &[0, 1, 3, 2]);
            let out = self.op("MatMul", "weighted", &[&weights, &v], vec![]);
            self.transpose(&out, "weighted", &[0, 1, 3, 2])
        } else {
            self.op("MatMul", "weighted", &[&weights, &v], vec![])
        };
        self.out(&out, &layers[3]);
        self.op("Sin", "side", &["x"], vec![]);
        let side = self.nodes.last().unwrap().output[0].clone();
        let doubled = make::node("Add", "/side/double", &[&side, &side], &["side"], vec![]);
        self.nodes.push(doubled);
    }

    /// Batch and tokens of x as one-element tensors; an output reads them too.
    fn sizes(&mut self) {
        if self.case.sizes == Sizes::Fixed {
            return;
        }
        let mut node = |op: &str, name: &str, inputs: &[&str], attributes| {
            let node = make::node(op, &format!("/{name}"), inputs, &[name], attributes);
            self.nodes.push(node);
        };
        let (axis, image) = match self.case.form {
            Form::ImageEinsum => (2, true),
            _ if self.case.is_channels_first() => (2, false),
            _ => (1, false),
        };
        node("Shape", "shape", &["x"], vec![]);
        let axis0 = || vec![int("axis", 0)];
        node("Gather", "batch", &["shape", "/first"], axis0());
        node("Mul", "batch_heads", &["batch", "/heads"], vec![]);
        if image {
            node("Gather", "rows", &["shape", "/axis"], axis0());
            node("Gather", "columns", &["shape", "/next"], axis0());
            node("Mul", "tokens", &["rows", "columns"], vec![]);
        } else {
            node("Gather", "tokens", &["shape", "/axis"], axis0());
        }
        node("Add", "side_size", &["tokens", "/first"], vec![]);
        self.integers("/first", &[0]);
        self.integers("/axis", &[axis]);
        self.integers("/next", &[axis + 1]);
        self.integers("/heads", &[self.case.heads as i64]);
    }

    /// q, k and v with their heads split.
    fn heads(&mut self, layers: &[Layer; 4]) -> [String; 3] {
        let c = self.case;
        let fused = matches!(c.form, Form::FusedSplit | Form::FusedSlice);
        let whole = if fused {
            self.fused(layers)
        } else {
            Vec::new()
        };
        let names = ["q", "k", "v"];
        [0, 1, 2].map(|i| {
            let dim = if i == 2 { c.value_dim } else { c.head_dim } as i64;
            let (heads, at) = (c.heads as i64, names[i]);
            let flat = match whole.get(i) {
                Some(flat) => flat.clone(),
                None => self.linear("x", &format!("to_{at}"), &layers[i]),
            };
            match c.form {
                _ if c.is_channels_first() => self.reshape(&flat, at, &[BATCH, heads, dim, TOKENS]),
                Form::StridedHeads => {
                    let split = self.reshape(&flat, at, &[BATCH, TOKENS, dim, heads]);
                    self.transpose(&split, &format!("{at}/split"), &[0, 3, 1, 2])
                }
                _ => {
                    let split = self.reshape(&flat, at, &[BATCH, TOKENS, heads, dim]);
                    let turned = self.transpose(&split, &format!("{at}/split"), &[0, 2, 1, 3]);
                    if c.form == Form::HeadsInBatch {
                        self.reshape(&turned, &format!("{at}/fold"), &[BATCH_HEADS, TOKENS, dim])
                    } else {
                        turned
                    }
                }
            }
        })
    }

    /// One layer for q, k and v, taken apart.
    fn fused(&mut self, layers: &[Layer; 4]) -> Vec<String> {
        let views: Vec<_> = layers[..3].iter().map(|l| l.weight.view()).collect();
        let weight = ndarray::concatenate(ndarray::Axis(1), &views).unwrap();
        let biases: Vec<_> = layers[..3].iter().filter_map(|l| l.bias.as_ref()).collect();
        let views: Vec<_> = biases.iter().map(|b| b.view()).collect();
        let bias =
            (!views.is_empty()).then(|| ndarray::concatenate(ndarray::Axis(0), &views).unwrap());
        let sizes: Vec<i64> = layers[..3]
            .iter()
            .map(|l| l.weight.ncols() as i64)
            .collect();
        let all = self.linear("x", "to_qkv", &Layer { weight, bias });
        let parts = ["q", "k", "v"].map(|p| format!("/part/{p}"));
        if self.case.form == Form::FusedSplit {
            let sizes = self.integers("/part/sizes", &sizes);
            let outputs: Vec<&str> = parts.iter().map(String::as_str).collect();
            let axis = vec![int("axis", 2)];
            let split = make::node("Split", "/part/Split", &[&all, &sizes], &outputs, axis);
            self.nodes.push(split);
        } else {
            let axes = self.integers("/part/axes", &[-1]);
            let mut start = 0;
            for (part, size) in parts.iter().zip(sizes) {
                let from = self.integers(&format!("{part}/from"), &[start]);
                // Beyond the end for the last, as exporters write it.
                let to = if part == &parts[2] {
                    i64::MAX
                } else {
                    start + size
                };
                let to = self.integers(&format!("{part}/to"), &[to]);
                let inputs = [&all, &from, &to, &axes].map(String::as_str);
                self.nodes.push(make::node(
                    "Slice",
                    &format!("{part}/Slice"),
                    &inputs,
                    &[part],
                    vec![],
                ));
                start += size;
            }
        }
        parts.to_vec()
    }

    /// A linear layer as the form writes it.
    fn linear(&mut self, value: &str, at: &str, layer: &Layer) -> String {
        let c = self.case;
        let (rows, columns) = layer.weight.dim();
        let turned = layer.weight.t();
        let turned: Vec<f64> = turned.iter().copied().collect();
        let name = format!("{MODULE}.{at}");
        let straight: Vec<f64> = layer.weight.iter().copied().collect();
        match c.form {
            Form::ConvEinsum | Form::ImageEinsum => {
                let rank = if c.form == Form::ImageEinsum && value == "x" {
                    2
                } else {
                    1
                };
                let dims = [&[columns, rows][..], &[1; 2][..rank]].concat();
                let w = self.floats(&format!("{name}.weight"), &dims, &turned);
                let mut inputs = vec![value.to_owned(), w];
                if let Some(bias) = &layer.bias {
                    let bias = bias.to_vec();
                    inputs.push(self.floats(&format!("{name}.bias"), &[columns], &bias));
                }
                let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
                self.op("Conv", &format!("{at}/Conv"), &inputs, vec![])
            }
            Form::LeftMatMul => {
                let w = self.floats(&format!("{name}.weight"), &[columns, rows], &turned);
                let out = self.op("MatMul", &format!("{at}/MatMul"), &[&w, value], vec![]);
                self.add_bias(out, at, layer, &[columns, 1])
            }
            Form::Rows => {
                let flat = match value {
                    "x" => self.reshape(value, &format!("{at}/rows"), &[-1, rows as i64]),
                    flat => flat.to_owned(),
                };
                let w = self.floats(&format!("{name}.weight"), &[columns, rows], &turned);
                let mut inputs = vec![flat, w];
                if let Some(bias) = &layer.bias {
                    let bias = bias.to_vec();
                    inputs.push(self.floats(&format!("{name}.bias"), &[columns], &bias));
                }
                let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
                self.op(
                    "Gemm",
                    &format!("{at}/Gemm"),
                    &inputs,
                    vec![int("transB", 1)],
                )
            }
            _ => {
                let w = self.floats(&format!("onnx::{name}"), &[rows, columns], &straight);
                let out = self.op("MatMul", &format!("{at}/MatMul"), &[value, &w], vec![]);
                self.add_bias(out, at, layer, &[columns])
            }
        }
    }

    fn add_bias(&mut self, value: String, at: &str, layer: &Layer, dims: &[usize]) -> String {
        let Some(bias) = &layer.bias else {
            return value;
        };
        let bias = self.floats(&format!("{MODULE}.{at}.bias"), dims, &bias.to_vec());
        self.op("Add", &format!("{at}/Add"), &[&bias, &value], vec![])
    }

    fn scale_operands(&mut self, q: String, k: String) -> (String, String) {
        match self.case.scale {
            Scale::Query => {
                let s = self.floats("/scale", &[], &[0.5]);
                (self.op("Mul", "q/Mul", &[&q, &s], vec![]), k)
            }
            Scale::Both => {
                let s = self.floats("/scale", &[], &[0.5]);
                let q = self.op("Mul", "q/Mul", &[&q, &s], vec![]);
                (q, self.op("Mul", "k/Mul", &[&k, &s], vec![]))
            }
            _ => (q, k),
        }
    }

    fn softmax(&mut self, scores: &str) -> String {
        let mut value = scores.to_owned();
        if matches!(self.case.scale, Scale::Mul | Scale::MulLeft | Scale::Div) {
            let s = self.floats("/scale", &[], &[0.25]);
            value = match self.case.scale {
                Scale::Mul => self.op("Mul", "scaled", &[&value, &s], vec![]),
                Scale::MulLeft => self.op("Mul", "scaled", &[&s, &value], vec![]),
                _ => self.op("Div", "scaled", &[&value, &s], vec![]),
            };
        }
        let cast = |to: ElementType| vec![int("to", i64::from(to.onnx()))];
        match self.case.around {
            Around::Nothing => self.op("Softmax", "Softmax", &[&value], vec![int("axis", -1)]),
            Around::Zeros => {
                let zeros = self.floats("/zeros", &[1], &[0.0]);
                let masked = self.op("Add", "masked", &[&value, &zeros], vec![]);
                self.op("Softmax", "Softmax", &[&masked], vec![int("axis", -1)])
            }
            Around::Casts => {
                let wide = self.op("Cast", "up", &[&value], cast(ElementType::F32));
                let p = self.op("Softmax", "Softmax", &[&wide], vec![int("axis", -1)]);
                self.op("Cast", "down", &[&p], cast(self.case.element))
            }
        }
    }

    /// The heads merged, and the out projection, whose result is `y`.
    fn out(&mut self, value: &str, layer: &Layer) {
        let c = self.case;
        let width = (c.heads * c.value_dim) as i64;
        let merged = match c.form {
            _ if c.is_channels_first() => self.reshape(value, "merge", &[BATCH, width, TOKENS]),
            form => {
                let mut value = value.to_owned();
                if form == Form::HeadsInBatch {
                    let dim = c.value_dim as i64;
                    let sizes = [BATCH, c.heads as i64, TOKENS, dim];
                    value = self.reshape(&value, "unfold", &sizes);
                }
                let turned = self.transpose(&value, "merge", &[0, 2, 1, 3]);
                let rows = [-1, width];
                let sizes = [BATCH, TOKENS, width];
                let sizes = if form == Form::Rows {
                    &rows[..]
                } else {
                    &sizes
                };
                self.reshape(&turned, "merge", sizes)
            }
        };
        let mut y = self.linear(&merged, "to_out.0", layer);
        if c.form == Form::Rows {
            y = self.reshape(&y, "unfold", &[BATCH, TOKENS, c.width as i64]);
        }
        // Another node's output: the site must leave it alone.
        self.nodes
            .push(make::node("Identity", "/y", &[&y], &["y"], vec![]));
    }

    fn model(self, x_shape: &[usize]) -> ModelProto {
        let c = self.case;
        let fixed =
            |shape: &[usize]| -> Vec<Dim> { shape.iter().map(|&d| Dim::Fixed(d as i64)).collect() };
        let mut x = fixed(x_shape);
        if c.sizes == Sizes::Computed {
            let named = |n: &str| Dim::Named(n.to_owned());
            x[0] = named("batch");
            match c.form {
                Form::ImageEinsum => x[2..].clone_from_slice(&[named("height"), named("width")]),
                _ if c.is_channels_first() => x[2] = named("sequence"),
                _ => x[1] = named("sequence"),
            }
        }
        let mut y = x.clone();
        if c.form == Form::ImageEinsum {
            y.truncate(3);
            y[2] = Dim::Unknown;
        }
        let mut outputs = vec![
            make::value_info("y", c.element, &y),
            make::value_info("side", c.element, &x),
        ];
        if c.sizes == Sizes::Computed {
            outputs.push(make::value_info(
                "side_size",
                ElementType::I64,
                &[Dim::Fixed(1)],
            ));
        }
        let graph = GraphProto {
            name: Some("sketch".to_owned()),
            node: self.nodes,
            initializer: self.initializers,
            input: vec![
                make::value_info("x", c.element, &x),
                make::value_info("t", c.element, &[]),
            ],
            output: outputs,
            ..GraphProto::default()
        };
        ModelProto {
            ir_version: Some(8),
            opset_import: vec![opset("", c.opset)],
            graph: graph.into(),
            ..ModelProto::default()
        }
    }
}
