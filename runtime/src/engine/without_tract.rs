//! What stands in for tract where it is left out of the build.

use std::path::Path;

use super::{Engine, EngineError, Loaded};

pub(super) fn load_file(path: &Path) -> Result<Loaded, EngineError> {
    Err(left_out(&path.display().to_string()))
}

pub(super) fn load_bytes(_: &[u8]) -> Result<Loaded, EngineError> {
    Err(left_out("the model in memory"))
}

fn left_out(model: &str) -> EngineError {
    EngineError::Load {
        engine: Engine::Tract,
        model: model.to_owned(),
        message:
            "this program was built without tract (hint: name a libonnxruntime in ORT_DYLIB_PATH)"
                .to_owned(),
    }
}
