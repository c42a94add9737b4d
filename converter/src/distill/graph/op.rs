//! Operations on tensors, each in terms that candle differentiates.

use candle_core::{D, DType, Result, Tensor};

use super::conv::Conv;
use super::einsum::Einsum;
use super::window::Windowed;

/// An operation with everything it takes from sizes and attributes.
pub(super) enum Op {
    /// A function of one tensor.
    Unary(fn(&Tensor) -> Result<Tensor>),
    /// A function of two tensors, broadcast; of more, from left to right.
    Binary(fn(&Tensor, &Tensor) -> Result<Tensor>),
    /// x for x > 0, else slope · x.
    LeakyRelu(f64),
    /// x for x > 0, else alpha · (exp x − 1).
    Elu(f64),
    /// x to a constant power.
    Power(f64),
    /// Between two constants.
    Clip([Option<f64>; 2]),
    /// A choice by a boolean tensor.
    Where,
    /// Another type.
    Cast(DType),
    /// A matrix product, with leading dimensions broadcast.
    MatMul,
    /// alpha · A·B + beta · C.
    Gemm {
        alpha: f64,
        beta: f64,
        turned: [bool; 2],
    },
    /// With a bias as third input.
    Conv(Conv),
    /// Sums of products by a letter for each axis.
    Einsum(Einsum),
    /// The mean of blocks of so many rows and columns.
    AveragePool([usize; 2]),
    /// Each pixel so many times, to these rows and columns.
    Nearest([usize; 2]),
    /// Over one axis.
    Softmax { axis: usize },
    /// Over all axes from the last one of `outer` on, which is viewed as `[outer, inner]`.
    FlatSoftmax { outer: usize },
    /// Scale and bias for each element of a row; a row has the axes from `axis` on.
    LayerNorm { axis: usize, epsilon: f64 },
    /// The same without a mean to subtract.
    RmsNorm { axis: usize, epsilon: f64 },
    /// Over groups of channels and all pixels; as many groups as channels are instance normalization.
    GroupNorm { groups: usize, epsilon: f64 },
    /// By mean and variance that are inputs.
    BatchNorm { epsilon: f64 },
    /// Over some axes, with the result's shape.
    Reduce {
        kind: Reduction,
        axes: Vec<usize>,
        shape: Vec<usize>,
    },
    /// Another shape with the same elements in order.
    Reshape(Vec<usize>),
    /// Axes in another order.
    Transpose(Vec<usize>),
    /// Broadcast to a shape.
    Expand(Vec<usize>),
    /// Repeated along each axis.
    Tile(Vec<usize>),
    /// Along an axis.
    Concat { axis: usize },
    /// Into parts of these lengths along an axis.
    Split { axis: usize, lengths: Vec<usize> },
    /// Some of the elements along axes.
    Slice(Vec<Range>),
    /// Rows of an axis by number.
    Gather { axis: usize },
    /// Zeros before and after, by axis.
    Pad(Vec<[usize; 2]>),
    /// LinFusion attention of q, k and v.
    LinFusion { heads: usize, epsilon: f64 },
    /// Window attention of q, k and v.
    Window(Windowed),
}

/// What is made of many elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reduction {
    Mean,
    Sum,
    SumSquare,
    L2,
    Max,
    Min,
}

/// Elements of an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub axis: usize,
    pub start: i64,
    pub step: i64,
    pub len: usize,
}

