//! The nodes that replace one attention site.

use std::collections::BTreeSet;

use linfusion_models::checkpoint::{
    Checkpoint, CheckpointError, CheckpointModule, MlpPart, MlpWidth, Part,
};
use linfusion_models::onnx::proto::{AttributeProto, NodeProto, TensorProto, ValueInfoProto};
use linfusion_models::onnx::{ElementType, make};
use linfusion_ops::LinFusionAttentionAttrs;
use linfusion_ops::schema::DEFAULT_EPS;

use super::emit::{Emit, Operands, attention_nodes};
use super::weights::{Orientation, initializer};
use crate::attention::plain::{Columns, Layout, Plain, Tap};
use crate::graph::{Graph, NodeId, input, label};
use crate::shapes::Shapes;

/// What a site's rewrite takes from the model and from the caller.
pub struct Context<'a, 'm> {
    /// The model's graph.
    pub graph: &'a Graph<'m>,
    /// Its shapes under the probe.
    pub shapes: &'a Shapes,
    /// Opset of the default domain.
    pub opset: i64,
    /// How the operator is written.
    pub emit: Emit,
    /// Every name in the model: none may be given a second time.
    pub names: &'a BTreeSet<&'m str>,
}

impl Context<'_, '_> {
    /// `/module`, or that with a suffix under which the model has nothing yet.
    fn prefix(&self, module: &str) -> String {
        let below = |prefix: &str| {
            let folder = format!("{prefix}/");
            let next = self.names.range(folder.as_str()..).next();
            next.is_some_and(|n| n.starts_with(&folder))
        };
        let mut prefix = format!("/{module}");
        while below(&prefix) {
            prefix += SUFFIX;
        }
        prefix
    }

    /// `name`, or that with a suffix if the model has it already.
    fn fresh(&self, mut name: String) -> String {
        while self.names.contains(name.as_str()) {
            name += SUFFIX;
        }
        name
    }
}

/// Tells new names from those that the model has.
pub(crate) const SUFFIX: &str = ".linfusion";

/// Where a site's weights come from.
pub enum Weights<'a> {
    /// A checkpoint's module replaces projections and MLPs.
    Module {
        /// The checkpoint.
        checkpoint: &'a Checkpoint,
        /// The module in it.
        module: &'a CheckpointModule,
    },
    /// The graph's own projections, F = 0: for measuring speed only.
    Graph,
}

/// A site's replacement, to be applied as one.
pub struct Patch {
    /// New nodes in topological order; they make the value that `replaced` made.
    pub nodes: Vec<NodeProto>,
    /// New weights.
    pub initializers: Vec<TensorProto>,
    /// Declared types of new values.
    pub value_info: Vec<ValueInfoProto>,
    /// The node whose output the new nodes make instead; they go to its place.
    pub replaced: NodeId,
    /// Inputs of other nodes that change: node, slot, value.
    pub inputs: Vec<(NodeId, usize, String)>,
    /// Values that have the shape of x, whose Shape may be read from x instead.
    pub shape_source: String,
    /// q, k, v and the output of the operator, by name.
    pub operands: ([String; 3], String),
    /// The site's input as `[B, N, C]`.
    pub tokens: String,
    /// The out projection's result as `[B, N, C]`, where it was replaced, and
    /// whether its bias is in it.
    pub projected: Option<(String, bool)>,
    /// The value that the new nodes make.
    pub target: String,
    /// Weights that left the range of the element type: name and how many values.
    pub overflows: Vec<(String, usize)>,
}

/// Why a site cannot be rewritten.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// Checkpoint and site disagree.
    #[error(
        "{module}: the checkpoint has width {found_dim} with {found_heads} heads, the graph has width {dim} with {heads} heads ({anchor}); is the checkpoint for this model?"
    )]
    Mismatch {
        /// The module.
        module: String,
        /// The site's anchor.
        anchor: String,
        /// Width in the graph.
        dim: i64,
        /// Heads in the graph.
        heads: i64,
        /// Width in the checkpoint.
        found_dim: usize,
        /// Heads in the checkpoint.
        found_heads: usize,
    },
    /// The checkpoint's tensors cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The opset cannot express the operator.
    #[error(transparent)]
    Body(#[from] linfusion_ops::body::BodyError),
    /// The graph around the site is not as needed.
    #[error("{anchor}: {reason}")]
    Graph {
        /// The site's anchor.
        anchor: String,
        /// What is missing.
        reason: String,
    },
}

