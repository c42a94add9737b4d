//! The operator's entries: one `OrtCustomOp` per element type, and their callbacks.
//!
//! No panic leaves a callback: it becomes a status.

use std::any::Any;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

use half::{bf16, f16};
use ort_sys::{
    ONNXTensorElementDataType, OrtApi, OrtCustomOp, OrtCustomOpInputOutputCharacteristic,
    OrtKernelContext, OrtKernelInfo, OrtMemType, OrtShapeInferContext, OrtStatusPtr,
};

use super::api::{API_VERSION, Api, InferredDim};
use super::{OrtError, with_node};
use crate::cpu::{self, Element, Execution, Isa, Pool, Tensors};
use crate::schema::{Dims, ElementType, INPUT_NAMES, LinFusionAttentionAttrs};

const NAME: &CStr = c"LinFusionAttention";
const ATTR_NUM_HEADS: &CStr = c"num_heads";
const ATTR_EPS: &CStr = c"eps";

/// An entry. ONNX Runtime hands the callbacks a pointer to the first field.
#[repr(C)]
pub(super) struct Entry {
    op: OrtCustomOp,
    element: ElementType,
}

impl Entry {
    /// The entries of all element types; they live for ever, as ONNX Runtime keeps pointers.
    pub(super) fn all() -> &'static [Self] {
        static ALL: OnceLock<Vec<Entry>> = OnceLock::new();
        ALL.get_or_init(|| ElementType::ALL.map(Self::new).into())
    }

    pub(super) fn as_op(&'static self) -> *const OrtCustomOp {
        (&raw const *self).cast()
    }

    fn new(element: ElementType) -> Self {
        // SAFETY: an integer and nullable function pointers; all zeros is a value of each. Fields
        // that newer bindings add stay null, and ONNX Runtime goes by `version`.
        let mut op: OrtCustomOp = unsafe { MaybeUninit::zeroed().assume_init() };
        op.version = API_VERSION;
        op.GetName = Some(get_name);
        op.GetExecutionProviderType = Some(get_provider);
        op.GetInputType = Some(get_type);
        op.GetInputTypeCount = Some(get_input_count);
        op.GetOutputType = Some(get_type);
        op.GetOutputTypeCount = Some(get_output_count);
        op.GetInputCharacteristic = Some(get_characteristic);
        op.GetOutputCharacteristic = Some(get_characteristic);
        op.GetInputMemoryType = Some(get_memory_type);
        op.GetVariadicInputMinArity = Some(get_zero);
        op.GetVariadicInputHomogeneity = Some(get_zero);
        op.GetVariadicOutputMinArity = Some(get_zero);
        op.GetVariadicOutputHomogeneity = Some(get_zero);
        op.GetStartVersion = Some(get_version);
        op.GetEndVersion = Some(get_end_version);
        op.CreateKernelV2 = Some(create_kernel);
        op.KernelComputeV2 = Some(compute);
        op.KernelDestroy = Some(destroy);
        op.InferOutputShapeFn = Some(infer_shape);
        Self { op, element }
    }
}

/// One node of a session.
struct Node {
    api: Api,
    name: String,
    attrs: LinFusionAttentionAttrs,
    element: ElementType,
}

unsafe extern "system" fn get_name(_: *const OrtCustomOp) -> *const c_char {
    NAME.as_ptr()
}

/// Null: the CPU provider.
unsafe extern "system" fn get_provider(_: *const OrtCustomOp) -> *const c_char {
    std::ptr::null()
}

unsafe extern "system" fn get_type(op: *const OrtCustomOp, _: usize) -> ONNXTensorElementDataType {
    // SAFETY: ONNX Runtime passes the pointer it was given, the first field of an `Entry`.
    tensor_type(unsafe { (*op.cast::<Entry>()).element })
}

unsafe extern "system" fn get_input_count(_: *const OrtCustomOp) -> usize {
    INPUT_NAMES.len()
}

unsafe extern "system" fn get_output_count(_: *const OrtCustomOp) -> usize {
    1
}

unsafe extern "system" fn get_characteristic(
    _: *const OrtCustomOp,
    _: usize,
) -> OrtCustomOpInputOutputCharacteristic {
    OrtCustomOpInputOutputCharacteristic::INPUT_OUTPUT_REQUIRED
}

