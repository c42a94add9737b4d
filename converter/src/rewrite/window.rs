//! The replacement of one site by window attention, alone or with LinFusion attention
//! beside it: `out = a ⊙ Window(q, k, v) + b ⊙ LinFusion(q', k', v')`, a and b one number
//! a head. q, k and v are the graph's own, with its norms and rotary embeddings; q' and k'
//! come from the site's input. Text tokens are attended to exactly and attend exactly;
//! the linear branch is of the image tokens alone.

use linfusion_models::checkpoint::{Checkpoint, CheckpointModule, MlpWidth, Part};
use linfusion_models::onnx::{ElementType, make};
use linfusion_ops::schema::{WindowAttentionAttrs, WindowSpec};

use super::builder::Builder;
use super::site::{Context, LinearPart, Patch, SiteError, Weights, check_module};
use crate::attention::exact::{Axes, Exact, Reading};
use crate::attention::plain::Plain;
use crate::attention::site::{Image, Site};
use crate::attention::stream::TextSide;
use crate::graph::label;
use crate::grid::{GridSize, GridSource};
use crate::plan::Method;

/// Beyond every axis.
const END: i64 = i32::MAX as i64;

/// What stands beside each other in a patch, by name and in numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct WindowPart {
    /// q, k and v of the operator, `[B, N, H·D]`.
    pub qkv: [String; 3],
    /// Its grid.
    pub grid: String,
    /// The grid under the probe.
    pub size: GridSize,
    /// Its output.
    pub attended: String,
    /// Its attributes.
    pub attrs: WindowAttentionAttrs,
    /// The linear branch's share.
    pub mixed: Option<Mixed>,
}

/// `value = local ⊙ window + global ⊙ linear`, over the image tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixed {
    /// The image part of the window attention's output.
    pub window: String,
    /// The linear branch's output.
    pub linear: String,
    /// The sum.
    pub value: String,
    /// One factor a head.
    pub local: Vec<f64>,
    /// One factor a head.
    pub global: Vec<f64>,
}

