//! The operators' entries: one `OrtCustomOp` per operator and element type, and their callbacks.
//!
//! No panic leaves a callback: it becomes a status.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use ort_sys::{
    ONNXTensorElementDataType, OrtApi, OrtCustomOp, OrtCustomOpInputOutputCharacteristic,
    OrtKernelContext, OrtKernelInfo, OrtMemType, OrtShapeInferContext, OrtStatusPtr,
};

use super::OrtError;
use super::api::{API_VERSION, Api, InferredDim};
use super::node::Node;
use crate::schema::{
    ElementType, INPUT_NAMES, LINFUSION_ATTENTION, WINDOW_ATTENTION, WINDOW_INPUT_NAMES,
};

/// Which operator an entry or node is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operator {
    Linear,
    Window,
}

impl Operator {
    const ALL: [Self; 2] = [Self::Linear, Self::Window];

    /// The operator's name, zero-terminated.
    fn c_name(self) -> &'static CStr {
        match self {
            Self::Linear => c"LinFusionAttention",
            Self::Window => c"WindowAttention",
        }
    }

    /// The operator's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Linear => LINFUSION_ATTENTION,
            Self::Window => WINDOW_ATTENTION,
        }
    }

    /// Names of its inputs; the first three are of the entry's type.
    pub(super) fn inputs(self) -> &'static [&'static str] {
        match self {
            Self::Linear => &INPUT_NAMES,
            Self::Window => &WINDOW_INPUT_NAMES,
        }
    }
}

/// Whose kernels an entry's are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Provider {
    Cpu,
    Cuda,
}

impl Provider {
    const ALL: [Self; 2] = [Self::Cpu, Self::Cuda];
}

/// An entry. ONNX Runtime hands the callbacks a pointer to the first field.
#[repr(C)]
pub(super) struct Entry {
    op: OrtCustomOp,
    operator: Operator,
    element: ElementType,
    provider: Provider,
}

impl Entry {
    /// The entries of all operators, element types and providers; they live for ever, as ONNX Runtime keeps pointers.
    pub(super) fn all() -> &'static [Self] {
        static ALL: OnceLock<Vec<Entry>> = OnceLock::new();
        ALL.get_or_init(|| {
            let mut all = Vec::new();
            for provider in Provider::ALL {
                for operator in Operator::ALL {
                    all.extend(ElementType::ALL.map(|e| Self::new(operator, e, provider)));
                }
            }
            all
        })
    }

    pub(super) fn as_op(&'static self) -> *const OrtCustomOp {
        (&raw const *self).cast()
    }

    pub(super) fn provider(&self) -> Provider {
        self.provider
    }

    fn new(operator: Operator, element: ElementType, provider: Provider) -> Self {
        // SAFETY: an integer and nullable function pointers; all zeros is a value of each. Fields
        // that newer bindings add stay null, and ONNX Runtime goes by `version`.
        let mut op: OrtCustomOp = unsafe { MaybeUninit::zeroed().assume_init() };
        op.version = API_VERSION;
        op.GetName = Some(get_name);
        op.GetExecutionProviderType = Some(get_provider);
        op.GetInputType = Some(get_input_type);
        op.GetInputTypeCount = Some(get_input_count);
        op.GetOutputType = Some(get_output_type);
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
        Self {
            op,
            operator,
            element,
            provider,
        }
    }
}

/// The entry behind the pointer that a callback is given.
///
/// # Safety
/// `op` must be what [`Entry::as_op`] gave.
unsafe fn entry(op: *const OrtCustomOp) -> &'static Entry {
    // SAFETY: the pointer is to the first field of an entry, which lives for ever.
    unsafe { &*op.cast::<Entry>() }
}

unsafe extern "system" fn get_name(op: *const OrtCustomOp) -> *const c_char {
    // SAFETY: ONNX Runtime passes the pointer it was given.
    unsafe { entry(op) }.operator.c_name().as_ptr()
}

unsafe extern "system" fn get_provider(op: *const OrtCustomOp) -> *const c_char {
    // SAFETY: ONNX Runtime passes the pointer it was given.
    match unsafe { entry(op) }.provider {
        // The CPU provider.
        Provider::Cpu => std::ptr::null(),
        Provider::Cuda => c"CUDAExecutionProvider".as_ptr(),
    }
}

unsafe extern "system" fn get_input_type(
    op: *const OrtCustomOp,
    index: usize,
) -> ONNXTensorElementDataType {
    if index >= INPUT_NAMES.len() {
        return ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    }
    // SAFETY: ONNX Runtime passes the pointer it was given.
    tensor_type(unsafe { entry(op) }.element)
}

unsafe extern "system" fn get_output_type(
    op: *const OrtCustomOp,
    _: usize,
) -> ONNXTensorElementDataType {
    // SAFETY: ONNX Runtime passes the pointer it was given.
    tensor_type(unsafe { entry(op) }.element)
}

unsafe extern "system" fn get_input_count(op: *const OrtCustomOp) -> usize {
    // SAFETY: ONNX Runtime passes the pointer it was given.
    unsafe { entry(op) }.operator.inputs().len()
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

unsafe extern "system" fn get_memory_type(_: *const OrtCustomOp, index: usize) -> OrtMemType {
    if index >= INPUT_NAMES.len() {
        // The grid is read by the host, whatever provider runs the node.
        return OrtMemType::OrtMemTypeCPUInput;
    }
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
            let entry = entry(op);
            let node = Node::new(api, info, entry.operator, entry.element, entry.provider)?;
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
        unsafe { node.compute(context) }
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
            assert_eq!(entry.operator.c_name().to_str(), Ok(entry.operator.name()));
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