/// Builds the replacement of one site.
///
/// # Errors
/// [`SiteError`].
pub fn patch(
    context: &Context<'_, '_>,
    site: &Plain<'_>,
    anchor: &str,
    module: &str,
    weights: &Weights<'_>,
) -> Result<Patch, SiteError> {
    let fail = |reason: String| SiteError::Graph {
        anchor: anchor.to_owned(),
        reason,
    };
    let element = ElementType::from_onnx(site.element)
        .ok_or_else(|| fail(format!("element type {} is not supported", site.element)))?;
    let mut b = Builder {
        context,
        site,
        element,
        prefix: context.prefix(module),
        module,
        nodes: Vec::new(),
        initializers: Vec::new(),
        value_info: Vec::new(),
        inputs: Vec::new(),
        overflows: Vec::new(),
    };
    let (target, layout) = match (weights, &site.out) {
        (Weights::Graph, _) => (site.merged, &site.merged_layout),
        (Weights::Module { .. }, Some(out)) => (out.result, &out.layout),
        (Weights::Module { .. }, None) => {
            return Err(fail(format!(
                "no single linear layer reads the attention's output '{}'",
                site.merged
            )));
        }
    };
    if let (Weights::Module { .. }, Some(obstacle)) =
        (weights, site.out.as_ref().and_then(|o| o.obstacle.as_ref()))
    {
        return Err(fail(obstacle.clone()));
    }
    let port = context
        .graph
        .producer(target)
        .ok_or_else(|| fail(format!("no node makes '{target}'")))?;
    if context
        .graph
        .node(port.node)
        .output
        .iter()
        .filter(|o| !o.is_empty())
        .count()
        > 1
    {
        return Err(fail(format!(
            "'{}' has several outputs",
            label(context.graph.node(port.node))
        )));
    }
    let made = context.shapes.fact(target).element;
    if made != Some(site.element) {
        return Err(b.fail(format!(
            "'{target}' has element type {made:?}, x '{}' has {}: types change inside the attention module",
            site.x, site.element
        )));
    }
    let x = b.tokens(site.x, &site.x_layout, "x")?;
    let qkv = match weights {
        Weights::Graph => b.graph_projections(&x)?,
        Weights::Module { checkpoint, module } => {
            check_module(site, anchor, module)?;
            b.checkpoint_projections(&x, checkpoint, module)?
        }
    };
    let attended = b.attention(&qkv)?;
    let mut out = attended.clone();
    let mut layout = layout;
    if let Weights::Module { checkpoint, module } = weights {
        if *layout == Layout::Rows {
            // Before the layer: engines want a 2-D layer as one Gemm.
            out = b.rows(&out);
            layout = &Layout::Tokens;
        }
        out = b.out_projection(&out, checkpoint, module)?;
    }
    b.finish(&out, target, layout)?;
    // The last node was given the replaced value's name.
    let named = |value: String| {
        if b.nodes.iter().any(|n| n.output.first() == Some(&value)) {
            value
        } else {
            target.to_owned()
        }
    };
    let attended = named(attended);
    let later_bias = site.out.as_ref().is_some_and(|o| o.later_bias.is_some());
    let projected = match weights {
        Weights::Module { .. } => Some((named(out), !later_bias)),
        Weights::Graph => None,
    };
    Ok(Patch {
        operands: (qkv, attended),
        tokens: x,
        projected,
        target: target.to_owned(),
        nodes: b.nodes,
        initializers: b.initializers,
        value_info: b.value_info,
        replaced: port.node,
        inputs: b.inputs,
        shape_source: site.x.to_owned(),
        overflows: b.overflows,
    })
}

