//! What the kernels ask of an instruction set, and φ in terms of it.

use super::panels::TileShape;

/// A number that sums are taken in.
pub(super) trait Accumulator: Copy + Send + Sync + 'static {
    const ZERO: Self;
    fn from_f64(value: f64) -> Self;
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
}

macro_rules! accumulator {
    ($t:ty) => {
        impl Accumulator for $t {
            const ZERO: Self = 0.0;
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as Self
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self * other
            }
            #[inline(always)]
            fn div(self, other: Self) -> Self {
                self / other
            }
        }
    };
}
accumulator!(f32);
accumulator!(f64);

/// Vectors of [`Vector::LANES`] numbers.
///
/// # Safety
/// Every method must only be called where the implementing instruction set is available; pointers
/// must be valid for the lanes that are read or written. No alignment is required.
pub(super) unsafe trait Vector: Copy {
    type Number: Accumulator;
    const LANES: usize;
    unsafe fn splat(value: Self::Number) -> Self;
    unsafe fn load(from: *const Self::Number) -> Self;
    unsafe fn store(self, to: *mut Self::Number);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    /// The larger, lane by lane; either where one is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// `self * a + b`, fused where the instruction set has it.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
}

/// One instruction set: its vectors, its conversions, and the register tiles that suit it.
///
/// # Safety
/// As for [`Vector`].
pub(super) unsafe trait Simd: Copy + Send + Sync + 'static {
    type Number: Accumulator;
    type Full: Vector<Number = Self::Number>;
    type Half: Vector<Number = Self::Number>;
    const TILE: TileShape;

    /// φ lane by lane: `u + 1` above zero, `exp(u)` otherwise, NaN for NaN.
    unsafe fn feature_map(u: Self::Full) -> Self::Full;
    /// φ of half a vector.
    unsafe fn feature_map_half(u: Self::Half) -> Self::Half;
    /// Half a vector, then zeros.
    unsafe fn extend_half(v: Self::Half) -> Self::Full;
    /// Sum of all lanes.
    unsafe fn sum(v: Self::Full) -> Self::Number;
    /// Copies a square of `Full::LANES` rows of so many numbers, rows as columns. Steps are the
    /// numbers from one row to the next.
    #[inline(always)]
    unsafe fn transpose(
        from: *const Self::Number,
        from_step: usize,
        to: *mut Self::Number,
        to_step: usize,
    ) {
        for row in 0..Self::Full::LANES {
            for column in 0..Self::Full::LANES {
                // SAFETY: the caller gives both squares.
                unsafe { *to.add(column * to_step + row) = *from.add(row * from_step + column) };
            }
        }
    }
    /// Runs the kernel compiled for this instruction set.
    unsafe fn vectorize<K: Kernel>(kernel: K);
}

/// Conversion between memory of one element type and vectors.
///
/// # Safety
/// As for [`Vector`].
pub(super) unsafe trait Convert<T>: Simd {
    /// Reads `LANES` elements.
    unsafe fn read(from: *const T) -> Self::Full;
    /// Reads `count < LANES` elements; the other lanes are zero.
    unsafe fn read_part(from: *const T, count: usize) -> Self::Full;
    /// Reads at most half a vector's elements; the other lanes are zero.
    unsafe fn read_half(from: *const T, count: usize) -> Self::Half;
    /// The same memory as numbers, where elements are numbers.
    #[inline(always)]
    fn in_place(_from: *const T) -> Option<*const Self::Number> {
        None
    }
    /// Writes `LANES` elements, rounded to nearest even.
    unsafe fn write(v: Self::Full, to: *mut T);
    /// Writes the first `count < LANES` lanes.
    unsafe fn write_part(v: Self::Full, to: *mut T, count: usize);
    /// Writes the first `count` lanes of half a vector.
    unsafe fn write_half(v: Self::Half, to: *mut T, count: usize);
}

/// Work to be compiled for an instruction set by [`Simd::vectorize`].
pub(super) trait Kernel {
    /// Does the work.
    ///
    /// # Safety
    /// Implementations state what their fields must satisfy.
    unsafe fn run(self);
}

/// Constants of `exp` in single precision: x = n·ln 2 + r, |r| ≤ ln 2 / 2, and
/// exp(r) ≈ 1 + r·(1 + r·P(r)) with the P of degree four whose largest relative error is least,
/// 3e-9; rounding included the result is within 0.9 units in the last place with fused operations.
pub(super) mod exp32 {
    /// Below this exp underflows to zero even as a subnormal.
    pub(in super::super) const LOWEST: f32 = -104.0;
    pub(in super::super) const LOG2_E: f32 = std::f32::consts::LOG2_E;
    /// The leading bits of ln 2, so that n·LN2_HI is exact.
    pub(in super::super) const LN2_HI: f32 = 0.693_359_4;
    pub(in super::super) const LN2_LO: f32 = -2.121_944_4e-4;
    /// The coefficients of 1 + r·(1 + r·P(r)), highest power first.
    pub(in super::super) const COEFFICIENTS: [f32; 7] = [
        1.381_459_9e-3,
        8.368_717e-3,
        4.166_839e-2,
        1.666_652_1e-1,
        4.999_999_4e-1,
        1.0,
        1.0,
    ];
}
