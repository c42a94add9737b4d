//! Reading `scheduler_config.json` so that no field is passed over.

use std::collections::HashSet;

use linfusion_models::json;
use serde_json::{Map, Value};

/// Why a sampler cannot be built.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SchedulerError {
    /// The file is no JSON object.
    #[error("{0}")]
    Json(String),
    /// There is no such sampler.
    #[error("there is no sampler `{name}`; there are {}", super::NAMES.join(", "))]
    Unknown {
        /// The name.
        name: String,
    },
    /// A field has a value of the wrong type, or one that the sampler does not do.
    #[error("field `{field}` is {found}, expected {expected}; --scheduler takes another sampler")]
    Field {
        /// Which field.
        field: String,
        /// Its value.
        found: String,
        /// What would do.
        expected: String,
    },
    /// A field that no sampler here knows.
    #[error(
        "field `{field}` is {found}, and {class} has no such field here; remove it if it means nothing"
    )]
    UnknownField {
        /// Which field.
        field: String,
        /// Its value.
        found: String,
        /// The sampler.
        class: String,
    },
    /// A number of steps that the sampler cannot take.
    #[error("{found} steps, expected {expected}")]
    Steps {
        /// How many.
        found: usize,
        /// What would do.
        expected: String,
    },
}

/// Fields that belong to some sampler of diffusers: configurations carry those of others along, and they mean nothing.
const OF_OTHERS: [&str; 62] = [
    "algorithm_type",
    "base_image_seq_len",
    "base_shift",
    "beta_end",
    "beta_schedule",
    "beta_start",
    "clip_sample",
    "clip_sample_range",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "invert_sigmas",
    "lambda_min_clipped",
    "lower_order_final",
    "max_image_seq_len",
    "max_shift",
    "num_train_timesteps",
    "original_inference_steps",
    "predict_x0",
    "prediction_type",
    "rescale_betas_zero_snr",
    "sample_max_value",
    "set_alpha_to_one",
    "shift",
    "shift_terminal",
    "sigma_max",
    "sigma_min",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "steps_offset",
    "stochastic_sampling",
    "thresholding",
    "time_shift_type",
    "timestep_scaling",
    "timestep_spacing",
    "timestep_type",
    "trained_betas",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_flow_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
    "rho",
    "sigma_data",
    "noise_sampler_seed",
    "s_churn",
    "s_noise",
    "s_tmin",
    "s_tmax",
    "snr",
    "sampling_eps",
    "correct_steps",
    "rescale_betas",
    "lambda_max_clipped",
    "use_sde",
];

/// The fields of a configuration, each marked when it is read.
pub(super) struct Fields {
    map: Map<String, Value>,
    read: HashSet<String>,
    /// Whether the class was chosen by the user, so that unknown fields may be of the configuration's own class.
    chosen: bool,
}

impl Fields {
    pub(super) fn parse(text: &str) -> Result<Self, SchedulerError> {
        // Python writes infinities as bare words, which are no JSON.
        let words = || {
            text.replace("-Infinity", "\"-inf\"")
                .replace("Infinity", "\"inf\"")
        };
        let map = serde_json::from_str(text)
            .or_else(|error| serde_json::from_str(&words()).map_err(|_| error))
            .map_err(|e| SchedulerError::Json(json::problem_in(text, &e)))?;
        Ok(Self {
            map,
            read: HashSet::new(),
            chosen: false,
        })
    }

    pub(super) fn into_map(self) -> Map<String, Value> {
        self.map
    }

    pub(super) fn class(&self) -> Result<String, SchedulerError> {
        match self.map.get("_class_name") {
            Some(Value::String(name)) => Ok(name.clone()),
            other => Err(self.wrong("_class_name", other, "the name of a sampler")),
        }
    }