impl Op {
    /// Computes the outputs. Inputs are those that the operation reads, see [`super::lower`].
    pub fn apply(&self, inputs: &[Option<&Tensor>]) -> Result<Vec<Tensor>> {
        let present: Vec<&Tensor> = inputs.iter().flatten().copied().collect();
        let optional = |i: usize| inputs.get(i).copied().flatten();
        let Some(x) = optional(0) else {
            candle_core::bail!("an operator has no input");
        };
        let needed = |i: usize| match optional(i) {
            Some(tensor) => Ok(tensor),
            None => candle_core::bail!("input {i} is missing"),
        };
        let made = match self {
            Self::Unary(f) => f(x)?,
            Self::Binary(f) => {
                let rest = present.iter().skip(1);
                rest.copied().try_fold(x.clone(), |sum, y| f(&sum, y))?
            }
            Self::LeakyRelu(slope) => (x.relu()? - (x.neg()?.relu()? * *slope)?)?,
            Self::Elu(alpha) => x.elu(*alpha)?,
            Self::Power(exponent) => power(x, *exponent)?,
            Self::Clip([low, high]) => {
                let x = low.map_or(Ok(x.clone()), |low| x.maximum(low))?;
                high.map_or(Ok(x.clone()), |high| x.minimum(high))?
            }
            Self::Where => choose(x, needed(1)?, needed(2)?)?,
            Self::Cast(dtype) => match dtype {
                DType::U8 => x.ne(&x.zeros_like()?)?,
                dtype => x.to_dtype(*dtype)?,
            },
            Self::MatMul => matmul(x, needed(1)?)?,
            Self::Gemm {
                alpha,
                beta,
                turned,
            } => gemm(x, needed(1)?, optional(2), *turned, [*alpha, *beta])?,
            Self::Conv(form) => {
                let made = form.apply(x, needed(1)?)?;
                optional(2).map_or(Ok(made.clone()), |bias| {
                    made.broadcast_add(&per_channel(bias, made.rank())?)
                })?
            }
            Self::Einsum(equation) => equation.apply(&present)?,
            Self::AveragePool([rows, cols]) => x.contiguous()?.avg_pool2d((*rows, *cols))?,
            Self::Nearest([rows, cols]) => repeated(x, *rows, *cols)?,
            Self::Softmax { axis } => candle_nn::ops::softmax(x, *axis)?,
            Self::FlatSoftmax { outer } => {
                let rows = x.reshape((*outer, x.elem_count() / (*outer).max(1)))?;
                candle_nn::ops::softmax(&rows, D::Minus1)?.reshape(x.shape())?
            }
            Self::LayerNorm { axis, epsilon } => {
                let rows = normal(&centred(&rows(x, *axis)?)?, *epsilon)?.reshape(x.shape())?;
                affine(&rows, needed(1)?, optional(2))?
            }
            Self::RmsNorm { axis, epsilon } => {
                let rows = normal(&rows(x, *axis)?, *epsilon)?.reshape(x.shape())?;
                affine(&rows, needed(1)?, None)?
            }
            Self::GroupNorm { groups, epsilon } => {
                group_norm(x, needed(1)?, needed(2)?, *groups, *epsilon)?
            }
            Self::BatchNorm { epsilon } => {
                let rank = x.rank();
                let channel = |i: usize| per_channel(needed(i)?, rank);
                let deviation = (channel(4)? + *epsilon)?.sqrt()?;
                let normal = x.broadcast_sub(&channel(3)?)?.broadcast_div(&deviation)?;
                affine(&normal, &channel(1)?, Some(&channel(2)?))?
            }
            Self::Reduce { kind, axes, shape } => kind.apply(x, axes)?.reshape(shape.as_slice())?,
            Self::Reshape(shape) => x.reshape(shape.as_slice())?,
            Self::Transpose(axes) => x.permute(axes.as_slice())?,
            Self::Expand(shape) => x.broadcast_as(shape.as_slice())?.contiguous()?,
            Self::Tile(repeats) => x.repeat(repeats.as_slice())?,
            Self::Concat { axis } => Tensor::cat(&present, *axis)?,
            Self::Slice(ranges) => ranges.iter().try_fold(x.clone(), |x, r| r.of(&x))?,
            Self::Gather { axis } => gather(x, needed(1)?, *axis)?,
            Self::Pad(pads) => {
                let mut x = x.clone();
                for (axis, [before, after]) in pads.iter().enumerate() {
                    if before + after > 0 {
                        x = x.pad_with_zeros(axis, *before, *after)?;
                    }
                }
                x
            }
            Self::LinFusion { heads, epsilon } => {
                linfusion(x, needed(1)?, needed(2)?, *heads, *epsilon)?
            }
            Self::Window(form) => form.apply([x, needed(1)?, needed(2)?], needed(3)?)?,
            Self::Split { axis, lengths } => return split(x, *axis, lengths),
        };
        Ok(vec![made])
    }
}

