//! Why a model cannot be resized.

/// Why. The model was not changed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ResizeError {
    /// Nothing has a height and a width.
    #[error(
        "no input of rank 4 ([batch, channels, height, width]) has a fixed size; its inputs are {inputs}"
    )]
    NoImage {
        /// The inputs with their shapes.
        inputs: String,
    },
    /// It takes any size.
    #[error("its image input '{input}' ({shape}) is dynamic already: nothing to resize")]
    AlreadyDynamic {
        /// The input.
        input: String,
        /// Its shape.
        shape: String,
    },
    /// A constant is a size of the image, or is not: both fit.
    #[error(
        "{op} '{node}': its constant '{constant}' can be read in {} ways, and the graph proves none of them:\n  {}\n\
         hint: export the model with dynamic height and width, or at a size whose height, width and their halves differ from its channels and heads",
        readings.len(), readings.join("\n  ")
    )]
    Ambiguous {
        /// The node that takes a size from it.
        node: String,
        /// Its operator.
        op: String,
        /// The value that the size is taken from.
        constant: String,
        /// The readings that are left.
        readings: Vec<String>,
    },
    /// Weights or positions for one size.
    #[error(
        "tensor '{tensor}' {shape:?} belongs to one image size: at another, {op} '{node}' cannot run ({reason})\n\
         hint: learned or stored position tables cannot be resized"
    )]
    FixedTensor {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<i64>,
        /// The node that reads it.
        node: String,
        /// Its operator.
        op: String,
        /// What does not fit.
        reason: String,
    },
    /// Something else holds at one size only.
    #[error("{op} '{node}' runs at the size of the export only: {reason}")]
    FixedNode {
        /// The node.
        node: String,
        /// Its operator.
        op: String,
        /// What does not fit.
        reason: String,
    },
    /// A number that is right at one size only.
    #[error(
        "{op} '{node}': its constant '{constant}' = {value} can be read in 2 ways: fixed, or computed from the {count} elements that '{sum}' sums over the image\n\
         hint: export the model with dynamic height and width"
    )]
    Normaliser {
        /// The node that multiplies or divides.
        node: String,
        /// Its operator.
        op: String,
        /// The number's name.
        constant: String,
        /// The number.
        value: f64,
        /// Elements that are summed, at the size of the export.
        count: i64,
        /// The node that sums.
        sum: String,
    },
    /// The graph is not understood.
    #[error("{op} '{node}' depends on the image's size and is not understood: {reason}")]
    NotUnderstood {
        /// The node.
        node: String,
        /// Its operator.
        op: String,
        /// Why.
        reason: String,
    },
    /// The network cannot halve this size.
    #[error(
        "the size {height}x{width} does not fit: {reason}\nhint: height and width must be multiples of {multiple_of}"
    )]
    Size {
        /// Rows.
        height: i64,
        /// Columns.
        width: i64,
        /// The node that cannot run, and why.
        reason: String,
        /// What fits.
        multiple_of: i64,
    },
}
