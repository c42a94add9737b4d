//! Whole calls: plan, memory, launches.

use half::{bf16, f16};
use linfusion_ops::cuda::plan::{Addresses, Device, Launch, LinearPlan, PlanError, WindowPlan};
use linfusion_ops::schema::{
    Dims, ElementType, LinFusionAttentionAttrs, ShapeError, WindowAttentionAttrs, WindowDims,
};
use ndarray::{ArrayD, IxDyn};
use thiserror::Error;

use crate::{EmulatorError, Memory, Settings, emulate};

/// How a call is run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RunOptions {
    /// The type of all four tensors.
    pub element: ElementType,
    /// The device that the plan is made for.
    pub device: Device,
    /// How each launch is run.
    pub settings: Settings,
    /// Bytes that tensors are moved from addresses that are multiples of 16.
    pub shift: usize,
}

impl RunOptions {
    /// On an H100.
    pub fn new(element: ElementType) -> Self {
        Self {
            element,
            device: Device {
                capability: (9, 0),
                multiprocessors: 132,
                shared_bytes: 227 << 10,
            },
            settings: Settings::default(),
            shift: 0,
        }
    }
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum RunError {
    /// Shapes and attributes don't fit.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// No kernel takes these sizes.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A kernel did something wrong.
    #[error(transparent)]
    Emulator(#[from] EmulatorError),
}

/// The output of a call, and the kernels that made it.
#[derive(Debug, Clone, PartialEq)]
pub struct Bits {
    /// The output's elements as they lie in memory.
    pub bytes: Vec<u8>,
    /// The output.
    pub values: ArrayD<f64>,
    /// Names of the kernels, in order.
    pub kernels: Vec<String>,
}

/// `LinFusionAttention` of q, k and v, which are rounded to the element type first.
///
/// # Errors
/// [`RunError`].
pub fn run_linear(
    qkv: [&ArrayD<f64>; 3],
    attrs: &LinFusionAttentionAttrs,
    options: &RunOptions,
) -> Result<Bits, RunError> {
    let [q, k, v] = qkv.map(|x| x.shape());
    let dims = Dims::new(q, k, v, attrs)?;
    let RunOptions {
        element, device, ..
    } = *options;
    let aligned = options.shift.is_multiple_of(16);
    let plan = LinearPlan::new(&dims, element, attrs.eps, aligned, &device)?;
    let launches = |at: &Addresses| plan.launches(at);
    run(
        qkv,
        &dims.out_shape(),
        plan.workspace_bytes(),
        launches,
        options,
    )
}

/// `WindowAttention` of q, k and v, which are rounded to the element type first.
///
/// # Errors
/// [`RunError`].
pub fn run_window(
    qkv: [&ArrayD<f64>; 3],
    grid: [i64; 2],
    attrs: &WindowAttentionAttrs,
    options: &RunOptions,
) -> Result<Bits, RunError> {
    let [q, k, v] = qkv.map(|x| x.shape());
    let dims = WindowDims::new(q, k, v, grid, attrs)?;
    let RunOptions {
        element, device, ..
    } = *options;
    let aligned = options.shift.is_multiple_of(16);
    let plan = WindowPlan::new(&dims, attrs, element, aligned, &device)?;
    let launches = |at: &Addresses| plan.launches(at);
    run(
        qkv,
        &dims.out_shape(),
        plan.workspace_bytes(),
        launches,
        options,
    )
}

fn run(
    qkv: [&ArrayD<f64>; 3],
    out_shape: &[usize],
    workspace_bytes: usize,
    launches: impl Fn(&Addresses) -> Vec<Launch>,
    options: &RunOptions,
) -> Result<Bits, RunError> {
    let [q, k, v] = qkv.map(|x| Memory::of(&encode(x, options.element), options.shift));
    let len: usize = out_shape.iter().product();
    let out = Memory::new(len * options.element.size(), options.shift);
    let workspace = Memory::new(workspace_bytes, 0);
    let launches = launches(&Addresses {
        q: q.address(),
        k: k.address(),
        v: v.address(),
        out: out.address(),
        workspace: workspace.address(),
    });
    for launch in &launches {
        // SAFETY: the memory is as large as the plan and the shapes say, and alive.
        unsafe { emulate(launch, &options.settings) }?;
    }
    let bytes = out.bytes();
    Ok(Bits {
        values: decode(&bytes, out_shape, options.element),
        bytes,
        kernels: launches.into_iter().map(|l| l.kernel).collect(),
    })
}

fn encode(x: &ArrayD<f64>, element: ElementType) -> Vec<u8> {
    let each = |x: &f64| match element {
        ElementType::F32 => (*x as f32).to_ne_bytes().to_vec(),
        ElementType::F16 => f16::from_f64(*x).to_ne_bytes().to_vec(),
        ElementType::Bf16 => bf16::from_f64(*x).to_ne_bytes().to_vec(),
        ElementType::F64 => x.to_ne_bytes().to_vec(),
    };
    x.iter().flat_map(each).collect()
}

fn decode(bytes: &[u8], shape: &[usize], element: ElementType) -> ArrayD<f64> {
    let each = |b: &[u8]| match element {
        ElementType::F32 => f64::from(f32::from_ne_bytes(array(b))),
        ElementType::F16 => f16::from_ne_bytes(array(b)).to_f64(),
        ElementType::Bf16 => bf16::from_ne_bytes(array(b)).to_f64(),
        ElementType::F64 => f64::from_ne_bytes(array(b)),
    };
    let values = bytes.chunks_exact(element.size()).map(each).collect();
    ArrayD::from_shape_vec(IxDyn(shape), values).expect("as many elements as the shape says")
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("chunks of the element's size")
}
