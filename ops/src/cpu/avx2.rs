//! AVX2, FMA and F16C: eight `f32`.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::panels::TileShape;
use super::simd::{Convert, Kernel, Simd, Vector, exp32};

/// Eight numbers.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct V8(__m256);

/// The instruction set.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

// SAFETY: all methods need AVX and FMA only; unaligned loads and stores of eight numbers.
unsafe impl Vector for V8 {
    type Number = f32;
    const LANES: usize = 8;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm256_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm256_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as for the trait.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm256_fmadd_ps(self.0, a.0, b.0) })
    }
}

// SAFETY: `vectorize` enables what the methods use.
unsafe impl Simd for Avx2 {
    type Number = f32;
    type Full = V8;
    type Half = V8;
    // 16 registers: rows × columns accumulators, one row of columns, one broadcast.
    const TILE: TileShape = TileShape {
        lanes: 8,
        half_columns: false,
        max_columns: 3,
        rows: [0, 8, 6, 4, 0, 0],
    };

    #[inline(always)]
    unsafe fn feature_map(u: V8) -> V8 {
        // SAFETY: as for the trait.
        unsafe {
            // What becomes of numbers above zero, infinity included, is blended out at the end.
            // max returns its second operand where one is NaN, so NaN goes through.
            let x = _mm256_max_ps(_mm256_set1_ps(exp32::LOWEST), u.0);
            let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                _mm256_mul_ps(x, _mm256_set1_ps(exp32::LOG2_E)),
            );
            let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(exp32::LN2_HI), x);
            let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(exp32::LN2_LO), r);
            let mut y = _mm256_set1_ps(exp32::COEFFICIENTS[0]);
            for &c in &exp32::COEFFICIENTS[1..] {
                y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
            }
            // 2ⁿ in two factors: n reaches -151, beyond the normal exponents.
            let n = _mm256_cvtps_epi32(n);
            let low = _mm256_srai_epi32::<1>(n);
            let high = _mm256_sub_epi32(n, low);
            let exp = _mm256_mul_ps(_mm256_mul_ps(y, power_of_two(low)), power_of_two(high));
            let positive = _mm256_cmp_ps::<_CMP_GT_OQ>(u.0, _mm256_setzero_ps());
            V8(_mm256_blendv_ps(
                exp,
                _mm256_add_ps(u.0, _mm256_set1_ps(1.0)),
                positive,
            ))
        }
    }

    #[inline(always)]
    unsafe fn feature_map_half(u: V8) -> V8 {
        // SAFETY: as for the trait.
        unsafe { Self::feature_map(u) }
    }

    #[inline(always)]
    unsafe fn extend_half(v: V8) -> V8 {
        v
    }

    #[inline(always)]
    unsafe fn sum(v: V8) -> f32 {
        // SAFETY: as for the trait.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v.0), _mm256_extractf128_ps::<1>(v.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn vectorize<K: Kernel>(kernel: K) {
        // Not inlined: each tile stays a function of its own, with registers of its own.
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline(never)]
        unsafe fn enabled<K: Kernel>(kernel: K) {
            // SAFETY: the caller keeps the kernel's contract.
            unsafe { kernel.run() }
        }
        // SAFETY: the caller has these instructions.
        unsafe { enabled(kernel) }
    }
}

#[inline(always)]
unsafe fn power_of_two(n: __m256i) -> __m256 {
    // SAFETY: the caller has AVX2.
    unsafe {
        let biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    }
}

/// Copies `count` elements into a whole vector's worth of zeros, as AVX2 has no masked access to
/// 16-bit elements.
#[inline(always)]
unsafe fn widen_part<T: Copy>(from: *const T, count: usize, zero: T) -> [T; 8] {
    let mut lanes = [zero; 8];
    for (i, lane) in lanes.iter_mut().enumerate().take(count) {
        // SAFETY: the caller gives `count` readable elements.
        *lane = unsafe { *from.add(i) };
    }
    lanes
}

