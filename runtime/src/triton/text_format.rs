//! Protocol Buffers' text format, as far as a configuration needs it.

use std::fmt::{self, Write};

/// Writes the fields of a message, one a line, indented by its depth.
pub struct Fields<'f, W: Write> {
    out: &'f mut W,
    depth: usize,
}

impl<'f, W: Write> Fields<'f, W> {
    /// The fields of the outermost message.
    pub fn new(out: &'f mut W) -> Self {
        Self { out, depth: 0 }
    }

    /// A number, or the name of an enumeration's value.
    pub fn plain(&mut self, name: &str, value: impl fmt::Display) -> fmt::Result {
        self.indent()?;
        writeln!(self.out, "{name}: {value}")
    }

    /// A list of numbers; an empty one is written too, which for Triton's shapes differs from none.
    pub fn list(&mut self, name: &str, values: &[i64]) -> fmt::Result {
        let values: Vec<String> = values.iter().map(i64::to_string).collect();
        self.plain(name, format_args!("[{}]", values.join(", ")))
    }

    /// A string, quoted.
    pub fn string(&mut self, name: &str, value: &str) -> fmt::Result {
        self.plain(name, Quoted(value))
    }

    /// An inner message, its fields by `write`.
    pub fn message(
        &mut self,
        name: &str,
        write: impl FnOnce(&mut Fields<'_, W>) -> fmt::Result,
    ) -> fmt::Result {
        self.indent()?;
        writeln!(self.out, "{name} {{")?;
        write(&mut Fields {
            out: self.out,
            depth: self.depth + 1,
        })?;
        self.indent()?;
        writeln!(self.out, "}}")
    }

    /// An entry of a map from strings to strings.
    pub fn entry(&mut self, name: &str, key: &str, value: &str) -> fmt::Result {
        self.message(name, |entry| {
            entry.string("key", key)?;
            entry.string("value", value)
        })
    }

    fn indent(&mut self) -> fmt::Result {
        write!(self.out, "{:width$}", "", width = 2 * self.depth)
    }
}

/// A string between quotes; what is not printable ASCII as the octal numbers of its bytes.
struct Quoted<'s>(&'s str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for byte in self.0.bytes() {
            match byte {
                b'"' | b'\\' => write!(f, "\\{}", char::from(byte))?,
                b' '..=b'~' => f.write_char(char::from(byte))?,
                other => write!(f, "\\{other:03o}")?,
            }
        }
        f.write_char('"')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_escaped_byte_by_byte() {
        assert_eq!(Quoted("plain name").to_string(), r#""plain name""#);
        assert_eq!(
            Quoted("a\"b\\c\nd\u{e9}").to_string(),
            r#""a\"b\\c\012d\303\251""#
        );
    }

    #[test]
    fn messages_nest() {
        let mut text = String::new();
        let mut fields = Fields::new(&mut text);
        fields
            .message("outer", |outer| {
                outer.list("dims", &[-1, 4])?;
                outer.list("shape", &[])?;
                outer.entry("map", "k", "v")
            })
            .unwrap();
        assert_eq!(
            text,
            "outer {\n  dims: [-1, 4]\n  shape: []\n  map {\n    key: \"k\"\n    value: \"v\"\n  }\n}\n"
        );
    }
}
