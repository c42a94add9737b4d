//! The CUDA driver API, loaded when first used: the context of a stream, the kernels in it, launches.
//!
//! Nothing here waits for the device, allocates on it or uses the default stream: launches go onto the stream that is
//! given, so a caller may capture them into a CUDA graph. Modules are loaded once a context and stay.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys::{self, CUcontext, CUdevice_attribute, CUfunction, CUmodule, CUresult};
use libloading::Library;
use thiserror::Error;

use super::archive::{Archive, ArchiveError};
use super::plan::{Device, Launch};

/// Bytes of dynamic shared memory that a kernel has without asking for more.
const SHARED_BYTES: u32 = 48 << 10;

/// Why the driver could not run a launch.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CudaError {
    /// The library was built without kernels.
    #[error("this library was built without CUDA kernels; `make cuda lib` builds one with them")]
    NotBuilt,
    /// There is no driver.
    #[error(
        "the CUDA driver's library (libcuda.so.1) was not found: install NVIDIA's driver, 525 or later"
    )]
    NoDriver,
    /// The driver's library lacks a function.
    #[error("the CUDA driver's library is too old or broken: {0}")]
    BadDriver(String),
    /// A function of the driver failed.
    #[error("{function} failed: {name}: {text}")]
    Call {
        /// The function.
        function: &'static str,
        /// The error's name, as `CUDA_ERROR_OUT_OF_MEMORY`.
        name: String,
        /// What the driver says about it.
        text: String,
    },
    /// There are no kernels for this device.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The driver can't load the kernels.
    #[error(
        "the driver, for CUDA {driver}, can't load the kernels for compute capability {}.{}: {name}; update the driver",
        .capability.0, .capability.1
    )]
    BadImage {
        /// The device's.
        capability: (u32, u32),
        /// What the driver speaks.
        driver: String,
        /// The driver's error.
        name: String,
    },
    /// There is no context on the calling thread and the stream has none.
    #[error("the stream has no CUDA context")]
    NoContext,
    /// A name with a zero inside.
    #[error("`{0}` is no kernel's name")]
    KernelName(String),
}

/// A stream, as CUDA's runtime and driver know it (`cudaStream_t`, `CUstream`); null: the legacy default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub *mut c_void);

/// Version of CUDA that the installed driver speaks, as (13, 0).
///
/// # Errors
/// [`CudaError`] if there is none.
pub fn version() -> Result<(u32, u32), CudaError> {
    let mut version = 0;
    // SAFETY: written before it is read.
    call("cuDriverGetVersion", || unsafe {
        sys::cuDriverGetVersion(&mut version)
    })?;
    let version = u32::try_from(version).unwrap_or(0);
    Ok((version / 1000, version % 1000 / 10))
}

/// Bytes of memory of the device of that number.
///
/// # Errors
/// [`CudaError`] if there is no driver or no such device.
pub fn total_memory(device: u32) -> Result<u64, CudaError> {
    // SAFETY: takes no pointer.
    call("cuInit", || unsafe { sys::cuInit(0) })?;
    let (mut handle, mut bytes) = (0, 0);
    let device = c_int::try_from(device).unwrap_or(c_int::MAX);
    // SAFETY: written before it is read.
    call("cuDeviceGet", || unsafe {
        sys::cuDeviceGet(&mut handle, device)
    })?;
    // SAFETY: the handle is one that the driver gave; written before it is read.
    call("cuDeviceTotalMem", || unsafe {
        sys::cuDeviceTotalMem_v2(&mut bytes, handle)
    })?;
    Ok(bytes as u64)
}

/// Bytes of memory of the device of that number that nothing has taken, in whatever process.
///
/// # Errors
/// [`CudaError`] if there is no driver, no such device, or it has no room for a context.
pub fn free_memory(device: u32) -> Result<u64, CudaError> {
    // SAFETY: takes no pointer.
    call("cuInit", || unsafe { sys::cuInit(0) })?;
    let (mut handle, mut context) = (0, std::ptr::null_mut());
    let device = c_int::try_from(device).unwrap_or(c_int::MAX);
    // SAFETY: written before it is read.
    call("cuDeviceGet", || unsafe {
        sys::cuDeviceGet(&mut handle, device)
    })?;
    // SAFETY: the handle is one that the driver gave; written before it is read.
    call("cuDevicePrimaryCtxRetain", || unsafe {
        sys::cuDevicePrimaryCtxRetain(&mut context, handle)
    })?;
    let free = (|| {
        // SAFETY: the context is the one just retained.
        call("cuCtxPushCurrent", || unsafe {
            sys::cuCtxPushCurrent_v2(context)
        })?;
        let (mut free, mut total, mut popped) = (0, 0, std::ptr::null_mut());
        // SAFETY: written before they are read.
        let asked = call("cuMemGetInfo", || unsafe {
            sys::cuMemGetInfo_v2(&mut free, &mut total)
        });
        // SAFETY: takes off what was pushed above.
        call("cuCtxPopCurrent", || unsafe {
            sys::cuCtxPopCurrent_v2(&mut popped)
        })?;
        asked.map(|()| free as u64)
    })();
    // SAFETY: retained above, once.
    call("cuDevicePrimaryCtxRelease", || unsafe {
        sys::cuDevicePrimaryCtxRelease_v2(handle)
    })?;
    free
}

