//! The custom-op library for ONNX Runtime 1.17 and later: `RegisterCustomOps`.
//!
//! The C API is asked for at version 17 whatever the bindings know, so one library serves every
//! later release. Kernels run on ONNX Runtime's own intra-op threads. Every error is an
//! `OrtStatus` that names the node and what was expected and found; no panic leaves the library.

mod api;
mod device;
mod entry;
mod node;
mod pool;
mod scratch;

use std::ffi::{CStr, CString, c_char};
use std::sync::{Mutex, OnceLock, PoisonError};

use ort_sys::{OrtApi, OrtApiBase, OrtCustomOpDomain, OrtSessionOptions, OrtStatusPtr};
use thiserror::Error;

use self::api::{API_VERSION, Api, MIN_RELEASE};
use self::entry::{Entry, Provider, guarded};
use self::scratch::Scratch;
use crate::cpu::{Isa, KernelError};
use crate::cuda;
use crate::cuda::driver::CudaError;
use crate::cuda::plan::PlanError;
use crate::schema::{
    DOMAIN, ElementType, LINFUSION_ATTENTION, OPSET_VERSION, ShapeError, WINDOW_ATTENTION,
};

/// Marks session options that already have our domain: adding a domain twice makes the session
/// fail with `Domain already set in registry`, and options can't be asked for their domains.
const REGISTERED_KEY: &CStr = c"ai.linfusion.registered";
const DOMAIN_NAME: &CStr = c"ai.linfusion";

/// The first ONNX Runtime release whose CUDA provider the kernels run in.
const CUDA_RELEASE: &str = "1.18";

