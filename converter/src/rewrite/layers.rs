//! Linear layers of the graph that a checkpoint of hybrid or window attention brings anew:
//! the nodes stay, their weights and biases become the checkpoint's.

use linfusion_models::checkpoint::{Checkpoint, CheckpointModule, CheckpointTensor, Part};
use linfusion_models::onnx::ElementType;

use super::builder::Builder;
use super::site::{SUFFIX, SiteError};
use super::weights::{Orientation, initializer};
use crate::attention::exact::Exact;
use crate::attention::layer::{Parameters, Slot, out_layer, parameters};
use crate::attention::plain::{Columns, Plain};
use crate::attention::projection::Linear;
use crate::attention::site::Image;
use crate::graph::{input, label};
use crate::plan::Method;

/// A layer around the attention, with the parts of a checkpoint that replace it.
struct Replaced<'m> {
    weight: Part,
    bias: Part,
    layer: Result<Linear<'m>, String>,
}

impl Builder<'_, '_> {
    /// Puts the module's own layers in: the projections of window attention, those of the
    /// text, and the out projections. The projections of a hybrid are its linear branch's.
    pub(super) fn replace_layers(
        &mut self,
        exact: &Exact<'_>,
        image: &Image<'_>,
        method: Method,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
    ) -> Result<(), SiteError> {
        let mut layers = Vec::new();
        let mut add = |weight, bias, layer| {
            layers.push(Replaced {
                weight,
                bias,
                layer,
            });
        };
        let (graph, shapes) = (self.context.graph, self.context.shapes);
        if method == Method::Window {
            for (i, (weight, bias)) in [
                (Part::QWeight, Part::QBias),
                (Part::KWeight, Part::KBias),
                (Part::VWeight, Part::VBias),
            ]
            .into_iter()
            .enumerate()
            {
                add(weight, bias, projection(&image.stream, i));
            }
        }
        for (i, (weight, bias)) in [
            (Part::AddQWeight, Part::AddQBias),
            (Part::AddKWeight, Part::AddKBias),
            (Part::AddVWeight, Part::AddVBias),
        ]
        .into_iter()
        .enumerate()
        {
            add(weight, bias, projection(&image.text_stream, i));
        }
        // One layer may read the image and the text together.
        let pixels = image.grid.size.rows * image.grid.size.cols;
        let out = |rows| out_layer(graph, shapes, exact.merged, exact.batch, rows);
        let image_out = out(pixels).or_else(|reason| out(exact.tokens).map_err(|_| reason));
        add(Part::OutWeight, Part::OutBias, image_out);
        let text_out = match image.text {
            Some(_) => out(exact.tokens - pixels),
            None => Err("there is no text among the tokens".to_owned()),
        };
        add(Part::AddOutWeight, Part::AddOutBias, text_out);
        for replaced in layers {
            self.replace_layer(replaced, checkpoint, module)?;
        }
        Ok(())
    }

    fn replace_layer(
        &mut self,
        replaced: Replaced<'_>,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
    ) -> Result<(), SiteError> {
        let weight = checkpoint.optional_tensor(module, replaced.weight)?;
        let bias = checkpoint.optional_tensor(module, replaced.bias)?;
        let Some(first) = weight.as_ref().or(bias.as_ref()) else {
            return Ok(());
        };
        let name = first.name.clone();
        let refuse = |reason: String| SiteError::Graph {
            anchor: module.module_name.clone(),
            reason: format!("the checkpoint's '{name}' has no place: {reason}"),
        };
        let (graph, shapes) = (self.context.graph, self.context.shapes);
        let layer = replaced.layer.map_err(refuse)?;
        let place = parameters(graph, shapes, layer).map_err(refuse)?;
        let Parameters {
            channels,
            out_first,
            ..
        } = place;
        if let Some(tensor) = weight {
            if !tensor.shape.iter().map(|&d| d as i64).eq(channels) {
                return Err(refuse(format!(
                    "it has shape {:?}, the layer '{}' has {channels:?} channels out and in",
                    tensor.shape,
                    label(graph.node(layer.node))
                )));
            }
            let (orientation, form) = match out_first {
                true => (Orientation::Stored, "weight"),
                false => (Orientation::Transposed, "weight_T"),
            };
            self.put(place.weight, &tensor, orientation, replaced.weight, form)?;
        }
        if let Some(tensor) = bias {
            let Some(slot) = place.bias else {
                return Err(refuse(format!(
                    "the layer '{}' adds no bias of its own",
                    label(graph.node(layer.node))
                )));
            };
            self.put(slot, &tensor, Orientation::Stored, replaced.bias, "bias")?;
        }
        Ok(())
    }

    /// Makes `tensor` what the node reads at `slot`.
    fn put(
        &mut self,
        slot: Slot,
        tensor: &CheckpointTensor,
        orientation: Orientation,
        part: Part,
        form: &str,
    ) -> Result<(), SiteError> {
        let (graph, shapes) = (self.context.graph, self.context.shapes);
        let old = input(graph.node(slot.0), slot.1);
        let fact = old.map(|v| shapes.fact(v));
        let element = fact.and_then(|f| ElementType::from_onnx(f.element?));
        let suffix = part.suffix();
        let layer = suffix.rsplit_once('.').map_or(&*suffix, |(layer, _)| layer);
        // The suffix tells it from the parameter that the graph had under this name.
        let name = self
            .context
            .fresh(format!("{}.{layer}.{form}{SUFFIX}", self.module));
        let converted = element.and_then(|e| initializer(&name, tensor, orientation, 1.0, e));
        let Some(mut converted) = converted else {
            return Err(self.fail(format!(
                "'{}' replaces '{}', which is no floating-point weight",
                tensor.name,
                old.unwrap_or("")
            )));
        };
        // A bias may lie as [1, 1, C].
        let dims = fact.and_then(|f| f.shape.clone()).unwrap_or_default();
        if form == "bias"
            && dims.iter().product::<i64>() == converted.tensor.dims.iter().product::<i64>()
        {
            converted.tensor.dims = dims;
        }
        if converted.overflowed > 0 {
            self.overflows
                .push((tensor.name.clone(), converted.overflowed));
        }
        self.initializers.push(converted.tensor);
        self.inputs.push((slot.0, slot.1, name));
        Ok(())
    }
}

/// The layer of q, k or v (0, 1, 2) of a stream, where it makes nothing else.
fn projection<'m>(stream: &Result<Plain<'m>, String>, which: usize) -> Result<Linear<'m>, String> {
    let stream = stream.as_ref().map_err(String::clone)?;
    let tap = stream.taps.get(which);
    match tap.and_then(|t| Some((t.linear?, &t.columns))) {
        Some((layer, Columns::All)) => Ok(layer),
        Some(_) => Err(
            "one layer makes q, k and v together; export the model with separate layers".to_owned(),
        ),
        None => Err("the attention node holds its own projections".to_owned()),
    }
}
