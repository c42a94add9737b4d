//! What a converted module computes, in f64, straight from the checkpoint's
//! tensors: the other side of verification, which shares nothing with the rewrite.

use linfusion_models::checkpoint::{
    Checkpoint, CheckpointError, CheckpointModule, MlpPart, MlpWidth, Part,
};
use ndarray::{Array1, Array2, ArrayView2, Axis};

/// A module's tensors.
pub struct Module {
    q: Option<Layer>,
    k: Option<Layer>,
    v: Option<Layer>,
    out: Option<Layer>,
    mlps: Option<[Mlp; 2]>,
    identity: bool,
}

/// `y = x·Wᵀ + b`, W as PyTorch stores it.
struct Layer {
    weight: Array2<f64>,
    bias: Option<Array1<f64>>,
}

struct Mlp {
    first: Layer,
    norm: [Array1<f64>; 2],
    last: Layer,
}

/// q, k and v of some tokens, as far as the checkpoint has the projections.
pub struct Projected {
    /// Queries `[rows, dim]`.
    pub q: Option<Array2<f64>>,
    /// Keys.
    pub k: Option<Array2<f64>>,
    /// Values.
    pub v: Option<Array2<f64>>,
}

impl Module {
    /// Reads the tensors of `module`.
    ///
    /// # Errors
    /// A tensor is missing or has the wrong shape or type.
    pub fn new(
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
    ) -> Result<Self, CheckpointError> {
        let read = Reader { checkpoint, module };
        let identity = module.mid == MlpWidth::Identity;
        Ok(Module {
            q: read.optional_layer(Part::QWeight, Part::QBias)?,
            k: read.optional_layer(Part::KWeight, Part::KBias)?,
            v: read.optional_layer(Part::VWeight, Part::VBias)?,
            out: read.optional_layer(Part::OutWeight, Part::OutBias)?,
            mlps: if identity {
                None
            } else {
                Some([read.mlp(Part::QMlp)?, read.mlp(Part::KMlp)?])
            },
            identity,
        })
    }

    /// q = Wq(x + Fq(x)), k = Wk(x + Fk(x)), v = Wv x for tokens `[rows, dim]`.
    #[must_use]
    pub fn project(&self, x: ArrayView2<'_, f64>) -> Projected {
        let shifted = |which: usize| match &self.mlps {
            Some(mlps) => &x + &mlps[which].run(x),
            None if self.identity => &x * 2.0,
            None => x.to_owned(),
        };
        Projected {
            q: self.q.as_ref().map(|q| q.run(shifted(0).view())),
            k: self.k.as_ref().map(|k| k.run(shifted(1).view())),
            v: self.v.as_ref().map(|v| v.run(x)),
        }
    }

    /// The out projection of attended tokens `[rows, dim]`; without its bias where
    /// a fused node adds that later.
    #[must_use]
    pub fn out(&self, attended: ArrayView2<'_, f64>, bias: bool) -> Option<Array2<f64>> {
        let out = self.out.as_ref()?;
        Some(if bias {
            out.run(attended)
        } else {
            attended.dot(&out.weight.t())
        })
    }
}

impl Layer {
    fn run(&self, x: ArrayView2<'_, f64>) -> Array2<f64> {
        let y = x.dot(&self.weight.t());
        match &self.bias {
            Some(bias) => y + bias,
            None => y,
        }
    }
}

impl Mlp {
    /// Linear, LayerNorm (eps 1e-5, as ONNX's attribute holds it in f32: in an f64
    /// graph the difference shows), LeakyReLU (slope 0.01), Linear.
    fn run(&self, x: ArrayView2<'_, f64>) -> Array2<f64> {
        let mut hidden = self.first.run(x);
        for mut row in hidden.axis_iter_mut(Axis(0)) {
            let n = row.len().max(1) as f64;
            let mean = row.sum() / n;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
            let scale = (variance + f64::from(1e-5_f32)).sqrt().recip();
            row.mapv_inplace(|v| (v - mean) * scale);
        }
        let [weight, bias] = &self.norm;
        let hidden = (hidden * weight + bias).mapv(|v| if v < 0.0 { 0.01 * v } else { v });
        self.last.run(hidden.view())
    }
}

struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    module: &'a CheckpointModule,
}

impl Reader<'_> {
    fn vector(&self, part: Part) -> Result<Array1<f64>, CheckpointError> {
        Ok(self.checkpoint.tensor(self.module, part)?.to_f64().into())
    }

    fn matrix(&self, part: Part) -> Result<Array2<f64>, CheckpointError> {
        let tensor = self.checkpoint.tensor(self.module, part)?;
        let columns = tensor.shape.last().copied().unwrap_or(1);
        let values = tensor.to_f64();
        let rows = values.len() / columns.max(1);
        // The checkpoint checked the shape: the product is the number of values.
        Ok(Array2::from_shape_vec((rows, columns), values).unwrap_or_default())
    }

    fn optional_layer(&self, weight: Part, bias: Part) -> Result<Option<Layer>, CheckpointError> {
        match self.checkpoint.optional_tensor(self.module, weight)? {
            None => Ok(None),
            Some(_) => self.layer(weight, bias).map(Some),
        }
    }

    fn layer(&self, weight: Part, bias: Part) -> Result<Layer, CheckpointError> {
        let bias = self.checkpoint.optional_tensor(self.module, bias)?;
        Ok(Layer {
            weight: self.matrix(weight)?,
            bias: bias.map(|b| b.to_f64().into()),
        })
    }

    fn mlp(&self, part: fn(MlpPart) -> Part) -> Result<Mlp, CheckpointError> {
        Ok(Mlp {
            first: self.layer(part(MlpPart::InWeight), part(MlpPart::InBias))?,
            norm: [
                self.vector(part(MlpPart::NormWeight))?,
                self.vector(part(MlpPart::NormBias))?,
            ],
            last: self.layer(part(MlpPart::OutWeight), part(MlpPart::OutBias))?,
        })
    }
}
