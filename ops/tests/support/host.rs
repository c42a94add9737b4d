//! ONNX Runtime through its bare C API, as a C or C++ host uses it.
//!
//! `LINFUSION_TEST_ORT_DIR` is a folder with one folder per release that holds `libonnxruntime.so*`.

use std::ffi::{CStr, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;

use libloading::Library;
use ndarray::ArrayD;
use ort_sys::{
    ONNXTensorElementDataType, OrtAllocatorType, OrtApi, OrtApiBase, OrtEnv, OrtLoggingLevel,
    OrtMemType, OrtSession, OrtSessionOptions, OrtStatusPtr, OrtValue,
};

/// A loaded ONNX Runtime with an environment. Nothing is released: the process ends with the test.
pub struct Host {
    pub api: &'static OrtApi,
    #[allow(dead_code, reason = "not every test registers by it")]
    pub base: *const OrtApiBase,
    env: *mut OrtEnv,
    pub release: String,
}

impl Host {
    /// Loads a library file.
    pub fn load(library: &Path) -> Self {
        // SAFETY: a real ONNX Runtime, which stays loaded; the table is that of version 17.
        unsafe {
            let library: &'static Library = Box::leak(Box::new(Library::new(library).unwrap()));
            let get = library
                .get::<unsafe extern "C" fn() -> *const OrtApiBase>(b"OrtGetApiBase\0")
                .unwrap();
            let base = get();
            let api = ((*base).GetApi)(17).as_ref().unwrap();
            let release = CStr::from_ptr(((*base).GetVersionString)());
            let mut host = Self {
                api,
                base,
                env: ptr::null_mut(),
                release: release.to_string_lossy().into_owned(),
            };
            let mut env = ptr::null_mut();
            let level = OrtLoggingLevel::ORT_LOGGING_LEVEL_FATAL;
            host.check((api.CreateEnv)(level, c"test".as_ptr(), &mut env))
                .unwrap();
            host.env = env;
            host
        }
    }

    /// The message of a status that is none of success.
    pub fn check(&self, status: OrtStatusPtr) -> Result<(), String> {
        if status.0.is_null() {
            return Ok(());
        }
        // SAFETY: a status that is not null is ours.
        unsafe {
            let message = CStr::from_ptr((self.api.GetErrorMessage)(status.0));
            let message = message.to_string_lossy().into_owned();
            (self.api.ReleaseStatus)(status.0);
            Err(message)
        }
    }

    /// New session options.
    pub fn options(&self) -> *mut OrtSessionOptions {
        let mut options = ptr::null_mut();
        // SAFETY: the result is written before it is read.
        self.check(unsafe { (self.api.CreateSessionOptions)(&mut options) })
            .unwrap();
        options
    }

    /// A session of a model's bytes.
    pub fn session(
        &self,
        model: &[u8],
        options: *const OrtSessionOptions,
    ) -> Result<Session<'_>, String> {
        let mut session = ptr::null_mut();
        // SAFETY: valid arguments; the model is copied.
        self.check(unsafe {
            (self.api.CreateSessionFromArray)(
                self.env,
                model.as_ptr().cast(),
                model.len(),
                options,
                &mut session,
            )
        })?;
        Ok(Session {
            host: self,
            session,
        })
    }

    fn tensor(&self, input: &Input<'_>) -> *mut OrtValue {
        use ONNXTensorElementDataType as Type;
        let (shape, data, bytes, element) = match input {
            Input::Floats(x) => {
                let data = x.as_slice().unwrap();
                let element = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
                (
                    x.shape().to_vec(),
                    data.as_ptr().cast(),
                    size_of_val(data),
                    element,
                )
            }
            Input::Integers(x) => {
                let element = Type::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
                (vec![x.len()], x.as_ptr().cast(), size_of_val(*x), element)
            }
        };
        let data: *const c_void = data;
        let shape: Vec<i64> = shape.iter().map(|&d| d as i64).collect();
        let (mut info, mut value) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the numbers outlive the value in every test.
        unsafe {
            self.check((self.api.CreateCpuMemoryInfo)(
                OrtAllocatorType::OrtArenaAllocator,
                OrtMemType::OrtMemTypeDefault,
                &mut info,
            ))
            .unwrap();
            self.check((self.api.CreateTensorWithDataAsOrtValue)(
                info,
                data.cast_mut(),
                bytes,
                shape.as_ptr(),
                shape.len(),
                element,
                &mut value,
            ))
            .unwrap();
        }
        value
    }
}