/// Calls the driver. Its library is looked for first, since the bindings panic without it.
fn call(function: &'static str, work: impl FnOnce() -> CUresult) -> Result<(), CudaError> {
    if !is_present() {
        return Err(CudaError::NoDriver);
    }
    let result = catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        CudaError::BadDriver(text.unwrap_or(function).to_owned())
    })?;
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        failed => Err(CudaError::Call {
            function,
            name: error_text(failed, sys::cuGetErrorName),
            text: error_text(failed, sys::cuGetErrorString),
        }),
    }
}

/// Whether there is a driver. Asked before every call, so a yes, which costs a search of the file system, is remembered;
/// a no is not: the driver may come. Not cudarc's own question, which it has only where it loads the driver itself: in a program
/// that learns on a GPU it is linked.
fn is_present() -> bool {
    static PRESENT: AtomicBool = AtomicBool::new(false);
    if PRESENT.load(Ordering::Relaxed) {
        return true;
    }
    // SAFETY: loading the driver's library runs its initialisers only.
    let present = unsafe { DRIVERS.iter().any(|name| Library::new(*name).is_ok()) };
    if present {
        PRESENT.store(true, Ordering::Relaxed);
    }
    present
}

/// What a driver's library is called: of cudarc's names for it, those in use.
const DRIVERS: [&str; 2] = ["libcuda.so", "libcuda.so.1"];

fn error_text(result: CUresult, of: unsafe fn(CUresult, *mut *const c_char) -> CUresult) -> String {
    let mut text = ptr::null();
    // SAFETY: the driver gives null or a string that lives for ever.
    unsafe {
        if of(result, &mut text) != CUresult::CUDA_SUCCESS || text.is_null() {
            return format!("error {}", result as u32);
        }
        CStr::from_ptr(text).to_string_lossy().into_owned()
    }
}

/// A context with the kernels loaded into it.
pub struct Gpu {
    context: CUcontext,
    device: Device,
    module: CUmodule,
    functions: Mutex<HashMap<String, Function>>,
}

// SAFETY: handles of the driver, whose functions may be called from any thread.
unsafe impl Send for Gpu {}
// SAFETY: see above.
unsafe impl Sync for Gpu {}

#[derive(Clone, Copy)]
struct Function {
    handle: CUfunction,
    /// Dynamic shared memory that it may have.
    shared_bytes: u32,
}

/// Makes a context current for as long as it lives.
struct Pushed;

impl Pushed {
    fn new(context: CUcontext) -> Result<Self, CudaError> {
        // SAFETY: a context that the driver gave.
        call("cuCtxPushCurrent", || unsafe {
            sys::cuCtxPushCurrent_v2(context)
        })?;
        Ok(Self)
    }
}

impl Drop for Pushed {
    fn drop(&mut self) {
        let mut context = ptr::null_mut();
        // SAFETY: what was pushed is taken back; there is nobody to tell of a failure.
        let _ = call("cuCtxPopCurrent", || unsafe {
            sys::cuCtxPopCurrent_v2(&mut context)
        });
    }
}

