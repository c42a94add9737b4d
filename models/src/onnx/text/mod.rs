//! Models in ONNX's textual form, the one of `onnx.printer` and `onnx.parser`.
//!
//! Large tensors are elided: their place shows type, shape, size and a hash, so
//! that a snapshot tells a changed weight without holding it. Without elided
//! tensors, and with none of the values that the syntax cannot express (sparse
//! tensors, non-finite sub-byte types), `onnx.parser` reads the text back.

mod tensor;
#[cfg(test)]
mod tests;
mod types;

use std::fmt::{self, Display, Formatter, Write};

use super::attrs::AttributeKind;
use super::open::OnnxFile;
use super::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, ValueInfoProto,
};
pub use types::TypeText;
use types::{Name, Quoted};

/// What to print, and how much of it.
#[derive(Clone, Copy, Debug)]
pub struct PrintOptions<'a> {
    /// Tensors of more elements than this are elided.
    pub max_elements: usize,
    /// What to show of an elided tensor.
    pub elided: Elided,
    /// The file that the model came from, to show external data; without it, the
    /// reference is shown.
    pub file: Option<&'a OnnxFile>,
}

impl Default for PrintOptions<'_> {
    fn default() -> Self {
        Self {
            max_elements: 8,
            elided: Elided::Hash,
            file: None,
        }
    }
}

/// What to show of an elided tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Elided {
    /// Its size and the first 16 digits of the SHA-256 of its bytes. Reads all of them.
    Hash,
    /// Its size.
    Size,
}

/// The model as text, through its `Display`.
pub fn print_model<'a>(model: &'a ModelProto, options: PrintOptions<'a>) -> impl Display + 'a {
    from_fn(move |f| Printer { options, depth: 0 }.model(f, model))
}

/// One graph as text.
pub fn print_graph<'a>(graph: &'a GraphProto, options: PrintOptions<'a>) -> impl Display + 'a {
    from_fn(move |f| {
        Printer { options, depth: 0 }.graph(f, graph)?;
        f.write_char('\n')
    })
}

/// One node as text, without a line end.
pub fn print_node<'a>(node: &'a NodeProto, options: PrintOptions<'a>) -> impl Display + 'a {
    from_fn(move |f| Printer { options, depth: 0 }.node(f, node))
}

/// A value that displays by calling `print`.
fn from_fn(print: impl Fn(&mut Formatter<'_>) -> fmt::Result) -> impl Display {
    struct FromFn<F>(F);
    impl<F: Fn(&mut Formatter<'_>) -> fmt::Result> Display for FromFn<F> {
        fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
            (self.0)(f)
        }
    }
    FromFn(print)
}

#[derive(Clone, Copy)]
struct Printer<'a> {
    options: PrintOptions<'a>,
    depth: usize,
}

/// Subgraphs beyond this are cut: a printer must not overflow the stack either.
const MAX_DEPTH: usize = 64;