unsafe extern "system" fn get_memory_type(_: *const OrtCustomOp, _: usize) -> OrtMemType {
    OrtMemType::OrtMemTypeDefault
}

unsafe extern "system" fn get_zero(_: *const OrtCustomOp) -> c_int {
    0
}

unsafe extern "system" fn get_version(_: *const OrtCustomOp) -> c_int {
    crate::schema::OPSET_VERSION as c_int
}

unsafe extern "system" fn get_end_version(_: *const OrtCustomOp) -> c_int {
    c_int::MAX
}

unsafe extern "system" fn create_kernel(
    op: *const OrtCustomOp,
    api: *const OrtApi,
    info: *const OrtKernelInfo,
    kernel: *mut *mut c_void,
) -> OrtStatusPtr {
    // SAFETY: ONNX Runtime passes its own table, an entry of ours and a place for the result.
    unsafe {
        let Some(api) = Api::from_table(api) else {
            return OrtStatusPtr::default();
        };
        guarded(api, || {
            let node = Node::new(api, info, (*op.cast::<Entry>()).element)?;
            kernel.write(Box::into_raw(Box::new(node)).cast());
            Ok(())
        })
    }
}

unsafe extern "system" fn destroy(kernel: *mut c_void) {
    if !kernel.is_null() {
        // SAFETY: made by `create_kernel`, destroyed once.
        drop(unsafe { Box::from_raw(kernel.cast::<Node>()) });
    }
}

unsafe extern "system" fn compute(
    kernel: *mut c_void,
    context: *mut OrtKernelContext,
) -> OrtStatusPtr {
    // SAFETY: made by `create_kernel`; shared only, as sessions may run on several threads.
    let Some(node) = (unsafe { kernel.cast::<Node>().as_ref() }) else {
        return OrtStatusPtr::default();
    };
    guarded(node.api, || {
        // SAFETY: ONNX Runtime passes the running node's context.
        unsafe { node.compute(context) }.map_err(|e| with_node(&node.name, e))
    })
}

unsafe extern "system" fn infer_shape(
    _: *const OrtCustomOp,
    context: *mut OrtShapeInferContext,
) -> OrtStatusPtr {
    // The callback is not given a table; every one that registered us has these functions.
    let Some(api) = super::any_api() else {
        return OrtStatusPtr::default();
    };
    guarded(api, || {
        // SAFETY: ONNX Runtime passes a context of the node at hand.
        unsafe {
            let (code, q) = api.inferred_input(context, 0)?;
            let (_, v) = api.inferred_input(context, 2)?;
            let Some(element) = ElementType::from_onnx_code(code) else {
                return Ok(());
            };
            // Unknown shapes are for the run to check.
            let Some(dims) = output_dims(&q, &v) else {
                return Ok(());
            };
            api.set_inferred_output(context, 0, tensor_type(element), &dims)
        }
    })
}

/// q's dimensions with v's width, where that can be told to ONNX Runtime.
fn output_dims(q: &[InferredDim], v: &[InferredDim]) -> Option<Vec<InferredDim>> {
    let (_, rows) = q.split_last()?;
    let width = v.last()?;
    let dims: Vec<_> = rows.iter().chain([width]).cloned().collect();
    let known = q.len() == v.len() && !dims.contains(&InferredDim::Unknown);
    known.then_some(dims)
}

fn tensor_type(element: ElementType) -> ONNXTensorElementDataType {
    use ONNXTensorElementDataType as Type;
    match element {
        ElementType::F32 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
        ElementType::F16 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
        ElementType::Bf16 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
        ElementType::F64 => Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE,
    }
}

/// Runs a callback's work; an error or a panic becomes a status.
pub(super) fn guarded(api: Api, work: impl FnOnce() -> Result<(), OrtError>) -> OrtStatusPtr {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => OrtStatusPtr::default(),
        Ok(Err(error)) => api.failure(&format!("linfusion-ops: {error}")),
        Err(panic) => api.failure(&format!("linfusion-ops: {}", OrtError::panic(&*panic))),
    }
}

