//! Window attention in terms that candle differentiates: tiles of queries against the keys that they reach.

use candle_core::{D, Error, Result, Tensor};
use linfusion_ops::schema::{GridAxis, Layout, WindowAttentionAttrs, WindowDims};

/// `WindowAttention`.
pub(super) struct Windowed {
    pub attributes: WindowAttentionAttrs,
}

/// Tiles are as long as the window, with twice its length of keys on a side, but not shorter than this.
const SHORTEST: usize = 8;

impl Windowed {
    /// q, k and v are `[B, N, H·D]` or `[B, H, N, D]`, and the output like them; `grid` has rows and columns.
    pub fn apply(&self, [q, k, v]: [&Tensor; 3], grid: &Tensor) -> Result<Tensor> {
        let grid: Vec<i64> = grid.flatten_all()?.to_vec1()?;
        let [rows, cols] = *grid.as_slice() else {
            candle_core::bail!("a grid has rows and columns, not {grid:?}");
        };
        let dims = WindowDims::new(q.dims(), k.dims(), v.dims(), [rows, cols], &self.attributes)
            .map_err(Error::wrap)?;
        let scale = match self.attributes.scale {
            Some(scale) => f64::from(scale),
            None => 1.0 / (dims.head_dim as f64).sqrt(),
        };
        let heads = |x: &Tensor, width: usize| match dims.layout {
            Layout::Heads => Ok(x.clone()),
            Layout::Packed => x
                .reshape((dims.batch, dims.tokens(), dims.heads, width))?
                .transpose(1, 2),
        };
        let tokens = Tokens {
            q: (heads(q, dims.head_dim)? * scale)?,
            k: heads(k, dims.head_dim)?,
            v: heads(v, dims.value_dim)?,
            attributes: &self.attributes,
            dims,
        };
        let out = tokens.attend()?;
        match dims.layout {
            Layout::Heads => Ok(out),
            Layout::Packed => out.transpose(1, 2)?.reshape(dims.out_shape()),
        }
    }
}

/// q, with its scale, k and v as `[B, H, N, D]`.
struct Tokens<'a> {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attributes: &'a WindowAttentionAttrs,
    dims: WindowDims,
}

/// Some rows or columns of queries, and those of the keys that one of them reaches.
struct Strip {
    queries: std::ops::Range<usize>,
    keys: std::ops::Range<usize>,
}