fn power(x: &Tensor, exponent: f64) -> Result<Tensor> {
    match exponent {
        1.0 => Ok(x.clone()),
        2.0 => x.sqr(),
        3.0 => x.sqr()? * x,
        0.5 => x.sqrt(),
        -1.0 => x.recip(),
        other => x.powf(other),
    }
}

fn choose(condition: &Tensor, yes: &Tensor, no: &Tensor) -> Result<Tensor> {
    let shape = condition
        .shape()
        .broadcast_shape_binary_op(yes.shape(), "where")?
        .broadcast_shape_binary_op(no.shape(), "where")?;
    condition
        .broadcast_as(&shape)?
        .where_cond(&yes.broadcast_as(&shape)?, &no.broadcast_as(&shape)?)
}

/// Each pixel of `[B, C, H, W]` so often that there are `rows` and `cols` of them. (The gradient of candle 0.11's
/// `upsample_nearest2d` forgets what other readers of its input gave.)
fn repeated(x: &Tensor, rows: usize, cols: usize) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let (down, across) = (rows / height.max(1), cols / width.max(1));
    x.reshape((batch, channels * height, 1, width, 1))?
        .broadcast_as((batch, channels * height, down, width, across))?
        .reshape((batch, channels, rows, cols))
}

/// As NumPy's: leading dimensions are broadcast, a vector is a row or a column.
fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match (a.rank(), b.rank()) {
        (1, _) => matmul(&a.unsqueeze(0)?, b)?.squeeze(D::Minus2),
        (_, 1) => matmul(a, &b.unsqueeze(1)?)?.squeeze(D::Minus1),
        // One product of all rows.
        (rank, 2) if rank > 2 => {
            let mut dims = a.dims().to_vec();
            let inner = dims.pop().unwrap_or(1);
            let rows: usize = dims.iter().product();
            dims.push(b.dim(1)?);
            a.reshape((rows, inner))?
                .matmul(&b.contiguous()?)?
                .reshape(dims)
        }
        _ => a.contiguous()?.broadcast_matmul(&b.contiguous()?),
    }
}

fn gemm(
    a: &Tensor,
    b: &Tensor,
    c: Option<&Tensor>,
    turned: [bool; 2],
    [alpha, beta]: [f64; 2],
) -> Result<Tensor> {
    let side = |x: &Tensor, turned: bool| match turned {
        true => x.t(),
        false => Ok(x.clone()),
    };
    let scaled = |x: Tensor, by: f64| if by == 1.0 { Ok(x) } else { x * by };
    let product = scaled(side(a, turned[0])?.matmul(&side(b, turned[1])?)?, alpha)?;
    match c {
        Some(c) => product.broadcast_add(&scaled(c.clone(), beta)?),
        None => Ok(product),
    }
}

/// A vector with an entry a channel, to be broadcast against `[B, C, …]`.
fn per_channel(vector: &Tensor, rank: usize) -> Result<Tensor> {
    let mut dims = vec![1; rank.max(2)];
    if let Some(channels) = dims.get_mut(1) {
        *channels = vector.elem_count();
    }
    vector.reshape(dims)
}

/// A matrix whose rows have the axes from `axis` on.
fn rows(x: &Tensor, axis: usize) -> Result<Tensor> {
    let outer: usize = x.dims().iter().take(axis).product();
    x.reshape((outer, x.elem_count() / outer.max(1)))
}

fn centred(rows: &Tensor) -> Result<Tensor> {
    rows.broadcast_sub(&rows.mean_keepdim(D::Minus1)?)
}

fn normal(rows: &Tensor, epsilon: f64) -> Result<Tensor> {
    let variance = rows.sqr()?.mean_keepdim(D::Minus1)?;
    rows.broadcast_div(&(variance + epsilon)?.sqrt()?)
}

fn affine(x: &Tensor, scale: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let x = x.broadcast_mul(scale)?;
    bias.map_or(Ok(x.clone()), |bias| x.broadcast_add(bias))
}

