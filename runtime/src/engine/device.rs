//! Which device a graph runs on.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use linfusion_models::onnx::{ElementType, make, proto};
use serde::{Deserialize, Serialize};

use super::{Engine, EngineError, Operators, Session, SessionOptions, execution_providers};

/// A device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// The GPU of that number, through ONNX Runtime's CUDA provider.
    Cuda(u32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl Device {
    /// How many bytes there are, in words: of the machine's memory what is free, of a GPU's all.
    pub fn has(self, bytes: u64) -> String {
        let bytes = crate::memory::shown(bytes);
        match self {
            Self::Cpu => format!("{bytes} are free"),
            Self::Cuda(_) => format!("{self} has {bytes}"),
        }
    }
}

/// What was asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if it works, else the processor.
    #[default]
    Auto,
    /// This one, and no other.
    Only(Device),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Only(Device::Cpu)),
            None if text == "cuda" => Ok(Self::Only(Device::Cuda(0))),
            Some(("cuda", number)) => number
                .parse()
                .map(|number| Self::Only(Device::Cuda(number)))
                .map_err(|_| format!("`{number}` is no number of a GPU")),
            _ => Err(format!("`{text}` is none of auto, cpu, cuda, cuda:1 …")),
        }
    }
}

/// The device that runs, and why it is not the one that was hoped for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// The device.
    pub device: Device,
    /// Why `auto` took the processor although ONNX Runtime has a CUDA provider.
    pub note: Option<String>,
}

impl DeviceChoice {
    /// Looks whether the device works, by running a small graph on it.
    ///
    /// # Errors
    /// A device was asked for by name and doesn't work.
    pub fn choose(self, engine: Engine, library: Option<&Path>) -> Result<Chosen, EngineError> {
        let (device, fixed) = match self {
            Self::Auto => (Device::Cuda(0), false),
            Self::Only(device) => (device, true),
        };
        let cpu = |note| Chosen {
            device: Device::Cpu,
            note,
        };
        if device == Device::Cpu {
            return Ok(cpu(None));
        }
        let refused = |problem: String, hint| EngineError::Device {
            device,
            problem,
            hint,
        };
        if engine == Engine::Tract {
            return match fixed {
                true => Err(refused(
                    "tract runs on the processor only".to_owned(),
                    "take --engine ort with an onnxruntime-gpu library",
                )),
                false => Ok(cpu(None)),
            };
        }
        let providers = execution_providers(library)?;
        if !providers.iter().any(|name| name == CUDA) {
            return match fixed {
                true => Err(refused(
                    format!(
                        "this ONNX Runtime has no {CUDA}, only {}",
                        providers.join(", ")
                    ),
                    "name the library of an onnxruntime-gpu package with --ort-library",
                )),
                false => Ok(cpu(None)),
            };
        }
        match (probe(device, library), fixed) {
            (Ok(()), _) => Ok(Chosen { device, note: None }),
            (Err(error), true) => Err(refused(
                error.to_string(),
                "nvidia-smi shows GPU and driver; CUDA 13 and cuDNN 9 must be where the loader finds them",
            )),
            (Err(error), false) => Ok(cpu(Some(format!("the GPU is not usable: {error}")))),
        }
    }
}

const CUDA: &str = "CUDAExecutionProvider";

/// Runs x + x on the device.
fn probe(device: Device, library: Option<&Path>) -> Result<(), EngineError> {
    let options = SessionOptions {
        operators: Operators::None,
        library: library.map(Path::to_owned),
        device,
        ..SessionOptions::default()
    };
    let bytes = of_one_node("Add", &["x", "x"], &[make::Dim::Fixed(1)], vec![]);
    let mut session = Session::from_bytes(Engine::Ort, &bytes, &options)?;
    session.run(&[("x", ndarray::arr1(&[1.0_f32]).into())])?;
    Ok(())
}

/// A model of one node that takes `x`, in float32 of these dimensions, and stored tensors, and gives `y` of the same dimensions.
pub(super) fn of_one_node(
    operator: &str,
    inputs: &[&str],
    dims: &[make::Dim],
    stored: Vec<proto::TensorProto>,
) -> Vec<u8> {
    let value = |name| make::value_info(name, ElementType::F32, dims);
    let graph = proto::GraphProto {
        name: Some("one".to_owned()),
        node: vec![make::node(operator, "node", inputs, &["y"], vec![])],
        initializer: stored,
        input: vec![value("x")],
        output: vec![value("y")],
        ..Default::default()
    };
    let model = proto::ModelProto {
        ir_version: Some(8),
        opset_import: vec![make::opset("", 17)],
        graph: buffa::MessageField::some(graph),
        ..Default::default()
    };
    buffa::Message::encode_to_vec(&model)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        for (text, device) in [
            ("cpu", Device::Cpu),
            ("cuda", Device::Cuda(0)),
            ("cuda:3", Device::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(DeviceChoice::Only(device)));
        }
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        assert_eq!(Device::Cuda(3).to_string(), "cuda:3");
        assert_eq!(Device::Cuda(3).has(80_000_000_000), "cuda:3 has 80.0 GB");
        assert_eq!(Device::Cpu.has(812_000_000), "812 MB are free");
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cpu:0", "CPU"] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_unless_auto() {
        let gpu = DeviceChoice::Only(Device::Cuda(0));
        let error = gpu.choose(Engine::Tract, None).unwrap_err().to_string();
        assert!(
            error.contains("cuda:0") && error.contains("tract"),
            "{error}"
        );
        let auto = DeviceChoice::Auto.choose(Engine::Tract, None).unwrap();
        assert_eq!(auto.device, Device::Cpu);
        let Ok(providers) = execution_providers(None) else {
            println!("skipped: no ONNX Runtime library");
            return;
        };
        probe(Device::Cpu, None).unwrap();
        if !providers.iter().any(|p| p == CUDA) {
            let error = gpu.choose(Engine::Ort, None).unwrap_err().to_string();
            assert!(error.contains("CPUExecutionProvider"), "{error}");
            assert_eq!(
                DeviceChoice::Auto.choose(Engine::Ort, None).unwrap().note,
                None
            );
            // What a driver that is gone would give.
            assert!(probe(Device::Cuda(0), None).is_err());
        }
    }
}
