//! Which instruction sets there are kernels for, and the choice at run time.

use std::fmt;
use std::marker::PhantomData;
use std::sync::OnceLock;

use half::{bf16, f16};

use super::element::Dispatch;
use super::kernel::{Accumulate, Apply, On};
use super::lanes::Portable;
use super::panels::TileShape;
use super::simd::Simd;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// The target's baseline (SSE2 on x86-64, NEON on aarch64).
    Portable,
}

impl Isa {
    /// The instruction sets this machine has kernels for, the fastest last.
    pub fn available() -> Vec<Self> {
        vec![Self::Portable]
    }

    /// The fastest instruction set of this machine.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().unwrap_or(Self::Portable))
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
        })
    }
}

/// Whether multiply-add is one instruction of the baseline.
const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

macro_rules! dispatch {
    ($element:ty, $number:ty, $($isa:pat => $simd:ty),+ $(,)?) => {
        impl Dispatch for $element {
            type Number = $number;
            fn tile(isa: Isa) -> TileShape {
                match isa {
                    $($isa => <$simd as Simd>::TILE,)+
                }
            }
            unsafe fn accumulate(isa: Isa, task: Accumulate<'_, Self, $number>) {
                match isa {
                    // SAFETY: the caller keeps `Accumulate`'s contract and has the instructions.
                    $($isa => unsafe {
                        <$simd>::vectorize(On::<$simd, _>(task, PhantomData));
                    },)+
                }
            }
            unsafe fn apply(isa: Isa, task: Apply<'_, Self, $number>) {
                match isa {
                    // SAFETY: the caller keeps `Apply`'s contract and has the instructions.
                    $($isa => unsafe {
                        <$simd>::vectorize(On::<$simd, _>(task, PhantomData));
                    },)+
                }
            }
        }
    };
}

type Portable32 = Portable<f32, 4, FUSED>;
type Portable64 = Portable<f64, 2, FUSED>;

dispatch!(f32, f32, Isa::Portable => Portable32);
dispatch!(f16, f32, Isa::Portable => Portable32);
dispatch!(bf16, f32, Isa::Portable => Portable32);
dispatch!(f64, f64, Isa::Portable => Portable64);
