//! Products of matrices, by ndarray. candle's own ask the system how many cores it has at each product, which on Linux is
//! a reading of `/proc/cpuinfo`: a third of the time of a step of learning on two cores, more where there are more.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Error, Layout, Result, Shape, Tensor};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, Axis, Ix2};

use super::{values, view, with};

/// `rows` `[R, I]` · `weight` `[O, I]`ᵀ.
pub struct Product;
/// [`Product`] with `bias` `[O]` added to each row.
pub struct Linear;

/// a · b.
fn product(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Array2<f32> {
    let mut made = Array2::zeros((a.nrows(), b.ncols()));
    general_mat_mul(1.0, &a, &b, 0.0, &mut made);
    made
}

/// A stored matrix.
fn matrix<'s>(storage: &'s CpuStorage, layout: &Layout) -> Result<ArrayView2<'s, f32>> {
    let (rows, columns) = layout.shape().dims2()?;
    view(values(storage, layout)?, Ix2(rows, columns))
}

fn stored(made: Array2<f32>) -> (CpuStorage, Shape) {
    let shape = Shape::from(made.dim());
    (CpuStorage::F32(made.into_raw_vec_and_offset().0), shape)
}

fn tensor(made: Array2<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(
        made.into_raw_vec_and_offset().0,
        like.shape(),
        like.device(),
    )
}

/// ndarray panics where a product has no sense.
fn fit(rows: &ArrayView2<'_, f32>, weight: &ArrayView2<'_, f32>) -> Result<()> {
    match rows.ncols() == weight.ncols() {
        true => Ok(()),
        false => Err(Error::Msg(format!(
            "rows of {} have no layer of {:?}",
            rows.ncols(),
            weight.dim()
        ))),
    }
}

/// The gradients of `rows` and `weight`; none for what is not learned, as a model's activations.
fn gradients(rows: &Tensor, weight: &Tensor, gradient: &Tensor) -> Result<[Option<Tensor>; 2]> {
    let (r, i) = rows.dims2()?;
    let (o, _) = weight.dims2()?;
    let made = with([rows, weight, gradient], |[x, w, g]| {
        let (x, w, g) = (
            view(x, Ix2(r, i))?,
            view(w, Ix2(o, i))?,
            view(g, Ix2(r, o))?,
        );
        let of_rows = rows.track_op().then(|| product(g, w));
        let of_weight = weight.track_op().then(|| product(g.t(), x));
        Ok::<_, Error>([of_rows, of_weight])
    })??;
    let [of_rows, of_weight] = made;
    Ok([
        of_rows.map(|made| tensor(made, rows)).transpose()?,
        of_weight.map(|made| tensor(made, weight)).transpose()?,
    ])
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn cpu_fwd(
        &self,
        rows: &CpuStorage,
        rows_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, weight) = (matrix(rows, rows_layout)?, matrix(weight, weight_layout)?);
        fit(&rows, &weight)?;
        Ok(stored(product(rows, weight.t())))
    }

    fn bwd(
        &self,
        rows: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [of_rows, of_weight] = gradients(rows, weight, gradient)?;
        Ok((of_rows, of_weight))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        rows: &CpuStorage,
        rows_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, weight) = (matrix(rows, rows_layout)?, matrix(weight, weight_layout)?);
        fit(&rows, &weight)?;
        let mut made = Array2::zeros((rows.nrows(), weight.nrows()));
        made.assign(&view(values(bias, bias_layout)?, Ix2(1, weight.nrows()))?);
        general_mat_mul(1.0, &rows, &weight.t(), 1.0, &mut made);
        Ok(stored(made))
    }

    fn bwd(
        &self,
        rows: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [of_rows, of_weight] = gradients(rows, weight, gradient)?;
        let (r, o) = gradient.dims2()?;
        let of_bias = with([gradient], |[g]| {
            Ok::<_, Error>(view(g, Ix2(r, o))?.sum_axis(Axis(0)))
        })??;
        let of_bias = Tensor::from_vec(of_bias.to_vec(), bias.shape(), bias.device())?;
        Ok((of_rows, of_weight, Some(of_bias)))
    }
}