/// Builds the replacement of one site; where it has no text, the operator is told that
/// the text lies `without_text`, so that all sites share one function.
///
/// # Errors
/// [`SiteError`].
pub fn patch(
    context: &Context<'_, '_>,
    site: &Site<'_>,
    method: Method,
    window: WindowSpec,
    without_text: TextSide,
    module: &str,
    weights: &Weights<'_>,
) -> Result<Patch, SiteError> {
    let fail = |reason: String| SiteError::Graph {
        anchor: site.anchor.clone(),
        reason,
    };
    let exact = site.exact.as_ref().map_err(|e| fail(e.clone()))?;
    let image = site.image.as_ref().map_err(|e| fail(e.to_string()))?;
    let frame = match (&image.stream, method) {
        (Ok(stream), _) => stream.clone(),
        (Err(_), Method::Window) => exact.frame(),
        (Err(reason), _) => return Err(fail(reason.clone())),
    };
    let element = ElementType::from_onnx(exact.element)
        .ok_or_else(|| fail(format!("element type {} is not supported", exact.element)))?;
    let port = context
        .graph
        .producer(exact.merged)
        .ok_or_else(|| fail(format!("no node makes '{}'", exact.merged)))?;
    let makes = |o: &&String| !o.is_empty();
    let replaced = context.graph.node(port.node);
    if replaced.output.iter().filter(makes).count() > 1 {
        return Err(fail(format!("'{}' has several outputs", label(replaced))));
    }
    if let Weights::Module { module, .. } = weights {
        check_module(&frame, &site.anchor, module)?;
    }
    let mut b = Builder::new(context, &frame, element, module);
    let parts = WindowBuilder {
        exact,
        image,
        frame: &frame,
        weights,
    };
    let attrs = WindowAttentionAttrs {
        num_heads: usize::try_from(exact.heads)
            .map_err(|_| fail(format!("{} heads", exact.heads)))?,
        scale: Some(exact.scale as f32),
        window: window.window,
        border: window.border,
        text: image.text.unwrap_or(without_text),
    };
    attrs.check().map_err(|e| fail(e.to_string()))?;
    let qkv = parts.operands(&mut b)?;
    let grid = b.grid(image.grid.source, context.shapes);
    let attended = b.window_attention(&qkv, &grid, &attrs)?;
    let mut linear_part = None;
    let mut mixed = None;
    let out = if method == Method::Hybrid {
        let near = b.image_part(&attended, &grid, image.text, "image");
        let linear = parts.linear(&mut b, &qkv, &grid)?;
        let (local, global) = parts.scales()?;
        let value = parts.mix(&mut b, &near, &linear.attended, &local, &global);
        let out = match image.text {
            None => value.clone(),
            Some(side) => {
                let text = b.text_part(&attended, &grid, side, "text");
                match side {
                    TextSide::Prefix => b.join(&[&text, &value]),
                    TextSide::Suffix => b.join(&[&value, &text]),
                }
            }
        };
        mixed = Some(Mixed {
            window: near,
            linear: linear.attended.clone(),
            value,
            local,
            global,
        });
        linear_part = Some(linear);
        out
    } else {
        attended.clone()
    };
    b.finish(&out, exact.merged, &exact.merged_layout)?;
    if let Weights::Module { checkpoint, module } = weights {
        b.replace_layers(exact, image, method, checkpoint, module)?;
    }
    // The last node was given the replaced value's name.
    let made = |value: String| {
        if b.makes(&value) {
            value
        } else {
            exact.merged.to_owned()
        }
    };
    let window = WindowPart {
        qkv,
        grid,
        size: image.grid.size,
        attended: made(attended),
        attrs,
        mixed: mixed.map(|m| Mixed {
            value: made(m.value.clone()),
            ..m
        }),
    };
    Ok(Patch {
        linear: linear_part,
        window: Some(window),
        target: exact.merged.to_owned(),
        nodes: b.nodes,
        initializers: b.initializers,
        value_info: b.value_info,
        replaced: port.node,
        inputs: b.inputs,
        shape_source: frame.x.to_owned(),
        overflows: b.overflows,
    })
}

struct WindowBuilder<'a, 'm> {
    exact: &'a Exact<'m>,
    image: &'a Image<'m>,
    frame: &'a Plain<'m>,
    weights: &'a Weights<'a>,
}

impl WindowBuilder<'_, '_> {
    /// q, k and v as `[B, N, H·D]` in the site's element type.
    fn operands(&self, b: &mut Builder<'_, '_>) -> Result<[String; 3], SiteError> {
        let Some(readings) = &self.exact.qkv else {
            let x = b.tokens(self.frame.x, &self.frame.x_layout, "x")?;
            return b.graph_projections(&x);
        };
        let widths = [
            self.exact.heads * self.exact.head_dim,
            self.exact.heads * self.exact.head_dim,
            self.exact.heads * self.exact.value_dim,
        ];
        let mut values = readings.iter().zip(["q", "k", "v"]).zip(widths);
        let mut next = || {
            values
                .next()
                .map_or(String::new(), |((reading, step), width)| {
                    b.packed(reading, width, step)
                })
        };
        Ok([next(), next(), next()])
    }