impl Node {
    /// # Safety
    /// `info` must be what the `CreateKernel` callback was given.
    unsafe fn new(
        api: Api,
        info: *const OrtKernelInfo,
        element: ElementType,
    ) -> Result<Self, OrtError> {
        // SAFETY: by the contract above.
        unsafe {
            let name = api.node_name(info)?;
            let in_node = |error| with_node(&name, error);
            let heads = api
                .int_attribute(info, ATTR_NUM_HEADS)
                .map_err(|_| in_node(OrtError::NumHeads))?;
            let eps = match api.float_attribute(info, ATTR_EPS) {
                Ok(eps) => Some(eps),
                // There is no "is it there?": an attribute that reads as an integer is.
                Err(_) if api.int_attribute(info, ATTR_EPS).is_ok() => {
                    return Err(in_node(OrtError::EpsType));
                }
                Err(_) => None,
            };
            let attrs = LinFusionAttentionAttrs::new(heads, eps)
                .map_err(|e| in_node(OrtError::Shape(e.into())))?;
            Ok(Self {
                api,
                name,
                attrs,
                element,
            })
        }
    }

    /// # Safety
    /// `context` must be the running node's.
    unsafe fn compute(&self, context: *mut OrtKernelContext) -> Result<(), OrtError> {
        // SAFETY: by the contract above.
        unsafe {
            match self.element {
                ElementType::F32 => self.compute_as::<f32>(context),
                ElementType::F16 => self.compute_as::<f16>(context),
                ElementType::Bf16 => self.compute_as::<bf16>(context),
                ElementType::F64 => self.compute_as::<f64>(context),
            }
        }
    }

    /// # Safety
    /// As for [`Self::compute`].
    unsafe fn compute_as<T: Element>(
        &self,
        context: *mut OrtKernelContext,
    ) -> Result<(), OrtError> {
        let api = self.api;
        // SAFETY: by the contract above; slices have the lengths of the tensors' shapes, and the
        // output is written only through `out`.
        unsafe {
            let q = self.input::<T>(context, 0)?;
            let k = self.input::<T>(context, 1)?;
            let v = self.input::<T>(context, 2)?;
            let dims = Dims::new(&q.shape, &k.shape, &v.shape, &self.attrs)?;
            let shape: Vec<i64> = dims.out_shape().iter().map(|&d| d as i64).collect();
            let value = api.output(context, 0, &shape)?;
            let len = shape.iter().map(|&d| d as usize).product();
            let out = if len == 0 {
                &mut []
            } else {
                let data = api.tensor_data(value)?.cast::<MaybeUninit<T>>();
                std::slice::from_raw_parts_mut(data, len)
            };
            let pool = OrtPool {
                api,
                context,
                failure: Mutex::new(None),
            };
            let tensors = Tensors {
                q: q.data,
                k: k.data,
                v: v.data,
                out,
            };
            let execution = Execution {
                isa: Isa::best(),
                pool: &pool,
            };
            cpu::linfusion_attention(&dims, self.attrs.eps, tensors, execution)?;
            let failure = pool.failure.into_inner();
            failure
                .unwrap_or_else(PoisonError::into_inner)
                .map_or(Ok(()), Err)
        }
    }

    /// # Safety
    /// As for [`Self::compute`]; the result must not outlive the callback.
    unsafe fn input<'a, T: Element>(
        &self,
        context: *const OrtKernelContext,
        index: usize,
    ) -> Result<Input<'a, T>, OrtError> {
        let input = INPUT_NAMES[index];
        // SAFETY: by the contract above; the tensor's data has the length of its shape.
        unsafe {
            let value = self.api.input(context, index)?;
            if value.is_null() {
                return Err(OrtError::MissingInput { input });
            }
            let (code, shape) = self.api.tensor_info(value)?;
            if code != T::TYPE.onnx_code() {
                return Err(OrtError::ElementType {
                    input,
                    expected: T::TYPE,
                    found: code,
                });
            }
            let shape = shape
                .iter()
                .map(|&d| usize::try_from(d))
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| OrtError::NegativeDim {
                    input,
                    shape: shape.clone(),
                })?;
            let len = shape.iter().product();
            let data = if len == 0 {
                &[]
            } else {
                let data = self.api.tensor_data(value.cast_mut())?;
                std::slice::from_raw_parts(data.cast::<T>(), len)
            };
            Ok(Input { shape, data })
        }
    }
}

