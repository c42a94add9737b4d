//! Vectors as plain arrays, for machines without a kernel of their own and for doubles.
//!
//! The compiler turns the array loops into whatever vector instructions the enclosing function
//! may use.

use half::{bf16, f16};

use super::panels::TileShape;
use super::simd::{Accumulator, Convert, Kernel, Simd, Vector, exp32};

/// N numbers; FUSED where multiply-add is one instruction (elsewhere it would be a library call).
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Lanes<A, const N: usize, const FUSED: bool>(pub(super) [A; N]);

macro_rules! vector {
    ($t:ty) => {
        // SAFETY: plain arithmetic; loads and stores touch N numbers.
        unsafe impl<const N: usize, const FUSED: bool> Vector for Lanes<$t, N, FUSED> {
            type Number = $t;
            const LANES: usize = N;
            #[inline(always)]
            unsafe fn splat(value: $t) -> Self {
                Self([value; N])
            }
            #[inline(always)]
            unsafe fn load(from: *const $t) -> Self {
                // SAFETY: the caller gives N readable numbers.
                Self(unsafe { from.cast::<[$t; N]>().read_unaligned() })
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $t) {
                // SAFETY: the caller gives N writable numbers.
                unsafe { to.cast::<[$t; N]>().write_unaligned(self.0) }
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
            }
            #[inline(always)]
            unsafe fn mul(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| self.0[i] * other.0[i]))
            }
            #[inline(always)]
            unsafe fn max(self, other: Self) -> Self {
                Self(std::array::from_fn(|i| self.0[i].max(other.0[i])))
            }
            #[inline(always)]
            unsafe fn mul_add(self, a: Self, b: Self) -> Self {
                Self(std::array::from_fn(|i| {
                    if FUSED {
                        self.0[i].mul_add(a.0[i], b.0[i])
                    } else {
                        self.0[i] * a.0[i] + b.0[i]
                    }
                }))
            }
        }
    };
}
vector!(f32);
vector!(f64);

/// Plain code for the target's baseline: four `f32`, two `f64`.
#[derive(Clone, Copy)]
pub(super) struct Portable<A, const N: usize, const FUSED: bool>(std::marker::PhantomData<A>);

macro_rules! portable {
    ($t:ty, $map:ident) => {
        // SAFETY: baseline code, available everywhere.
        unsafe impl<const N: usize, const FUSED: bool> Simd for Portable<$t, N, FUSED> {
            type Number = $t;
            type Full = Lanes<$t, N, FUSED>;
            type Half = Lanes<$t, N, FUSED>;
            const TILE: TileShape = TileShape {
                lanes: N,
                half_columns: false,
                max_columns: 2,
                rows: [0, 4, 4, 0, 0, 0],
            };
            #[inline(always)]
            unsafe fn feature_map(u: Self::Full) -> Self::Full {
                Lanes(u.0.map($map::<FUSED>))
            }
            #[inline(always)]
            unsafe fn feature_map_half(u: Self::Half) -> Self::Half {
                // SAFETY: as for the trait.
                unsafe { Self::feature_map(u) }
            }
            #[inline(always)]
            unsafe fn extend_half(v: Self::Half) -> Self::Full {
                v
            }
            #[inline(always)]
            unsafe fn sum(v: Self::Full) -> $t {
                v.0.iter().sum()
            }
            #[inline(always)]
            unsafe fn vectorize<K: Kernel>(kernel: K) {
                // SAFETY: the caller keeps the kernel's contract.
                unsafe { kernel.run() }
            }
        }

        // SAFETY: reads and writes exactly the counts stated.
        unsafe impl<T, const N: usize, const FUSED: bool> Convert<T> for Portable<$t, N, FUSED>
        where
            T: Widen<$t>,
        {
            #[inline(always)]
            unsafe fn read(from: *const T) -> Self::Full {
                // SAFETY: the caller gives N readable elements.
                Lanes(unsafe { from.cast::<[T; N]>().read_unaligned() }.map(T::widen))
            }
            #[inline(always)]
            unsafe fn read_part(from: *const T, count: usize) -> Self::Full {
                let mut lanes = [<$t>::ZERO; N];
                for (i, lane) in lanes.iter_mut().enumerate().take(count) {
                    // SAFETY: the caller gives `count` readable elements.
                    *lane = unsafe { *from.add(i) }.widen();
                }
                Lanes(lanes)
            }
            #[inline(always)]
            unsafe fn read_half(from: *const T, count: usize) -> Self::Half {
                // SAFETY: as for the trait.
                unsafe { Self::read_part(from, count) }
            }
            #[inline(always)]
            unsafe fn write(v: Self::Full, to: *mut T) {
                // SAFETY: the caller gives N writable elements.
                unsafe { to.cast::<[T; N]>().write_unaligned(v.0.map(T::narrow)) }
            }
            #[inline(always)]
            unsafe fn write_part(v: Self::Full, to: *mut T, count: usize) {
                for (i, &lane) in v.0.iter().enumerate().take(count) {
                    // SAFETY: the caller gives `count` writable elements.
                    unsafe { to.add(i).write(T::narrow(lane)) };
                }
            }
            #[inline(always)]
            unsafe fn write_half(v: Self::Half, to: *mut T, count: usize) {
                // SAFETY: as for the caller.
                unsafe { Self::write_part(v, to, count) }
            }
        }
    };
}
portable!(f32, feature_map_f32);
portable!(f64, feature_map_f64);

/// Exact widening and rounding to nearest even.
pub(super) trait Widen<A>: Copy + Send + Sync + 'static {
    fn widen(self) -> A;
    fn narrow(value: A) -> Self;
}