    /// The linear branch over the image tokens.
    fn linear(
        &self,
        b: &mut Builder<'_, '_>,
        [own_q, own_k, v]: &[String; 3],
        grid: &str,
    ) -> Result<LinearPart, SiteError> {
        let all = b.tokens(self.frame.x, &self.frame.x_layout, "linear/x")?;
        let all = b.in_element_type(&all, self.frame.x, "linear/x");
        // A layer over all tokens reads the text as well.
        let whole = self.image.text.is_some() && self.frame.tokens == self.exact.tokens;
        let side = if whole { self.image.text } else { None };
        let x = b.image_part(&all, grid, side, "linear/x/image");
        let (qkv, weights) = match self.weights {
            Weights::Graph => {
                let [q, k] = match &self.exact.qkv {
                    // Nothing lies between the layers and the attention.
                    None => [own_q.clone(), own_k.clone()],
                    Some(_) => {
                        let [q, k, _] = b.graph_projections(&all)?;
                        [q, k]
                    }
                };
                let mut image = |value: &str, step: &str| {
                    let value = b.in_element_type(value, self.frame.x, step);
                    b.image_part(&value, grid, side, step)
                };
                let (q, k) = (image(&q, "linear/q"), image(&k, "linear/k"));
                let v = b.image_part(v, grid, self.image.text, "linear/v");
                ([q, k, v], None)
            }
            Weights::Module { checkpoint, module } => {
                let qkv = self.module_projections(b, &x, v, grid, checkpoint, module)?;
                (qkv, Some((*module).clone()))
            }
        };
        let like = side.is_none().then_some(self.frame.x);
        let attended = b.attention(&qkv, like)?;
        Ok(LinearPart {
            tokens: x,
            qkv,
            attended,
            projected: None,
            heads: self.exact.heads,
            weights,
        })
    }

    /// q' = Wq(x + Fq(x)), k' = Wk(x + Fk(x)), v' = Wv x, with the graph's own layer where
    /// the checkpoint has none, and the graph's own v.
    fn module_projections(
        &self,
        b: &mut Builder<'_, '_>,
        x: &str,
        v: &str,
        grid: &str,
        checkpoint: &Checkpoint,
        module: &CheckpointModule,
    ) -> Result<[String; 3], SiteError> {
        let (xq, xk) = if module.mid == MlpWidth::Identity {
            let twice = b.op("Add", "linear/twice", &[x, x], vec![]);
            (twice.clone(), twice)
        } else {
            (
                b.mlp(x, "to_q_", Part::QMlp, checkpoint, module)?,
                b.mlp(x, "to_k_", Part::KMlp, checkpoint, module)?,
            )
        };
        let [tap_q, tap_k, _] = &self.frame.taps;
        let mut own = |from: &str, step: &str, weight: Part, bias: Part| {
            b.projection(from, step, weight, bias, checkpoint, module)
        };
        let q = own(&xq, "linear/to_q", Part::QWeight, Part::QBias)?;
        let k = own(&xk, "linear/to_k", Part::KWeight, Part::KBias)?;
        let own_v = own(x, "linear/to_v", Part::VWeight, Part::VBias)?;
        let q = q.map_or_else(|| b.reapplied(tap_q, &xq, "linear/to_q"), Ok)?;
        let k = k.map_or_else(|| b.reapplied(tap_k, &xk, "linear/to_k"), Ok)?;
        let v = match own_v {
            Some(v) => v,
            None => b.image_part(v, grid, self.image.text, "linear/v"),
        };
        Ok([q, k, v])
    }

    /// a and b, one number a head.
    fn scales(&self) -> Result<(Vec<f64>, Vec<f64>), SiteError> {
        match self.weights {
            Weights::Graph => {
                let half = vec![0.5; usize::try_from(self.exact.heads).unwrap_or(0)];
                Ok((half.clone(), half))
            }
            Weights::Module { checkpoint, module } => Ok((
                checkpoint.tensor(module, Part::LocalScale)?.to_f64(),
                checkpoint.tensor(module, Part::GlobalScale)?.to_f64(),
            )),
        }
    }

    fn mix(
        &self,
        b: &mut Builder<'_, '_>,
        window: &str,
        linear: &str,
        local: &[f64],
        global: &[f64],
    ) -> String {
        let channels = usize::try_from(self.exact.value_dim).unwrap_or(0);
        let local = b.per_channel("local_scale", local, channels);
        let global = b.per_channel("global_scale", global, channels);
        let near = b.op("Mul", "local", &[window, &local], vec![]);
        let far = b.op("Mul", "global", &[linear, &global], vec![]);
        b.op("Add", "mix", &[&near, &far], vec![])
    }
}