fn check_module(
    site: &Plain<'_>,
    anchor: &str,
    module: &CheckpointModule,
) -> Result<(), SiteError> {
    let same = |a: i64, b: usize| i64::try_from(b).is_ok_and(|b| a == b);
    let out_width = site.out.as_ref().map_or(site.width, |o| o.width);
    if same(site.width, module.dim) && same(out_width, module.dim) && same(site.heads, module.heads)
    {
        return Ok(());
    }
    Err(SiteError::Mismatch {
        module: module.module_name.clone(),
        anchor: anchor.to_owned(),
        dim: site.width,
        heads: site.heads,
        found_dim: module.dim,
        found_heads: module.heads,
    })
}

struct Builder<'a, 'm> {
    context: &'a Context<'a, 'm>,
    site: &'a Plain<'m>,
    element: ElementType,
    prefix: String,
    module: &'a str,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
    value_info: Vec<ValueInfoProto>,
    inputs: Vec<(NodeId, usize, String)>,
    overflows: Vec<(String, usize)>,
}

impl Builder<'_, '_> {
    fn op(
        &mut self,
        op: &str,
        step: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) -> String {
        let name = format!("{}/{step}/{op}", self.prefix);
        let out = format!("{name}_output_0");
        self.nodes
            .push(make::node(op, &name, inputs, &[&out], attributes));
        out
    }

    fn ints(&mut self, step: &str, values: &[i64]) -> String {
        let name = format!("{}/{step}", self.prefix);
        self.initializers
            .push(make::tensor_i64(&name, &[values.len() as i64], values));
        name
    }

    fn fail(&self, reason: String) -> SiteError {
        SiteError::Graph {
            anchor: self.prefix.clone(),
            reason,
        }
    }

    /// A matrix that lies as `layout`, as `[B, N, C]`.
    fn tokens(&mut self, value: &str, layout: &Layout, step: &str) -> Result<String, SiteError> {
        let rank = self.context.shapes.shape(value).map_or(0, <[i64]>::len);
        Ok(match (layout, rank) {
            (Layout::Tokens, _) => value.to_owned(),
            (Layout::ChannelsFirst, 3) => self.op(
                "Transpose",
                step,
                &[value],
                vec![make::ints("perm", &[0, 2, 1])],
            ),
            (Layout::ChannelsFirst, 4) => {
                let shape = self.ints(&format!("{step}/shape"), &[0, 0, -1]);
                let flat = self.op("Reshape", step, &[value, &shape], vec![]);
                self.op(
                    "Transpose",
                    step,
                    &[&flat],
                    vec![make::ints("perm", &[0, 2, 1])],
                )
            }
            (Layout::Image, 4) => {
                let width = self
                    .context
                    .shapes
                    .shape(value)
                    .and_then(|s| s.last().copied())
                    .unwrap_or(-1);
                let shape = self.ints(&format!("{step}/shape"), &[0, -1, width]);
                self.op("Reshape", step, &[value, &shape], vec![])
            }
            (Layout::Rows, _) => {
                let like = self.site.x.to_owned();
                let leading = self.leading(&like, 2, step);
                let rest = self.ints(&format!("{step}/rest"), &[-1]);
                let shape = self.op(
                    "Concat",
                    step,
                    &[&leading, &rest],
                    vec![make::int("axis", 0)],
                );
                self.op("Reshape", step, &[value, &shape], vec![])
            }
            _ => {
                return Err(self.fail(format!(
                    "'{value}' of rank {rank} lies in a way that is not supported"
                )));
            }
        })
    }

    /// The attention's `[B, N, H·Dv]` as `[B·N, H·Dv]`.
    fn rows(&mut self, value: &str) -> String {
        let width = self.site.heads * self.site.value_dim;
        let shape = self.ints("out/shape", &[-1, width]);
        self.op("Reshape", "out", &[value, &shape], vec![])
    }

    /// The first `n` dimensions of x, which must lie as tokens.
    fn leading(&mut self, value: &str, n: i64, step: &str) -> String {
        let shape = self.op("Shape", &format!("{step}/like"), &[value], vec![]);
        let start = self.ints(&format!("{step}/like/start"), &[0]);
        let end = self.ints(&format!("{step}/like/end"), &[n]);
        self.op(
            "Slice",
            &format!("{step}/like"),
            &[&shape, &start, &end],
            vec![],
        )
    }

