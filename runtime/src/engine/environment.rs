//! ONNX Runtime's library, which a process loads once, and its environment.

use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libloading::Library;
use ort::environment::Environment;
use ort::logging::LogLevel;

use super::library::{self, Candidate, LibraryError};

/// The process's only ONNX Runtime.
pub(super) struct Runtime {
    pub environment: Environment,
    library: Candidate,
}

static RUNTIME: OnceLock<Runtime> = OnceLock::new();

/// Loads ONNX Runtime, or finds it loaded; gives the library that is in use.
///
/// # Errors
/// No library loads, or another than the given one is in use.
pub fn load_library(given: Option<&Path>) -> Result<Candidate, LibraryError> {
    runtime(given).map(|runtime| runtime.library.clone())
}

/// Names of the execution providers that the loaded library has.
///
/// # Errors
/// As [`load_library`].
pub fn execution_providers(given: Option<&Path>) -> Result<Vec<String>, LibraryError> {
    runtime(given)?;
    let api = ort::api();
    let mut names = std::ptr::null_mut();
    let mut count = 0;
    // SAFETY: both out-pointers are valid; the API is that of the loaded library.
    let status = unsafe { (api.GetAvailableProviders)(&mut names, &mut count) };
    if !status.0.is_null() || names.is_null() {
        // SAFETY: a status that is not null is owned by us.
        unsafe { (api.ReleaseStatus)(status.0) };
        return Ok(Vec::new());
    }
    let count = usize::try_from(count).unwrap_or(0);
    // SAFETY: on success `names` points at `count` zero-terminated strings.
    let list = unsafe { std::slice::from_raw_parts(names, count) };
    let providers = list
        .iter()
        // SAFETY: as above.
        .map(|name| unsafe { std::ffi::CStr::from_ptr(*name) })
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    // SAFETY: the list came from GetAvailableProviders and is not used after this.
    let released =
        unsafe { (api.ReleaseAvailableProviders)(names, i32::try_from(count).unwrap_or(0)) };
    if !released.0.is_null() {
        // SAFETY: a status that is not null is owned by us.
        unsafe { (api.ReleaseStatus)(released.0) };
    }
    Ok(providers)
}

/// Loads it where that has not been done.
///
/// # Errors
/// As [`load_library`].
pub(super) fn runtime(given: Option<&Path>) -> Result<&'static Runtime, LibraryError> {
    static LOADING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    if RUNTIME.get().is_none() {
        let loaded = load_first(library::find(given))?;
        // Nobody else sets it while the lock is held.
        let _ = RUNTIME.set(loaded);
    }
    let runtime = RUNTIME
        .get()
        .ok_or(LibraryError::NotFound { tried: vec![] })?;
    match given {
        Some(asked) if !same_file(asked, &runtime.library.path) => {
            Err(LibraryError::AnotherLoaded {
                loaded: runtime.library.path.clone(),
                asked: asked.to_owned(),
            })
        }
        _ => Ok(runtime),
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(a) == real(b)
}

fn load_first(candidates: Vec<Candidate>) -> Result<Runtime, LibraryError> {
    let mut tried = Vec::new();
    for candidate in candidates {
        match load(&candidate) {
            Ok(environment) => {
                return Ok(Runtime {
                    environment,
                    library: candidate,
                });
            }
            Err(message) if candidate.origin.is_explicit() => {
                return Err(LibraryError::Broken {
                    path: candidate.path,
                    origin: candidate.origin,
                    message,
                });
            }
            Err(message) => tried.push(format!("{} ({message})", candidate.path.display())),
        }
    }
    Err(LibraryError::NotFound { tried })
}

fn load(candidate: &Candidate) -> Result<Environment, String> {
    // A path with folders is made absolute: ort would resolve it against the program's own folder.
    let path = match candidate.path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => {
            std::path::absolute(&candidate.path).map_err(|e| e.to_string())?
        }
        _ => candidate.path.clone(),
    };
    let _library = opened(&path)?;
    let environment = ort::init_from(&path)
        .map_err(|e| e.to_string())?
        .with_name("linfusion")
        .with_telemetry(false)
        .with_logger(Arc::new(log))
        .build()
        .map_err(|e| e.to_string())?;
    environment.set_log_level(LogLevel::Warning);
    Ok(environment)
}

/// Opens the library before `ort` does, which keeps the loader's reason to itself.
fn opened(path: &Path) -> Result<Library, String> {
    // SAFETY: loading runs the library's initialisers; it was named, or is called as ONNX Runtime's is.
    let library = unsafe { Library::new(path) }.map_err(|e| {
        let said = e.source().map_or_else(|| e.to_string(), |s| s.to_string());
        // Whoever reports it names the file.
        let named = format!("{}: ", path.display());
        said.strip_prefix(&named).unwrap_or(&said).to_owned()
    })?;
    // SAFETY: only looked up, not called.
    unsafe { library.get::<*const ()>(b"OrtGetApiBase\0") }
        .map_err(|_| "it has no OrtGetApiBase, which every ONNX Runtime has".to_owned())?;
    Ok(library)
}

/// ONNX Runtime's messages become events; a library does not write to the terminal. Of a node that fails it also gives a status
/// with the same words, which whoever called it reports; other errors are said here alone.
fn log(level: LogLevel, _category: &str, _id: &str, place: &str, message: &str) {
    let is_told = place.contains("ExecuteKernel");
    match level {
        LogLevel::Error if is_told => tracing::debug!(place, "{message}"),
        LogLevel::Fatal | LogLevel::Error => tracing::error!(place, "{message}"),
        LogLevel::Warning => tracing::debug!(place, "{message}"),
        LogLevel::Info | LogLevel::Verbose => tracing::trace!(place, "{message}"),
    }
}
