//! Finding ONNX Runtime's shared library.

use std::path::{Path, PathBuf};

/// The variable that names the library.
pub const VARIABLE: &str = "ORT_DYLIB_PATH";

/// A library to load, and why this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// A file, or a bare name for the system's loader.
    pub path: PathBuf,
    /// Where it was found.
    pub origin: Origin,
}

/// How a library was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Given by the caller.
    Given,
    /// `ORT_DYLIB_PATH`.
    Variable,
    /// Beside the running program.
    BesideProgram,
    /// By name, from wherever the system's loader looks.
    System,
}

/// Why there is no ONNX Runtime.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// No candidate could be loaded.
    #[error(
        "no ONNX Runtime library could be loaded; tried {}. \
         Set {VARIABLE} to a libonnxruntime of version 1.17 or later, e.g. the one in the Python package: \
         `python3 -m pip download --no-deps --only-binary=:all: onnxruntime`, unzip the wheel, and take \
         onnxruntime/capi/libonnxruntime.so.*",
        tried.join("; ")
    )]
    NotFound {
        /// Each candidate and what the loader said.
        tried: Vec<String>,
    },
    /// The library that was asked for by name does not load.
    #[error("ONNX Runtime's library {} ({}) does not load: {message}", path.display(), origin.describe())]
    Broken {
        /// The file.
        path: PathBuf,
        /// Who asked for it.
        origin: Origin,
        /// What the loader said.
        message: String,
    },
    /// Another library was loaded before.
    #[error(
        "this process already runs on {}, and cannot load {} as well",
        loaded.display(),
        asked.display()
    )]
    AnotherLoaded {
        /// The library in use.
        loaded: PathBuf,
        /// The one asked for.
        asked: PathBuf,
    },
}

impl LibraryError {
    /// What to do, where the message does not say it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { .. } | Self::AnotherLoaded { .. } => None,
            Self::Broken { origin, .. } => Some(format!(
                "{} must be a whole libonnxruntime of version 1.17 or later for this machine, with all that it depends on; \
                 --engine tract needs none",
                match origin {
                    Origin::Variable => VARIABLE,
                    Origin::Given | Origin::BesideProgram | Origin::System => "--ort-library",
                }
            )),
        }
    }
}

impl Origin {
    /// A few words for messages.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Given => "from --ort-library",
            Self::Variable => "from ORT_DYLIB_PATH",
            Self::BesideProgram => "beside the program",
            Self::System => "from the system",
        }
    }

    /// Whether somebody asked for just this library, so that no other will do.
    pub(super) fn is_explicit(self) -> bool {
        matches!(self, Self::Given | Self::Variable)
    }
}

/// Libraries to try, best first: the given path alone; else `ORT_DYLIB_PATH` alone; else the newest beside
/// the program, then the system's.
pub fn find(given: Option<&Path>) -> Vec<Candidate> {
    let candidate = |path: PathBuf, origin| Candidate { path, origin };
    if let Some(path) = given {
        return vec![candidate(path.to_owned(), Origin::Given)];
    }
    if let Some(path) = std::env::var_os(VARIABLE).filter(|_| is_named()) {
        return vec![candidate(path.into(), Origin::Variable)];
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|program| program.parent().map(libraries_in))
        .unwrap_or_default();
    let system = ["libonnxruntime.so.1", file_name()];
    beside
        .into_iter()
        .map(|path| candidate(path, Origin::BesideProgram))
        .chain(system.map(|name| candidate(name.into(), Origin::System)))
        .collect()
}

/// Whether `ORT_DYLIB_PATH` names a library: no other engine should quietly run instead.
pub fn is_named() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|v| !v.is_empty())
}

/// ONNX Runtime libraries in a folder, newest version first.
pub fn libraries_in(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(is_library_name)
        })
        .collect();
    found.sort_by_key(|path| std::cmp::Reverse(version_in(path)));
    found
}

/// `libonnxruntime.so` and its versions, but not `libonnxruntime_providers_*.so`.
fn is_library_name(name: &str) -> bool {
    name == file_name()
        || name.starts_with("libonnxruntime.so.")
        || (name.starts_with("libonnxruntime.") && name.ends_with(".dylib"))
}

fn file_name() -> &'static str {
    if cfg!(windows) {
        "onnxruntime.dll"
    } else if cfg!(target_vendor = "apple") {
        "libonnxruntime.dylib"
    } else {
        "libonnxruntime.so"
    }
}

/// The numbers in a file name, e.g. `[1, 32, 0]`.
fn version_in(path: &Path) -> Vec<u64> {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
        .split('.')
        .filter_map(|part| part.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_path_is_the_only_candidate() {
        let found = find(Some(Path::new("/x/libonnxruntime.so")));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].origin, Origin::Given);
    }

    #[test]
    fn the_newest_library_of_a_folder_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "libonnxruntime.so.1.9.0",
            "libonnxruntime.so.1.32.0",
            "libonnxruntime_providers_shared.so",
            "libonnxruntime.so.1.20.1",
            "other.so",
        ] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let found: Vec<_> = libraries_in(folder.path())
            .iter()
            .map(|p| p.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        assert_eq!(
            found,
            [
                "libonnxruntime.so.1.32.0",
                "libonnxruntime.so.1.20.1",
                "libonnxruntime.so.1.9.0"
            ]
        );
    }
}
