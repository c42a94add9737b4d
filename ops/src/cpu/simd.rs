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
    /// The first half of the lanes.
    unsafe fn lower_half(v: Self::Full) -> Self::Half;
    /// Sum of all lanes.
    unsafe fn sum(v: Self::Full) -> Self::Number;
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
/// exp(r) ≈ 1 + r + r²·P(r) with the minimax P of the Cephes library (Moshier, `expf`).
pub(super) mod exp32 {
    /// Below this exp underflows to zero even as a subnormal.
    pub(in super::super) const LOWEST: f32 = -104.0;
    pub(in super::super) const LOG2_E: f32 = std::f32::consts::LOG2_E;
    /// The leading bits of ln 2, so that n·LN2_HI is exact.
    pub(in super::super) const LN2_HI: f32 = 0.693_359_4;
    pub(in super::super) const LN2_LO: f32 = -2.121_944_4e-4;
    /// P's coefficients, highest power first.
    pub(in super::super) const P: [f32; 6] = [
        1.987_569_1e-4,
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];
}
