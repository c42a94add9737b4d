//! What is needed to know of a site to learn its weights: where its tokens, its attention's output and its layers are in
//! the graph.
//!
//! Learning compares the attention's output with heads merged, before the out projection: that is what softmax made and
//! what the student makes; the out projection stays the graph's own. So a site's error is its attention's alone, and the
//! original graph can run on from a student's output.

use linfusion_models::shapes::Shapes;
use linfusion_runtime::tensor::{DType, Tensor};
use ndarray::{Array3, ArrayD, Ix3, IxDyn};

use super::error::DistillError;
use super::student::Shape;
use crate::analysis::Analysis;
use crate::attention::plain::{Columns, Layout, Tap};
use crate::attention::site::Site;
use crate::graph::{input, qualified_op};
use crate::plan::Method;

/// A value of the graph that holds `[batch, tokens, channels]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// How it lies.
    pub layout: Layout,
}

/// Where q, k or v of a site is.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    /// The value that has it, before heads are split.
    pub value: Value,
    /// Which of its channels.
    pub columns: Columns,
}

/// A site to learn.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its index among the model's sites.
    pub site: usize,
    /// Its module's path, or a name in its place.
    pub module: String,
    /// Sizes.
    pub shape: Shape,
    /// Tokens at the samples' size.
    pub tokens: usize,
    /// The input of q, k and v.
    pub x: Value,
    /// The attention's output, heads merged.
    pub merged: Value,
    /// q, k and v.
    pub operands: [Operand; 3],
    /// What window attention reads: the site's input, or q, k and v where norms or rotary embeddings made them.
    pub reads: Vec<String>,
    /// What it may become, in the order of preference where all else is equal.
    pub methods: Vec<Method>,
    /// The out projection's result, where the weights of the layer are taken from; a linear site has one.
    pub out: Option<Value>,
    /// A bias of the out projection that another node holds: the name of the stored tensor.
    pub out_bias: Option<String>,
}

impl Target {
    /// Reads `site`, at the sizes that `shapes` has, for those of `methods` that it can become.
    ///
    /// # Errors
    /// One sentence on what stands in the way.
    pub fn new(
        analysis: &Analysis<'_>,
        site: &Site<'_>,
        shapes: &Shapes,
        methods: &[Method],
    ) -> Result<Self, String> {
        let anchor = site.node.ok_or("it lies inside a subgraph")?;
        let mut possible = Vec::new();
        let mut reason = String::new();
        for method in methods {
            match can_become(site, *method) {
                Ok(()) => possible.push(*method),
                Err(why) => reason = why,
            }
        }
        if possible.is_empty() {
            return Err(reason);
        }
        // What is learned reads the tokens through the layers of a strict reading, or of the image's stream.
        let plain = match (&site.plain, &site.image) {
            (Ok(plain), _) => plain,
            (Err(_), Ok(image)) => image.stream.as_ref().map_err(Clone::clone)?,
            (Err(reason), Err(_)) => return Err(reason.clone()),
        };
        let [dim, heads, inner, value] = [
            plain.width,
            plain.heads,
            plain.heads * plain.head_dim,
            plain.heads * plain.value_dim,
        ];
        let (merged, merged_layout) = match &site.exact {
            Ok(exact) => (exact.merged, &exact.merged_layout),
            Err(_) => (plain.merged, &plain.merged_layout),
        };
        let out = plain.out.as_ref();
        let out_width = out.map_or(dim, |o| o.width);
        if inner != dim || value != dim || out_width != dim {
            return Err(format!(
                "its input has {dim} channels, q and k have {inner}, v has {value}, the output {out_width}: a checkpoint needs one number for all"
            ));
        }
        let size = |v: i64| usize::try_from(v).map_err(|_| format!("a size is {v}"));
        let tokens = site
            .tokens_at(shapes)
            .ok_or("the number of its tokens at the samples' size is unknown")?;
        let value = |name: &str, layout: &Layout| Value {
            name: name.to_owned(),
            layout: layout.clone(),
        };
        let operand = |tap: &Tap<'_>| Operand {
            value: value(tap.value, &tap.layout),
            columns: tap.columns.clone(),
        };
        if plain.taps.iter().any(|t| t.linear.is_none()) {
            return Err(format!(
                "{} '{}' holds the weights of q, k and v itself; distil from the model as it was before ONNX Runtime optimized it",
                qualified_op(analysis.graph.node(anchor)),
                site.anchor
            ));
        }
        let operands = plain.taps.each_ref().map(operand);
        let later = out
            .and_then(|o| o.later_bias)
            .and_then(|(node, slot)| input(analysis.graph.node(node), slot).map(str::to_owned));
        Ok(Self {
            site: site.index,
            module: site.checkpoint_name().into_owned(),
            shape: Shape {
                dim: size(dim)?,
                heads: size(heads)?,
            },
            tokens: size(tokens)?,
            x: value(plain.x, &plain.x_layout),
            merged: value(merged, merged_layout),
            operands,
            reads: match site.exact.as_ref().ok().and_then(|e| e.qkv.as_ref()) {
                Some(readings) => readings.iter().map(|r| r.value.to_owned()).collect(),
                None => vec![plain.x.to_owned()],
            },
            methods: possible,
            out: out.map(|o| value(o.result, &o.layout)),
            out_bias: later,
        })
    }
}

