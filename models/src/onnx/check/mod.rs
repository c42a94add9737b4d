//! Our own structural check of a model.
//!
//! It finds what would make a model ambiguous, unsafe to compute with or
//! unloadable, independently of any operator's schema: names, order, scopes,
//! functions, opsets, attributes, shapes and data lengths. It does not know the
//! standard operators' inputs and attributes.

mod functions;
mod graph;
mod tensors;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;

use super::limits::Limits;
use super::open::OnnxFile;
use super::proto::{ModelProto, NodeProto, OperatorSetIdProto};
use super::tensor::TensorError;

/// The opset versions of standard ONNX that this library was made for.
pub const OPSETS: std::ops::RangeInclusive<i64> = 11..=28;
/// The IR versions that this library can read and write in full.
pub const IR_VERSIONS: std::ops::RangeInclusive<i64> = 3..=14;

/// Something wrong with a model.
#[derive(Debug)]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// What.
    pub fault: Fault,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.fault)
    }
}

/// A place in a model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The model as a whole.
    Model,
    /// A graph or subgraph, by name.
    Graph(String),
    /// A function, as `domain::name`.
    Function(String),
    /// A node.
    Node {
        /// Its name; may be empty.
        name: String,
        /// Its operator.
        op_type: String,
        /// Its position in its graph or function.
        index: usize,
    },
}

impl Place {
    fn node(node: &NodeProto, index: usize) -> Self {
        Self::Node {
            name: node.name.clone().unwrap_or_default(),
            op_type: node.op_type.clone().unwrap_or_default(),
            index,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model => f.write_str("model"),
            Self::Graph(name) => write!(f, "graph `{name}`"),
            Self::Function(name) => write!(f, "function `{name}`"),
            Self::Node {
                name,
                op_type,
                index,
            } if name.is_empty() => {
                write!(f, "node {index} ({op_type})")
            }
            Self::Node { name, op_type, .. } => write!(f, "node `{name}` ({op_type})"),
        }
    }
}

/// What can be wrong with a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// No graph.
    #[error("there is no graph")]
    NoGraph,
    /// Beyond the [`Limits`].
    #[error("{0}")]
    Limit(String),
    /// `ir_version` is missing or outside [`IR_VERSIONS`].
    #[error("IR version {0} is not supported (supported: 3 to 14)")]
    IrVersion(i64),
    /// No version of the standard operators.
    #[error("there is no opset_import for the standard domain")]
    NoOpset,
    /// The standard opset is older than [`OPSETS`].
    #[error(
        "opset {0} is not supported (supported: 11 to 28; hint: onnx.version_converter can raise it)"
    )]
    OldOpset(i64),
    /// The standard opset is newer than [`OPSETS`]. Only a warning.
    #[error("opset {0} is newer than 28, the newest this version was made for")]
    NewOpset(i64),
    /// A domain imported twice.
    #[error("the domain `{0}` is imported twice")]
    DuplicateOpset(String),
    /// A node's domain is not imported.
    #[error("its domain `{0}` has no opset_import")]
    DomainNotImported(String),
    /// A value defined twice.
    #[error("the value `{0}` is defined twice")]
    Redefined(String),
    /// A value that hides one of an outer graph. Only a warning.
    #[error("the value `{0}` hides one of the same name in an outer graph")]
    Shadows(String),
    /// A value that nothing defines.
    #[error("its input `{0}` is not defined anywhere")]
    Undefined(String),
    /// A value used before the node that computes it.
    #[error("its input `{0}` is computed only by a later node")]
    OutOfOrder(String),
    /// Nodes that depend on each other.
    #[error("its nodes depend on each other in a cycle through `{0}`")]
    Cycle(String),
    /// A graph output that nothing computes.
    #[error("the output `{0}` is not computed by any node")]
    OutputNotProduced(String),
    /// A graph output listed twice.
    #[error("the output `{0}` is listed twice")]
    DuplicateOutput(String),
    /// A subgraph returns an outer value. Only a warning: some runtimes refuse it.
    #[error("the output `{0}` is a value of an outer graph")]
    OuterOutput(String),
    /// A graph input or output without a name.
    #[error("an input or output has no name")]
    Unnamed,
    /// No operator.
    #[error("it has no op_type")]
    NoOpType,
    /// An attribute twice.
    #[error("the attribute `{0}` occurs twice")]
    DuplicateAttribute(String),
    /// An attribute's type is missing or unknown.
    #[error("the attribute `{name}` has the unknown type {kind}")]
    AttributeType {
        /// The attribute.
        name: String,
        /// Its type number.
        kind: i32,
    },
    /// An attribute whose value is in another field than its type says.
    #[error("the attribute `{name}` is of type {kind}, but its value is in the field of another")]
    AttributeValue {
        /// The attribute.
        name: String,
        /// Its type.
        kind: &'static str,
    },
    /// A reference to an attribute that the function does not have.
    #[error(
        "the attribute `{name}` refers to `{reference}`, which is no attribute of the function"
    )]
    AttributeReference {
        /// The attribute.
        name: String,
        /// What it refers to.
        reference: String,
    },
    /// A function without a name.
    #[error("it has no name")]
    UnnamedFunction,
    /// A function defined twice.
    #[error("it is defined twice")]
    DuplicateFunction,
    /// An input, output or attribute of a function listed twice.
    #[error("it lists `{0}` twice")]
    DuplicateParameter(String),
    /// Functions that call each other.
    #[error("it calls itself: {0}")]
    Recursion(String),
    /// A declared shape with a negative size. Only a warning: old exporters write
    /// -1 for "unknown".
    #[error("the declared shape of `{value}` has the negative size {size}")]
    NegativeSize {
        /// The value.
        value: String,
        /// The size.
        size: i64,
    },
    /// A tensor that is not in order.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