impl Widen<f32> for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Widen<f64> for f64 {
    #[inline(always)]
    fn widen(self) -> f64 {
        self
    }
    #[inline(always)]
    fn narrow(value: f64) -> Self {
        value
    }
}

impl Widen<f32> for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Widen<f32> for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
}

#[inline(always)]
fn fma32<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn fma64<const FUSED: bool>(a: f64, b: f64, c: f64) -> f64 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// 1.5·2²³: added to a small number it rounds to an integer, which then stands in the low bits.
const ROUND32: f32 = 12_582_912.0;
/// 1.5·2⁵², likewise.
const ROUND64: f64 = 6_755_399_441_055_744.0;

#[inline(always)]
fn feature_map_f32<const FUSED: bool>(u: f32) -> f32 {
    // Comparisons are written so that NaN goes through unchanged.
    let x = if u > 0.0 { 0.0 } else { u };
    let x = if x < exp32::LOWEST { exp32::LOWEST } else { x };
    let rounded = fma32::<FUSED>(x, exp32::LOG2_E, ROUND32);
    let n = rounded - ROUND32;
    let r = fma32::<FUSED>(n, -exp32::LN2_HI, x);
    let r = fma32::<FUSED>(n, -exp32::LN2_LO, r);
    let mut y = exp32::COEFFICIENTS[0];
    for &c in &exp32::COEFFICIENTS[1..] {
        y = fma32::<FUSED>(y, r, c);
    }
    // 2ⁿ in two factors: n reaches -151, beyond the normal exponents.
    let n = (rounded.to_bits() as i32).wrapping_sub(ROUND32.to_bits() as i32);
    let half = n >> 1;
    let low = f32::from_bits((half.wrapping_add(127) as u32) << 23);
    let high = f32::from_bits(((n.wrapping_sub(half)).wrapping_add(127) as u32) << 23);
    let exp = y * low * high;
    if u > 0.0 { u + 1.0 } else { exp }
}

/// Below this exp underflows to zero even as a subnormal.
const LOWEST64: f64 = -746.0;
/// The leading bits of ln 2, so that n·LN2_HI is exact, and the rest.
const LN2_HI64: f64 = 0.693_147_180_369_123_8;
const LN2_LO64: f64 = 1.908_214_929_270_587_7e-10;

/// 1/13! … 1/2!: the Taylor series of exp, whose next term is below 2⁻⁵⁶ for |r| ≤ ln 2 / 2.
const TAYLOR64: [f64; 12] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
];

#[inline(always)]
pub(super) fn feature_map_f64<const FUSED: bool>(u: f64) -> f64 {
    let x = if u > 0.0 { 0.0 } else { u };
    let x = if x < LOWEST64 { LOWEST64 } else { x };
    let rounded = fma64::<FUSED>(x, std::f64::consts::LOG2_E, ROUND64);
    let n = rounded - ROUND64;
    let r = fma64::<FUSED>(n, -LN2_HI64, x);
    let r = fma64::<FUSED>(n, -LN2_LO64, r);
    let mut p = TAYLOR64[0];
    for &c in &TAYLOR64[1..] {
        p = fma64::<FUSED>(p, r, c);
    }
    let y = fma64::<FUSED>(p, r * r, r) + 1.0;
    let n = (rounded.to_bits() as i64).wrapping_sub(ROUND64.to_bits() as i64);
    let half = n >> 1;
    let low = f64::from_bits((half.wrapping_add(1023) as u64) << 52);
    let high = f64::from_bits(((n.wrapping_sub(half)).wrapping_add(1023) as u64) << 52);
    let exp = y * low * high;
    if u > 0.0 { u + 1.0 } else { exp }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_maps_are_within_two_ulp() {
        let mut worst = (0.0f64, 0.0f64);
        for step in 0..400_000 {
            let u = -105.0 + f64::from(step) * (107.0 / 400_000.0);
            let single = u as f32;
            let exact = crate::reference::feature_map(f64::from(single));
            let ulp = f64::from((exact as f32).next_up() - exact as f32);
            for found in [
                feature_map_f32::<true>(single),
                feature_map_f32::<false>(single),
            ] {
                worst.0 = worst.0.max((f64::from(found) - exact).abs() / ulp);
            }
            // The standard library's exp is itself within one ulp.
            let exact = crate::reference::feature_map(u * 7.0);
            let ulp = exact.next_up() - exact;
            for found in [
                feature_map_f64::<true>(u * 7.0),
                feature_map_f64::<false>(u * 7.0),
            ] {
                worst.1 = worst.1.max((found - exact).abs() / ulp);
            }
        }
        assert!(worst.0 <= 2.0 && worst.1 <= 2.0, "{worst:?}");
    }

    #[test]
    fn feature_maps_at_the_edges() {
        for (u, expected) in [
            (0.0f32, 1.0f32),
            (-0.0, 1.0),
            (f32::NEG_INFINITY, 0.0),
            (-65504.0, 0.0),
            (f32::MIN, 0.0),
            (f32::INFINITY, f32::INFINITY),
            (65504.0, 65505.0),
        ] {
            assert_eq!(feature_map_f32::<true>(u), expected, "{u}");
            assert_eq!(
                feature_map_f64::<true>(f64::from(u)),
                f64::from(expected),
                "{u}"
            );
        }
        assert!(feature_map_f32::<true>(f32::NAN).is_nan());
        assert!(feature_map_f64::<true>(f64::NAN).is_nan());
    }
}
