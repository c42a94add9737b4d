//! Which instruction sets there are kernels for, and the choice at run time.

use std::fmt;
use std::marker::PhantomData;
use std::sync::OnceLock;

use half::{bf16, f16};

use super::element::Dispatch;
use super::lanes::Portable;
use super::panels::TileShape;
use super::simd::Simd;
use super::task::{Accumulate, Apply, On};
use super::window::WindowTask;

#[cfg(target_arch = "x86_64")]
use super::{
    avx2::Avx2,
    avx512::Avx512,
    wide64::{Avx2Doubles, Avx512Doubles},
};

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// The target's baseline: SSE2 on x86-64, NEON on aarch64.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The instruction sets this machine has kernels for, the fastest last.
    pub fn available() -> &'static [Self] {
        static AVAILABLE: OnceLock<Vec<Isa>> = OnceLock::new();
        AVAILABLE.get_or_init(detect)
    }

    /// The fastest instruction set of this machine.
    pub fn best() -> Self {
        Self::available().last().copied().unwrap_or(Self::Portable)
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Vec<Isa> {
    let mut found = vec![Isa::Portable];
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
    {
        found.push(Isa::Avx2);
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            found.push(Isa::Avx512);
        }
    }
    found
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Vec<Isa> {
    vec![Isa::Portable]
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable if cfg!(target_arch = "aarch64") => "neon",
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
        })
    }
}

/// Whether multiply-add is one instruction of the baseline.
const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

macro_rules! dispatch {
    ($element:ty, $number:ty, $portable:ty, $avx2:ty, $avx512:ty) => {
        impl Dispatch for $element {
            type Number = $number;
            fn tile(isa: Isa) -> TileShape {
                match isa {
                    Isa::Portable => <$portable as Simd>::TILE,
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => <$avx2 as Simd>::TILE,
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => <$avx512 as Simd>::TILE,
                }
            }
            unsafe fn accumulate(isa: Isa, task: Accumulate<'_, Self, $number>) {
                // SAFETY: the caller keeps `Accumulate`'s contract and has the instructions.
                unsafe {
                    match isa {
                        Isa::Portable => {
                            <$portable>::vectorize(On::<$portable, _>(task, PhantomData))
                        }
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx2 => <$avx2>::vectorize(On::<$avx2, _>(task, PhantomData)),
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx512 => <$avx512>::vectorize(On::<$avx512, _>(task, PhantomData)),
                    }
                }
            }
            unsafe fn apply(isa: Isa, task: Apply<'_, Self, $number>) {
                // SAFETY: the caller keeps `Apply`'s contract and has the instructions.
                unsafe {
                    match isa {
                        Isa::Portable => {
                            <$portable>::vectorize(On::<$portable, _>(task, PhantomData))
                        }
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx2 => <$avx2>::vectorize(On::<$avx2, _>(task, PhantomData)),
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx512 => <$avx512>::vectorize(On::<$avx512, _>(task, PhantomData)),
                    }
                }
            }
            unsafe fn window(isa: Isa, task: WindowTask<'_, Self, $number>) {
                // SAFETY: the caller keeps `WindowTask`'s contract and has the instructions.
                unsafe {
                    match isa {
                        Isa::Portable => {
                            <$portable>::vectorize(On::<$portable, _>(task, PhantomData))
                        }
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx2 => <$avx2>::vectorize(On::<$avx2, _>(task, PhantomData)),
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx512 => <$avx512>::vectorize(On::<$avx512, _>(task, PhantomData)),
                    }
                }
            }
        }
    };
}

type Portable32 = Portable<f32, 4, FUSED>;
type Portable64 = Portable<f64, 2, FUSED>;

dispatch!(f32, f32, Portable32, Avx2, Avx512);
dispatch!(f16, f32, Portable32, Avx2, Avx512);
dispatch!(bf16, f32, Portable32, Avx2, Avx512);
dispatch!(f64, f64, Portable64, Avx2Doubles, Avx512Doubles);
