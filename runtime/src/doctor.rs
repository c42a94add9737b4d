//! What is installed, and what would run where.

use std::ffi::{CStr, c_char};
use std::path::{Path, PathBuf};

use libloading::Library;
use serde::Serialize;

use crate::engine::library::{self, Candidate};
use crate::engine::{execution_providers, load_library};

/// The state of the machine.
#[derive(Debug, Clone, Serialize)]
pub struct Diagnosis {
    /// ONNX Runtime libraries that would be tried, best first.
    pub candidates: Vec<FoundLibrary>,
    /// The one that loads; `None` with `onnx_runtime_problem` otherwise.
    pub onnx_runtime: Option<OnnxRuntime>,
    /// Why none loads.
    pub onnx_runtime_problem: Option<String>,
    /// The operators in this program, in one line.
    pub operators_in_process: String,
    /// The operator library that was asked about.
    pub operator_library: Option<OperatorLibrary>,
    /// What happens to a `LinFusionAttention` node, for each place it can run.
    pub placements: Vec<Placement>,
}

/// A library that a search came upon.
#[derive(Debug, Clone, Serialize)]
pub struct FoundLibrary {
    /// A file, or a bare name for the system's loader.
    pub path: PathBuf,
    /// How it was found.
    pub origin: &'static str,
}

/// The ONNX Runtime in use.
#[derive(Debug, Clone, Serialize)]
pub struct OnnxRuntime {
    /// Its file.
    pub path: PathBuf,
    /// How it was found.
    pub origin: &'static str,
    /// Its version.
    pub version: String,
    /// Its execution providers.
    pub providers: Vec<String>,
}

/// An operator library for ONNX Runtime.
#[derive(Debug, Clone, Serialize)]
pub struct OperatorLibrary {
    /// Its file.
    pub path: PathBuf,
    /// What it says of itself.
    pub status: Option<String>,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// What runs a `LinFusionAttention` node in one place.
#[derive(Debug, Clone, Serialize)]
pub struct Placement {
    /// An engine, or one of its execution providers.
    pub place: String,
    /// What runs when the operators are registered.
    pub with_operators: String,
    /// What runs when they are not.
    pub without_operators: String,
}

/// Looks at the machine. Loads the ONNX Runtime library that a session would load, for good.
pub fn diagnose(ort_library: Option<&Path>, operator_library: Option<&Path>) -> Diagnosis {
    let candidates = library::find(ort_library)
        .into_iter()
        .map(|c| FoundLibrary {
            origin: c.origin.describe(),
            path: c.path,
        })
        .collect();
    let (onnx_runtime, onnx_runtime_problem) = match load_library(ort_library) {
        Ok(loaded) => (Some(describe(loaded)), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let placements = placements(onnx_runtime.as_ref());
    Diagnosis {
        candidates,
        onnx_runtime,
        onnx_runtime_problem,
        operators_in_process: linfusion_ops::ort::status_text(),
        operator_library: operator_library.map(inspect_operator_library),
        placements,
    }
}

fn describe(loaded: Candidate) -> OnnxRuntime {
    OnnxRuntime {
        version: version(&loaded.path).unwrap_or_else(|| "unknown".to_owned()),
        // The library is loaded already, so this can only fail as `load_library` would have.
        providers: execution_providers(None).unwrap_or_default(),
        origin: loaded.origin.describe(),
        path: loaded.path,
    }
}

/// The version that a library states.
fn version(path: &Path) -> Option<String> {
    // SAFETY: the library has been loaded before, so that its initialisers do not run again.
    let library = unsafe { Library::new(path) }.ok()?;
    // SAFETY: the symbol has this signature in every ONNX Runtime.
    let base = unsafe {
        library.get::<unsafe extern "C" fn() -> *const ort::sys::OrtApiBase>(b"OrtGetApiBase\0")
    }
    .ok()?;
    // SAFETY: the base is a static of the library, or null.
    let base = unsafe { base().as_ref() }?;
    // SAFETY: the version is a static, zero-terminated text.
    let version = unsafe { CStr::from_ptr((base.GetVersionString)()) };
    Some(version.to_string_lossy().into_owned())
}

fn inspect_operator_library(path: &Path) -> OperatorLibrary {
    let (status, problem) = match operator_library_status(path) {
        Ok(status) => (Some(status), None),
        Err(problem) => (None, Some(problem)),
    };
    OperatorLibrary {
        path: path.to_owned(),
        status,
        problem,
    }
}

fn operator_library_status(path: &Path) -> Result<String, String> {
    let path = std::path::absolute(path).map_err(|e| e.to_string())?;
    // SAFETY: loading runs the library's initialisers; the user named it as one to load.
    let library = unsafe { Library::new(&path) }.map_err(|e| e.to_string())?;
    // SAFETY: only looked up, not called.
    unsafe { library.get::<*const ()>(b"RegisterCustomOps\0") }
        .map_err(|_| "it has no RegisterCustomOps: no operator library".to_owned())?;
    // SAFETY: a symbol of this name is ours and has this signature.
    let status = unsafe {
        library.get::<unsafe extern "system" fn() -> *const c_char>(b"LinFusionOpsStatus\0")
    }
    .map_err(|_| "it has operators, but not those of LinFusion".to_owned())?;
    // SAFETY: it gives a zero-terminated text that lives as long as the library.
    let text = unsafe { status() };
    if text.is_null() {
        return Err("it has no status".to_owned());
    }
    // SAFETY: as above, and not null.
    Ok(unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned())
}

fn placements(runtime: Option<&OnnxRuntime>) -> Vec<Placement> {
    let kernel = format!("kernel ({})", linfusion_ops::cpu::Isa::best());
    let mut placements = vec![Placement {
        place: "tract".to_owned(),
        with_operators: kernel.clone(),
        without_operators: "they are always registered".to_owned(),
    }];
    for provider in runtime.map(|r| r.providers.as_slice()).unwrap_or_default() {
        let with_operators = match provider.as_str() {
            "CPUExecutionProvider" => kernel.clone(),
            // Providers without an entry leave the node to the CPU, which splits their part of the graph.
            _ => {
                "on the CPU, with copies; register no operators to keep the graph whole".to_owned()
            }
        };
        placements.push(Placement {
            place: provider.clone(),
            with_operators,
            without_operators: "the model's function body".to_owned(),
        });
    }
    placements
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_operator_library_has_a_problem() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("liblinfusion_ops.so");
        std::fs::write(&path, "no library").unwrap();
        let found = inspect_operator_library(&path);
        assert!(found.status.is_none() && found.problem.is_some());
    }

    #[test]
    fn tract_is_always_there() {
        let diagnosis = diagnose(Some(Path::new("/nowhere/libonnxruntime.so")), None);
        assert!(diagnosis.onnx_runtime.is_none() || diagnosis.onnx_runtime_problem.is_none());
        assert_eq!(diagnosis.placements[0].place, "tract");
        assert!(
            diagnosis
                .operators_in_process
                .contains("LinFusionAttention")
        );
    }
}