/// Why a registration or a node failed.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum OrtError {
    /// The null pointer was passed for the API or the session options.
    #[error("a null pointer was passed for {what}")]
    Null {
        /// What was null.
        what: &'static str,
    },
    /// The ONNX Runtime that loaded the library lacks the C API version used.
    #[error(
        "ONNX Runtime {MIN_RELEASE} or later is needed (C API version {API_VERSION}), found {release}"
    )]
    TooOld {
        /// The release found.
        release: String,
    },
    /// A call into ONNX Runtime failed.
    #[error("ONNX Runtime: {0}")]
    OnnxRuntime(String),
    /// An error of one node.
    #[error("node `{node}` ({operator}): {source}")]
    Node {
        /// The node's name.
        node: String,
        /// Its operator.
        operator: &'static str,
        /// What went wrong.
        r#source: Box<OrtError>,
    },
    /// `num_heads` is missing or no integer.
    #[error("expected an int attribute `num_heads`, found none")]
    NumHeads,
    /// A float attribute is an integer.
    #[error("expected attribute `{attribute}` to be a float, found an int")]
    FloatType {
        /// Which attribute.
        attribute: &'static str,
    },
    /// Neither `window` nor `radius`, or both, or `window` is no pair.
    #[error(
        "expected either an ints attribute `window` of two numbers or an int attribute `radius`, found window {window:?} and radius {radius:?}"
    )]
    WindowOrRadius {
        /// `window` as found.
        window: Option<Vec<i64>>,
        /// `radius` as found.
        radius: Option<i64>,
    },
    /// A string attribute has a value that means nothing.
    #[error("expected attribute `{attribute}` to be {expected}, found `{found}`")]
    Choice {
        /// Which attribute.
        attribute: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// `grid` is not two numbers.
    #[error("input `grid`: expected shape [2], rows and columns, found shape {shape:?}")]
    GridShape {
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A required input is missing.
    #[error("input `{input}` is missing")]
    MissingInput {
        /// Which input.
        input: &'static str,
    },
    /// An input's element type is not the one the entry was registered for.
    #[error("input `{input}`: expected ONNX element type number {expected}, found {found}")]
    ElementType {
        /// Which input.
        input: &'static str,
        /// `TensorProto.DataType` of the entry.
        expected: i32,
        /// `TensorProto.DataType` found.
        found: i32,
    },
    /// ONNX Runtime reports a negative dimension at run time.
    #[error("input `{input}`: negative dimension in shape {shape:?}")]
    NegativeDim {
        /// Which input.
        input: &'static str,
        /// Its shape.
        shape: Vec<i64>,
    },
    /// Shapes or attributes don't fit.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The kernel refused or ran out of memory.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The CUDA driver refused.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// No CUDA kernel takes these sizes.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A CUDA node of a registration that has none.
    #[error("the CUDA kernels need ONNX Runtime {CUDA_RELEASE} or later")]
    CudaRelease,
    /// A panic, which is a bug in this library.
    #[error("internal error (a bug in linfusion-ops): {0}")]
    Panic(String),
}

/// The entry point that ONNX Runtime calls after loading the library
/// (`RegisterCustomOpsLibrary`, `register_custom_ops_library`).
///
/// Registering again with the same options changes nothing.
///
/// # Safety
/// `options` must be valid session options and `base` what `OrtGetApiBase` returned, of an ONNX
/// Runtime that stays loaded.
#[unsafe(no_mangle)]
pub unsafe extern "system" fn RegisterCustomOps(
    options: *mut OrtSessionOptions,
    base: *const OrtApiBase,
) -> OrtStatusPtr {
    // SAFETY: by the contract above.
    match unsafe { Api::from_base(base) } {
        // SAFETY: likewise.
        Ok(api) => guarded(api, || unsafe {
            let scratch = cuda::kernels().and_then(|_| Scratch::from_base(base));
            register(options, api, scratch)
        }),
        Err(old) => old.oldest.map_or_else(OrtStatusPtr::default, |api| {
            let error = OrtError::TooOld {
                release: old.release,
            };
            api.failure(&format!("linfusion-ops: {error}"))
        }),
    }
}

/// One line about this library, zero-terminated: version, operator, element types, the
/// instruction set used on this machine, CUDA. Lives for ever.
#[unsafe(no_mangle)]
pub extern "system" fn LinFusionOpsStatus() -> *const c_char {
    static TEXT: OnceLock<CString> = OnceLock::new();
    TEXT.get_or_init(|| CString::new(status_text()).unwrap_or_default())
        .as_ptr()
}

/// One line about this library, as [`LinFusionOpsStatus`] gives it.
pub fn status_text() -> String {
    let types = ElementType::ALL.map(|t| t.to_string()).join(", ");
    let sets: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
    format!(
        "linfusion-ops {}: {DOMAIN} version {OPSET_VERSION}: {LINFUSION_ATTENTION}, {WINDOW_ATTENTION}; element types {types}; ONNX Runtime {MIN_RELEASE} or later (C API {API_VERSION}); CPU kernels {} (available: {}); {}",
        env!("CARGO_PKG_VERSION"),
        Isa::best(),
        sets.join(", "),
        cuda::status()
    )
}

/// Registers the operators' CPU kernels with session options in this process, without a library file.
///
/// The function table doesn't tell ONNX Runtime's release, on which the CUDA kernels depend;
/// [`RegisterCustomOps`] registers those too.
///
/// # Safety
/// `options` must be valid session options of the ONNX Runtime that `api` belongs to, `api` must
/// be its function table at version 17 or later, and that ONNX Runtime must stay loaded.
///
/// # Errors
/// [`OrtError`] for null pointers and for what ONNX Runtime reports.
pub unsafe fn register_in_process(
    options: *mut OrtSessionOptions,
    api: *const OrtApi,
) -> Result<(), OrtError> {
    // SAFETY: by the contract above.
    unsafe {
        let api = Api::from_table(api).ok_or(OrtError::Null { what: "the API" })?;
        register(options, api, None)
    }
}

/// Registers the CPU kernels, and with `scratch` the CUDA kernels.
///
/// # Safety
/// `options` must be null or valid session options of the ONNX Runtime of `api`.
unsafe fn register(
    options: *mut OrtSessionOptions,
    api: Api,
    scratch: Option<Scratch>,
) -> Result<(), OrtError> {
    if options.is_null() {
        return Err(OrtError::Null {
            what: "the session options",
        });
    }
    // SAFETY: by the contract above; domains live for ever.
    unsafe {
        if api.has_config_entry(options, REGISTERED_KEY)? {
            return Ok(());
        }
        let domain = domain_for(api, scratch)?;
        api.add_domain(options, domain)?;
        api.add_config_entry(options, REGISTERED_KEY, c"1")
    }
}

/// One domain object per loaded ONNX Runtime, with and without CUDA, shared by all its sessions and
/// never released: sessions keep pointers to it.
fn domain_for(api: Api, scratch: Option<Scratch>) -> Result<*mut OrtCustomOpDomain, OrtError> {
    let mut domains = domains().lock().unwrap_or_else(PoisonError::into_inner);
    let known = domains
        .iter()
        .find(|d| d.api.address() == api.address() && d.scratch.is_some() == scratch.is_some());
    if let Some(known) = known {
        return Ok(known.domain);
    }
    let domain = api.create_domain(DOMAIN_NAME)?;
    let entries = Entry::all()
        .iter()
        .filter(|e| scratch.is_some() || e.provider() == Provider::Cpu);
    for entry in entries {
        // SAFETY: the domain was just made; entries live for ever.
        unsafe { api.add_op(domain, entry.as_op()) }?;
    }
    domains.push(Registered {
        api,
        scratch,
        domain,
    });
    Ok(domain)
}

/// The table of some ONNX Runtime that has registered us.
fn any_api() -> Option<Api> {
    let domains = domains().lock().unwrap_or_else(PoisonError::into_inner);
    domains.first().map(|d| d.api)
}

/// How nodes of an ONNX Runtime get memory of their stream, if it registered CUDA kernels.
fn scratch_of(api: Api) -> Option<Scratch> {
    let domains = domains().lock().unwrap_or_else(PoisonError::into_inner);
    let mut of_api = domains.iter().filter(|d| d.api.address() == api.address());
    of_api.find_map(|d| d.scratch)
}

struct Registered {
    api: Api,
    scratch: Option<Scratch>,
    domain: *mut OrtCustomOpDomain,
}

// SAFETY: the pointer is only handed to ONNX Runtime, whose domain objects aren't bound to a
// thread and aren't changed after they were filled.
unsafe impl Send for Registered {}

fn domains() -> &'static Mutex<Vec<Registered>> {
    static DOMAINS: Mutex<Vec<Registered>> = Mutex::new(Vec::new());
    &DOMAINS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c_names_are_the_schemas() {
        assert_eq!(DOMAIN_NAME.to_str(), Ok(DOMAIN));
        // SAFETY: a zero-terminated string that lives for ever.
        let status = unsafe { CStr::from_ptr(LinFusionOpsStatus()) };
        assert_eq!(status.to_str(), Ok(status_text().as_str()));
    }

    #[test]
    fn null_pointers_are_refused() {
        // SAFETY: null is allowed for and refused.
        unsafe {
            assert!(
                RegisterCustomOps(std::ptr::null_mut(), std::ptr::null())
                    .0
                    .is_null()
            );
            let error = register_in_process(std::ptr::null_mut(), std::ptr::null());
            assert_eq!(error, Err(OrtError::Null { what: "the API" }));
        }
    }
}
