//! A node of the CUDA provider: its tensors' addresses, memory for partial sums, launches on its stream.

use std::ffi::c_void;
use std::ptr;

use ort_sys::{OrtAllocator, OrtKernelContext, OrtValue};

use super::OrtError;
use super::api::Api;
use super::node::{Attrs, Node};
use super::scratch::Scratch;
use crate::cuda;
use crate::cuda::driver::{CudaError, Gpu, Stream};
use crate::cuda::plan::{Addresses, Launch, LinearPlan, WindowPlan};
use crate::schema::{Dims, WindowDims};

/// What a node of the CUDA provider has beside its attributes.
pub(super) struct CudaNode {
    kernels: &'static [u8],
    scratch: Scratch,
}

impl CudaNode {
    /// Loads the kernels where the session's thread has a context already, so that a device that can't run them is
    /// told of when the session is made, and so that nothing is loaded while a CUDA graph is captured.
    pub(super) fn new(api: Api) -> Result<Self, OrtError> {
        let kernels = cuda::kernels().ok_or(CudaError::NotBuilt)?;
        let scratch = super::scratch_of(api).ok_or(OrtError::CudaRelease)?;
        // SAFETY: the library's own kernels.
        unsafe { Gpu::current(kernels) }?;
        Ok(Self { kernels, scratch })
    }

    /// # Safety
    /// `context` must be the running node's, of the CUDA provider.
    pub(super) unsafe fn compute(
        &self,
        node: &Node,
        context: *mut OrtKernelContext,
    ) -> Result<(), OrtError> {
        let code = node.element.onnx_code();
        // SAFETY: by the contract above. Inputs, the output and the workspace are device memory
        // of the sizes that the plan was made for; what is freed behind the launches stays with
        // the stream they are on.
        unsafe {
            let stream = Stream(node.api.gpu_stream(context)?);
            let gpu = Gpu::of_stream(stream, self.kernels)?;
            let q = node.placed(context, 0, code)?;
            let k = node.placed(context, 1, code)?;
            let v = node.placed(context, 2, code)?;
            let call = match &node.attrs {
                Attrs::Linear(attrs) => {
                    Call::Linear(Dims::new(&q.shape, &k.shape, &v.shape, attrs)?)
                }
                Attrs::Window(attrs) => {
                    let grid = node.grid(context)?;
                    Call::Window(WindowDims::new(&q.shape, &k.shape, &v.shape, grid, attrs)?)
                }
            };
            let shape: Vec<i64> = call.out_shape().iter().map(|&d| d as i64).collect();
            let value = node.api.output(context, 0, &shape)?;
            let out = node.api.tensor_data(value)?;
            let mut at = Addresses {
                q: q.address as u64,
                k: k.address as u64,
                v: v.address as u64,
                out: out as u64,
                workspace: 0,
            };
            let aligned = [at.q, at.k, at.v, at.out]
                .iter()
                .all(|a| a.is_multiple_of(16));
            let plan = call.plan(node, aligned, gpu)?;
            let workspace = Workspace::new(self, node.api, context, value, plan.workspace_bytes())?;
            at.workspace = workspace.memory as u64;
            gpu.launch(stream, &plan.launches(&at))?;
            Ok(())
        }
    }
}

/// Sizes of a call.
enum Call {
    Linear(Dims),
    Window(WindowDims),
}

impl Call {
    fn out_shape(&self) -> Vec<usize> {
        match self {
            Self::Linear(dims) => dims.out_shape(),
            Self::Window(dims) => dims.out_shape(),
        }
    }

    fn plan(&self, node: &Node, aligned: bool, gpu: &Gpu) -> Result<Plan, OrtError> {
        let (element, device) = (node.element, gpu.device());
        Ok(match (self, &node.attrs) {
            (Self::Linear(dims), Attrs::Linear(attrs)) => {
                Plan::Linear(LinearPlan::new(dims, element, attrs.eps, aligned, device)?)
            }
            (Self::Window(dims), Attrs::Window(attrs)) => {
                Plan::Window(WindowPlan::new(dims, attrs, element, aligned, device)?)
            }
            _ => return Err(OrtError::Panic("sizes of another operator".into())),
        })
    }
}

enum Plan {
    Linear(LinearPlan),
    Window(WindowPlan),
}

impl Plan {
    fn workspace_bytes(&self) -> usize {
        match self {
            Self::Linear(plan) => plan.workspace_bytes(),
            Self::Window(plan) => plan.workspace_bytes(),
        }
    }

    fn launches(&self, at: &Addresses) -> Vec<Launch> {
        match self {
            Self::Linear(plan) => plan.launches(at),
            Self::Window(plan) => plan.launches(at),
        }
    }
}

/// Device memory of the session's arena, until it is dropped.
struct Workspace {
    api: Api,
    allocator: *mut OrtAllocator,
    memory: *mut c_void,
}

impl Workspace {
    /// Memory where `like` lies.
    ///
    /// # Safety
    /// As for [`CudaNode::compute`]; `like` must be a tensor on the node's device.
    unsafe fn new(
        node: &CudaNode,
        api: Api,
        context: *const OrtKernelContext,
        like: *const OrtValue,
        bytes: usize,
    ) -> Result<Self, OrtError> {
        let mut workspace = Self {
            api,
            allocator: ptr::null_mut(),
            memory: ptr::null_mut(),
        };
        if bytes > 0 {
            // SAFETY: by the contract above. The allocator is fetched first: whatever fails then,
            // it is given back.
            unsafe {
                let info = api.memory_info(like)?;
                workspace.allocator = api.allocator(context, info)?;
                workspace.memory = node.scratch.buffer(api, context, info, bytes)?;
            }
        }
        Ok(workspace)
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if !self.allocator.is_null() {
            // SAFETY: what `new` fetched.
            unsafe { self.api.release_allocator(self.allocator, self.memory) };
        }
    }
}
