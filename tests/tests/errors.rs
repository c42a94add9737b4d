//! Whoever prints an error with its sources, as miette and anyhow do, must not say anything twice: a message either holds its
//! cause's, or the cause is the error's source (the guideline of Rust's working group on error handling). Ours hold them.

use std::path::{Path, PathBuf};

/// A declared error: the text of its `#[error(…)]`, and what follows up to the next one.
struct Declared<'s> {
    message: &'s str,
    fields: &'s str,
}

fn declared(source: &str) -> Vec<Declared<'_>> {
    const BEGIN: &str = "#[error(";
    let begins: Vec<usize> = source.match_indices(BEGIN).map(|(at, _)| at).collect();
    let ends = begins.iter().skip(1).copied().chain([source.len()]);
    begins
        .iter()
        .zip(ends)
        .filter_map(|(begin, end)| {
            let (message, fields) = source[begin + BEGIN.len()..end].split_once(")]")?;
            // The enum or struct ends there.
            let fields = fields
                .split_once("\n}")
                .map_or(fields, |(fields, _)| fields);
            Some(Declared { message, fields })
        })
        .collect()
}

fn tells_twice(error: &Declared<'_>) -> bool {
    if error.message == "transparent" {
        return false;
    }
    let mut fields = error.fields.lines().map(str::trim_start);
    let is_source = |line: &str| {
        let declares = !line.starts_with("//") && format!(" {line}").contains(" source: ");
        declares || line.contains("#[from]") || line.contains("#[source]")
    };
    fields.any(is_source)
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in folder.read_dir().unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn no_error_has_its_cause_in_the_message_and_as_source() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = Vec::new();
    for crate_ in ["models", "ops", "runtime", "converter"] {
        sources(&root.join(crate_).join("src"), &mut files);
    }
    let (mut seen, mut wrong) = (0, Vec::new());
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        for error in declared(&text) {
            seen += 1;
            if tells_twice(&error) {
                wrong.push(format!("{}: {}", path.display(), error.message.trim()));
            }
        }
    }
    assert!(seen > 200, "only {seen} errors were found");
    assert!(wrong.is_empty(), "make the field r#source: {wrong:#?}");
}

#[test]
fn what_would_tell_twice_is_seen() {
    let found = |text: &str| declared(text).iter().map(tells_twice).collect::<Vec<_>>();
    let text = r#"
        #[error("cannot read: {source}")]
        Io { source: std::io::Error },
        #[error("cannot read: {source}")]
        Io {
            path: PathBuf,
            source: std::io::Error,
        },
        #[error("cannot read: {source}")]
        Io {
            r#source: std::io::Error,
        },
        #[error(transparent)]
        Other(#[from] Other),
        #[error("other: {0}")]
        Other(#[from] Other),
    "#;
    assert_eq!(found(text), [true, true, false, false, true]);
}