impl Builder<'_, '_> {
    /// A reading as `[B, N, width]` in the site's element type.
    fn packed(&mut self, reading: &Reading<'_>, width: i64, step: &str) -> String {
        let mut value = self.in_element_type(reading.value, reading.value, step);
        let perm: Option<&[i64]> = match reading.axes {
            Axes::Packed => return value,
            Axes::Split => None,
            Axes::Heads => Some(&[0, 2, 1, 3]),
            Axes::HeadsTurned => Some(&[0, 3, 1, 2]),
            // [N, B·H, D] folds to [N, B, H·D] whatever N and B are.
            Axes::Folded => Some(&[1, 0, 2]),
            Axes::FoldedTurned => Some(&[2, 0, 1]),
        };
        if let Some(perm) = perm {
            let perm = vec![make::ints("perm", perm)];
            value = self.op("Transpose", step, &[&value], perm);
        }
        if !matches!(reading.axes, Axes::Folded | Axes::FoldedTurned) {
            let shape = self.ints(&format!("{step}/shape"), &[0, 0, width]);
            return self.op("Reshape", step, &[&value, &shape], vec![]);
        }
        let shape = self.ints(&format!("{step}/shape"), &[0, -1, width]);
        let value = self.op("Reshape", step, &[&value, &shape], vec![]);
        let perm = vec![make::ints("perm", &[1, 0, 2])];
        self.op("Transpose", &format!("{step}/rows"), &[&value], perm)
    }

    /// `value`, which has the element type that the graph gives `like`, in the site's.
    fn in_element_type(&mut self, value: &str, like: &str, step: &str) -> String {
        let found = self.context.shapes.fact(like).element;
        if found == Some(self.element.onnx()) {
            return value.to_owned();
        }
        let to = vec![make::int("to", i64::from(self.element.onnx()))];
        self.op("Cast", &format!("{step}/cast"), &[value], to)
    }

    /// The grid as int64 `[2]`.
    fn grid(&mut self, source: GridSource<'_>, shapes: &crate::shapes::Shapes) -> String {
        match source {
            GridSource::Fixed(size) => self.ints("grid", &[size.rows, size.cols]),
            GridSource::Spatial { value, axis } => {
                let shape = self.op("Shape", "grid", &[value], vec![]);
                self.slice(&shape, axis, axis + 2, 0, "grid")
            }
            GridSource::Ids { input, rank } => {
                // Ids are in raster order: the last token's row and column, counted from
                // the first's.
                let mut ids = input.to_owned();
                if shapes.fact(input).element != Some(ElementType::I64.onnx()) {
                    let to = vec![make::int("to", i64::from(ElementType::I64.onnx()))];
                    ids = self.op("Cast", "grid", &[&ids], to);
                }
                let axis = rank.saturating_sub(2) as i64;
                let mut at = |index: i64, step: &str| {
                    let index = self.ints(&format!("grid/{step}/index"), &[index]);
                    let axis = vec![make::int("axis", axis)];
                    self.op("Gather", &format!("grid/{step}"), &[&ids, &index], axis)
                };
                let (first, last) = (at(0, "first"), at(-1, "last"));
                let span = self.op("Sub", "grid/span", &[&last, &first], vec![]);
                let one = self.ints("grid/one", &[1]);
                let size = self.op("Add", "grid/size", &[&span, &one], vec![]);
                let size = self.slice(&size, 1, 3, rank as i64 - 1, "grid/pixel");
                let flat = self.ints("grid/flat", &[-1]);
                let size = self.op("Reshape", "grid/last_pixel", &[&size, &flat], vec![]);
                let size = self.slice(&size, 0, 2, 0, "grid/stated");
                // Rows and columns of other ids (of two images, say) do not multiply to their
                // number: then this Reshape fails, and nothing is computed wrong.
                let column = self.ints("grid/column", &[0]);
                let last = vec![make::int("axis", rank as i64 - 1)];
                let column = self.op("Gather", "grid/column", &[&ids, &column], last);
                let mut shape = size;
                if rank > 2 {
                    let batch = self.ints("grid/batch", &[0]);
                    let axis = vec![make::int("axis", 0)];
                    shape = self.op("Concat", "grid/shape", &[&batch, &shape], axis);
                }
                let step = "grid/ids_are_rows_times_columns";
                let plane = self.op("Reshape", step, &[&column, &shape], vec![]);
                let shape = self.op("Shape", "grid", &[&plane], vec![]);
                self.slice(&shape, axis, axis + 2, 0, "grid")
            }
        }
    }

