//! What is learned at a site: LinFusion attention as a function that can be differentiated.
//!
//! ```text
//! q = Wq(x + Fq(x)) + bq,   k = Wk(x + Fk(x)) + bk,   v = Wv x + bv
//! F(x) = W3·LeakyReLU₀.₀₁(LayerNorm₁ₑ₋₅(W0·x + b0; g, b1)) + b3
//! out[n] = φ(q[n])·(Σₘ φ(k[m])ᵀ v[m] / N) / (φ(q[n])·Σₘ φ(k[m]) / N + 1e-4),   φ(u) = elu(u) + 1
//! ```
//!
//! for each head; a hybrid site gives `a ⊙ near + b ⊙ out`, a and b one number a head, near what window
//! attention made of the same tokens. The formula is `GeneralizedLinearAttention` of the official code, as in
//! [`crate::reference`]. Weights are `[out, in]`, as PyTorch and the checkpoint have them.

use candle_core::{DType, Device, Result, Tensor, Var};
use linfusion_models::checkpoint::{MlpPart, Part};
use linfusion_models::random::SplitMix64;
use linfusion_ops::schema::DEFAULT_EPS;

use super::fused::{self, Cut, features, hidden, linear};

/// The sizes of a site's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Channels in and out.
    pub dim: usize,
    /// Heads; they divide `dim`.
    pub heads: usize,
}

/// A linear layer as the graph has it: `y = x·Wᵀ + b`.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// `[out, in]`, row-major.
    pub weight: Vec<f32>,
    /// `[out]`, where the layer has one.
    pub bias: Option<Vec<f32>>,
}

/// Where the weights of a student begin.
#[derive(Clone, Copy, Debug)]
pub struct Beginning<'a> {
    /// The graph's q, k and v.
    pub projections: &'a [Layer; 3],
    /// Width of the two MLPs; `None` for the identity, which makes q = Wq(2x).
    pub mid: Option<usize>,
    /// Whether the output is mixed with a window's.
    pub mixed: bool,
    /// For the MLPs' first layers.
    pub seed: u64,
}

/// The weights of one site, being learned.
#[derive(Debug)]
pub struct Student {
    shape: Shape,
    projections: [Projection; 3],
    mlps: Option<[Mlp; 2]>,
    scales: Option<[Var; 2]>,
    device: Device,
}

#[derive(Debug)]
struct Projection {
    weight: Var,
    bias: Option<Var>,
}

#[derive(Debug)]
struct Mlp {
    first: Projection,
    norm: [Var; 2],
    last: Projection,
}

/// The two halves of a mixture begin equal.
const HALF: f32 = 0.5;

impl Student {
    /// A student whose q, k and v are the graph's and whose MLPs give zero, as the official training begins.
    ///
    /// # Errors
    /// A layer has not `dim` × `dim` weights, or the device fails.
    pub fn new(shape: Shape, beginning: &Beginning<'_>, device: &Device) -> Result<Self> {
        let Shape { dim, heads } = shape;
        let var = |values: Vec<f32>, dims: &[usize]| {
            Var::from_tensor(&Tensor::from_vec(values, dims, device)?)
        };
        let [q, k, v] = beginning.projections.each_ref().map(|layer| {
            Ok::<_, candle_core::Error>(Projection {
                weight: var(layer.weight.clone(), &[dim, dim])?,
                bias: layer
                    .bias
                    .as_ref()
                    .map(|b| var(b.clone(), &[dim]))
                    .transpose()?,
            })
        });
        let mut random = SplitMix64::new(beginning.seed);
        let mut mlp = |mid: usize| {
            // As PyTorch begins a Linear: uniform within 1/√in.
            let bound = 1.0 / (dim as f64).sqrt();
            let mut draw = |n: usize| -> Vec<f32> {
                (0..n)
                    .map(|_| (bound * random.symmetric()) as f32)
                    .collect()
            };
            Ok::<_, candle_core::Error>(Mlp {
                first: Projection {
                    weight: var(draw(mid * dim), &[mid, dim])?,
                    bias: Some(var(draw(mid), &[mid])?),
                },
                norm: [var(vec![1.0; mid], &[mid])?, var(vec![0.0; mid], &[mid])?],
                last: Projection {
                    weight: var(vec![0.0; dim * mid], &[dim, mid])?,
                    bias: Some(var(vec![0.0; dim], &[dim])?),
                },
            })
        };
        Ok(Self {
            shape,
            projections: [q?, k?, v?],
            mlps: match beginning.mid {
                Some(mid) => Some([mlp(mid)?, mlp(mid)?]),
                None => None,
            },
            scales: match beginning.mixed {
                true => Some([
                    var(vec![HALF; heads], &[heads])?,
                    var(vec![HALF; heads], &[heads])?,
                ]),
                false => None,
            },
            device: device.clone(),
        })
    }