fn group_norm(
    x: &Tensor,
    scale: &Tensor,
    bias: &Tensor,
    groups: usize,
    epsilon: f64,
) -> Result<Tensor> {
    let (batch, channels) = (x.dim(0)?, x.dim(1)?);
    let groups_rows = x.reshape((batch * groups, x.elem_count() / (batch * groups).max(1)))?;
    let normal = normal(&centred(&groups_rows)?, epsilon)?.reshape(x.shape())?;
    // Until opset 20 they have an entry for each group.
    let spread = |vector: &Tensor| {
        let each = channels / vector.elem_count().max(1);
        let vector = vector.flatten_all()?.unsqueeze(1)?;
        let wide = vector.broadcast_as((vector.dim(0)?, each))?;
        per_channel(&wide.contiguous()?, x.rank())
    };
    affine(&normal, &spread(scale)?, Some(&spread(bias)?))
}

fn split(x: &Tensor, axis: usize, lengths: &[usize]) -> Result<Vec<Tensor>> {
    let mut at = 0;
    let part = |len: &usize| {
        let part = x.narrow(axis, at, *len);
        at += len;
        part
    };
    lengths.iter().map(part).collect()
}

fn gather(x: &Tensor, indices: &Tensor, axis: usize) -> Result<Tensor> {
    let size = x.dim(axis)? as i64;
    let at: Vec<i64> = indices.flatten_all()?.to_vec1()?;
    // Negative numbers count from the end.
    let at: Vec<i64> = at
        .iter()
        .map(|i| if *i < 0 { i + size } else { *i })
        .collect();
    let mut dims = x.dims().to_vec();
    dims.splice(axis..=axis, indices.dims().iter().copied());
    let count = at.len();
    x.contiguous()?
        .index_select(&Tensor::from_vec(at, count, x.device())?, axis)?
        .reshape(dims)
}

impl Range {
    fn of(&self, x: &Tensor) -> Result<Tensor> {
        let index = |i: usize| self.start + self.step * i as i64;
        match (usize::try_from(self.start), self.step) {
            (Ok(start), 1) => x.narrow(self.axis, start, self.len),
            _ => {
                let at: Vec<i64> = (0..self.len).map(index).collect();
                let at = Tensor::from_vec(at, self.len, x.device())?;
                x.contiguous()?.index_select(&at, self.axis)
            }
        }
    }
}

impl Reduction {
    fn apply(self, x: &Tensor, axes: &[usize]) -> Result<Tensor> {
        let each = |f: fn(&Tensor, usize) -> Result<Tensor>| {
            axes.iter().try_fold(x.clone(), |x, axis| f(&x, *axis))
        };
        match self {
            Self::Mean => x.mean_keepdim(axes.to_vec()),
            Self::Sum => x.sum_keepdim(axes.to_vec()),
            Self::SumSquare => x.sqr()?.sum_keepdim(axes.to_vec()),
            Self::L2 => x.sqr()?.sum_keepdim(axes.to_vec())?.sqrt(),
            Self::Max => each(|x, axis| x.max_keepdim(axis)),
            Self::Min => each(|x, axis| x.min_keepdim(axis)),
        }
    }
}

/// φ(q)·(φ(k)ᵀv / M) / (φ(q)·mean φ(k) + ε), φ(u) = elu(u) + 1, of `[B, N, H·D]` or `[B, H, N, D]`.
fn linfusion(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, epsilon: f64) -> Result<Tensor> {
    let packed = q.rank() == 3;
    let side = |x: &Tensor| -> Result<Tensor> {
        if !packed {
            return x.contiguous();
        }
        let (batch, tokens, width) = x.dims3()?;
        x.reshape((batch, tokens, heads, width / heads))?
            .transpose(1, 2)?
            .contiguous()
    };
    let features = |x: &Tensor| side(x)?.elu(1.0)? + 1.0;
    let (q, k, v) = (features(q)?, features(k)?, side(v)?);
    let keys = v.dim(2)?.max(1) as f64;
    let state = (k.transpose(2, 3)?.contiguous()?.matmul(&v)? / keys)?;
    let mean = k.mean_keepdim(2)?.transpose(2, 3)?.contiguous()?;
    let out = q
        .matmul(&state)?
        .broadcast_div(&(q.matmul(&mean)? + epsilon)?)?;
    match packed {
        false => Ok(out),
        true => {
            let (batch, heads, tokens, width) = out.dims4()?;
            out.transpose(1, 2)?.reshape((batch, tokens, heads * width))
        }
    }
}
