//! The committed small models, for tests.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The path of a file or folder under `models/fixtures`.
pub fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(name)
}

/// The bytes of a fixture; those of a `.gz` are unpacked.
///
/// # Errors
/// The file is not there or damaged.
pub fn bytes(name: &str) -> io::Result<Vec<u8>> {
    let path = path(name);
    let stored = std::fs::read(&path)?;
    if path.extension().is_none_or(|e| e != "gz") {
        return Ok(stored);
    }
    let mut unpacked = Vec::new();
    flate2::read::GzDecoder::new(stored.as_slice()).read_to_end(&mut unpacked)?;
    Ok(unpacked)
}

/// Names of the exported models, `exports/*.onnx.gz`, sorted.
///
/// # Errors
/// The folder cannot be read.
pub fn exports() -> io::Result<Vec<String>> {
    let mut names = std::fs::read_dir(path("exports"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.retain(|name| name.ends_with(".onnx.gz"));
    names.sort();
    Ok(names.into_iter().map(|n| format!("exports/{n}")).collect())
}

/// Lays a tiny pipeline of `pipelines` out in a folder, its models unpacked; `into` must not be there yet.
///
/// # Errors
/// There is no such pipeline, or the folder cannot be written.
pub fn pipeline(name: &str, into: &Path) -> io::Result<()> {
    copy(&format!("pipelines/{name}"), into)
}

fn copy(from: &str, into: &Path) -> io::Result<()> {
    std::fs::create_dir(into)?;
    for entry in std::fs::read_dir(path(from))? {
        let entry = entry?;
        let file = entry.file_name().to_string_lossy().into_owned();
        let inner = format!("{from}/{file}");
        if entry.file_type()?.is_dir() {
            copy(&inner, &into.join(&file))?;
        } else {
            let unpacked = file.strip_suffix(".gz").unwrap_or(&file);
            std::fs::write(into.join(unpacked), bytes(&inner)?)?;
        }
    }
    Ok(())
}
