//! ONNX Runtime's C API at version 17, with statuses turned into `Result`s.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr;

use ort_sys::{
    ONNXTensorElementDataType, OrtAllocator, OrtApi, OrtApiBase, OrtCustomOp, OrtCustomOpDomain,
    OrtErrorCode, OrtKernelContext, OrtKernelInfo, OrtMemoryInfo, OrtSessionOptions,
    OrtShapeInferContext, OrtStatusPtr, OrtTensorTypeAndShapeInfo, OrtValue,
};

use super::OrtError;

/// The version of the C API that is asked for, whatever newer one the bindings know.
pub(super) const API_VERSION: u32 = 17;
/// The first ONNX Runtime release that has it.
pub(super) const MIN_RELEASE: &str = "1.17";

/// The function table of a loaded ONNX Runtime.
#[derive(Clone, Copy)]
pub(super) struct Api(&'static OrtApi);

impl Api {
    /// The table at [`API_VERSION`].
    ///
    /// # Safety
    /// `base` must be null or what `OrtGetApiBase` returned, of a library that stays loaded.
    ///
    /// # Errors
    /// The version of an ONNX Runtime that is too old.
    pub(super) unsafe fn from_base(base: *const OrtApiBase) -> Result<Self, TooOld> {
        // SAFETY: by the contract above; the table lives as long as the library.
        unsafe {
            let Some(base) = base.as_ref() else {
                return Err(TooOld {
                    release: "unknown".into(),
                    oldest: None,
                });
            };
            if let Some(api) = (base.GetApi)(API_VERSION).as_ref() {
                return Ok(Self(api));
            }
            // CreateStatus has kept its place since version 1, so any table can carry the message.
            let oldest = (1..API_VERSION)
                .rev()
                .find_map(|version| (base.GetApi)(version).as_ref())
                .map(Self);
            Err(TooOld {
                release: text((base.GetVersionString)()),
                oldest,
            })
        }
    }

    /// # Safety
    /// `api` must be null or a table of at least [`API_VERSION`] of a library that stays loaded.
    pub(super) unsafe fn from_table(api: *const OrtApi) -> Option<Self> {
        // SAFETY: by the contract above.
        unsafe { api.as_ref() }.map(Self)
    }

    /// Where the table lies: tells two loaded ONNX Runtimes apart.
    pub(super) fn address(self) -> usize {
        ptr::from_ref(self.0) as usize
    }

    /// A new status that carries a message.
    pub(super) fn failure(self, message: &str) -> OrtStatusPtr {
        let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
        // SAFETY: the message is copied.
        unsafe { (self.0.CreateStatus)(OrtErrorCode::ORT_FAIL, message.as_ptr()) }
    }

    /// Consumes a status.
    pub(super) fn check(self, status: OrtStatusPtr) -> Result<(), OrtError> {
        if status.0.is_null() {
            return Ok(());
        }
        // SAFETY: a status that is not null is owned by us until released.
        unsafe {
            let message = text((self.0.GetErrorMessage)(status.0));
            (self.0.ReleaseStatus)(status.0);
            Err(OrtError::OnnxRuntime(message))
        }
    }

    /// # Safety
    /// `options` must be valid session options of this ONNX Runtime.
    pub(super) unsafe fn has_config_entry(
        self,
        options: *const OrtSessionOptions,
        key: &CStr,
    ) -> Result<bool, OrtError> {
        let mut found = 0;
        // SAFETY: by the contract above.
        self.check(unsafe { (self.0.HasSessionConfigEntry)(options, key.as_ptr(), &mut found) })?;
        Ok(found != 0)
    }

    /// # Safety
    /// `options` must be valid session options of this ONNX Runtime.
    pub(super) unsafe fn add_config_entry(
        self,
        options: *mut OrtSessionOptions,
        key: &CStr,
        value: &CStr,
    ) -> Result<(), OrtError> {
        // SAFETY: by the contract above; strings are copied.
        self.check(unsafe { (self.0.AddSessionConfigEntry)(options, key.as_ptr(), value.as_ptr()) })
    }

    pub(super) fn create_domain(self, name: &CStr) -> Result<*mut OrtCustomOpDomain, OrtError> {
        let mut domain = ptr::null_mut();
        // SAFETY: the name is copied, the result written before it is read.
        self.check(unsafe { (self.0.CreateCustomOpDomain)(name.as_ptr(), &mut domain) })?;
        Ok(domain)
    }

    /// # Safety
    /// `domain` must be valid and `op` must live for ever.
    pub(super) unsafe fn add_op(
        self,
        domain: *mut OrtCustomOpDomain,
        op: *const OrtCustomOp,
    ) -> Result<(), OrtError> {
        // SAFETY: by the contract above.
        self.check(unsafe { (self.0.CustomOpDomain_Add)(domain, op) })
    }

    /// # Safety
    /// `options` and `domain` must be valid, and `domain` must live for ever.
    pub(super) unsafe fn add_domain(
        self,
        options: *mut OrtSessionOptions,
        domain: *mut OrtCustomOpDomain,
    ) -> Result<(), OrtError> {
        // SAFETY: by the contract above.
        self.check(unsafe { (self.0.AddCustomOpDomain)(options, domain) })
    }

    /// # Safety
    /// `info` must be what a `CreateKernel` callback was given.
    pub(super) unsafe fn int_attribute(
        self,
        info: *const OrtKernelInfo,
        name: &CStr,
    ) -> Result<i64, OrtError> {
        let mut value = 0;
        // SAFETY: by the contract above.
        self.check(unsafe {
            (self.0.KernelInfoGetAttribute_int64)(info, name.as_ptr(), &mut value)
        })?;
        Ok(value)
    }

    /// # Safety
    /// `info` must be what a `CreateKernel` callback was given.
    pub(super) unsafe fn float_attribute(
        self,
        info: *const OrtKernelInfo,
        name: &CStr,
    ) -> Result<f32, OrtError> {
        let mut value = 0.0;
        // SAFETY: by the contract above.
        self.check(unsafe {
            (self.0.KernelInfoGetAttribute_float)(info, name.as_ptr(), &mut value)
        })?;
        Ok(value)
    }

    /// # Safety
    /// `info` must be what a `CreateKernel` callback was given.
    pub(super) unsafe fn ints_attribute(
        self,
        info: *const OrtKernelInfo,
        name: &CStr,
    ) -> Result<Vec<i64>, OrtError> {
        let read = self.0.KernelInfoGetAttributeArray_int64;
        let mut count = 0;
        // SAFETY: a null buffer asks for the count.
        self.check(unsafe { read(info, name.as_ptr(), ptr::null_mut(), &mut count) })?;
        let mut values = vec![0; count];
        // SAFETY: the buffer has the count asked for.
        self.check(unsafe { read(info, name.as_ptr(), values.as_mut_ptr(), &mut count) })?;
        Ok(values)
    }

    /// # Safety
    /// `info` must be what a `CreateKernel` callback was given.
    pub(super) unsafe fn string_attribute(
        self,
        info: *const OrtKernelInfo,
        name: &CStr,
    ) -> Result<String, OrtError> {
        let read = self.0.KernelInfoGetAttribute_string;
        let mut size = 0;
        // SAFETY: a null buffer asks for the size, terminating zero included.
        self.check(unsafe { read(info, name.as_ptr(), ptr::null_mut(), &mut size) })?;
        let mut buffer = vec![0u8; size.max(1)];
        let to = buffer.as_mut_ptr().cast::<c_char>();
        // SAFETY: the buffer has the size asked for.
        self.check(unsafe { read(info, name.as_ptr(), to, &mut size) })?;
        let text = CStr::from_bytes_until_nul(&buffer).unwrap_or_default();
        Ok(text.to_string_lossy().into_owned())
    }

    /// # Safety
    /// `info` must be what a `CreateKernel` callback was given.
    pub(super) unsafe fn node_name(self, info: *const OrtKernelInfo) -> Result<String, OrtError> {
        let mut size = 0;
        // SAFETY: a null buffer asks for the size, terminating zero included.
        self.check(unsafe { (self.0.KernelInfo_GetNodeName)(info, ptr::null_mut(), &mut size) })?;
        let mut buffer = vec![0u8; size.max(1)];
        // SAFETY: the buffer has the size asked for.
        self.check(unsafe {
            (self.0.KernelInfo_GetNodeName)(info, buffer.as_mut_ptr().cast::<c_char>(), &mut size)
        })?;
        let name = CStr::from_bytes_until_nul(&buffer).unwrap_or_default();
        Ok(name.to_string_lossy().into_owned())
    }

    /// An input of the running node; null where it has none.
    ///
    /// # Safety
    /// `context` must be what a `KernelCompute` callback was given.
    pub(super) unsafe fn input(
        self,
        context: *const OrtKernelContext,
        index: usize,
    ) -> Result<*const OrtValue, OrtError> {
        let mut value = ptr::null();
        // SAFETY: by the contract above.
        self.check(unsafe { (self.0.KernelContext_GetInput)(context, index, &mut value) })?;
        Ok(value)
    }

    /// Allocates an output of the running node.
    ///
    /// # Safety
    /// As for [`Self::input`].
    pub(super) unsafe fn output(
        self,
        context: *mut OrtKernelContext,
        index: usize,
        shape: &[i64],
    ) -> Result<*mut OrtValue, OrtError> {
        let mut value = ptr::null_mut();
        // SAFETY: by the contract above.
        self.check(unsafe {
            (self.0.KernelContext_GetOutput)(
                context,
                index,
                shape.as_ptr(),
                shape.len(),
                &mut value,
            )
        })?;
        Ok(value)
    }

    /// Element type and shape of a tensor.
    ///
    /// # Safety
    /// `value` must be valid and not null.
    pub(super) unsafe fn tensor_info(
        self,
        value: *const OrtValue,
    ) -> Result<(i32, Vec<i64>), OrtError> {
        let mut info = ptr::null_mut();
        // SAFETY: by the contract above; the info is ours to release.
        unsafe {
            self.check((self.0.GetTensorTypeAndShape)(value, &mut info))?;
            let result = self.type_and_shape(info);
            (self.0.ReleaseTensorTypeAndShapeInfo)(info);
            result
        }
    }

    /// # Safety
    /// `info` must be valid.
    unsafe fn type_and_shape(
        self,
        info: *const OrtTensorTypeAndShapeInfo,
    ) -> Result<(i32, Vec<i64>), OrtError> {
        let mut element = ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        let mut rank = 0;
        // SAFETY: by the contract above; `shape` has the rank that is passed with it.
        unsafe {
            self.check((self.0.GetTensorElementType)(info, &mut element))?;
            self.check((self.0.GetDimensionsCount)(info, &mut rank))?;
            let mut shape = vec![0; rank];
            self.check((self.0.GetDimensions)(info, shape.as_mut_ptr(), rank))?;
            Ok((element as i32, shape))
        }
    }

    /// The first element of a tensor.
    ///
    /// # Safety
    /// `value` must be a valid tensor; writing needs it to be an output.
    pub(super) unsafe fn tensor_data(self, value: *mut OrtValue) -> Result<*mut c_void, OrtError> {
        let mut data = ptr::null_mut();
        // SAFETY: by the contract above.
        self.check(unsafe { (self.0.GetTensorMutableData)(value, &mut data) })?;
        Ok(data)
    }

    /// The stream that the running node's work belongs on, a `cudaStream_t` on the CUDA provider.
    ///
    /// # Safety
    /// As for [`Self::input`].
    pub(super) unsafe fn gpu_stream(
        self,
        context: *const OrtKernelContext,
    ) -> Result<*mut c_void, OrtError> {
        let mut stream = ptr::null_mut();
        // SAFETY: by the contract above.
        self.check(unsafe { (self.0.KernelContext_GetGPUComputeStream)(context, &mut stream) })?;
        Ok(stream)
    }

    /// Where a tensor lies.
    ///
    /// # Safety
    /// `value` must be a valid tensor; the result lives as long as it.
    pub(super) unsafe fn memory_info(
        self,
        value: *const OrtValue,
    ) -> Result<*const OrtMemoryInfo, OrtError> {
        let mut info = ptr::null();
        // SAFETY: by the contract above.
        self.check(unsafe { (self.0.GetTensorMemoryInfo)(value, &mut info) })?;
        Ok(info)
    }

    /// The allocator of the session's memory of a kind; to be given back with [`Self::release_allocator`].
    ///
    /// # Safety
    /// `context` as for [`Self::input`], `info` valid.
    pub(super) unsafe fn allocator(
        self,
        context: *const OrtKernelContext,
        info: *const OrtMemoryInfo,
    ) -> Result<*mut OrtAllocator, OrtError> {
        let mut allocator = ptr::null_mut();
        // SAFETY: by the contract above.
        self.check(unsafe { (self.0.KernelContext_GetAllocator)(context, info, &mut allocator) })?;
        Ok(allocator)
    }

    /// # Safety
    /// `allocator` must be what [`Self::allocator`] gave, and `memory` null or memory of the same
    /// session and kind.
    pub(super) unsafe fn release_allocator(
        self,
        allocator: *mut OrtAllocator,
        memory: *mut c_void,
    ) {
        // SAFETY: by the contract above. A failure to free has nobody to be told to.
        unsafe {
            if !memory.is_null() {
                let _ = self.check((self.0.AllocatorFree)(allocator, memory));
            }
            (self.0.ReleaseAllocator)(allocator);
        }
    }

    /// Runs `function(data, i)` for every i < count on ONNX Runtime's own threads.
    ///
    /// # Safety
    /// `context` as for [`Self::input`]; `function` must be sound to call with `data` from any
    /// thread.
    pub(super) unsafe fn parallel_for(
        self,
        context: *const OrtKernelContext,
        function: unsafe extern "C" fn(*mut c_void, usize),
        count: usize,
        data: *mut c_void,
    ) -> Result<(), OrtError> {
        // One batch per task: batches are what threads pick up, so uneven tasks balance out.
        // SAFETY: by the contract above.
        self.check(unsafe {
            (self.0.KernelContext_ParallelFor)(context, function, count, count, data)
        })
    }

    /// An input's element type and dimensions at the time of shape inference.
    ///
    /// # Safety
    /// `context` must be what an `InferOutputShape` callback was given.
    pub(super) unsafe fn inferred_input(
        self,
        context: *const OrtShapeInferContext,
        index: usize,
    ) -> Result<(i32, Vec<InferredDim>), OrtError> {
        let mut info = ptr::null_mut();
        // SAFETY: by the contract above. The info belongs to the context and is not released.
        unsafe {
            self.check((self.0.ShapeInferContext_GetInputTypeShape)(
                context, index, &mut info,
            ))?;
            if info.is_null() {
                return Ok((0, vec![]));
            }
            let (element, shape) = self.type_and_shape(info)?;
            let mut names = vec![ptr::null::<c_char>(); shape.len()];
            self.check((self.0.GetSymbolicDimensions)(
                info,
                names.as_mut_ptr().cast(),
                names.len(),
            ))?;
            let dims = shape
                .into_iter()
                .zip(names)
                .map(|(value, name)| match text(name) {
                    name if !name.is_empty() => InferredDim::Named(name),
                    _ if value >= 0 => InferredDim::Known(value),
                    _ => InferredDim::Unknown,
                })
                .collect();
            Ok((element, dims))
        }
    }

    /// Sets an output's element type and dimensions; all must be known or named.
    ///
    /// # Safety
    /// As for [`Self::inferred_input`].
    pub(super) unsafe fn set_inferred_output(
        self,
        context: *mut OrtShapeInferContext,
        index: usize,
        element: ONNXTensorElementDataType,
        dims: &[InferredDim],
    ) -> Result<(), OrtError> {
        let values: Vec<i64> = dims
            .iter()
            .map(|dim| match dim {
                InferredDim::Known(value) => *value,
                InferredDim::Named(_) | InferredDim::Unknown => -1,
            })
            .collect();
        let names: Vec<CString> = dims
            .iter()
            .map(|dim| match dim {
                InferredDim::Named(name) => CString::new(name.as_str()).unwrap_or_default(),
                InferredDim::Known(_) | InferredDim::Unknown => CString::default(),
            })
            .collect();
        let mut names: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
        let mut info = ptr::null_mut();
        // SAFETY: by the contract above; the strings outlive the calls, which copy them, and the
        // info is released on every way out.
        unsafe {
            self.check((self.0.CreateTensorTypeAndShapeInfo)(&mut info))?;
            let result = self
                .check((self.0.SetTensorElementType)(info, element))
                .and_then(|()| {
                    self.check((self.0.SetDimensions)(info, values.as_ptr(), values.len()))
                })
                .and_then(|()| {
                    let names_ptr = names.as_mut_ptr().cast();
                    self.check((self.0.SetSymbolicDimensions)(info, names_ptr, names.len()))
                })
                .and_then(|()| {
                    self.check((self.0.ShapeInferContext_SetOutputTypeShape)(
                        context, index, info,
                    ))
                });
            (self.0.ReleaseTensorTypeAndShapeInfo)(info);
            result
        }
    }
}

/// An ONNX Runtime without [`API_VERSION`].
pub(super) struct TooOld {
    /// Its release.
    pub(super) release: String,
    /// The newest table it has, to carry a status.
    pub(super) oldest: Option<Api>,
}

/// A dimension as far as shape inference knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum InferredDim {
    /// A number.
    Known(i64),
    /// A symbol.
    Named(String),
    /// Neither.
    Unknown,
}

/// # Safety
/// `from` must be null or a zero-terminated string.
pub(super) unsafe fn text(from: *const c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: by the contract above.
    unsafe { CStr::from_ptr(from) }
        .to_string_lossy()
        .into_owned()
}