/// Whether weights for `method` can be learned at a site.
fn can_become(site: &Site<'_>, method: Method) -> Result<(), String> {
    if method == Method::Linear {
        let plain = site.plain.as_ref().map_err(Clone::clone)?;
        let Some(out) = &plain.out else {
            return Err(format!(
                "no single linear layer reads the attention's output '{}'",
                plain.merged
            ));
        };
        return match &out.obstacle {
            Some(obstacle) => Err(obstacle.clone()),
            None => Ok(()),
        };
    }
    site.exact.as_ref().map_err(Clone::clone)?;
    let image = site.image.as_ref().map_err(ToString::to_string)?;
    if image.text.is_some() {
        return Err(
            "text lies among its tokens, and distillation does images alone so far".to_owned(),
        );
    }
    Ok(())
}

impl Value {
    /// `[batch, tokens, channels]` of the value's tensor.
    ///
    /// # Errors
    /// Expected and found shape.
    pub fn matrix(&self, tensor: &Tensor, tokens: usize) -> Result<Array3<f32>, String> {
        let found = tensor.shape().to_vec();
        let wrong = || {
            format!(
                "has shape {found:?}, not {tokens} tokens as {:?}",
                self.layout
            )
        };
        let Tensor::F32(values) = tensor.cast(DType::F32) else {
            return Err(wrong());
        };
        let (shape, turned) = match (&self.layout, found.as_slice()) {
            (Layout::Tokens, &[b, n, c]) => ([b, n, c], false),
            (Layout::Rows, &[r, c]) => ([r / tokens.max(1), tokens, c], false),
            (Layout::Image, &[b, y, x, c]) => ([b, y * x, c], false),
            (Layout::ChannelsFirst, &[b, c, n]) => ([b, c, n], true),
            (Layout::ChannelsFirst, &[b, c, y, x]) => ([b, c, y * x], true),
            _ => return Err(wrong()),
        };
        let values = values.as_standard_layout().into_owned();
        let matrix = values
            .into_shape_with_order(IxDyn(&shape))
            .and_then(ArrayD::into_dimensionality::<Ix3>)
            .map_err(|_| wrong())?;
        let matrix = match turned {
            true => matrix
                .permuted_axes([0, 2, 1])
                .as_standard_layout()
                .into_owned(),
            false => matrix,
        };
        match matrix.shape().get(1) == Some(&tokens) {
            true => Ok(matrix),
            false => Err(wrong()),
        }
    }

    /// The inverse of [`Self::matrix`]: a tensor of `shape`, which the value has.
    ///
    /// # Errors
    /// The shape is of another size.
    pub fn tensor(&self, matrix: Array3<f32>, shape: &[usize]) -> Result<ArrayD<f32>, String> {
        let matrix = match self.layout {
            Layout::ChannelsFirst => matrix.permuted_axes([0, 2, 1]),
            _ => matrix,
        };
        let found = matrix.shape().to_vec();
        matrix
            .as_standard_layout()
            .into_owned()
            .into_shape_with_order(IxDyn(shape))
            .map_err(|_| format!("has shape {shape:?}, which is not that of {found:?}"))
    }
}

impl Target {
    /// An error at one of its values.
    pub(super) fn fault(&self, value: &str, problem: impl Into<String>) -> DistillError {
        DistillError::Value {
            module: self.module.clone(),
            value: value.to_owned(),
            problem: problem.into(),
        }
    }
}
