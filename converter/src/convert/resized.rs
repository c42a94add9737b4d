//! Resizing before, or instead of, converting.

use linfusion_models::onnx::proto::{ModelProto, TensorProto};
use linfusion_models::onnx::write::{check_output, stage};
use linfusion_models::onnx::{ElementType, OnnxFile};
use linfusion_ops::schema::WindowSpec;

use super::{ConvertError, Request, Run, output, publish, write_options};
use crate::analysis::Analysis;
use crate::plan::plan;
use crate::report::{ConvertReport, ModelReport};
use crate::resize::verify::VerifyError;
use crate::resize::{ImageSize, ResizeReport, resize};
use crate::verify::{self, Verify, known_problems};

/// Models with more bytes of weights are run only under [`Verify::Full`]: the original and the
/// resized one are in memory together.
const MOST_WEIGHTS: u64 = 1 << 30;

/// Resizes the model of `file` in place.
pub(super) fn resize_first(
    request: &Request,
    file: &mut OnnxFile,
    size: ImageSize,
    warnings: &mut Vec<String>,
    progress: &mut dyn FnMut(&str),
) -> Result<ResizeReport, ConvertError> {
    let model = request.model.display().to_string();
    progress("looking for sizes of the image");
    let mut resized = resize(file, size).map_err(|source| ConvertError::Resize {
        model: model.clone(),
        source: Box::new(source),
    })?;
    if request.run == Run::Write && request.verify != Verify::Off {
        let weights = weights(&file.model);
        if request.verify == Verify::Full || weights <= MOST_WEIGHTS {
            progress("running the resized model beside the original");
            match resized.verify(file) {
                Ok(verified) => resized.report.verified = Some(verified),
                Err(VerifyError::Original(reason)) if request.verify != Verify::Full => {
                    warnings.push(format!("the resized model was not run: {reason}"));
                }
                Err(VerifyError::Library(error)) => {
                    return Err(verify::VerifyError::Library(error).into());
                }
                Err(source) => {
                    let source = Box::new(source);
                    return Err(ConvertError::ResizedWrong { model, source });
                }
            }
            if matches!(size, ImageSize::Fixed { .. }) && !resized.runs_at_its_size() {
                warnings.push(format!(
                    "the resized model was not run at {size}, which is much larger than the size of the export"
                ));
            }
        } else {
            warnings.push(format!(
                "the resized model was not run: it has {} MB of weights (--verify full runs it)",
                weights / 1_000_000
            ));
        }
    }
    file.model = resized.model;
    Ok(resized.report)
}

fn weights(model: &ModelProto) -> u64 {
    let size = |tensor: &TensorProto| {
        let element = ElementType::from_onnx(tensor.data_type?)?;
        let bytes = element.byte_len(&tensor.dims).ok()??;
        u64::try_from(bytes).ok()
    };
    (model.graph.initializer.iter())
        .filter_map(size)
        .fold(0, u64::saturating_add)
}

/// Writes a model that was resized and whose attention the user keeps.
pub(super) fn write_resized(
    request: &Request,
    file: &OnnxFile,
    resized: ResizeReport,
    warnings: Vec<String>,
    progress: &mut dyn FnMut(&str),
) -> Result<ConvertReport, ConvertError> {
    let analysis = Analysis::with_grid(file, request.selection.grid);
    let actions = plan(&analysis, &request.selection, &[]);
    let name = request.model.display().to_string();
    let mut report = ConvertReport {
        model: ModelReport::new(&name, &analysis, &actions, WindowSpec::default(), 0),
        resized: Some(resized),
        output: None,
        companions: Vec::new(),
        weights: "graph",
        checkpoint: None,
        checkpoint_sha256: None,
        emit: request.emit,
        converted: 0,
        nodes_removed: 0,
        initializers_removed: 0,
        verified: None,
        warnings,
    };
    let out = output(request);
    let options = write_options(request);
    if request.run == Run::Dry {
        check_output(Some(file), &out, &options)?;
        return Ok(report);
    }
    progress("writing");
    let staged = stage(&file.model, Some(file), &out, &options)?;
    if request.verify != Verify::Off {
        let before = known_problems(&OnnxFile::open(&request.model)?);
        let written = staged.open()?;
        let verified = verify::verify(&written, &before, &[], None, request.verify, &mut |_| {})?;
        report.verified = Some(verified);
    }
    publish(staged, &out, &mut report)?;
    Ok(report)
}