impl Gpu {
    /// The context that a stream belongs to, with the kernels of `kernels`, an archive, loaded.
    ///
    /// # Safety
    /// The stream must be valid, and the code in `kernels` that of our kernels.
    ///
    /// # Errors
    /// [`CudaError`]: no driver, a device that the kernels aren't compiled for, what the driver reports.
    pub unsafe fn of_stream(
        stream: Stream,
        kernels: &'static [u8],
    ) -> Result<&'static Self, CudaError> {
        let mut context = ptr::null_mut();
        // SAFETY: by the contract above.
        call("cuStreamGetCtx", || unsafe {
            sys::cuStreamGetCtx(stream.0.cast(), &mut context)
        })?;
        // SAFETY: by the contract above.
        unsafe { Self::of_context(context, kernels) }
    }

    /// The calling thread's context with the kernels loaded; `None` where it has no context.
    ///
    /// # Safety
    /// The code in `kernels` must be that of our kernels.
    ///
    /// # Errors
    /// As for [`Self::of_stream`].
    pub unsafe fn current(kernels: &'static [u8]) -> Result<Option<&'static Self>, CudaError> {
        let mut context = ptr::null_mut();
        // SAFETY: written before it is read.
        call("cuCtxGetCurrent", || unsafe {
            sys::cuCtxGetCurrent(&mut context)
        })?;
        if context.is_null() {
            return Ok(None);
        }
        // SAFETY: by the contract above.
        unsafe { Self::of_context(context, kernels) }.map(Some)
    }

    /// # Safety
    /// As for [`Self::of_stream`].
    unsafe fn of_context(
        context: CUcontext,
        kernels: &'static [u8],
    ) -> Result<&'static Self, CudaError> {
        static LOADED: Mutex<Vec<&'static Gpu>> = Mutex::new(Vec::new());
        if context.is_null() {
            return Err(CudaError::NoContext);
        }
        // Held while loading, so that a context's module is loaded once.
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = loaded.iter().find(|gpu| gpu.context == context) {
            return Ok(gpu);
        }
        let _pushed = Pushed::new(context)?;
        let device = device()?;
        let image = Archive::read(kernels)?.image(device.capability)?;
        let mut module = ptr::null_mut();
        // SAFETY: by the contract above; the driver copies the image.
        let load = call("cuModuleLoadData", || unsafe {
            sys::cuModuleLoadData(&mut module, image.as_ptr().cast())
        });
        load.map_err(|error| match error {
            CudaError::Call { name, .. } if is_bad_image(&name) => CudaError::BadImage {
                capability: device.capability,
                driver: version().map_or_else(|e| e.to_string(), |(a, b)| format!("{a}.{b}")),
                name,
            },
            other => other,
        })?;
        let gpu: &'static Self = Box::leak(Box::new(Self {
            context,
            device,
            module,
            functions: Mutex::default(),
        }));
        loaded.push(gpu);
        Ok(gpu)
    }

    /// What plans have to know of it.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Puts launches onto a stream of this context, in order.
    ///
    /// # Safety
    /// The stream must be valid and the addresses in the launches' parameters those of device memory that is large
    /// enough and lives until the launches have run.
    ///
    /// # Errors
    /// What the driver reports.
    pub unsafe fn launch(&self, stream: Stream, launches: &[Launch]) -> Result<(), CudaError> {
        if launches.is_empty() {
            return Ok(());
        }
        let _pushed = Pushed::new(self.context)?;
        for launch in launches {
            let function = self.function(&launch.kernel, launch.shared_bytes)?;
            let (params, _) = launch.params.argument();
            let mut arguments = [params.cast_mut()];
            let [x, y, z] = launch.grid;
            // SAFETY: by the contract above; the parameters are copied before the call returns.
            call("cuLaunchKernel", || unsafe {
                sys::cuLaunchKernel(
                    function,
                    x,
                    y,
                    z,
                    launch.threads,
                    1,
                    1,
                    launch.shared_bytes,
                    stream.0.cast(),
                    arguments.as_mut_ptr(),
                    ptr::null_mut(),
                )
            })?;
        }
        Ok(())
    }

    /// A kernel that may have so much shared memory. This context is current.
    fn function(&self, name: &str, shared_bytes: u32) -> Result<CUfunction, CudaError> {
        let mut functions = self
            .functions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut function = match functions.get(name) {
            Some(function) if shared_bytes <= function.shared_bytes => return Ok(function.handle),
            Some(function) => *function,
            None => {
                let c_name = CString::new(name).map_err(|_| CudaError::KernelName(name.into()))?;
                let mut handle = ptr::null_mut();
                // SAFETY: the module is loaded and stays.
                call("cuModuleGetFunction", || unsafe {
                    sys::cuModuleGetFunction(&mut handle, self.module, c_name.as_ptr())
                })?;
                Function {
                    handle,
                    shared_bytes: SHARED_BYTES,
                }
            }
        };
        if shared_bytes > function.shared_bytes {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of this context.
            call("cuFuncSetAttribute", || unsafe {
                sys::cuFuncSetAttribute(function.handle, attribute, shared_bytes as c_int)
            })?;
            function.shared_bytes = shared_bytes;
        }
        functions.insert(name.to_owned(), function);
        Ok(function.handle)
    }
}

/// Errors that mean that the driver doesn't know what the image has.
fn is_bad_image(name: &str) -> bool {
    [
        "CUDA_ERROR_NO_BINARY_FOR_GPU",
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        "CUDA_ERROR_INVALID_IMAGE",
        "CUDA_ERROR_INVALID_PTX",
    ]
    .contains(&name)
}

/// The current context's device.
fn device() -> Result<Device, CudaError> {
    use CUdevice_attribute as Attribute;
    let mut device = 0;
    // SAFETY: written before it is read.
    call("cuCtxGetDevice", || unsafe {
        sys::cuCtxGetDevice(&mut device)
    })?;
    let attribute = |which: Attribute| {
        let mut value = 0;
        // SAFETY: likewise.
        call("cuDeviceGetAttribute", || unsafe {
            sys::cuDeviceGetAttribute(&mut value, which, device)
        })?;
        Ok::<u32, CudaError>(u32::try_from(value).unwrap_or(0))
    };
    Ok(Device {
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}