    /// q, k, v of the graph's own projections.
    fn graph_projections(&mut self, x: &str) -> Result<[String; 3], SiteError> {
        let site = self.site;
        let merged = match site.taps.iter().any(|t| t.linear.is_none()) {
            true => Some(self.merged_projection(x)?),
            false => None,
        };
        let mut qkv = Vec::with_capacity(3);
        for (tap, step) in site.taps.iter().zip(["to_q", "to_k", "to_v"]) {
            let full = match &merged {
                Some(value) => value.clone(),
                None => self.tokens(tap.value, &tap.layout, step)?,
            };
            qkv.push(self.columns(&full, tap, step));
        }
        let mut qkv = qkv.into_iter();
        match (qkv.next(), qkv.next(), qkv.next()) {
            (Some(q), Some(k), Some(v)) => Ok([q, k, v]),
            _ => Err(self.fail("q, k, v are incomplete".to_owned())),
        }
    }

    /// x times the weights that `com.microsoft::Attention` holds, plus bias.
    fn merged_projection(&mut self, x: &str) -> Result<String, SiteError> {
        let graph = self.context.graph;
        let node = graph
            .producer(self.site.merged)
            .map(|p| graph.node(p.node))
            .ok_or_else(|| self.fail("the attention node is gone".to_owned()))?;
        let Some(weight) = input(node, 1) else {
            return Err(self.fail(format!("'{}' has no weights", label(node))));
        };
        let product = self.op("MatMul", "to_qkv", &[x, weight], vec![]);
        Ok(match input(node, 2) {
            Some(bias) => self.op("Add", "to_qkv", &[&product, bias], vec![]),
            None => product,
        })
    }

    fn columns(&mut self, value: &str, tap: &Tap<'_>, step: &str) -> String {
        match &tap.columns {
            Columns::All => value.to_owned(),
            Columns::Range { start, len } => {
                let start_name = self.ints(&format!("{step}/start"), &[*start]);
                let end = self.ints(&format!("{step}/end"), &[start + len]);
                let axis = self.ints(&format!("{step}/axis"), &[2]);
                self.op("Slice", step, &[value, &start_name, &end, &axis], vec![])
            }
            Columns::Listed(list) => {
                let indices = self.ints(&format!("{step}/columns"), list);
                self.op(
                    "Gather",
                    step,
                    &[value, &indices],
                    vec![make::int("axis", 2)],
                )
            }
        }
    }

    /// q = Wq(x + Fq(x)), k = Wk(x + Fk(x)), v = Wv x.
    fn checkpoint_projections(
        &mut self,
        x: &str,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
    ) -> Result<[String; 3], SiteError> {
        let identity = module.mid == MlpWidth::Identity;
        // The identity as F makes q = Wq(2x): folded into the weight, exactly.
        let factor = if identity { 2.0 } else { 1.0 };
        let (mut xq, mut xk) = (x.to_owned(), x.to_owned());
        if !identity {
            xq = self.mlp(x, "to_q_", Part::QMlp, checkpoint, module)?;
            xk = self.mlp(x, "to_k_", Part::KMlp, checkpoint, module)?;
        }
        let mut project = |from: &str,
                           step: &str,
                           weight: Part,
                           bias: Part,
                           factor: f64|
         -> Result<String, SiteError> {
            let w = self.matrix(step, weight, checkpoint, module, factor)?;
            let product = self.op("MatMul", step, &[from, &w], vec![]);
            match checkpoint.optional_tensor(module, bias)? {
                None => Ok(product),
                Some(_) => {
                    let bias = self.bias(step, bias, checkpoint, module)?;
                    Ok(self.op("Add", step, &[&product, &bias], vec![]))
                }
            }
        };
        Ok([
            project(&xq, "to_q", Part::QWeight, Part::QBias, factor)?,
            project(&xk, "to_k", Part::KWeight, Part::KBias, factor)?,
            project(x, "to_v", Part::VWeight, Part::VBias, 1.0)?,
        ])
    }

