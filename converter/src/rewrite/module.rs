//! The layers of a checkpoint's module as nodes and weights.

use linfusion_models::checkpoint::{Checkpoint, CheckpointModule, MlpPart, MlpWidth, Part};
use linfusion_models::onnx::{ElementType, make};

use super::builder::Builder;
use super::site::SiteError;
use super::weights::{Orientation, initializer};
use crate::attention::plain::Layout;

impl Builder<'_, '_> {
    /// q = Wq(x + Fq(x)), k = Wk(x + Fk(x)), v = Wv x.
    pub(super) fn checkpoint_projections(
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
        let mut project = |from: &str, step: &str, weight: Part, bias: Part, factor: f64| {
            let w = self.matrix(step, weight, checkpoint, module, factor)?;
            let product = self.op("MatMul", step, &[from, &w], vec![]);
            self.biased(product, step, bias, checkpoint, module)
        };
        Ok([
            project(&xq, "to_q", Part::QWeight, Part::QBias, factor)?,
            project(&xk, "to_k", Part::KWeight, Part::KBias, factor)?,
            project(x, "to_v", Part::VWeight, Part::VBias, 1.0)?,
        ])
    }

    /// W·from + b, where the checkpoint has W.
    pub(super) fn projection(
        &mut self,
        from: &str,
        step: &str,
        weight: Part,
        bias: Part,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
    ) -> Result<Option<String>, SiteError> {
        if checkpoint.optional_tensor(module, weight)?.is_none() {
            return Ok(None);
        }
        let w = self.matrix(step, weight, checkpoint, module, 1.0)?;
        let product = self.op("MatMul", step, &[from, &w], vec![]);
        self.biased(product, step, bias, checkpoint, module)
            .map(Some)
    }

    /// `product` plus the bias, where the checkpoint has one.
    fn biased(
        &mut self,
        product: String,
        step: &str,
        bias: Part,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
    ) -> Result<String, SiteError> {
        match checkpoint.optional_tensor(module, bias)? {
            None => Ok(product),
            Some(_) => {
                let bias = self.bias(step, bias, checkpoint, module)?;
                Ok(self.op("Add", step, &[&product, &bias], vec![]))
            }
        }
    }

    /// x + F(x), F = Linear → LayerNorm(1e-5) → LeakyReLU(0.01) → Linear.
    pub(super) fn mlp(
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

    pub(super) fn leaky_relu(&mut self, h: &str, step: &str) -> String {
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

    pub(super) fn layer_norm(&mut self, h: &str, step: &str, scale: &str, shift: &str) -> String {
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

    pub(super) fn matrix(
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

    pub(super) fn vector(
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
    pub(super) fn bias(
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

    pub(super) fn convert(
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

    pub(super) fn out_projection(
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
}
