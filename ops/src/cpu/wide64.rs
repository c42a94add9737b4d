//! Doubles under AVX2 and AVX-512.

use std::arch::x86_64::*;

use super::lanes::{Lanes, feature_map_f64};
use super::panels::TileShape;
use super::simd::{Convert, Kernel, Simd, Vector};

macro_rules! doubles {
    ($simd:ident, $vector:ident, $raw:ty, $lanes:literal, $max_columns:literal, $rows:expr, $features:literal,
     $splat:ident, $load:ident, $store:ident, $add:ident, $mul:ident, $max:ident, $fma:ident) => {
        /// Doubles.
        #[derive(Clone, Copy)]
        #[repr(transparent)]
        pub(super) struct $vector($raw);

        /// The instruction set, for doubles.
        #[derive(Clone, Copy)]
        pub(super) struct $simd;

        // SAFETY: all methods need the features of `vectorize` only; accesses are unaligned.
        unsafe impl Vector for $vector {
            type Number = f64;
            const LANES: usize = $lanes;
            #[inline(always)]
            unsafe fn splat(value: f64) -> Self {
                // SAFETY: as for the trait.
                Self(unsafe { $splat(value) })
            }
            #[inline(always)]
            unsafe fn load(from: *const f64) -> Self {
                // SAFETY: as for the trait.
                Self(unsafe { $load(from) })
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut f64) {
                // SAFETY: as for the trait.
                unsafe { $store(to, self.0) }
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                // SAFETY: as for the trait.
                Self(unsafe { $add(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn mul(self, other: Self) -> Self {
                // SAFETY: as for the trait.
                Self(unsafe { $mul(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn max(self, other: Self) -> Self {
                // SAFETY: as for the trait.
                Self(unsafe { $max(self.0, other.0) })
            }
            #[inline(always)]
            unsafe fn mul_add(self, a: Self, b: Self) -> Self {
                // SAFETY: as for the trait.
                Self(unsafe { $fma(self.0, a.0, b.0) })
            }
        }

        impl $vector {
            #[inline(always)]
            unsafe fn lanes(self) -> [f64; $lanes] {
                let mut lanes = [0.0; $lanes];
                // SAFETY: room for all lanes.
                unsafe { self.store(lanes.as_mut_ptr()) };
                lanes
            }
        }

        // SAFETY: `vectorize` enables what the methods use.
        unsafe impl Simd for $simd {
            type Number = f64;
            type Full = $vector;
            type Half = $vector;
            const TILE: TileShape = TileShape {
                lanes: $lanes,
                half_columns: false,
                max_columns: $max_columns,
                rows: $rows,
            };
            #[inline(always)]
            unsafe fn feature_map(u: $vector) -> $vector {
                // SAFETY: as for the trait. The compiler vectorises the array loop.
                unsafe {
                    let mapped: Lanes<f64, $lanes, true> =
                        Lanes(u.lanes().map(feature_map_f64::<true>));
                    $vector::load(mapped.0.as_ptr())
                }
            }
            #[inline(always)]
            unsafe fn feature_map_half(u: $vector) -> $vector {
                // SAFETY: as for the trait.
                unsafe { Self::feature_map(u) }
            }
            #[inline(always)]
            unsafe fn extend_half(v: $vector) -> $vector {
                v
            }
            #[inline(always)]
            unsafe fn sum(v: $vector) -> f64 {
                // SAFETY: as for the trait.
                unsafe { v.lanes() }.iter().sum()
            }
            #[inline(always)]
            unsafe fn vectorize<K: Kernel>(kernel: K) {
                #[target_feature(enable = $features)]
                #[inline(never)]
                unsafe fn enabled<K: Kernel>(kernel: K) {
                    // SAFETY: the caller keeps the kernel's contract.
                    unsafe { kernel.run() }
                }
                // SAFETY: the caller has these instructions.
                unsafe { enabled(kernel) }
            }
        }

        // SAFETY: parts touch no element beyond the count.
        unsafe impl Convert<f64> for $simd {
            #[inline(always)]
            unsafe fn read(from: *const f64) -> $vector {
                // SAFETY: as for the trait.
                unsafe { $vector::load(from) }
            }
            #[inline(always)]
            unsafe fn read_part(from: *const f64, count: usize) -> $vector {
                let mut lanes = [0.0; $lanes];
                for (i, lane) in lanes.iter_mut().enumerate().take(count) {
                    // SAFETY: `count` elements are readable.
                    *lane = unsafe { *from.add(i) };
                }
                // SAFETY: all lanes are there.
                unsafe { $vector::load(lanes.as_ptr()) }
            }
            #[inline(always)]
            unsafe fn read_half(from: *const f64, count: usize) -> $vector {
                // SAFETY: as for the trait.
                unsafe { Self::read_part(from, count) }
            }
            #[inline(always)]
            unsafe fn write(v: $vector, to: *mut f64) {
                // SAFETY: as for the trait.
                unsafe { v.store(to) }
            }
            #[inline(always)]
            unsafe fn write_part(v: $vector, to: *mut f64, count: usize) {
                // SAFETY: `count` elements are writable.
                unsafe {
                    for (i, &lane) in v.lanes().iter().enumerate().take(count) {
                        to.add(i).write(lane);
                    }
                }
            }
            #[inline(always)]
            unsafe fn write_half(v: $vector, to: *mut f64, count: usize) {
                // SAFETY: as for the trait.
                unsafe { Self::write_part(v, to, count) }
            }
        }
    };
}

doubles!(
    Avx2Doubles,
    D4,
    __m256d,
    4,
    3,
    [0, 8, 6, 4, 0, 0],
    "avx2,fma",
    _mm256_set1_pd,
    _mm256_loadu_pd,
    _mm256_storeu_pd,
    _mm256_add_pd,
    _mm256_mul_pd,
    _mm256_max_pd,
    _mm256_fmadd_pd
);
doubles!(
    Avx512Doubles,
    D8,
    __m512d,
    8,
    5,
    [0, 8, 8, 8, 6, 5],
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma",
    _mm512_set1_pd,
    _mm512_loadu_pd,
    _mm512_storeu_pd,
    _mm512_add_pd,
    _mm512_mul_pd,
    _mm512_max_pd,
    _mm512_fmadd_pd
);