    /// x + F(x), F = Linear → LayerNorm(1e-5) → LeakyReLU(0.01) → Linear.
    fn mlp(
        &mut self,
        x: &str,
        step: &str,
        part: fn(MlpPart) -> Part,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
    ) -> Result<String, SiteError> {
        let layer = |i: usize| format!("{step}/{i}");
        let w0 = self.matrix(
            &format!("{step}.0"),
            part(MlpPart::InWeight),
            checkpoint,
            module,
            1.0,
        )?;
        let b0 = self.bias(
            &format!("{step}.0"),
            part(MlpPart::InBias),
            checkpoint,
            module,
        )?;
        let scale = self.vector(
            &format!("{step}.1"),
            part(MlpPart::NormWeight),
            checkpoint,
            module,
        )?;
        let shift = self.vector(
            &format!("{step}.1"),
            part(MlpPart::NormBias),
            checkpoint,
            module,
        )?;
        let w3 = self.matrix(
            &format!("{step}.3"),
            part(MlpPart::OutWeight),
            checkpoint,
            module,
            1.0,
        )?;
        let b3 = self.bias(
            &format!("{step}.3"),
            part(MlpPart::OutBias),
            checkpoint,
            module,
        )?;
        let h = self.op("MatMul", &layer(0), &[x, &w0], vec![]);
        let h = self.op("Add", &layer(0), &[&h, &b0], vec![]);
        let h = self.layer_norm(&h, &layer(1), &scale, &shift);
        let h = self.leaky_relu(&h, &layer(2));
        let h = self.op("MatMul", &layer(3), &[&h, &w3], vec![]);
        let h = self.op("Add", &layer(3), &[&h, &b3], vec![]);
        Ok(self.op("Add", step, &[x, &h], vec![]))
    }

    fn leaky_relu(&mut self, h: &str, step: &str) -> String {
        const SLOPE: f64 = 0.01;
        if self.element != ElementType::F64 {
            let alpha = vec![make::float("alpha", SLOPE as f32)];
            return self.op("LeakyRelu", step, &[h], alpha);
        }
        // ONNX Runtime (seen in 1.32) has no LeakyRelu for f64 on the CPU.
        let slope = format!("{}/{step}/slope", self.prefix);
        let bytes = SLOPE.to_le_bytes().to_vec();
        self.initializers
            .push(make::tensor(&slope, ElementType::F64, &[], bytes));
        let lower = self.op("Mul", step, &[h, &slope], vec![]);
        self.op("Max", step, &[h, &lower], vec![])
    }

    fn layer_norm(&mut self, h: &str, step: &str, scale: &str, shift: &str) -> String {
        const EPSILON: f32 = 1e-5;
        if self.context.opset >= 17 {
            let attributes = vec![make::int("axis", -1), make::float("epsilon", EPSILON)];
            return self.op("LayerNormalization", step, &[h, scale, shift], attributes);
        }
        // The decomposed form squares: in fp16 that overflows from 256 up, so it runs in fp32.
        let wide = if self.element == ElementType::F64 {
            ElementType::F64
        } else {
            ElementType::F32
        };
        let narrow = self.element != wide;
        let cast = |to: ElementType| vec![make::int("to", i64::from(to.onnx()))];
        let axes = || vec![make::ints("axes", &[-1]), make::int("keepdims", 1)];
        let h = if narrow {
            self.op("Cast", &format!("{step}/widen"), &[h], cast(wide))
        } else {
            h.to_owned()
        };
        let eps_name = format!("{}/{step}/eps", self.prefix);
        let eps: bytes::Bytes = if wide == ElementType::F64 {
            f64::from(EPSILON).to_le_bytes().to_vec().into()
        } else {
            EPSILON.to_le_bytes().to_vec().into()
        };
        self.initializers
            .push(make::tensor(&eps_name, wide, &[], eps));
        let mean = self.op("ReduceMean", &format!("{step}/mean"), &[&h], axes());
        let centred = self.op("Sub", step, &[&h, &mean], vec![]);
        let square = self.op(
            "Mul",
            &format!("{step}/square"),
            &[&centred, &centred],
            vec![],
        );
        let variance = self.op(
            "ReduceMean",
            &format!("{step}/variance"),
            &[&square],
            axes(),
        );
        let safe = self.op(
            "Add",
            &format!("{step}/eps"),
            &[&variance, &eps_name],
            vec![],
        );
        let deviation = self.op("Sqrt", step, &[&safe], vec![]);
        let unit = self.op("Div", step, &[&centred, &deviation], vec![]);
        let unit = if narrow {
            self.op("Cast", step, &[&unit], cast(self.element))
        } else {
            unit
        };
        let scaled = self.op("Mul", step, &[&unit, scale], vec![]);
        self.op("Add", step, &[&scaled, shift], vec![])
    }