    /// The class of a short name or of its own name, with the fields that the short name stands for.
    pub(super) fn choose(&mut self, name: &str) -> Option<&'static str> {
        self.chosen = true;
        let mut set = |key: &str, value: Value| {
            self.map.insert(key.to_owned(), value);
        };
        Some(match name {
            "ddim" | "DDIMScheduler" => "DDIMScheduler",
            "pndm" => {
                // Few configurations of others say so, and the model's makers always did.
                set("skip_prk_steps", true.into());
                "PNDMScheduler"
            }
            "PNDMScheduler" => "PNDMScheduler",
            "euler" | "EulerDiscreteScheduler" => "EulerDiscreteScheduler",
            "euler-a" | "EulerAncestralDiscreteScheduler" => "EulerAncestralDiscreteScheduler",
            "dpm++" | "dpm++-karras" | "dpm++-sde" | "dpm++-sde-karras" => {
                let algorithm = if name.contains("sde") {
                    "sde-dpmsolver++"
                } else {
                    "dpmsolver++"
                };
                set("algorithm_type", algorithm.into());
                set("use_karras_sigmas", name.ends_with("karras").into());
                "DPMSolverMultistepScheduler"
            }
            "DPMSolverMultistepScheduler" => "DPMSolverMultistepScheduler",
            "unipc" | "UniPCMultistepScheduler" => "UniPCMultistepScheduler",
            "lcm" | "LCMScheduler" => "LCMScheduler",
            "flow-euler" | "FlowMatchEulerDiscreteScheduler" => "FlowMatchEulerDiscreteScheduler",
            _ => return None,
        })
    }

    fn take(&mut self, field: &str) -> Option<Value> {
        self.read.insert(field.to_owned());
        self.map.get(field).filter(|v| !v.is_null()).cloned()
    }

    fn wrong(&self, field: &str, found: Option<&Value>, expected: &str) -> SchedulerError {
        SchedulerError::Field {
            field: field.to_owned(),
            found: found.map_or_else(|| "missing".to_owned(), Value::to_string),
            expected: expected.to_owned(),
        }
    }

    pub(super) fn number(&mut self, field: &str, default: f64) -> Result<f64, SchedulerError> {
        Ok(self.optional(field)?.unwrap_or(default))
    }

    pub(super) fn optional(&mut self, field: &str) -> Result<Option<f64>, SchedulerError> {
        match self.take(field) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|v| v.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(field, Some(&value), "a number")),
            },
        }
    }

    pub(super) fn count(&mut self, field: &str, default: usize) -> Result<usize, SchedulerError> {
        match self.take(field) {
            None => Ok(default),
            Some(value) => match value.as_u64().and_then(|v| usize::try_from(v).ok()) {
                // A million is far beyond any schedule, and the tables stay small.
                Some(count) if count <= 1_000_000 => Ok(count),
                _ => Err(self.wrong(field, Some(&value), "a whole number up to 1000000")),
            },
        }
    }

    pub(super) fn flag(&mut self, field: &str, default: bool) -> Result<bool, SchedulerError> {
        match self.take(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(self.wrong(field, Some(&other), "true or false")),
        }
    }

    pub(super) fn numbers(&mut self, field: &str) -> Result<Option<Vec<f64>>, SchedulerError> {
        match self.take(field) {
            None => Ok(None),
            Some(value) => {
                let list = value
                    .as_array()
                    .map(|a| a.iter().map(Value::as_f64).collect());
                match list {
                    Some(Some(numbers)) => Ok(Some(numbers)),
                    _ => Err(self.wrong(field, Some(&value), "a list of numbers")),
                }
            }
        }
    }

    /// One of some words.
    pub(super) fn choice<T: Copy>(
        &mut self,
        field: &str,
        default: T,
        choices: &[(&str, T)],
    ) -> Result<T, SchedulerError> {
        let Some(value) = self.take(field) else {
            return Ok(default);
        };
        let found = value
            .as_str()
            .and_then(|word| choices.iter().find(|(name, _)| *name == word));
        match found {
            Some((_, choice)) => Ok(*choice),
            None => {
                let names: Vec<String> = choices
                    .iter()
                    .map(|(name, _)| format!("`{name}`"))
                    .collect();
                Err(self.wrong(field, Some(&value), &names.join(" or ")))
            }
        }
    }

    /// A flag that must not be set: what it stands for isn't done here.
    pub(super) fn refuse_flag(&mut self, field: &str) -> Result<(), SchedulerError> {
        if self.flag(field, false)? {
            return Err(self.wrong(
                field,
                Some(&Value::Bool(true)),
                "false, for this sampler here",
            ));
        }
        Ok(())
    }

    /// A field that must be missing or null.
    pub(super) fn refuse(&mut self, field: &str) -> Result<(), SchedulerError> {
        match self.take(field) {
            None => Ok(()),
            Some(value) => Err(self.wrong(field, Some(&value), "null, for this sampler here")),
        }
    }

    /// A bound that must be none: missing, or infinite, which JSON can only say as a word.
    pub(super) fn refuse_finite(&mut self, field: &str) -> Result<(), SchedulerError> {
        match self.take(field) {
            Some(value) if value.is_number() => {
                Err(self.wrong(field, Some(&value), "-Infinity or null"))
            }
            _ => Ok(()),
        }
    }

    /// A field that has no effect on the samples.
    pub(super) fn ignore(&mut self, field: &str) {
        self.read.insert(field.to_owned());
    }

    /// An error if a field was not read that no sampler has.
    pub(super) fn finish(&self, class: &str) -> Result<(), SchedulerError> {
        if self.chosen {
            return Ok(());
        }
        for (field, value) in &self.map {
            let known = field.starts_with('_')
                || self.read.contains(field)
                || OF_OTHERS.contains(&field.as_str());
            if !known {
                return Err(SchedulerError::UnknownField {
                    field: field.clone(),
                    found: value.to_string(),
                    class: class.to_owned(),
                });
            }
        }
        Ok(())
    }
}
