//! The ensemble of a pipeline's two text encoders.

use std::collections::BTreeMap;

use super::config::{ModelConfig, Platform, Port, Step};

/// The name of the ensemble.
pub const NAME: &str = "text";

/// Both encoders in one request: their inputs, the second's under names that end in `_2`, and of each what the denoising
/// model is conditioned on: the hidden states of the last layer but one, and pooled text where there is some.
/// `None` where an encoder doesn't give hidden states.
pub fn of_text_encoders(first: &ModelConfig, second: &ModelConfig) -> Option<ModelConfig> {
    let mut ensemble = ModelConfig {
        name: NAME.to_owned(),
        platform: Platform::Ensemble,
        max_batch_size: first.max_batch_size.min(second.max_batch_size),
        inputs: Vec::new(),
        outputs: Vec::new(),
        dynamic_batching: None,
        instances: None,
        operator_libraries: Vec::new(),
        parameters: BTreeMap::new(),
        steps: Vec::new(),
    };
    // A tensor has its batch in its dimensions in one and not in the other.
    if (first.max_batch_size == 0) != (second.max_batch_size == 0) {
        return None;
    }
    for (model, suffix) in [(first, ""), (second, "_2")] {
        let mut step = Step {
            model: model.name.clone(),
            inputs: BTreeMap::new(),
            outputs: BTreeMap::new(),
        };
        for port in &model.inputs {
            let name = format!("{}{suffix}", port.name);
            step.inputs.insert(port.name.clone(), name.clone());
            ensemble.inputs.push(Port {
                name,
                ..port.clone()
            });
        }
        let states = penultimate(&model.outputs)?;
        let pooled = model.outputs.iter().find(|p| p.name == "text_embeds");
        let outputs = [
            Some((states, format!("hidden_states{suffix}"))),
            pooled.map(|p| (p, p.name.clone())),
        ];
        for (port, name) in outputs.into_iter().flatten() {
            step.outputs.insert(port.name.clone(), name.clone());
            ensemble.outputs.push(Port {
                name,
                ..port.clone()
            });
        }
        ensemble.steps.push(step);
    }
    Some(ensemble)
}

/// Of `hidden_states.0`, `hidden_states.1`, … the second-last, in whatever order the graph has them.
fn penultimate(outputs: &[Port]) -> Option<&Port> {
    let number =
        |port: &Port| -> Option<usize> { port.name.strip_prefix("hidden_states.")?.parse().ok() };
    let mut states: Vec<(usize, &Port)> = outputs
        .iter()
        .filter_map(|p| Some((number(p)?, p)))
        .collect();
    states.sort_by_key(|(number, _)| *number);
    let wanted = states.len().checked_sub(2)?;
    states.get(wanted).map(|(_, port)| *port)
}