    fn matrix(
        &mut self,
        step: &str,
        part: Part,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
        factor: f64,
    ) -> Result<String, SiteError> {
        // The name says that it is the transposed PyTorch weight: whoever merges
        // a LoRA by name must not mistake it for `[out, in]`.
        let name = format!("{}.{}.weight_T", self.module, step.replace('/', "."));
        self.convert(
            name,
            part,
            checkpoint,
            module,
            Orientation::Transposed,
            factor,
        )
    }

    fn vector(
        &mut self,
        step: &str,
        part: Part,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
    ) -> Result<String, SiteError> {
        let kind = if matches!(
            part,
            Part::QMlp(MlpPart::NormWeight) | Part::KMlp(MlpPart::NormWeight)
        ) {
            "weight"
        } else {
            "bias"
        };
        let name = format!("{}.{}.{kind}", self.module, step.replace('/', "."));
        self.convert(name, part, checkpoint, module, Orientation::Stored, 1.0)
    }

    /// A bias to be added to `[B, N, C]`.
    fn bias(
        &mut self,
        step: &str,
        part: Part,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
    ) -> Result<String, SiteError> {
        let name = self.vector(step, part, checkpoint, module)?;
        // Where ONNX Runtime has optimized the graph before, its MatMulAddFusion
        // (seen in 1.24 to 1.32) gives its new shapes names that the first time used up, and
        // the session fails with "Attempt to replace the existing tensor". It
        // wants a bias of rank 1.
        let taken = ["gemm_input_shape", "gemm_output_shape"];
        if taken.iter().any(|n| self.context.names.contains(n))
            && let Some(tensor) = self.initializers.last_mut()
        {
            tensor.dims.splice(0..0, [1, 1]);
        }
        Ok(name)
    }

    fn convert(
        &mut self,
        name: String,
        part: Part,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
        orientation: Orientation,
        factor: f64,
    ) -> Result<String, SiteError> {
        // The graph may already have a parameter of that name (an out projection's
        // bias); somebody else may read it.
        let name = self.context.fresh(name);
        let tensor = checkpoint.tensor(module, part)?;
        let Some(converted) = initializer(&name, &tensor, orientation, factor, self.element) else {
            return Err(self.fail(format!(
                "weights cannot be converted to {}",
                self.element.name()
            )));
        };
        if converted.overflowed > 0 {
            self.overflows.push((tensor.name, converted.overflowed));
        }
        self.initializers.push(converted.tensor);
        Ok(name)
    }

    fn attention(&mut self, qkv: &[String; 3]) -> Result<String, SiteError> {
        let name = format!("{}/LinFusionAttention", self.prefix);
        let out = format!("{name}_output_0");
        let attrs = LinFusionAttentionAttrs::new(self.site.heads, Some(DEFAULT_EPS))
            .map_err(|e| self.fail(e.to_string()))?;
        let [q, k, v] = qkv;
        let operands = Operands {
            qkv: [q, k, v],
            out: &out,
            name: &name,
        };
        let nodes = attention_nodes(
            self.context.emit,
            &operands,
            attrs,
            self.context.opset,
            self.element,
        )?;
        self.nodes.extend(nodes);
        self.declare(&out);
        Ok(out)
    }

    /// Declares the attention's output: engines that do not look into functions
    /// keep shapes then. Batch and tokens are those declared for x.
    fn declare(&mut self, value: &str) {
        let width = make::Dim::Fixed(self.site.heads * self.site.value_dim);
        let proto = self.context.graph.proto;
        let declared = proto
            .value_info
            .iter()
            .chain(&proto.input)
            .find(|v| v.name.as_deref() == Some(self.site.x))
            .and_then(make::tensor_type_of)
            .and_then(|(_, dims)| dims)
            .filter(|d| d.len() == 3 && self.site.x_layout == Layout::Tokens);
        let dims = match declared.as_deref() {
            Some([b, n, _]) => [b.clone(), n.clone(), width],
            _ => [make::Dim::Unknown, make::Dim::Unknown, width],
        };
        self.value_info
            .push(make::value_info(value, self.element, &dims));
    }

