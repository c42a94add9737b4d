//! CUDA: the kernels' sources, and how a call is turned into launches.
//!
//! [`plan`] is arithmetic on shapes and runs everywhere; `kernels/` has the CUDA C++.

pub mod params;
pub mod plan;