    /// Whether its output is mixed with a window's.
    #[must_use]
    pub fn is_mixed(&self) -> bool {
        self.scales.is_some()
    }

    /// Everything that is learned, in an order that never changes.
    #[must_use]
    pub fn vars(&self) -> Vec<Var> {
        self.parts()
            .into_iter()
            .map(|(_, var)| var.clone())
            .collect()
    }

    fn parts(&self) -> Vec<(Part, &Var)> {
        let mut parts = Vec::new();
        let kinds = [
            (Part::QWeight, Part::QBias),
            (Part::KWeight, Part::KBias),
            (Part::VWeight, Part::VBias),
        ];
        for (projection, (weight, bias)) in self.projections.iter().zip(kinds) {
            parts.push((weight, &projection.weight));
            parts.extend(projection.bias.as_ref().map(|b| (bias, b)));
        }
        let kinds: [fn(MlpPart) -> Part; 2] = [Part::QMlp, Part::KMlp];
        for (mlp, part) in self.mlps.iter().flatten().zip(kinds) {
            parts.push((part(MlpPart::InWeight), &mlp.first.weight));
            parts.extend(mlp.first.bias.as_ref().map(|b| (part(MlpPart::InBias), b)));
            let [weight, bias] = &mlp.norm;
            parts.push((part(MlpPart::NormWeight), weight));
            parts.push((part(MlpPart::NormBias), bias));
            parts.push((part(MlpPart::OutWeight), &mlp.last.weight));
            parts.extend(mlp.last.bias.as_ref().map(|b| (part(MlpPart::OutBias), b)));
        }
        if let Some([local, global]) = &self.scales {
            parts.push((Part::LocalScale, local));
            parts.push((Part::GlobalScale, global));
        }
        parts
    }

    /// The weights as the checkpoint names them.
    ///
    /// # Errors
    /// The device fails.
    pub fn weights(&self) -> Result<Weights> {
        let values = |(part, var): (Part, &Var)| Ok((part, var.flatten_all()?.to_vec1::<f32>()?));
        Ok(Weights(
            self.parts()
                .into_iter()
                .map(values)
                .collect::<Result<_>>()?,
        ))
    }

    /// Takes weights that [`Self::weights`] of an equal student gave.
    ///
    /// # Errors
    /// They are of another student.
    pub fn set(&self, weights: &Weights) -> Result<()> {
        for (part, var) in self.parts() {
            let values = weights.get(part).ok_or_else(|| {
                candle_core::Error::Msg(format!("no weights for {}", part.suffix()))
            })?;
            var.set(&Tensor::from_slice(values, var.shape(), &self.device)?)?;
        }
        Ok(())
    }

    /// The attention's output `[B, N, dim]` for tokens `x` of that shape and, at a hybrid site, what the window
    /// made of them.
    ///
    /// # Errors
    /// Shapes don't fit, or the device fails.
    pub fn forward(&self, x: &Tensor, near: Option<&Tensor>) -> Result<Tensor> {
        let (batch, tokens, dim) = x.dims3()?;
        let mut samples: Vec<Tensor> = Vec::new();
        let mut rows: Vec<Tensor> = Vec::new();
        self.each_block(x, near, &mut |block, out| {
            rows.push(out.reshape((block.samples, block.tokens, dim))?);
            if block.first_token + block.tokens == tokens {
                samples.push(Tensor::cat(&rows, 1)?);
                rows.clear();
            }
            Ok(())
        })?;
        Tensor::cat(&samples, 0)?.reshape((batch, tokens, dim))
    }

    /// Σ (out − target)², to be differentiated; shapes as [`Self::forward`] has them.
    ///
    /// # Errors
    /// Shapes don't fit, or the device fails.
    pub fn squared_error(
        &self,
        x: &Tensor,
        near: Option<&Tensor>,
        target: &Tensor,
    ) -> Result<Tensor> {
        let mut sum = Tensor::zeros((), DType::F32, &self.device)?;
        self.each_block(x, near, &mut |block, out| {
            let target = block.rows_of(target)?;
            sum = (&sum + fused::squared_error(&out, &target)?)?;
            Ok(())
        })?;
        Ok(sum)
    }

