//! Texts in an image that say how it was made.

use std::fmt::{self, Display, Formatter};

use super::ImageError;

/// Ordered pairs of a key and a text, for [`super::RowWriter`]: chunks of a PNG (`tEXt` for Latin-1, `iTXt` for
/// other texts, as Pillow chooses), `ImageDescription` and `Software` of a TIFF.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    entries: Vec<(String, String)>,
}

impl Metadata {
    /// Adds a text at the end.
    ///
    /// # Errors
    /// The key is not 1 to 79 Latin-1 characters as PNG wants them, or the text has a character NUL or 2^31 bytes.
    pub fn push(
        &mut self,
        key: impl Into<String>,
        text: impl Into<String>,
    ) -> Result<(), ImageError> {
        let (key, text) = (key.into(), text.into());
        let reason = if key.is_empty() || key.chars().count() > 79 {
            "its key must have 1 to 79 characters"
        } else if !key.chars().all(is_key_character) {
            "its key must be of printable Latin-1 characters"
        } else if key.trim() != key || key.contains("  ") {
            "its key must not begin or end with a space or have two in a row"
        } else if text.contains('\0') {
            "it contains a character NUL, which ends a text there; remove it"
        } else if text.len() >= 1 << 31 {
            "it has 2^31 bytes or more"
        } else {
            self.entries.push((key, text));
            return Ok(());
        };
        Err(ImageError::Text { key, reason })
    }

    /// The pairs in their order.
    pub fn entries(&self) -> &[(String, String)] {
        &self.entries
    }

    /// The text of a key, the first if there are more.
    pub fn get(&self, key: &str) -> Option<&str> {
        let entry = self.entries.iter().find(|(k, _)| k == key);
        entry.map(|(_, text)| text.as_str())
    }
}

fn is_key_character(character: char) -> bool {
    matches!(character, ' '..='~' | '\u{a1}'..='\u{ff}')
}

/// How an image was made, in the form that AUTOMATIC1111's web UI and the tools that read its images have agreed on
/// for the text `parameters`. [`Display`] writes it:
///
/// ```text
/// a lighthouse
/// Negative prompt: fog
/// Steps: 20, Sampler: Euler, CFG scale: 7.5, Seed: 1, Size: 512x512, Model: sd15, Version: ..., Hashes: {"model":"6ce0161689"}
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Parameters {
    /// What the image shall show.
    pub prompt: String,
    /// What it shall not show; left out if empty.
    pub negative_prompt: String,
    /// Steps of the sampler.
    pub steps: usize,
    /// The sampler's name.
    pub sampler: String,
    /// Weight of the guidance.
    pub cfg_scale: f64,
    /// Seed of the noise.
    pub seed: u64,
    /// The image's width.
    pub width: u32,
    /// The image's height.
    pub height: u32,
    /// First digits of the model's SHA-256.
    pub model_hash: Option<String>,
    /// The model's name.
    pub model: Option<String>,
    /// Other fields, put between the model and the version.
    pub others: Vec<(String, String)>,
    /// The program and its version.
    pub version: String,
    /// First digits of the SHA-256 of everything that took part, in the JSON object `Hashes`, by which sites for models find
    /// them: `model`, `vae`, and others; left out if empty.
    pub hashes: Vec<(String, String)>,
}

impl Display for Parameters {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if !self.prompt.is_empty() {
            writeln!(f, "{}", self.prompt)?;
        }
        if !self.negative_prompt.is_empty() {
            writeln!(f, "Negative prompt: {}", self.negative_prompt)?;
        }
        write!(f, "Steps: {}", self.steps)?;
        write!(f, ", Sampler: {}", quoted(&self.sampler))?;
        write!(f, ", CFG scale: {}, Seed: {}", self.cfg_scale, self.seed)?;
        write!(f, ", Size: {}x{}", self.width, self.height)?;
        if let Some(hash) = &self.model_hash {
            write!(f, ", Model hash: {}", quoted(hash))?;
        }
        if let Some(model) = &self.model {
            write!(f, ", Model: {}", quoted(model))?;
        }
        for (key, value) in &self.others {
            write!(f, ", {key}: {}", quoted(value))?;
        }
        write!(f, ", Version: {}", quoted(&self.version))?;
        if self.hashes.is_empty() {
            return Ok(());
        }
        let hash = |(name, hash): &(String, String)| (name.clone(), hash.as_str().into());
        let object: serde_json::Map<_, _> = self.hashes.iter().map(hash).collect();
        // Not quoted: readers look for the braces.
        write!(f, ", Hashes: {}", serde_json::Value::from(object))
    }
}

/// A value, as a JSON string if it has a character that ends a value or a key.
fn quoted(value: &str) -> String {
    if value.contains([',', '\n', ':']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters() -> Parameters {
        Parameters {
            prompt: "a \"red\" house,\n(snow:1.2), 灯台".to_owned(),
            negative_prompt: "blurry, text".to_owned(),
            steps: 20,
            sampler: "Euler".to_owned(),
            cfg_scale: 7.5,
            seed: u64::MAX,
            width: 512,
            height: 768,
            model_hash: Some("6ce0161689".to_owned()),
            version: "linfusion 0.1.0".to_owned(),
            ..Parameters::default()
        }
    }

    #[test]
    fn prompts_are_written_as_they_are() {
        assert_eq!(
            parameters().to_string(),
            "a \"red\" house,\n(snow:1.2), 灯台\nNegative prompt: blurry, text\n\
             Steps: 20, Sampler: Euler, CFG scale: 7.5, Seed: 18446744073709551615, Size: 512x768, \
             Model hash: 6ce0161689, Version: linfusion 0.1.0"
        );
    }

    #[test]
    fn fields_that_would_break_the_line_are_quoted() {
        let mut parameters = parameters();
        parameters.prompt.clear();
        parameters.negative_prompt.clear();
        parameters.cfg_scale = 7.0;
        parameters.model = Some("a, \"b\"\nc".to_owned());
        parameters.others = vec![("Tiling".to_owned(), "x: 灯".to_owned())];
        assert_eq!(
            parameters.to_string(),
            "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 18446744073709551615, Size: 512x768, \
             Model hash: 6ce0161689, Model: \"a, \\\"b\\\"\\nc\", Tiling: \"x: 灯\", Version: linfusion 0.1.0"
        );
    }

    #[test]
    fn hashes_are_an_object_at_the_end() {
        let mut parameters = parameters();
        let hash = |name: &str, hash: &str| (name.to_owned(), hash.to_owned());
        parameters.hashes = vec![hash("model", "6ce0161689"), hash("vae", "735e4c3a44")];
        let text = parameters.to_string();
        let (rest, object) = text.split_once(", Hashes: ").unwrap();
        assert!(rest.ends_with("Version: linfusion 0.1.0"), "{text}");
        assert_eq!(object, r#"{"model":"6ce0161689","vae":"735e4c3a44"}"#);
    }

    #[test]
    fn keys_and_texts_no_file_can_hold_are_refused() {
        let long = "k".repeat(80);
        for (key, text) in [
            ("", "a"),
            (long.as_str(), "a"),
            (" a", "a"),
            ("a  b", "a"),
            ("灯", "a"),
            ("a\n", "a"),
            ("a", "b\0c"),
        ] {
            assert!(Metadata::default().push(key, text).is_err(), "{key:?}");
        }
        let mut metadata = Metadata::default();
        metadata.push("k".repeat(79), "").unwrap();
        metadata.push("Größe", "灯台").unwrap();
        assert_eq!(metadata.get("Größe"), Some("灯台"));
        assert_eq!(metadata.entries().len(), 2);
    }
}
