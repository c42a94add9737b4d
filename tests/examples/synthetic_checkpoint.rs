//! Writes a LinFusion checkpoint of random weights, in the official format, that
//! fits a model: `cargo run -p linfusion-tests --example synthetic_checkpoint unet.onnx folder`.

use std::path::Path;
use std::process::ExitCode;

use linfusion_models::checkpoint::MlpWidth;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, folder] = &arguments[..] else {
        eprintln!("usage: synthetic_checkpoint MODEL FOLDER");
        return ExitCode::from(2);
    };
    match linfusion_tests::checkpoint_for(Path::new(model), Path::new(folder), MlpWidth::Width(16))
    {
        Ok(path) => {
            println!("{}", path.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