    /// Computes the output block by block, as `[rows, dim]`.
    fn each_block(
        &self,
        x: &Tensor,
        near: Option<&Tensor>,
        take: &mut dyn FnMut(Block, Tensor) -> Result<()>,
    ) -> Result<()> {
        let (batch, tokens, dim) = x.dims3()?;
        let wide = self.mlps.as_ref().map_or(dim, |[q, _]| q.width().max(dim));
        let elements = match self.device.is_cpu() {
            true => Block::OF_A_CORE,
            false => Block::OF_A_GPU,
        };
        for group in Block::groups(batch, tokens, elements / wide.max(1)) {
            // Σ φ(k)ᵀ [v, 1] / N: a column of ones beside v makes the normaliser with the sum.
            let mut state: Option<Tensor> = None;
            for block in &group {
                let part = self.state(&block.rows_of(x)?, *block)?;
                state = Some(match state {
                    None => part,
                    Some(sum) => (sum + part)?,
                });
            }
            let Some(state) = state else { continue };
            let state = (state * (1.0 / tokens as f64))?;
            for block in group {
                let near = near.map(|near| block.rows_of(near)).transpose()?;
                let out = self.attend(&block.rows_of(x)?, block, &state, near.as_ref())?;
                take(block, out)?;
            }
        }
        Ok(())
    }

    fn state(&self, rows: &Tensor, block: Block) -> Result<Tensor> {
        let [_, wk, wv] = &self.projections;
        let k = features(&wk.forward(&self.shifted(1, rows)?)?)?;
        fused::state(&k, &wv.forward(rows)?, self.cut(block))
    }

    fn cut(&self, block: Block) -> Cut {
        Cut {
            samples: block.samples,
            heads: self.shape.heads,
        }
    }

    fn attend(
        &self,
        rows: &Tensor,
        block: Block,
        state: &Tensor,
        near: Option<&Tensor>,
    ) -> Result<Tensor> {
        let q = features(&self.projections[0].forward(&self.shifted(0, rows)?)?)?;
        let out = fused::attend(&q, state, self.cut(block), DEFAULT_EPS)?;
        let (Some([local, global]), Some(near)) = (&self.scales, near) else {
            return Ok(out);
        };
        let Shape { dim, heads } = self.shape;
        let split = |rows: &Tensor| rows.reshape(((), heads, dim / heads));
        let per_head = |s: &Var| s.reshape((1, heads, 1));
        let far = split(&out)?.broadcast_mul(&per_head(global)?)?;
        let near = split(near)?.broadcast_mul(&per_head(local)?)?;
        (far + near)?.reshape(((), dim))
    }

    /// x + F(x).
    fn shifted(&self, which: usize, rows: &Tensor) -> Result<Tensor> {
        match &self.mlps {
            Some(mlps) => rows + mlps[which].forward(rows)?,
            None => rows * 2.0,
        }
    }
}

/// Tokens that are computed together: some samples whole, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    first_sample: usize,
    samples: usize,
    first_token: usize,
    tokens: usize,
}

impl Block {
    /// Elements of a tensor. From 65,536 on candle shares elementwise work among threads that spin, which costs
    /// more than it saves where sites are learned beside each other; and so much fits into a core's cache.
    const OF_A_CORE: usize = 60_000;
    /// 256 MiB.
    const OF_A_GPU: usize = 1 << 26;

    /// The blocks, of about `rows` tokens, of each run of samples: those of one run share their state.
    fn groups(batch: usize, tokens: usize, rows: usize) -> Vec<Vec<Self>> {
        let rows = rows.max(32);
        let (samples, step) = match rows / tokens.max(1) {
            // Parts alike, so that none is nearly empty.
            0 => (1, tokens.div_ceil(tokens.div_ceil(rows))),
            samples => (samples, tokens.max(1)),
        };
        let group = |first_sample: usize| {
            let block = |first_token: usize| Self {
                first_sample,
                samples: samples.min(batch - first_sample),
                first_token,
                tokens: step.min(tokens - first_token),
            };
            (0..tokens).step_by(step).map(block).collect()
        };
        (0..batch).step_by(samples).map(group).collect()
    }

    /// Its part of `[B, N, C]`, as `[rows, C]`.
    fn rows_of(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, dim) = x.dims3()?;
        x.narrow(0, self.first_sample, self.samples)?
            .narrow(1, self.first_token, self.tokens)?
            .reshape((self.samples * self.tokens, dim))
    }
}

impl Projection {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, self.bias.as_ref().map(Var::as_tensor))
    }
}

impl Mlp {
    fn width(&self) -> usize {
        self.norm[0].elem_count()
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [weight, bias] = &self.norm;
        let hidden = hidden(&self.first.forward(x)?, weight, bias)?;
        self.last.forward(&hidden)
    }
}

/// A student's weights, by the part of the checkpoint that they are.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights(pub Vec<(Part, Vec<f32>)>);

impl Weights {
    /// The values of one part.
    #[must_use]
    pub fn get(&self, part: Part) -> Option<&[f32]> {
        let found = self.0.iter().find(|(p, _)| *p == part);
        found.map(|(_, values)| values.as_slice())
    }
}

#[cfg(test)]
#[path = "student_tests.rs"]
mod tests;
