//! The device that tests run on. The library's own tests have this file too.

use super::engine::{Device, DeviceChoice, Engine};

const VARIABLE: &str = "LINFUSION_TEST_DEVICE";

/// The device that `LINFUSION_TEST_DEVICE` names, the processor where it isn't set. One that cannot be used fails the test:
/// whoever asks for a GPU is to see what it does.
pub fn device() -> Device {
    let Some(name) = std::env::var_os(VARIABLE) else {
        return Device::Cpu;
    };
    named(&name.to_string_lossy()).unwrap_or_else(|problem| panic!("{VARIABLE}: {problem}"))
}

/// The device of that name, if it works.
pub fn named(name: &str) -> Result<Device, String> {
    match name.parse()? {
        // It would fall back.
        DeviceChoice::Auto => Err("`auto` is none of cpu, cuda, cuda:1 …".to_owned()),
        only => match only.choose(Engine::Ort, None) {
            Ok(chosen) => Ok(chosen.device),
            Err(error) => Err(error.to_string()),
        },
    }
}