impl Tokens<'_> {
    fn attend(&self) -> Result<Tensor> {
        let side = self.attributes.text;
        let WindowDims {
            text, rows, cols, ..
        } = self.dims;
        let texts = |x: &Tensor| x.narrow(2, self.dims.text_start(side), text);
        // [B, H, rows, columns, D]
        let image = |x: &Tensor| {
            let x = x.narrow(2, self.dims.image_start(side), rows * cols)?;
            let (batch, heads, _, width) = x.dims4()?;
            x.reshape((batch, heads, rows, cols, width))
        };
        let [q, k, v] = [image(&self.q)?, image(&self.k)?, image(&self.v)?];
        let beside = match text {
            0 => None,
            _ => Some([texts(&self.k)?, texts(&self.v)?]),
        };
        let mut bands = Vec::new();
        for down in self.strips(GridAxis::Rows, rows) {
            let mut tiles = Vec::new();
            for across in self.strips(GridAxis::Cols, cols) {
                let tile = self.tile([&q, &k, &v], beside.as_ref(), &down, &across)?;
                tiles.push(tile);
            }
            bands.push(Tensor::cat(&tiles, 3)?);
        }
        let out = Tensor::cat(&bands, 2)?;
        let (batch, heads, _, _, width) = out.dims5()?;
        let out = out.reshape((batch, heads, rows * cols, width))?;
        if text == 0 {
            return Ok(out);
        }
        // Text attends to everything.
        let told = softmax(&texts(&self.q)?, &self.k, &self.v, None)?;
        let parts = match self.dims.text_start(side) {
            0 => [told, out],
            _ => [out, told],
        };
        Tensor::cat(&parts, 2)
    }

    fn strips(&self, axis: GridAxis, size: usize) -> Vec<Strip> {
        let keys = |at: usize| self.attributes.key_range(axis, at, size);
        let length = keys(size / 2).len().max(SHORTEST);
        let strip = |first: usize| {
            let queries = first..(first + length).min(size);
            Strip {
                // Windows move on with their queries.
                keys: keys(queries.start).start..keys(queries.end - 1).end,
                queries,
            }
        };
        (0..size).step_by(length).map(strip).collect()
    }

    /// `[B, H, rows, columns, D]` of a tile's queries.
    fn tile(
        &self,
        [q, k, v]: [&Tensor; 3],
        beside: Option<&[Tensor; 2]>,
        down: &Strip,
        across: &Strip,
    ) -> Result<Tensor> {
        let part = |x: &Tensor, rows: &std::ops::Range<usize>, cols: &std::ops::Range<usize>| {
            let part = x
                .narrow(2, rows.start, rows.len())?
                .narrow(3, cols.start, cols.len())?;
            let (batch, heads, rows, cols, width) = part.dims5()?;
            part.reshape((batch, heads, rows * cols, width))
        };
        let q = part(q, &down.queries, &across.queries)?;
        let mut k = part(k, &down.keys, &across.keys)?;
        let mut v = part(v, &down.keys, &across.keys)?;
        if let Some([keys, values]) = beside {
            k = Tensor::cat(&[&k, keys], 2)?;
            v = Tensor::cat(&[&v, values], 2)?;
        }
        let mask = Tensor::from_vec(
            self.mask(down, across),
            (q.dim(2)?, k.dim(2)?),
            self.q.device(),
        )?;
        let out = softmax(&q, &k, &v, Some(&mask))?;
        let (batch, heads, _, width) = out.dims4()?;
        out.reshape((
            batch,
            heads,
            down.queries.len(),
            across.queries.len(),
            width,
        ))
    }

    /// For each query of a tile, zero for the keys that it attends to, which all text is, and −∞ for the others.
    fn mask(&self, down: &Strip, across: &Strip) -> Vec<f32> {
        let WindowDims {
            text, rows, cols, ..
        } = self.dims;
        let mut mask = Vec::new();
        for y in down.queries.clone() {
            let near_rows = self.attributes.key_range(GridAxis::Rows, y, rows);
            for x in across.queries.clone() {
                let near_cols = self.attributes.key_range(GridAxis::Cols, x, cols);
                for row in down.keys.clone() {
                    for col in across.keys.clone() {
                        let near = near_rows.contains(&row)
                            && near_cols.contains(&col)
                            && self.attributes.reaches(row.abs_diff(y), col.abs_diff(x));
                        mask.push(if near { 0.0 } else { f32::NEG_INFINITY });
                    }
                }
                mask.resize(mask.len() + text, 0.0);
            }
        }
        mask
    }
}

