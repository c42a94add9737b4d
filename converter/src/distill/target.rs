//! What is needed to know of a site to learn its weights: where its tokens, its attention's output and its layers are in
//! the graph.
//!
//! Learning compares the attention's output with heads merged, before the out projection: that is what softmax made and
//! what the student makes; the out projection stays the graph's own. So a site's error is its attention's alone, and the
//! original graph can run on from a student's output.

use std::ops::Range;

use linfusion_models::shapes::Shapes;
use linfusion_ops::schema::TextSide;
use linfusion_runtime::tensor::{DType, Tensor};
use ndarray::{Array3, ArrayD, Ix3, IxDyn, s};

use super::error::DistillError;
use super::student::Shape;
use crate::analysis::Analysis;
use crate::attention::plain::{Columns, Layout, Tap};
use crate::attention::site::Site;
use crate::graph::{input, qualified_op};
use crate::plan::Method;

/// A value of the graph that holds `[batch, tokens, channels]`, the image's tokens and text beside them or not.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// How it lies.
    pub layout: Layout,
    /// The text among its tokens.
    pub text: Option<Text>,
}

/// Text before or behind the image's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text {
    /// Where.
    pub side: TextSide,
    /// How many tokens.
    pub tokens: usize,
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
    /// The node that it is found by.
    pub anchor: String,
    /// Its module's path, or a name in its place.
    pub module: String,
    /// Sizes.
    pub shape: Shape,
    /// Tokens of the image at the samples' size.
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
        let all = site
            .tokens_at(shapes)
            .ok_or("the number of its tokens at the samples' size is unknown")?;
        let Beside { tokens, text } = Beside::new(site, shapes, size(all)?)?;
        // A layer over all tokens reads the text as well.
        let whole = site.exact.as_ref().is_ok_and(|e| e.tokens == plain.tokens);
        let value = |name: &str, layout: &Layout, text: Option<Text>| Value {
            name: name.to_owned(),
            layout: layout.clone(),
            text,
        };
        let read = text.filter(|_| whole);
        let operand = |tap: &Tap<'_>| Operand {
            value: value(tap.value, &tap.layout, read),
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
            anchor: site.anchor.clone(),
            module: site.checkpoint_name().into_owned(),
            shape: Shape {
                dim: size(dim)?,
                heads: size(heads)?,
            },
            tokens,
            x: value(plain.x, &plain.x_layout, read),
            merged: value(merged, merged_layout, text),
            operands,
            reads: match site.exact.as_ref().ok().and_then(|e| e.qkv.as_ref()) {
                Some(readings) => readings.iter().map(|r| r.value.to_owned()).collect(),
                None => vec![plain.x.to_owned()],
            },
            methods: possible,
            out: out.map(|o| value(o.result, &o.layout, text)),
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
    site.image.as_ref().map_err(ToString::to_string)?;
    Ok(())
}

/// The image's tokens at a site, and the text's.
struct Beside {
    tokens: usize,
    text: Option<Text>,
}

impl Beside {
    /// Of `all` tokens, at the sizes that `shapes` has.
    fn new(site: &Site<'_>, shapes: &Shapes, all: usize) -> Result<Self, String> {
        let image = site.image.as_ref().ok();
        let Some((image, side)) = image.and_then(|image| Some((image, image.text?))) else {
            return Ok(Self {
                tokens: all,
                text: None,
            });
        };
        let tokens = image.grid.source.tokens(shapes);
        let tokens = tokens.and_then(|tokens| usize::try_from(tokens).ok());
        let parts = tokens.and_then(|tokens| Some((tokens, all.checked_sub(tokens)?)));
        let (tokens, text) = parts.ok_or_else(|| {
            format!(
                "how many of its {all} tokens are the image's at the samples' size cannot be told from the {}",
                image.grid.source
            )
        })?;
        Ok(Self {
            tokens,
            text: Some(Text { side, tokens: text }),
        })
    }
}

impl Value {
    /// `[batch, tokens, channels]` of the image's tokens in the value's tensor.
    ///
    /// # Errors
    /// Expected and found shape.
    pub fn matrix(&self, tensor: &Tensor, tokens: usize) -> Result<Array3<f32>, String> {
        let found = tensor.shape().to_vec();
        let all = self.all(tokens);
        let wrong = || format!("has shape {found:?}, not {} of {all} tokens", self.layout);
        let Tensor::F32(values) = tensor.cast(DType::F32) else {
            return Err(wrong());
        };
        let (shape, turned) = match (&self.layout, found.as_slice()) {
            (Layout::Tokens, &[b, n, c]) => ([b, n, c], false),
            (Layout::Rows, &[r, c]) => ([r / all.max(1), all, c], false),
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
            true => matrix.permuted_axes([0, 2, 1]),
            false => matrix,
        };
        if matrix.shape().get(1) != Some(&all) {
            return Err(wrong());
        }
        let image = matrix.slice_move(s![.., self.of_image(tokens), ..]);
        // Copies what is not in order already, and nothing else.
        match image.is_standard_layout() {
            true => Ok(image),
            false => Ok(image.as_standard_layout().into_owned()),
        }
    }

    /// The inverse of [`Self::matrix`]: a tensor of `shape`, which the value has; text is zero there.
    ///
    /// # Errors
    /// The shape is of another size.
    pub fn tensor(&self, matrix: Array3<f32>, shape: &[usize]) -> Result<ArrayD<f32>, String> {
        let matrix = match self.text {
            None => matrix,
            Some(text) => {
                let (batch, tokens, channels) = matrix.dim();
                let mut all = Array3::zeros((batch, tokens + text.tokens, channels));
                all.slice_mut(s![.., self.of_image(tokens), ..])
                    .assign(&matrix);
                all
            }
        };
        let matrix = match self.layout {
            Layout::ChannelsFirst => matrix.permuted_axes([0, 2, 1]),
            _ => matrix,
        };
        let found = matrix.shape().to_vec();
        matrix
            .as_standard_layout()
            .into_owned()
            .into_shape_with_order(IxDyn(shape))
            .map_err(|_| {
                format!("has shape {shape:?}, where one of {found:?} elements was expected")
            })
    }

    /// How many tokens it has where the image has so many.
    #[must_use]
    pub fn all(&self, tokens: usize) -> usize {
        tokens + self.text.map_or(0, |text| text.tokens)
    }

    /// Where the image's tokens lie among all.
    #[must_use]
    pub fn of_image(&self, tokens: usize) -> Range<usize> {
        match self.text {
            Some(text) if text.side == TextSide::Prefix => text.tokens..text.tokens + tokens,
            _ => 0..tokens,
        }
    }
}

impl Target {
    /// Whether a window may come to stand there.
    pub(super) fn has_window(&self) -> bool {
        self.methods.iter().any(|m| *m != Method::Linear)
    }

    /// Where one is wanted.
    pub(super) fn no_window(&self) -> DistillError {
        self.fault(
            &self.merged.name,
            "has no window: the rows and columns of its tokens cannot be told (hint: --grid)",
        )
    }

    /// An error at one of its values.
    pub(super) fn fault(&self, value: &str, problem: impl Into<String>) -> DistillError {
        DistillError::Value {
            module: self.module.clone(),
            value: value.to_owned(),
            problem: problem.into(),
        }
    }
}