    fn slice(&mut self, value: &str, start: i64, end: i64, axis: i64, step: &str) -> String {
        let start = self.ints(&format!("{step}/start"), &[start]);
        let end = self.ints(&format!("{step}/end"), &[end]);
        let axis = self.ints(&format!("{step}/axis"), &[axis]);
        self.op("Slice", step, &[value, &start, &end, &axis], vec![])
    }

    /// The image's tokens of `[B, N, C]`.
    fn image_part(
        &mut self,
        value: &str,
        grid: &str,
        text: Option<TextSide>,
        step: &str,
    ) -> String {
        let Some(side) = text else {
            return value.to_owned();
        };
        let pixels = self.pixels(grid);
        let (start, end) = match side {
            TextSide::Prefix => {
                let start = self.op("Neg", step, &[&pixels], vec![]);
                (start, self.ints(&format!("{step}/end"), &[END]))
            }
            TextSide::Suffix => (self.ints(&format!("{step}/start"), &[0]), pixels),
        };
        self.token_range(value, &start, &end, step)
    }

    /// The text's tokens of `[B, N, C]`.
    fn text_part(&mut self, value: &str, grid: &str, side: TextSide, step: &str) -> String {
        let pixels = self.pixels(grid);
        let (start, end) = match side {
            TextSide::Prefix => {
                let start = self.ints(&format!("{step}/start"), &[0]);
                (start, self.op("Neg", step, &[&pixels], vec![]))
            }
            TextSide::Suffix => (pixels, self.ints(&format!("{step}/end"), &[END])),
        };
        self.token_range(value, &start, &end, step)
    }

    fn token_range(&mut self, value: &str, start: &str, end: &str, step: &str) -> String {
        let axis = self.ints(&format!("{step}/axis"), &[1]);
        self.op("Slice", step, &[value, start, end, &axis], vec![])
    }

    /// rows · cols as int64 `[1]`, made once.
    fn pixels(&mut self, grid: &str) -> String {
        let made = format!("{}/grid/pixels/Mul_output_0", self.prefix);
        if self.makes(&made) {
            return made;
        }
        let rows = self.slice(grid, 0, 1, 0, "grid/rows");
        let cols = self.slice(grid, 1, 2, 0, "grid/cols");
        self.op("Mul", "grid/pixels", &[&rows, &cols], vec![])
    }

    fn join(&mut self, parts: &[&str]) -> String {
        self.op("Concat", "join", parts, vec![make::int("axis", 1)])
    }

    /// One number a head as one a channel, `[H·D]`.
    fn per_channel(&mut self, name: &str, heads: &[f64], channels: usize) -> String {
        let values: Vec<f64> = heads
            .iter()
            .flat_map(|&v| std::iter::repeat_n(v, channels))
            .collect();
        let name = self.context.fresh(format!("{}.{name}", self.module));
        let dims = [values.len() as i64];
        if let Some((bytes, _)) = super::weights::encode(&values, self.element) {
            self.initializers
                .push(make::tensor(&name, self.element, &dims, bytes));
        }
        name
    }
}