    fn out_projection(
        &mut self,
        value: &str,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
    ) -> Result<String, SiteError> {
        let weight = self.matrix("to_out.0", Part::OutWeight, checkpoint, module, 1.0)?;
        let product = self.op("MatMul", "to_out.0", &[value, &weight], vec![]);
        match self.site.out.as_ref().and_then(|o| o.later_bias) {
            Some((node, slot)) => {
                let bias = self.vector("to_out.0", Part::OutBias, checkpoint, module)?;
                self.inputs.push((node, slot, bias));
                Ok(product)
            }
            None => {
                let bias = if self.site.merged_layout == Layout::Rows {
                    self.vector("to_out.0", Part::OutBias, checkpoint, module)?
                } else {
                    self.bias("to_out.0", Part::OutBias, checkpoint, module)?
                };
                Ok(self.op("Add", "to_out.0", &[&product, &bias], vec![]))
            }
        }
    }

    /// Brings `[B, N, C]` back to how the replaced value lay, under its name.
    fn finish(&mut self, value: &str, target: &str, layout: &Layout) -> Result<(), SiteError> {
        let rank = self.context.shapes.shape(target).map_or(0, <[i64]>::len);
        match (layout, rank) {
            (Layout::Tokens, _) => {}
            (Layout::Rows, _) => {
                self.rows(value);
            }
            (Layout::ChannelsFirst, 3) => {
                self.op(
                    "Transpose",
                    "out",
                    &[value],
                    vec![make::ints("perm", &[0, 2, 1])],
                );
            }
            (Layout::ChannelsFirst, 4) if self.rank(self.site.x) == 4 => {
                let turned = self.op(
                    "Transpose",
                    "out",
                    &[value],
                    vec![make::ints("perm", &[0, 2, 1])],
                );
                let channels = self
                    .context
                    .shapes
                    .shape(target)
                    .and_then(|s| s.get(1).copied())
                    .unwrap_or(-1);
                let shape = self.spatial(&[0, channels], 2, "out");
                self.op("Reshape", "out", &[&turned, &shape], vec![]);
            }
            _ => {
                return Err(self.fail(format!(
                    "'{target}' of rank {rank} lies in a way that is not supported"
                )));
            }
        }
        // The last node makes the replaced value itself: readers, graph outputs
        // and captures in subgraphs stay as they are.
        match self.nodes.last_mut().and_then(|n| n.output.first_mut()) {
            Some(out) => {
                let old = std::mem::replace(out, target.to_owned());
                let proto = self.context.graph.proto;
                let declared = proto
                    .value_info
                    .iter()
                    .chain(&proto.output)
                    .any(|v| v.name.as_deref() == Some(target));
                if declared {
                    self.value_info.retain(|v| v.name.as_deref() != Some(&old));
                } else if let Some(info) = self
                    .value_info
                    .iter_mut()
                    .find(|v| v.name.as_deref() == Some(&old))
                {
                    info.name = Some(target.to_owned());
                }
                Ok(())
            }
            None => Err(self.fail("nothing was built".to_owned())),
        }
    }

    fn rank(&self, value: &str) -> usize {
        self.context.shapes.shape(value).map_or(0, <[i64]>::len)
    }

    /// A shape of `head` (0 copies) and the dimensions of x from `from` on.
    fn spatial(&mut self, head: &[i64], from: i64, step: &str) -> String {
        let x = self.site.x.to_owned();
        let shape = self.op("Shape", &format!("{step}/like"), &[&x], vec![]);
        let start = self.ints(&format!("{step}/like/start"), &[from]);
        let end = self.ints(&format!("{step}/like/end"), &[i64::from(i32::MAX)]);
        let tail = self.op(
            "Slice",
            &format!("{step}/like"),
            &[&shape, &start, &end],
            vec![],
        );
        let head = self.ints(&format!("{step}/head"), head);
        self.op("Concat", step, &[&head, &tail], vec![make::int("axis", 0)])
    }
}