#[inline(always)]
unsafe fn write_lanes<T: Copy>(lanes: [T; 8], to: *mut T, count: usize) {
    for (i, &lane) in lanes.iter().enumerate().take(count) {
        // SAFETY: the caller gives `count` writable elements.
        unsafe { to.add(i).write(lane) };
    }
}

macro_rules! convert {
    ($t:ty, $zero:expr) => {
        // SAFETY: parts touch no element beyond the count.
        unsafe impl Convert<$t> for Avx2 {
            #[inline(always)]
            unsafe fn read(from: *const $t) -> V8 {
                // SAFETY: as for the trait.
                unsafe { Whole::read(from) }
            }
            #[inline(always)]
            unsafe fn read_part(from: *const $t, count: usize) -> V8 {
                // SAFETY: as for the trait.
                unsafe { Whole::read(widen_part(from, count, $zero).as_ptr()) }
            }
            #[inline(always)]
            unsafe fn read_half(from: *const $t, count: usize) -> V8 {
                // SAFETY: as for the trait.
                unsafe { Self::read_part(from, count) }
            }
            #[inline(always)]
            unsafe fn write(v: V8, to: *mut $t) {
                // SAFETY: as for the trait.
                unsafe { Whole::write(v, to) }
            }
            #[inline(always)]
            unsafe fn write_part(v: V8, to: *mut $t, count: usize) {
                let mut lanes = [$zero; 8];
                // SAFETY: as for the trait.
                unsafe {
                    Whole::write(v, lanes.as_mut_ptr());
                    write_lanes(lanes, to, count);
                }
            }
            #[inline(always)]
            unsafe fn write_half(v: V8, to: *mut $t, count: usize) {
                // SAFETY: as for the trait.
                unsafe { Self::write_part(v, to, count) }
            }
        }
    };
}
convert!(f32, 0.0);
convert!(f16, f16::ZERO);
convert!(bf16, bf16::ZERO);

/// Whole vectors of one element type.
trait Whole: Sized {
    /// # Safety
    /// Eight readable elements; AVX2 and F16C.
    unsafe fn read(from: *const Self) -> V8;
    /// # Safety
    /// Eight writable elements; AVX2 and F16C.
    unsafe fn write(v: V8, to: *mut Self);
}

impl Whole for f32 {
    #[inline(always)]
    unsafe fn read(from: *const Self) -> V8 {
        // SAFETY: as for the trait.
        V8(unsafe { _mm256_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn write(v: V8, to: *mut Self) {
        // SAFETY: as for the trait.
        unsafe { _mm256_storeu_ps(to, v.0) }
    }
}

impl Whole for f16 {
    #[inline(always)]
    unsafe fn read(from: *const Self) -> V8 {
        // SAFETY: as for the trait.
        V8(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) })
    }
    #[inline(always)]
    unsafe fn write(v: V8, to: *mut Self) {
        // SAFETY: as for the trait.
        unsafe {
            let half = _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(v.0);
            _mm_storeu_si128(to.cast(), half);
        }
    }
}

impl Whole for bf16 {
    #[inline(always)]
    unsafe fn read(from: *const Self) -> V8 {
        // SAFETY: as for the trait.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            V8(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }
    /// Rounded to nearest even; NaN stays NaN.
    #[inline(always)]
    unsafe fn write(v: V8, to: *mut Self) {
        // SAFETY: as for the trait.
        unsafe {
            let bits = _mm256_castps_si256(v.0);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_castsi256_ps(_mm256_add_epi32(bits, bias));
            let quiet = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000)));
            let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(v.0, v.0);
            let bits = _mm256_castps_si256(_mm256_blendv_ps(rounded, quiet, nan));
            let high = _mm256_srli_epi32::<16>(bits);
            // packus works on 128-bit halves; the permutation puts them in order.
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(high, high));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        }
    }
}
