//! What is wrong with a JSON text, in words for whoever wrote the file.

use serde_json::error::Category;

/// The parser's message. Of a field that is missing it says where the object ends, which helps nobody: the field's name alone is
/// told.
#[must_use]
pub fn problem(error: &serde_json::Error) -> String {
    missing(error).unwrap_or_else(|| error.to_string())
}

fn missing(error: &serde_json::Error) -> Option<String> {
    let text = error.to_string();
    let (field, _) = text
        .strip_prefix("missing field `")
        .and_then(|rest| rest.split_once('`'))
        .filter(|_| error.classify() == Category::Data)?;
    Some(format!("field `{field}` is missing"))
}

/// The same of an error in `text`, with the name of the field whose value is not what it should be.
#[must_use]
pub fn problem_in(text: &str, error: &serde_json::Error) -> String {
    if let Some(missing) = missing(error) {
        return missing;
    }
    let problem = error.to_string();
    let lines = text.lines().take(error.line());
    let field = match error.classify() {
        Category::Data => lines.enumerate().fold(None, |found, (index, line)| {
            let end = match index + 1 == error.line() {
                true => error.column().min(line.len()),
                false => line.len(),
            };
            // A column may end within a character.
            let before = (0..=end).rev().find_map(|end| line.get(..end));
            before.and_then(last_key).or(found)
        }),
        _ => None,
    };
    match field {
        Some(field) if !problem.contains(&format!("`{field}`")) => {
            format!("field `{field}`: {problem}")
        }
        _ => problem,
    }
}

/// The last name in a line that a value may follow.
fn last_key(line: &str) -> Option<&str> {
    line.match_indices(':').rev().find_map(|(at, _)| {
        let name = line[..at].trim_end().strip_suffix('"')?;
        name.rsplit('"').next()
    })
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
    #[test]
    fn a_value_of_the_wrong_kind_has_its_fields_name() {
        let told =
            |text: &str| problem_in(text, &serde_json::from_str::<Config>(text).unwrap_err());
        let wrong = told("{\"a\": 1, \"width\" :\n [\"b: c\"], \"z\": 2}");
        assert!(
            wrong.starts_with("field `width`: invalid type: sequence"),
            "{wrong}"
        );
        let wrong = told(r#"{"width": "größe", "z": 2}"#);
        assert!(
            wrong.starts_with("field `width`: invalid type: string"),
            "{wrong}"
        );
        assert_eq!(told(r#"{"a": 1}"#), "field `width` is missing");
        assert!(told("[").starts_with("EOF"), "{}", told("["));
    }
}