impl Fault {
    /// Whether the model can be worked with all the same.
    pub fn is_warning(&self) -> bool {
        matches!(
            self,
            Self::NewOpset(_) | Self::Shadows(_) | Self::OuterOutput(_) | Self::NegativeSize { .. }
        )
    }
}

/// Checks the structure of `model`. With the `file` that it came from, its external
/// data is checked too (the data files are opened, not read); without, only how it
/// is referred to.
///
/// Returns the warnings, if there is nothing worse.
///
/// # Errors
/// All problems that are not warnings, in the order of the file.
pub fn check_model(
    model: &ModelProto,
    file: Option<&OnnxFile>,
) -> Result<Vec<Problem>, Vec<Problem>> {
    let mut report = Report::default();
    // Everything after this recurses over subgraphs.
    if let Err(error) = Limits::default().check(model) {
        report.add(Place::Model, Fault::Limit(error.to_string()));
        return report.into_result();
    }
    header(model, &mut report);
    let imports = Imports::of(&model.opset_import, &Place::Model, &mut report);
    match model.graph.as_option() {
        Some(main) => graph::check_main(main, &imports, &mut report),
        None => report.add(Place::Model, Fault::NoGraph),
    }
    functions::check_all(&model.functions, &mut report);
    tensors::check_all(model, file, &mut report);
    report.into_result()
}

fn header(model: &ModelProto, report: &mut Report) {
    let ir_version = model.ir_version.unwrap_or_default();
    if !IR_VERSIONS.contains(&ir_version) {
        report.add(Place::Model, Fault::IrVersion(ir_version));
    }
    let standard = model
        .opset_import
        .iter()
        .find(|o| domain(o.domain.as_deref()).is_empty());
    match standard.map(|opset| opset.version.unwrap_or_default()) {
        None => report.add(Place::Model, Fault::NoOpset),
        Some(old) if old < *OPSETS.start() => report.add(Place::Model, Fault::OldOpset(old)),
        Some(new) if new > *OPSETS.end() => report.add(Place::Model, Fault::NewOpset(new)),
        Some(_) => {}
    }
}

/// The standard domain has two spellings.
fn domain(domain: Option<&str>) -> &str {
    match domain.unwrap_or_default() {
        "ai.onnx" => "",
        other => other,
    }
}

/// Which domains a model or function may use.
struct Imports<'a>(HashMap<&'a str, i64>);

impl<'a> Imports<'a> {
    fn of(opsets: &'a [OperatorSetIdProto], place: &Place, report: &mut Report) -> Self {
        let mut imports = HashMap::new();
        for opset in opsets {
            let name = domain(opset.domain.as_deref());
            if imports
                .insert(name, opset.version.unwrap_or_default())
                .is_some()
            {
                report.add(place.clone(), Fault::DuplicateOpset(name.to_owned()));
            }
        }
        Self(imports)
    }

    fn has(&self, node: &NodeProto) -> bool {
        self.0.contains_key(domain(node.domain.as_deref()))
    }
}

/// What was found so far.
#[derive(Default)]
struct Report {
    problems: Vec<Problem>,
}

/// A broken model can break in as many places as it has nodes; nobody reads more.
const MAX_PROBLEMS: usize = 1000;

impl Report {
    fn add(&mut self, place: Place, fault: Fault) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem { place, fault });
        }
    }

    fn into_result(self) -> Result<Vec<Problem>, Vec<Problem>> {
        if self.problems.iter().all(|p| p.fault.is_warning()) {
            Ok(self.problems)
        } else {
            let errors = self.problems.into_iter().filter(|p| !p.fault.is_warning());
            Err(errors.collect())
        }
    }
}