impl Printer<'_> {
    fn model(&self, f: &mut Formatter<'_>, model: &ModelProto) -> fmt::Result {
        f.write_str("<\n")?;
        write!(
            f,
            "  ir_version: {},\n  ",
            model.ir_version.unwrap_or_default()
        )?;
        self.opsets(f, &model.opset_import)?;
        let strings = [
            ("producer_name", &model.producer_name),
            ("producer_version", &model.producer_version),
            ("domain", &model.domain),
        ];
        for (key, value) in strings {
            if let Some(value) = value.as_deref().filter(|v| !v.is_empty()) {
                write!(f, ",\n  {key}: {}", Quoted(value))?;
            }
        }
        if let Some(version) = model.model_version.filter(|v| *v != 0) {
            write!(f, ",\n  model_version: {version}")?;
        }
        if let Some(doc) = model.doc_string.as_deref().filter(|v| !v.is_empty()) {
            write!(f, ",\n  doc_string: {}", Quoted(doc))?;
        }
        if !model.metadata_props.is_empty() {
            f.write_str(",\n  metadata_props: ")?;
            self.entries(f, &model.metadata_props)?;
        }
        f.write_str("\n>\n")?;
        if let Some(graph) = model.graph.as_option() {
            self.graph(f, graph)?;
            f.write_char('\n')?;
        }
        for function in &model.functions {
            self.function(f, function)?;
        }
        Ok(())
    }

    fn function(&self, f: &mut Formatter<'_>, function: &FunctionProto) -> fmt::Result {
        write!(
            f,
            "<\n  domain: {}",
            Quoted(function.domain.as_deref().unwrap_or_default())
        )?;
        if let Some(overload) = function.overload.as_deref().filter(|o| !o.is_empty()) {
            write!(f, ",\n  overload: {}", Quoted(overload))?;
        }
        f.write_str(",\n  ")?;
        self.opsets(f, &function.opset_import)?;
        if let Some(doc) = function.doc_string.as_deref().filter(|d| !d.is_empty()) {
            write!(f, ",\n  doc_string: {}", Quoted(doc))?;
        }
        write!(
            f,
            "\n>\n{} ",
            Name(function.name.as_deref().unwrap_or_default())
        )?;
        if !function.attribute.is_empty() || !function.attribute_proto.is_empty() {
            f.write_char('<')?;
            let plain = function.attribute.iter().map(|name| Parameter::Plain(name));
            let defaults = function.attribute_proto.iter().map(Parameter::Default);
            self.list(f, plain.chain(defaults), |f, parameter| match parameter {
                Parameter::Plain(name) => Name(name).fmt(f),
                Parameter::Default(attribute) => self.attribute(f, attribute),
            })?;
            f.write_str("> ")?;
        }
        f.write_char('(')?;
        self.list(f, &function.input, |f, name| Name(name).fmt(f))?;
        f.write_str(") => (")?;
        self.list(f, &function.output, |f, name| Name(name).fmt(f))?;
        f.write_str(")\n")?;
        self.value_list(f, &[], &function.value_info)?;
        self.block(f, &function.node)?;
        f.write_char('\n')
    }

    fn graph(&self, f: &mut Formatter<'_>, graph: &GraphProto) -> fmt::Result {
        write!(f, "{} (", Name(graph.name.as_deref().unwrap_or_default()))?;
        self.list(f, &graph.input, types::value)?;
        f.write_str(") => (")?;
        self.list(f, &graph.output, types::value)?;
        f.write_str(")\n")?;
        self.value_list(f, &graph.initializer, &graph.value_info)?;
        if !graph.sparse_initializer.is_empty() {
            self.indent(f)?;
            writeln!(
                f,
                "# {} sparse initializers",
                graph.sparse_initializer.len()
            )?;
        }
        self.block(f, &graph.node)
    }

    /// Initializers, then declared types of inner values, a line each.
    fn value_list(
        &self,
        f: &mut Formatter<'_>,
        initializers: &[TensorProto],
        declared: &[ValueInfoProto],
    ) -> fmt::Result {
        let inner = self.deeper();
        let last = (initializers.len() + declared.len()).wrapping_sub(1);
        if initializers.is_empty() && declared.is_empty() {
            return Ok(());
        }
        self.indent(f)?;
        f.write_str("<\n")?;
        let comma = |index: usize| if index == last { "" } else { "," };
        for (index, tensor) in initializers.iter().enumerate() {
            inner.indent(f)?;
            let values = tensor::print(f, tensor, tensor::Place::Initializer, &self.options)?;
            writeln!(f, "{}{}", comma(index), values.comment())?;
        }
        for (index, value) in declared.iter().enumerate() {
            inner.indent(f)?;
            types::value(f, value)?;
            writeln!(f, "{}", comma(initializers.len() + index))?;
        }
        self.indent(f)?;
        f.write_str(">\n")
    }

    fn block(&self, f: &mut Formatter<'_>, nodes: &[NodeProto]) -> fmt::Result {
        self.indent(f)?;
        f.write_str("{\n")?;
        let inner = self.deeper();
        for node in nodes {
            inner.indent(f)?;
            inner.node(f, node)?;
            f.write_char('\n')?;
        }
        self.indent(f)?;
        f.write_char('}')
    }

    fn node(&self, f: &mut Formatter<'_>, node: &NodeProto) -> fmt::Result {
        if let Some(name) = node.name.as_deref().filter(|n| !n.is_empty()) {
            write!(f, "[{}] ", Name(name))?;
        }
        self.list(f, &node.output, |f, name| Name(name).fmt(f))?;
        f.write_str(" = ")?;
        match node.domain.as_deref() {
            None | Some("") => {}
            Some(domain) => write!(f, "{domain}.")?,
        }
        f.write_str(node.op_type.as_deref().unwrap_or_default())?;
        if let Some(overload) = node.overload.as_deref().filter(|o| !o.is_empty()) {
            write!(f, ":{overload}")?;
        }
        // Subgraphs after the inputs, as they are long.
        let has_graph = |a: &AttributeProto| a.g.is_set() || !a.graphs.is_empty();
        if node.attribute.iter().any(has_graph) {
            self.inputs(f, node)?;
            self.attributes(f, node)
        } else {
            self.attributes(f, node)?;
            self.inputs(f, node)
        }
    }

    fn inputs(&self, f: &mut Formatter<'_>, node: &NodeProto) -> fmt::Result {
        f.write_str(" (")?;
        self.list(f, &node.input, |f, name| Name(name).fmt(f))?;
        f.write_char(')')
    }

    fn attributes(&self, f: &mut Formatter<'_>, node: &NodeProto) -> fmt::Result {
        if node.attribute.is_empty() {
            return Ok(());
        }
        f.write_str(" <")?;
        self.list(f, &node.attribute, |f, attribute| {
            self.attribute(f, attribute)
        })?;
        f.write_char('>')
    }

    fn attribute(&self, f: &mut Formatter<'_>, attribute: &AttributeProto) -> fmt::Result {
        let name = attribute.name.as_deref().unwrap_or_default();
        let Some(kind) = AttributeKind::from_onnx(attribute.r#type.unwrap_or_default()) else {
            return write!(f, "{}: undefined = ?", Name(name));
        };
        write!(f, "{}: {} = ", Name(name), kind.name())?;
        if let Some(reference) = attribute.ref_attr_name.as_deref().filter(|r| !r.is_empty()) {
            return write!(f, "@{reference}");
        }
        let text = |bytes: &bytes::Bytes| String::from_utf8_lossy(bytes).into_owned();
        match kind {
            AttributeKind::Int => write!(f, "{}", attribute.i.unwrap_or_default()),
            AttributeKind::Float => {
                types::float(f, attribute.f.unwrap_or_default().into(), Width::F32)
            }
            AttributeKind::String => {
                let value = attribute.s.as_ref().map(text).unwrap_or_default();
                Quoted(&value).fmt(f)
            }
            AttributeKind::Ints => self.bracketed(f, &attribute.ints, |f, v| write!(f, "{v}")),
            AttributeKind::Floats => self.bracketed(f, &attribute.floats, |f, v| {
                types::float(f, (*v).into(), Width::F32)
            }),
            AttributeKind::Strings => {
                self.bracketed(f, &attribute.strings, |f, v| Quoted(&text(v)).fmt(f))
            }
            AttributeKind::Tensor => match attribute.t.as_option() {
                Some(value) => {
                    tensor::print(f, value, tensor::Place::Attribute, &self.options).map(drop)
                }
                None => f.write_char('?'),
            },
            AttributeKind::Tensors => self.bracketed(f, &attribute.tensors, |f, value| {
                tensor::print(f, value, tensor::Place::Attribute, &self.options).map(drop)
            }),
            AttributeKind::Graph => match attribute.g.as_option() {
                Some(value) => self.subgraph(f, value),
                None => f.write_char('?'),
            },
            AttributeKind::Graphs => {
                self.bracketed(f, &attribute.graphs, |f, value| self.subgraph(f, value))
            }
            AttributeKind::TypeProto => match attribute.tp.as_option() {
                Some(value) => types::type_proto(f, value, 0),
                None => f.write_char('?'),
            },
            AttributeKind::TypeProtos => self.bracketed(f, &attribute.type_protos, |f, value| {
                types::type_proto(f, value, 0)
            }),
            // The syntax has no form for these.
            AttributeKind::SparseTensor | AttributeKind::SparseTensors => f.write_str("..."),
        }
    }

    fn subgraph(&self, f: &mut Formatter<'_>, graph: &GraphProto) -> fmt::Result {
        if self.depth >= MAX_DEPTH {
            return f.write_str("...");
        }
        self.graph(f, graph)
    }

    fn opsets(&self, f: &mut Formatter<'_>, opsets: &[OperatorSetIdProto]) -> fmt::Result {
        f.write_str("opset_import: [")?;
        self.list(f, opsets, |f, opset| {
            let domain = opset.domain.as_deref().unwrap_or_default();
            write!(
                f,
                "{}: {}",
                Quoted(domain),
                opset.version.unwrap_or_default()
            )
        })?;
        f.write_char(']')
    }

    fn entries(&self, f: &mut Formatter<'_>, entries: &[StringStringEntryProto]) -> fmt::Result {
        self.bracketed(f, entries, types::entry)
    }

    fn bracketed<T>(
        &self,
        f: &mut Formatter<'_>,
        items: &[T],
        print: impl Fn(&mut Formatter<'_>, &T) -> fmt::Result,
    ) -> fmt::Result {
        f.write_char('[')?;
        self.list(f, items, print)?;
        f.write_char(']')
    }

    fn list<T>(
        &self,
        f: &mut Formatter<'_>,
        items: impl IntoIterator<Item = T>,
        print: impl Fn(&mut Formatter<'_>, T) -> fmt::Result,
    ) -> fmt::Result {
        for (index, item) in items.into_iter().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            print(f, item)?;
        }
        Ok(())
    }

    fn indent(&self, f: &mut Formatter<'_>) -> fmt::Result {
        (0..self.depth).try_for_each(|_| f.write_str("  "))
    }

    fn deeper(&self) -> Self {
        Self {
            depth: self.depth + 1,
            ..*self
        }
    }
}

/// An attribute of a function: required, or with a default value.
enum Parameter<'a> {
    Plain(&'a str),
    Default(&'a AttributeProto),
}

/// How many digits a float needs to be read back as the same value.
#[derive(Clone, Copy)]
enum Width {
    F32,
    F64,
}