/// softmax(q·kᵀ + mask)·v
fn softmax(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let scores = q.contiguous()?.matmul(&k.transpose(2, 3)?.contiguous()?)?;
    let scores = mask.map_or(Ok(scores.clone()), |mask| scores.broadcast_add(mask))?;
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v.contiguous()?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use linfusion_models::random::SplitMix64;
    use linfusion_ops::reference::window_attention;
    use linfusion_ops::schema::{Border, TextSide, Window};
    use ndarray::{ArrayD, IxDyn};
    use rstest::rstest;

    use super::*;

    const SQUARE: Window = Window::Rect { rows: 3, cols: 4 };
    const WIDE: Window = Window::Rect { rows: 1, cols: 20 };
    const CIRCLE: Window = Window::Circle { radius: 3 };
    const GRID: [i64; 2] = [11, 18];

    fn form(window: Window, border: Border, text: TextSide) -> Windowed {
        Windowed {
            attributes: WindowAttentionAttrs {
                num_heads: 2,
                scale: None,
                window,
                border,
                text,
            },
        }
    }

    /// q, k and v of so many text tokens beside the image.
    fn given(text: usize, layout: Layout) -> [ArrayD<f32>; 3] {
        let mut random = SplitMix64::new(3);
        let tokens = text + (GRID[0] * GRID[1]) as usize;
        [4, 4, 3].map(|width| {
            let dims = match layout {
                Layout::Packed => vec![2, tokens, 2 * width],
                Layout::Heads => vec![2, 2, tokens, width],
            };
            ArrayD::from_shape_simple_fn(IxDyn(&dims), || 2.0 * random.normal() as f32)
        })
    }

    fn grid() -> Tensor {
        Tensor::new(&GRID, &Device::Cpu).unwrap()
    }

    fn tensor(values: &ArrayD<f32>) -> Tensor {
        let flat = values.iter().copied().collect();
        Tensor::from_vec(flat, values.shape(), &Device::Cpu).unwrap()
    }

    #[rstest]
    #[case(SQUARE, Border::Clamp, 0, TextSide::Prefix, Layout::Packed)]
    #[case(SQUARE, Border::Truncate, 0, TextSide::Prefix, Layout::Heads)]
    #[case(SQUARE, Border::Clamp, 5, TextSide::Prefix, Layout::Packed)]
    #[case(WIDE, Border::Clamp, 5, TextSide::Suffix, Layout::Heads)]
    #[case(WIDE, Border::Truncate, 0, TextSide::Suffix, Layout::Packed)]
    #[case(CIRCLE, Border::Truncate, 2, TextSide::Suffix, Layout::Packed)]
    fn tiles_compute_what_the_operator_is_defined_as(
        #[case] window: Window,
        #[case] border: Border,
        #[case] text: usize,
        #[case] side: TextSide,
        #[case] layout: Layout,
    ) {
        let form = form(window, border, side);
        let [q, k, v] = given(text, layout);
        let expected =
            window_attention(q.view(), k.view(), v.view(), GRID, &form.attributes).unwrap();
        let out = form
            .apply([&tensor(&q), &tensor(&k), &tensor(&v)], &grid())
            .unwrap();
        assert_eq!(out.dims(), expected.shape());
        let out: Vec<f32> = out.flatten_all().unwrap().to_vec1().unwrap();
        for (found, expected) in out.iter().zip(&expected) {
            // Values below 2³, weighted by exponentials of scores below 2⁶, which are rounded to 2⁻¹⁹ at least once in numerator
            // and denominator: 2⁻¹⁵ at the worst, and half of it allowed.
            let error = (f64::from(*found) - expected).abs();
            assert!(error < 2.0_f64.powi(-16), "{found} {expected}");
        }
    }

    #[rstest]
    fn gradients_are_those_of_finite_differences(#[values(0, 1, 2)] which: usize) {
        let form = form(SQUARE, Border::Clamp, TextSide::Prefix);
        let given = given(5, Layout::Packed);
        let vars = given
            .each_ref()
            .map(|values| Var::from_tensor(&tensor(values)).unwrap());
        let mut random = SplitMix64::new(4);
        let pull = given[2].mapv(|_| random.symmetric() as f32);
        let push = given[which].mapv(|_| random.symmetric() as f32);
        let loss = form
            .apply(vars.each_ref().map(Var::as_tensor), &grid())
            .unwrap();
        let loss = (loss * tensor(&pull)).unwrap().sum_all().unwrap();
        let gradient = loss.backward().unwrap();
        let gradient = gradient.get(&vars[which]).unwrap();
        let slope = (gradient * tensor(&push)).unwrap().sum_all().unwrap();
        let slope = f64::from(slope.to_scalar::<f32>().unwrap());
        // In f64, where a step can be small.
        let value = |by: f64| -> f64 {
            let mut moved = given.each_ref().map(|values| values.mapv(f64::from));
            moved[which].scaled_add(by, &push.mapv(f64::from));
            let [q, k, v] = moved.each_ref().map(|values| values.view());
            let out = window_attention(q, k, v, GRID, &form.attributes).unwrap();
            out.iter().zip(&pull).map(|(o, p)| o * f64::from(*p)).sum()
        };
        const STEP: f64 = 1.0 / 4096.0;
        let numeric = (value(STEP) - value(-STEP)) / (2.0 * STEP);
        // A sum of some 2,000 products, each of which a few roundings by 2⁻²⁴ made, so √2,000 · 4 · 2⁻²⁴ ≈ 10⁻⁵ of terms of
        // order 1; the step adds a sixth of its square, 10⁻⁸, times the third derivative.
        assert!((numeric - slope).abs() < 1e-4, "{numeric} {slope}");
        assert!(slope.abs() > 0.1, "{slope}");
    }
}
