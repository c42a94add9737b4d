//! The two halves of linear attention, for each sample and head, without moving heads apart. See [`crate::reference`] for
//! the formula.

use candle_core::{CpuStorage, CustomOp2, Error, Layout, Result, Shape, Tensor};
use ndarray::linalg::general_mat_mul;
use ndarray::{
    Array1, Array3, Array4, ArrayView1, ArrayView2, ArrayView3, ArrayView4, Axis, Ix3, Ix4, Zip, s,
};

use super::{values, view, with};

/// How rows of tokens are cut: `[samples · N, heads · D]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Samples, one after the other.
    pub samples: usize,
    /// Heads, side by side.
    pub heads: usize,
}

/// Σ φ(k)ᵀ [v, 1] over the tokens of each sample, `[samples, heads, D, D + 1]`, of φ(k) and v.
pub struct State(pub Cut);
/// out = φ(q)·S / (φ(q)·s + eps) of φ(q) and the state `[S, s]`, in the rows of φ(q).
pub struct Attend {
    /// The rows of φ(q).
    pub cut: Cut,
    /// Added to the normaliser.
    pub eps: f32,
}

impl Cut {
    fn sizes(self, rows: usize, dim: usize) -> Result<Sizes> {
        let Self { samples, heads } = self;
        match samples > 0 && heads > 0 && rows.is_multiple_of(samples) && dim.is_multiple_of(heads)
        {
            true => Ok(Sizes {
                samples,
                heads,
                tokens: rows / samples,
                width: dim / heads,
            }),
            false => Err(Error::Msg(format!(
                "{rows} × {dim} are not {samples} samples of {heads} heads"
            ))),
        }
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    samples: usize,
    heads: usize,
    tokens: usize,
    width: usize,
}

impl Sizes {
    fn rows(self) -> Ix3 {
        Ix3(self.samples, self.tokens, self.heads * self.width)
    }

    fn state(self) -> Ix4 {
        Ix4(self.samples, self.heads, self.width, self.width + 1)
    }

    /// Each sample and head, with the columns of the head.
    fn parts(self) -> impl Iterator<Item = (usize, usize, std::ops::Range<usize>)> {
        let width = self.width;
        let heads = move |sample| (0..self.heads).map(move |head| (sample, head));
        (0..self.samples)
            .flat_map(heads)
            .map(move |(sample, head)| (sample, head, head * width..(head + 1) * width))
    }
}

fn rows(values: &[f32], sizes: Sizes) -> Result<ArrayView3<'_, f32>> {
    view(values, sizes.rows())
}

fn states(values: &[f32], sizes: Sizes) -> Result<ArrayView4<'_, f32>> {
    view(values, sizes.state())
}

impl CustomOp2 for State {
    fn name(&self) -> &'static str {
        "attention-state"
    }

    fn cpu_fwd(
        &self,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (r, dim) = k_layout.shape().dims2()?;
        let sizes = self.0.sizes(r, dim)?;
        let (k, v) = (values(k, k_layout)?, values(v, v_layout)?);
        let (k, v) = (rows(k, sizes)?, rows(v, sizes)?);
        let mut made = Array4::<f32>::zeros(sizes.state());
        for (sample, head, columns) in sizes.parts() {
            let k = k.slice(s![sample, .., columns.clone()]);
            let v = v.slice(s![sample, .., columns]);
            let mut state = made.slice_mut(s![sample, head, .., ..]);
            let (mut sums, mut norm) =
                state.multi_slice_mut((s![.., ..sizes.width], s![.., sizes.width]));
            general_mat_mul(1.0, &k.t(), &v, 0.0, &mut sums);
            norm.assign(&k.sum_axis(Axis(0)));
        }
        let shape = Shape::from(made.dim());
        Ok((CpuStorage::F32(made.into_raw_vec_and_offset().0), shape))
    }

    fn bwd(
        &self,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (r, dim) = k.dims2()?;
        let sizes = self.0.sizes(r, dim)?;
        let (of_k, of_v) = with([k, v, gradient], |[k, v, g]| {
            let (k, v, g) = (rows(k, sizes)?, rows(v, sizes)?, states(g, sizes)?);
            let mut of_k = Array3::<f32>::zeros(sizes.rows());
            let mut of_v = Array3::<f32>::zeros(sizes.rows());
            for (sample, head, columns) in sizes.parts() {
                let g = g.slice(s![sample, head, .., ..]);
                let (g, of_norm) = (g.slice(s![.., ..sizes.width]), g.column(sizes.width));
                let of = s![sample, .., columns];
                let mut of_k = of_k.slice_mut(of);
                of_k.assign(&of_norm);
                general_mat_mul(1.0, &v.slice(of), &g.t(), 1.0, &mut of_k);
                general_mat_mul(1.0, &k.slice(of), &g, 0.0, &mut of_v.slice_mut(of));
            }
            Ok::<_, Error>((of_k, of_v))
        })??;
        Ok((Some(tensor(of_k, k)?), Some(tensor(of_v, v)?)))
    }
}