/// One of the inputs q, k, v and grid.
pub enum Input<'a> {
    /// A tensor.
    Floats(&'a ArrayD<f32>),
    /// A vector.
    #[allow(dead_code, reason = "not every test has a grid")]
    Integers(&'a [i64]),
}

/// A session.
pub struct Session<'h> {
    host: &'h Host,
    session: *mut OrtSession,
}

// SAFETY: sessions of ONNX Runtime may run on several threads at once.
unsafe impl Sync for Session<'_> {}

impl Session<'_> {
    /// The output for q, k and v.
    #[allow(dead_code, reason = "not every test has three inputs")]
    pub fn run(&self, inputs: [&ArrayD<f32>; 3]) -> Result<Vec<f32>, String> {
        self.run_on(&inputs.map(Input::Floats))
    }

    /// The output for q, k, v and, where the model has it, grid.
    pub fn run_on(&self, inputs: &[Input<'_>]) -> Result<Vec<f32>, String> {
        let values: Vec<_> = inputs
            .iter()
            .map(|x| self.host.tensor(x).cast_const())
            .collect();
        let input_names = [c"q", c"k", c"v", c"grid"].map(CStr::as_ptr);
        assert!(values.len() <= input_names.len());
        let output_names = [c"out".as_ptr()];
        let mut out: *mut OrtValue = ptr::null_mut();
        let api = self.host.api;
        // SAFETY: names, values and the place of the output have the counts given.
        unsafe {
            self.host.check((api.Run)(
                self.session,
                ptr::null(),
                input_names.as_ptr(),
                values.as_ptr(),
                values.len(),
                output_names.as_ptr(),
                1,
                &mut out,
            ))?;
            let (mut info, mut count) = (ptr::null_mut(), 0);
            self.host
                .check((api.GetTensorTypeAndShape)(out, &mut info))?;
            self.host
                .check((api.GetTensorShapeElementCount)(info, &mut count))?;
            let mut data: *mut c_void = ptr::null_mut();
            self.host
                .check((api.GetTensorMutableData)(out, &mut data))?;
            Ok(std::slice::from_raw_parts(data.cast::<f32>(), count).to_vec())
        }
    }
}

/// Every `libonnxruntime.so*` one folder below `LINFUSION_TEST_ORT_DIR`.
pub fn runtimes() -> Vec<PathBuf> {
    let Some(root) = std::env::var_os("LINFUSION_TEST_ORT_DIR") else {
        eprintln!("LINFUSION_TEST_ORT_DIR is not set: no ONNX Runtime to test with");
        return vec![];
    };
    let files = |folder: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect()
    };
    let mut found: Vec<PathBuf> = files(Path::new(&root))
        .iter()
        .flat_map(|p| files(p))
        .collect();
    found.retain(|p| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libonnxruntime.so")
    });
    found.sort();
    assert!(!found.is_empty(), "no libonnxruntime.so* below {root:?}");
    found
}

/// The cdylib beside this test; cargo builds it with the library.
#[allow(dead_code, reason = "not every test loads it")]
pub fn our_library() -> PathBuf {
    let folder = std::env::current_exe().unwrap();
    let folder = folder.ancestors().nth(1).unwrap();
    ["", ".."]
        .map(|up| folder.join(up).join("liblinfusion_ops.so"))
        .into_iter()
        .find(|p| p.is_file())
        .expect("cargo builds liblinfusion_ops.so before the tests")
}

/// Runs the ignored test `one_release` for each release in a process of its own, as two of them
/// don't share one well.
pub fn every_release() {
    for library in runtimes() {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "one_release", "--ignored", "--nocapture"])
            .env("LINFUSION_TEST_ORT_LIB", &library)
            .status()
            .unwrap();
        assert!(status.success(), "{}", library.display());
    }
}

/// The release that `one_release` is for.
pub fn this_release() -> Host {
    let library = std::env::var_os("LINFUSION_TEST_ORT_LIB").expect("LINFUSION_TEST_ORT_LIB");
    let host = Host::load(Path::new(&library));
    eprintln!("ONNX Runtime {}", host.release);
    host
}
