//! Convolution by weights that stay: candle's own gradient also computes that of the weights, as a convolution by
//! kernels as large as the image.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Storage, Tensor};

/// The form of a convolution of one or two dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Conv {
    /// Zeros before and after the rows, before and after the columns.
    pub pads: [usize; 4],
    /// Of rows and columns alike.
    pub stride: usize,
    /// Of rows and columns alike.
    pub dilation: usize,
    /// Channels are convolved within so many groups.
    pub groups: usize,
}

impl Conv {
    /// `x` `[B, C, H, W]` by `kernel` `[O, C / groups, rows, columns]`, or both without rows.
    pub fn apply(self, x: &Tensor, kernel: &Tensor) -> Result<Tensor> {
        if x.rank() == 3 {
            return self
                .apply(&x.unsqueeze(2)?, &kernel.unsqueeze(2)?)?
                .squeeze(2);
        }
        let [top, bottom, left, right] = self.pads;
        let x = padded(x, 2, top, bottom)?;
        let x = padded(&x, 3, left, right)?.contiguous()?;
        let made = x
            .detach()
            .conv2d(kernel, 0, self.stride, self.dilation, self.groups)?
            .contiguous()?;
        match x.track_op() {
            true => x.apply_op1(Convolved {
                kernel: kernel.clone(),
                form: self,
                made,
            }),
            false => Ok(made),
        }
    }

    /// The gradient by the padded `x` of `size`.
    fn gradient(self, out: &Tensor, kernel: &Tensor, size: [usize; 2]) -> Result<Tensor> {
        let (_, _, rows, cols) = kernel.dims4()?;
        // A stride is a convolution of stride 1 of which some outputs are left out: those have no gradient.
        let out = spread(&spread(out, 2, self.stride)?, 3, self.stride)?;
        let mut out = out;
        for (axis, kernel, size) in [(2, rows, size[0]), (3, cols, size[1])] {
            // Rows at the end that no window reached have no gradient either.
            let after = size.saturating_sub(out.dim(axis)?);
            out = padded(&out, axis, self.dilation * (kernel - 1), after)?;
        }
        out.contiguous()?
            .conv2d(&self.turned(kernel)?, 0, 1, self.dilation, self.groups)
    }

    /// The kernel with inputs and outputs exchanged, in each group, and turned by half a turn.
    fn turned(self, kernel: &Tensor) -> Result<Tensor> {
        let (o, c, rows, cols) = kernel.dims4()?;
        kernel
            .reshape((self.groups, o / self.groups.max(1), c, rows, cols))?
            .transpose(1, 2)?
            .reshape((self.groups * c, o / self.groups.max(1), rows, cols))?
            .flip(&[2, 3])?
            .contiguous()
    }
}

fn padded(x: &Tensor, axis: usize, before: usize, after: usize) -> Result<Tensor> {
    match (before, after) {
        (0, 0) => Ok(x.clone()),
        _ => x.pad_with_zeros(axis, before, after),
    }
}

/// `x` with `by − 1` zeros between neighbours of an axis.
fn spread(x: &Tensor, axis: usize, by: usize) -> Result<Tensor> {
    if by == 1 {
        return Ok(x.clone());
    }
    let mut dims = x.dims().to_vec();
    let Some(len) = dims.get(axis).copied().filter(|len| *len > 0) else {
        return Ok(x.clone());
    };
    let wide = x.unsqueeze(axis + 1)?.pad_with_zeros(axis + 1, 0, by - 1)?;
    if let Some(size) = dims.get_mut(axis) {
        *size = len * by;
    }
    wide.reshape(dims)?.narrow(axis, 0, len * by - (by - 1))
}

/// A convolution that was computed, for its gradient.
struct Convolved {
    kernel: Tensor,
    form: Conv,
    made: Tensor,
}

impl CustomOp1 for Convolved {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.made.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => {
                let values = values.get(start..end).unwrap_or_default().to_vec();
                Ok((CpuStorage::F32(values), self.made.shape().clone()))
            }
            _ => candle_core::bail!("a convolution was not computed in float32 on the processor"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.made.storage_and_layout();
        match &*storage {
            // The copy is of all that the storage holds.
            Storage::Cuda(values)
                if layout.contiguous_offsets() == Some((0, self.made.elem_count())) =>
            {
                Ok((values.try_clone(layout)?, self.made.shape().clone()))
            }
            _ => candle_core::bail!("a convolution was not computed on the GPU"),
        }
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (_, _, height, width) = x.dims4()?;
        self.form
            .gradient(gradient, &self.kernel, [height, width])
            .map(Some)
    }
}