fn tensor(made: Array3<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(
        made.into_raw_vec_and_offset().0,
        like.shape(),
        like.device(),
    )
}

/// φ(q)·s + eps.
fn norms(q: &ArrayView2<'_, f32>, norm: &ArrayView1<'_, f32>, eps: f32) -> Array1<f32> {
    q.dot(norm) + eps
}

impl CustomOp2 for Attend {
    fn name(&self) -> &'static str {
        "attend"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        state: &CpuStorage,
        state_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (r, dim) = q_layout.shape().dims2()?;
        let sizes = self.cut.sizes(r, dim)?;
        let q = rows(values(q, q_layout)?, sizes)?;
        let state = states(values(state, state_layout)?, sizes)?;
        let mut made = Array3::<f32>::zeros(sizes.rows());
        for (sample, head, columns) in sizes.parts() {
            let q = q.slice(s![sample, .., columns.clone()]);
            let state = state.slice(s![sample, head, .., ..]);
            let (sums, norm) = (
                state.slice(s![.., ..sizes.width]),
                state.column(sizes.width),
            );
            let mut out = made.slice_mut(s![sample, .., columns]);
            general_mat_mul(1.0, &q, &sums, 0.0, &mut out);
            let norms = norms(&q, &norm, self.eps);
            Zip::from(out.rows_mut())
                .and(&norms)
                .for_each(|mut row, norm| row /= *norm);
        }
        let shape = q_layout.shape().clone();
        Ok((CpuStorage::F32(made.into_raw_vec_and_offset().0), shape))
    }

    /// With g the gradient of out and n the normaliser: S gets φ(q)ᵀ·(g/n), s gets φ(q)ᵀ·m, and φ(q) gets (g/n)·Sᵀ + m·sᵀ,
    /// for m = −Σ g/n ⊙ out over a row.
    fn bwd(
        &self,
        q: &Tensor,
        state: &Tensor,
        out: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (r, dim) = q.dims2()?;
        let sizes = self.cut.sizes(r, dim)?;
        let (of_q, of_state) = with([q, state, out, gradient], |[q, state, out, g]| {
            let (q, state) = (rows(q, sizes)?, states(state, sizes)?);
            let (out, g) = (rows(out, sizes)?, rows(g, sizes)?);
            let mut of_q = Array3::<f32>::zeros(sizes.rows());
            let mut of_state = Array4::<f32>::zeros(sizes.state());
            for (sample, head, columns) in sizes.parts() {
                let of = s![sample, .., columns];
                let (q, out) = (q.slice(of), out.slice(of));
                let state = state.slice(s![sample, head, .., ..]);
                let (sums, norm) = (
                    state.slice(s![.., ..sizes.width]),
                    state.column(sizes.width),
                );
                let mut g = g.slice(of).to_owned();
                let mut of_norms = norms(&q, &norm, self.eps);
                Zip::from(g.rows_mut())
                    .and(out.rows())
                    .and(&mut of_norms)
                    .for_each(|mut g, out, n| {
                        g /= *n;
                        *n = -g.dot(&out);
                    });
                let mut of_q = of_q.slice_mut(of);
                Zip::from(of_q.rows_mut())
                    .and(&of_norms)
                    .for_each(|mut row, m| row.scaled_add(*m, &norm));
                general_mat_mul(1.0, &g, &sums.t(), 1.0, &mut of_q);
                let mut of_state = of_state.slice_mut(s![sample, head, .., ..]);
                let (mut of_sums, mut of_norm) =
                    of_state.multi_slice_mut((s![.., ..sizes.width], s![.., sizes.width]));
                general_mat_mul(1.0, &q.t(), &g, 0.0, &mut of_sums);
                of_norm.assign(&q.t().dot(&of_norms));
            }
            Ok::<_, Error>((of_q, of_state))
        })??;
        let made = of_state.into_raw_vec_and_offset().0;
        let of_state = Tensor::from_vec(made, state.shape(), state.device())?;
        Ok((Some(tensor(of_q, q)?), Some(of_state)))
    }
}