struct Input<'a, T> {
    shape: Vec<usize>,
    data: &'a [T],
}

/// ONNX Runtime's intra-op threads.
struct OrtPool {
    api: Api,
    context: *const OrtKernelContext,
    failure: Mutex<Option<OrtError>>,
}

// SAFETY: only the thread that runs the node uses `context`, in `run`; tasks reach `failure`,
// which is locked.
unsafe impl Sync for OrtPool {}

/// What a task finds behind its data pointer.
struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    failure: &'a Mutex<Option<OrtError>>,
}

impl Pool for OrtPool {
    fn run(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        if count <= 1 {
            (0..count).for_each(task);
            return;
        }
        let job = Job {
            task,
            failure: &self.failure,
        };
        let data = (&raw const job).cast_mut().cast();
        // SAFETY: the job outlives the call, which returns when all tasks are done.
        let result = unsafe { self.api.parallel_for(self.context, run_task, count, data) };
        if let Err(error) = result {
            record(&self.failure, error);
        }
    }
}

unsafe extern "C" fn run_task(data: *mut c_void, index: usize) {
    // SAFETY: `OrtPool::run` passed a job that is still alive.
    let job = unsafe { &*data.cast::<Job<'_>>() };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.task)(index))) {
        record(job.failure, OrtError::panic(&*panic));
    }
}

fn record(place: &Mutex<Option<OrtError>>, error: OrtError) {
    let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
    place.get_or_insert(error);
}

impl OrtError {
    fn panic(payload: &(dyn Any + Send)) -> Self {
        let message = payload
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "without a message".into());
        Self::Panic(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// The C struct of API 17: an integer, then pointers in the order of the header. Newer
    /// bindings may only append.
    #[test]
    fn the_struct_is_that_of_version_17() {
        let word = size_of::<usize>();
        let fields = [
            offset_of!(OrtCustomOp, version),
            offset_of!(OrtCustomOp, CreateKernel),
            offset_of!(OrtCustomOp, GetName),
            offset_of!(OrtCustomOp, GetExecutionProviderType),
            offset_of!(OrtCustomOp, GetInputType),
            offset_of!(OrtCustomOp, GetInputTypeCount),
            offset_of!(OrtCustomOp, GetOutputType),
            offset_of!(OrtCustomOp, GetOutputTypeCount),
            offset_of!(OrtCustomOp, KernelCompute),
            offset_of!(OrtCustomOp, KernelDestroy),
            offset_of!(OrtCustomOp, GetInputCharacteristic),
            offset_of!(OrtCustomOp, GetOutputCharacteristic),
            offset_of!(OrtCustomOp, GetInputMemoryType),
            offset_of!(OrtCustomOp, GetVariadicInputMinArity),
            offset_of!(OrtCustomOp, GetVariadicInputHomogeneity),
            offset_of!(OrtCustomOp, GetVariadicOutputMinArity),
            offset_of!(OrtCustomOp, GetVariadicOutputHomogeneity),
            offset_of!(OrtCustomOp, CreateKernelV2),
            offset_of!(OrtCustomOp, KernelComputeV2),
            offset_of!(OrtCustomOp, InferOutputShapeFn),
            offset_of!(OrtCustomOp, GetStartVersion),
            offset_of!(OrtCustomOp, GetEndVersion),
        ];
        let expected: Vec<usize> = (0..fields.len()).map(|i| i * word).collect();
        assert_eq!(fields.to_vec(), expected);
        for entry in Entry::all() {
            assert_eq!(entry.op.version, 17);
            assert_eq!(offset_of!(Entry, op), 0);
        }
    }

    #[test]
    fn unnamed_dimensions_are_left_unknown() {
        let known = InferredDim::Known;
        let named = |s: &str| InferredDim::Named(s.into());
        let q = [named("batch"), named("hw"), known(40)];
        let v = [known(2), known(77), known(80)];
        assert_eq!(
            output_dims(&q, &v),
            Some(vec![named("batch"), named("hw"), known(80)])
        );
        assert_eq!(
            output_dims(&[known(1), InferredDim::Unknown, known(4)], &v),
            None
        );
        assert_eq!(output_dims(&q, &v[1..]), None);
        assert_eq!(output_dims(&[], &[]), None);
    }
}
