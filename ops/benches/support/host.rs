//! ONNX Runtime through its C API: sessions of one-node models, and time per run.

use std::any::Any;
use std::ffi::CStr;
use std::path::Path;
use std::ptr;

use crate::machine::now;
use libloading::Library;
use linfusion_ops::ort::register_in_process;
use ort_sys::{
    ONNXTensorElementDataType, OrtAllocatorType, OrtApi, OrtApiBase, OrtEnv, OrtLoggingLevel,
    OrtMemType, OrtSession, OrtStatusPtr, OrtValue,
};

/// A loaded ONNX Runtime. It and the sessions stay until the process ends.
pub struct Host {
    api: &'static OrtApi,
    env: *mut OrtEnv,
    /// Its version.
    pub release: String,
}

/// A tensor and the memory behind it.
pub struct Tensor {
    value: *mut OrtValue,
    api: &'static OrtApi,
    _data: Box<dyn Any>,
}

/// What tensors are made of.
pub trait Number: Copy + 'static {
    const TYPE: ONNXTensorElementDataType;
}
impl Number for f32 {
    const TYPE: ONNXTensorElementDataType =
        ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
impl Number for i64 {
    const TYPE: ONNXTensorElementDataType =
        ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: made by this API and released once.
        unsafe { (self.api.ReleaseValue)(self.value) };
    }
}

/// A model ready to run.
pub struct Session<'h> {
    host: &'h Host,
    session: *mut OrtSession,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        // SAFETY: made by this API and released once.
        unsafe { (self.host.api.ReleaseSession)(self.session) };
    }
}

impl Host {
    /// The library that `ORT_DYLIB_PATH` names.
    pub fn from_environment() -> Result<Self, String> {
        let path = std::env::var_os("ORT_DYLIB_PATH").ok_or("ORT_DYLIB_PATH is not set")?;
        // SAFETY: the user vouches that this is ONNX Runtime; the table is that of version 17.
        unsafe {
            let library = Library::new(Path::new(&path)).map_err(|e| e.to_string())?;
            let library: &'static Library = Box::leak(Box::new(library));
            let get = library
                .get::<unsafe extern "C" fn() -> *const OrtApiBase>(b"OrtGetApiBase\0")
                .map_err(|e| e.to_string())?;
            let base = get();
            let api = ((*base).GetApi)(17).as_ref().ok_or("older than 1.17")?;
            let mut host = Self {
                api,
                env: ptr::null_mut(),
                release: CStr::from_ptr(((*base).GetVersionString)())
                    .to_string_lossy()
                    .into_owned(),
            };
            let level = OrtLoggingLevel::ORT_LOGGING_LEVEL_FATAL;
            let mut env = ptr::null_mut();
            host.check((api.CreateEnv)(level, c"bench".as_ptr(), &mut env))?;
            host.env = env;
            Ok(host)
        }
    }

    fn check(&self, status: OrtStatusPtr) -> Result<(), String> {
        if status.0.is_null() {
            return Ok(());
        }
        // SAFETY: a status that is not null is ours.
        unsafe {
            let message = CStr::from_ptr((self.api.GetErrorMessage)(status.0))
                .to_string_lossy()
                .into_owned();
            (self.api.ReleaseStatus)(status.0);
            Err(message)
        }
    }

    /// A session with our operators and so many threads.
    pub fn session(&self, model: &[u8], threads: usize) -> Result<Session<'_>, String> {
        let (mut options, mut session) = (ptr::null_mut(), ptr::null_mut());
        let threads = i32::try_from(threads).map_err(|e| e.to_string())?;
        // SAFETY: results are written before they are read; the model is copied.
        unsafe {
            self.check((self.api.CreateSessionOptions)(&mut options))?;
            self.check((self.api.SetIntraOpNumThreads)(options, threads))?;
            // Threads of one session that wait for work would take the processors from the next.
            self.check((self.api.AddSessionConfigEntry)(
                options,
                c"session.force_spinning_stop".as_ptr(),
                c"1".as_ptr(),
            ))?;
            register_in_process(options, self.api).map_err(|e| e.to_string())?;
            let made = self.check((self.api.CreateSessionFromArray)(
                self.env,
                model.as_ptr().cast(),
                model.len(),
                options,
                &mut session,
            ));
            (self.api.ReleaseSessionOptions)(options);
            made?;
        }
        Ok(Session {
            host: self,
            session,
        })
    }

    /// A tensor of this shape.
    pub fn tensor<T: Number>(&self, shape: &[i64], mut data: Vec<T>) -> Result<Tensor, String> {
        let (mut info, mut value) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the data lives as long as the value.
        unsafe {
            self.check((self.api.CreateCpuMemoryInfo)(
                OrtAllocatorType::OrtArenaAllocator,
                OrtMemType::OrtMemTypeDefault,
                &mut info,
            ))?;
            let made = self.check((self.api.CreateTensorWithDataAsOrtValue)(
                info,
                data.as_mut_ptr().cast(),
                size_of_val(&data[..]),
                shape.as_ptr(),
                shape.len(),
                T::TYPE,
                &mut value,
            ));
            (self.api.ReleaseMemoryInfo)(info);
            made?;
        }
        Ok(Tensor {
            value,
            api: self.api,
            _data: Box::new(data),
        })
    }
}

impl Session<'_> {
    /// Seconds of one run on q, k, v and, where the model has it, grid.
    pub fn time(&self, inputs: &[&Tensor]) -> Result<f64, String> {
        let values: Vec<_> = inputs.iter().map(|t| t.value.cast_const()).collect();
        let input_names = [c"q", c"k", c"v", c"grid"].map(CStr::as_ptr);
        if values.len() > input_names.len() {
            return Err(format!("{} inputs", values.len()));
        }
        let output_names = [c"out".as_ptr()];
        let mut out: *mut OrtValue = ptr::null_mut();
        let api = self.host.api;
        let start = now();
        // SAFETY: names, values and the place of the output have the counts given.
        let status = unsafe {
            (api.Run)(
                self.session,
                ptr::null(),
                input_names.as_ptr(),
                values.as_ptr(),
                values.len(),
                output_names.as_ptr(),
                1,
                &mut out,
            )
        };
        let seconds = now() - start;
        self.host.check(status)?;
        // SAFETY: the run succeeded, so this is a value of ours.
        unsafe { (api.ReleaseValue)(out) };
        Ok(seconds)
    }
}
