//! AVX-512 (F, BW, DQ, VL): sixteen `f32`, with half vectors for short rests.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::panels::TileShape;
use super::simd::{Convert, Kernel, Simd, Vector, exp32};

/// Sixteen numbers.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct V16(__m512);

/// Eight numbers.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct V8(__m256);

/// The instruction set.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

// SAFETY: all methods need AVX-512F only; unaligned loads and stores of sixteen numbers.
unsafe impl Vector for V16 {
    type Number = f32;
    const LANES: usize = 16;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as for the trait.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: as for the trait.
        Self(unsafe { _mm512_fmadd_ps(self.0, a.0, b.0) })
    }
}

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
unsafe impl Simd for Avx512 {
    type Number = f32;
    type Full = V16;
    type Half = V8;
    // 32 registers: rows × columns accumulators, one row of columns, one broadcast.
    const TILE: TileShape = TileShape {
        lanes: 16,
        half_columns: true,
        max_columns: 5,
        rows: [0, 8, 8, 8, 6, 5],
    };

    #[inline(always)]
    unsafe fn feature_map(u: V16) -> V16 {
        // SAFETY: as for the trait.
        unsafe {
            // What becomes of numbers above zero, infinity included, is masked out at the end.
            // max returns its second operand where one is NaN, so NaN goes through.
            let x = _mm512_max_ps(_mm512_set1_ps(exp32::LOWEST), u.0);
            let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                _mm512_mul_ps(x, _mm512_set1_ps(exp32::LOG2_E)),
            );
            let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(exp32::LN2_HI), x);
            let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(exp32::LN2_LO), r);
            let mut y = _mm512_set1_ps(exp32::COEFFICIENTS[0]);
            for &c in &exp32::COEFFICIENTS[1..] {
                y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
            }
            let exp = _mm512_scalef_ps(y, n);
            let positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(u.0, _mm512_setzero_ps());
            V16(_mm512_mask_add_ps(exp, positive, u.0, _mm512_set1_ps(1.0)))
        }
    }

    #[inline(always)]
    unsafe fn feature_map_half(u: V8) -> V8 {
        // SAFETY: as for the trait.
        unsafe {
            // What becomes of numbers above zero, infinity included, is masked out at the end.
            // max returns its second operand where one is NaN, so NaN goes through.
            let x = _mm256_max_ps(_mm256_set1_ps(exp32::LOWEST), u.0);
            let n = _mm256_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                _mm256_mul_ps(x, _mm256_set1_ps(exp32::LOG2_E)),
            );
            let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(exp32::LN2_HI), x);
            let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(exp32::LN2_LO), r);
            let mut y = _mm256_set1_ps(exp32::COEFFICIENTS[0]);
            for &c in &exp32::COEFFICIENTS[1..] {
                y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
            }
            let exp = _mm256_scalef_ps(y, n);
            let positive = _mm256_cmp_ps_mask::<_CMP_GT_OQ>(u.0, _mm256_setzero_ps());
            V8(_mm256_mask_add_ps(exp, positive, u.0, _mm256_set1_ps(1.0)))
        }
    }

    #[inline(always)]
    unsafe fn extend_half(v: V8) -> V16 {
        // SAFETY: as for the trait.
        V16(unsafe { _mm512_zextps256_ps512(v.0) })
    }

    #[inline(always)]
    unsafe fn sum(v: V16) -> f32 {
        // SAFETY: as for the trait.
        unsafe { _mm512_reduce_add_ps(v.0) }
    }

    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_step: usize, to: *mut f32, to_step: usize) {
        // SAFETY: as for the trait.
        unsafe {
            let mut rows = [_mm512_setzero_ps(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(from.add(i * from_step));
            }
            // In fours of rows, lane by lane of 128 bits: element j of each.
            let mut fours = rows;
            for i in (0..16).step_by(4) {
                let [a, b, c, d] = [rows[i], rows[i + 1], rows[i + 2], rows[i + 3]];
                let low = [_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d)];
                let high = [_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d)];
                fours[i] = _mm512_shuffle_ps::<0x44>(low[0], low[1]);
                fours[i + 1] = _mm512_shuffle_ps::<0xee>(low[0], low[1]);
                fours[i + 2] = _mm512_shuffle_ps::<0x44>(high[0], high[1]);
                fours[i + 3] = _mm512_shuffle_ps::<0xee>(high[0], high[1]);
            }
            // Lanes of 128 bits of the four fours.
            for j in 0..4 {
                let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
                let even = [
                    _mm512_shuffle_f32x4::<0x88>(a, b),
                    _mm512_shuffle_f32x4::<0x88>(c, d),
                ];
                let odd = [
                    _mm512_shuffle_f32x4::<0xdd>(a, b),
                    _mm512_shuffle_f32x4::<0xdd>(c, d),
                ];
                let columns = [
                    _mm512_shuffle_f32x4::<0x88>(even[0], even[1]),
                    _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]),
                    _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]),
                    _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]),
                ];
                for (lane, column) in columns.into_iter().enumerate() {
                    _mm512_storeu_ps(to.add((lane * 4 + j) * to_step), column);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn vectorize<K: Kernel>(kernel: K) {
        // Not inlined: each tile stays a function of its own, with registers of its own.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
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
fn mask16(count: usize) -> __mmask16 {
    (1u32 << count).wrapping_sub(1) as __mmask16
}

#[inline(always)]
fn mask8(count: usize) -> __mmask8 {
    (1u32 << count).wrapping_sub(1) as __mmask8
}

// SAFETY: masked accesses touch no element beyond the count.
unsafe impl Convert<f32> for Avx512 {
    #[inline(always)]
    unsafe fn read(from: *const f32) -> V16 {
        // SAFETY: as for the trait.
        V16(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn read_part(from: *const f32, count: usize) -> V16 {
        // SAFETY: as for the trait.
        V16(unsafe { _mm512_maskz_loadu_ps(mask16(count), from) })
    }
    #[inline(always)]
    unsafe fn read_half(from: *const f32, count: usize) -> V8 {
        // SAFETY: as for the trait.
        V8(unsafe { _mm256_maskz_loadu_ps(mask8(count), from) })
    }
    #[inline(always)]
    fn in_place(from: *const f32) -> Option<*const f32> {
        Some(from)
    }
    #[inline(always)]
    unsafe fn write(v: V16, to: *mut f32) {
        // SAFETY: as for the trait.
        unsafe { _mm512_storeu_ps(to, v.0) }
    }
    #[inline(always)]
    unsafe fn write_part(v: V16, to: *mut f32, count: usize) {
        // SAFETY: as for the trait.
        unsafe { _mm512_mask_storeu_ps(to, mask16(count), v.0) }
    }
    #[inline(always)]
    unsafe fn write_half(v: V8, to: *mut f32, count: usize) {
        // SAFETY: as for the trait.
        unsafe { _mm256_mask_storeu_ps(to, mask8(count), v.0) }
    }
}

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

// SAFETY: as for f32.
unsafe impl Convert<f16> for Avx512 {
    #[inline(always)]
    unsafe fn read(from: *const f16) -> V16 {
        // SAFETY: as for the trait.
        V16(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }
    #[inline(always)]
    unsafe fn read_part(from: *const f16, count: usize) -> V16 {
        // SAFETY: as for the trait.
        V16(unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask16(count), from.cast())) })
    }
    #[inline(always)]
    unsafe fn read_half(from: *const f16, count: usize) -> V8 {
        // SAFETY: as for the trait.
        V8(unsafe { _mm256_cvtph_ps(_mm_maskz_loadu_epi16(mask8(count), from.cast())) })
    }
    #[inline(always)]
    unsafe fn write(v: V16, to: *mut f16) {
        // SAFETY: as for the trait.
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<NEAREST>(v.0)) }
    }
    #[inline(always)]
    unsafe fn write_part(v: V16, to: *mut f16, count: usize) {
        // SAFETY: as for the trait.
        unsafe {
            let half = _mm512_cvtps_ph::<NEAREST>(v.0);
            _mm256_mask_storeu_epi16(to.cast(), mask16(count), half);
        }
    }
    #[inline(always)]
    unsafe fn write_half(v: V8, to: *mut f16, count: usize) {
        // SAFETY: as for the trait.
        unsafe {
            let half = _mm256_cvtps_ph::<NEAREST>(v.0);
            _mm_mask_storeu_epi16(to.cast(), mask8(count), half);
        }
    }
}

