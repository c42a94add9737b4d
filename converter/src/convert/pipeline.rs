//! A whole pipeline's folder: its UNet or transformer converted, the rest linked.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use linfusion_models::onnx::write::Overwrite;
use linfusion_models::staged::{StagedFolder, parent_folder};

use super::error::{ConvertError, PipelineFault};
use super::{Request, Run, convert};
use crate::report::ConvertReport;

const INDEX: &str = "model_index.json";
/// The models that take the steps of sampling; a pipeline has one of them.
const DENOISERS: [&str; 2] = ["unet", "transformer"];

/// Converts the pipeline in the folder `request.model` into the folder `request.out` (default `<FOLDER>.linfusion`): the
/// converted model and small files are new, other components are links to the original's.
///
/// # Errors
/// [`ConvertError`]; what was there before is as it was.
pub fn convert_pipeline(
    request: &Request,
    progress: &mut dyn FnMut(&str),
) -> Result<ConvertReport, ConvertError> {
    let folder = &request.model;
    let fault = |path: &Path, fault: PipelineFault| ConvertError::Pipeline {
        path: path.display().to_string(),
        fault,
    };
    if !folder.join(INDEX).is_file() {
        return Err(fault(folder, PipelineFault::NoIndex));
    }
    let component = DENOISERS
        .into_iter()
        .find(|name| folder.join(name).is_dir())
        .ok_or_else(|| fault(folder, PipelineFault::NoDenoiser))?;
    let model = only_model(&folder.join(component))
        .ok_or_else(|| fault(&folder.join(component), PipelineFault::NoModel))?;
    let mut inner = Request {
        model: model.clone(),
        out: None,
        ..request.clone()
    };
    if request.run == Run::Dry {
        return convert(&inner, progress).map_err(|error| of_folder(error, folder));
    }
    let out = request
        .out
        .clone()
        .unwrap_or_else(|| default_output(folder));
    if request.overwrite == Overwrite::Refuse && out.symlink_metadata().is_ok() {
        return Err(fault(&out, PipelineFault::Exists));
    }
    // The new folder links to the original's.
    let at = |path: &Path| std::fs::canonicalize(path).ok();
    let inside = at(parent_folder(&out)).zip(at(folder));
    if at(&out).is_some_and(|out| Some(out) == at(folder))
        || inside.is_some_and(|(parent, folder)| parent.starts_with(folder))
    {
        return Err(fault(&out, PipelineFault::Itself));
    }
    // Others' folders are not for replacing.
    if out.symlink_metadata().is_ok() && !out.join(INDEX).is_file() {
        return Err(fault(&out, PipelineFault::NoPipeline));
    }
    let staged = StagedFolder::of(&out);
    let staged = staged.map_err(|source| fault(&out, PipelineFault::Create(source)))?;
    let written = |source| fault(&out, PipelineFault::Write(source));
    let target = staged.path().join(component);
    std::fs::create_dir(&target).map_err(written)?;
    let name = model.file_name().unwrap_or("model.onnx".as_ref());
    inner.out = Some(target.join(name));
    let mut report = convert(&inner, progress).map_err(|error| of_folder(error, folder))?;
    fill(folder, staged.path(), component).map_err(written)?;
    let begun = staged.path().to_owned();
    staged.publish(request.overwrite).map_err(written)?;
    // By the names that the files have now.
    for path in report.output.iter_mut().chain(&mut report.companions) {
        if let Ok(inside) = Path::new(path.as_str()).strip_prefix(&begun) {
            *path = out.join(inside).display().to_string();
        }
    }
    Ok(report)
}

fn default_output(folder: &Path) -> PathBuf {
    let mut name = folder.file_name().unwrap_or_default().to_owned();
    name.push(".linfusion");
    folder.with_file_name(name)
}

/// What to type next names what was typed.
fn of_folder(mut error: ConvertError, folder: &Path) -> ConvertError {
    if let ConvertError::NoWeights { model, .. } | ConvertError::ManyWeights { model, .. } =
        &mut error
    {
        *model = folder.display().to_string();
    }
    error
}

/// `model.onnx`, else the only ONNX file.
fn only_model(folder: &Path) -> Option<PathBuf> {
    let usual = folder.join("model.onnx");
    if usual.is_file() {
        return Some(usual);
    }
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let mut models = entries
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "onnx"));
    models.next().filter(|_| models.next().is_none())
}

/// Puts everything but the converted model into the new folder, the index last.
fn fill(folder: &Path, out: &Path, component: &str) -> io::Result<()> {
    for entry in std::fs::read_dir(folder.join(component))? {
        let path = entry?.path();
        // Weights beside the old model are the old model's.
        if path.extension().is_some_and(|e| e == "json" || e == "txt") {
            copy(&path, &out.join(component))?;
        }
    }
    let original = std::fs::canonicalize(folder)?;
    let beside = original.parent() == std::fs::canonicalize(out)?.parent();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == component || name == INDEX {
            continue;
        }
        // Relative where both lie in one folder, so that it can be moved.
        let target = match (beside, original.file_name()) {
            (true, Some(folder)) => Path::new("..").join(folder).join(&name),
            _ => original.join(&name),
        };
        symlink(target, out.join(&name))?;
    }
    copy(&folder.join(INDEX), out)
}

fn copy(file: &Path, into: &Path) -> io::Result<()> {
    std::fs::copy(file, into.join(file.file_name().unwrap_or_default())).map(|_| ())
}
