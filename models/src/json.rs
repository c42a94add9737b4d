//! What is wrong with a JSON text, in words for whoever wrote the file.

use serde_json::error::Category;

/// The parser's message. Of a field that is missing it says where the object ends, which helps nobody: the field's name alone is
/// told.
#[must_use]
pub fn problem(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let missing = text
        .strip_prefix("missing field `")
        .and_then(|rest| rest.split_once('`'))
        .filter(|_| error.classify() == Category::Data);
    match missing {
        Some((field, _)) => format!("field `{field}` is missing"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Config {
        #[expect(dead_code, reason = "it is only missed")]
        width: usize,
    }

    #[test]
    fn missing_fields_are_named_and_syntax_has_its_place() {
        let told = |text: &str| problem(&serde_json::from_str::<Config>(text).unwrap_err());
        assert_eq!(told("{}"), "field `width` is missing");
        assert!(told("{\n\"width\": }").contains("line 2"));
        assert!(told(r#"{"width": "x"}"#).contains("expected usize at line 1"));
    }
}