/// Sixteen bfloat16, rounded to nearest even; NaN stays NaN.
#[inline(always)]
unsafe fn to_bf16(v: __m512) -> __m256i {
    // SAFETY: the caller has AVX-512F and BW.
    unsafe {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        let rounded = _mm512_add_epi32(bits, bias);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
        let rounded = _mm512_mask_mov_epi32(rounded, nan, quiet);
        _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
    }
}

// SAFETY: as for f32.
unsafe impl Convert<bf16> for Avx512 {
    #[inline(always)]
    unsafe fn read(from: *const bf16) -> V16 {
        // SAFETY: as for the trait.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            V16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn read_part(from: *const bf16, count: usize) -> V16 {
        // SAFETY: as for the trait.
        unsafe {
            let narrow = _mm256_maskz_loadu_epi16(mask16(count), from.cast());
            let wide = _mm512_cvtepu16_epi32(narrow);
            V16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn read_half(from: *const bf16, count: usize) -> V8 {
        // SAFETY: as for the trait.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask8(count), from.cast()));
            V8(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn write(v: V16, to: *mut bf16) {
        // SAFETY: as for the trait.
        unsafe { _mm256_storeu_si256(to.cast(), to_bf16(v.0)) }
    }
    #[inline(always)]
    unsafe fn write_part(v: V16, to: *mut bf16, count: usize) {
        // SAFETY: as for the trait.
        unsafe { _mm256_mask_storeu_epi16(to.cast(), mask16(count), to_bf16(v.0)) }
    }
    #[inline(always)]
    unsafe fn write_half(v: V8, to: *mut bf16, count: usize) {
        // SAFETY: as for the trait.
        unsafe {
            let narrow = to_bf16(_mm512_castps256_ps512(v.0));
            _mm256_mask_storeu_epi16(to.cast(), mask16(count), narrow);
        }
    }
}
