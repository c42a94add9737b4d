//! Sizes for the dynamic dimensions of a graph's inputs.

use std::collections::HashMap;

use crate::onnx::proto::{GraphProto, TensorProto, ValueInfoProto};

use super::value::Fact;
use super::{Dim, tensor_type};
use crate::graph::{Graph, op};

/// The sizes at which a graph is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Batch size of every dynamic batch dimension.
    pub batch: i64,
    /// Rows and columns of the latent image.
    pub latent: (i64, i64),
    /// Length of the text.
    pub text: i64,
}

impl Probe {
    /// Small sizes for tracing layouts. All differ from each other and from the
    /// widths that models have, and stay whole through four halvings.
    pub const TRACE: Probe = Probe {
        batch: 2,
        latent: (16, 48),
        text: 13,
    };

    /// Other sizes, for telling what a size of [`Probe::TRACE`] stands for.
    pub const AGAIN: Probe = Probe {
        batch: 3,
        latent: (48, 32),
        text: 11,
    };

    /// A square latent image at batch 1 with 77 text tokens.
    #[must_use]
    pub fn square(side: i64) -> Self {
        Probe {
            batch: 1,
            latent: (side, side),
            text: 77,
        }
    }

    /// Text tokens and patches of 2 × 2 together.
    #[must_use]
    pub fn tokens(&self) -> i64 {
        (self.latent.0 / 2) * (self.latent.1 / 2) + self.text
    }

    /// Sizes that a trace left in the graph: batch and tokens of constant Reshape targets.
    /// A graph of packed tokens whose declared sizes are not what it can run at is looked
    /// at with these; the image is taken to be the largest square below all tokens.
    /// Commonest first.
    #[must_use]
    pub fn baked(graph: &Graph<'_>) -> Vec<Probe> {
        let mut counts: HashMap<(i64, i64), usize> = HashMap::new();
        for (_, node) in graph.nodes().filter(|(_, n)| op(n) == "Reshape") {
            let target = node.input.get(1).and_then(|v| graph.constant(v));
            let Some(dims) = target.and_then(int64s) else {
                continue;
            };
            if let [batch, tokens, _, ..] = dims[..]
                && batch > 0
                && tokens > 2
            {
                *counts.entry((batch, tokens)).or_default() += 1;
            }
        }
        let mut found: Vec<_> = counts.into_iter().collect();
        found.sort_by_key(|&(size, count)| (std::cmp::Reverse(count), size));
        let probe = |((batch, tokens), _): ((i64, i64), usize)| {
            let side = (tokens - 1).isqrt();
            Probe {
                batch,
                // Patches of 2 × 2.
                latent: (2 * side, 2 * side),
                text: tokens - side * side,
            }
        };
        found.into_iter().take(3).map(probe).collect()
    }

    /// Gives every graph input a fact and every input symbol a size. The first
    /// rank-4 input is the latent image; a later one with 3 channels is a
    /// conditioning image at 8 pixels a latent.
    pub(super) fn bind(
        &self,
        graph: &GraphProto,
        symbols: &mut HashMap<String, i64>,
        facts: &mut HashMap<String, Fact>,
    ) {
        let initialized: std::collections::HashSet<&str> = graph
            .initializer
            .iter()
            .filter_map(|t| t.name.as_deref())
            .collect();
        let inputs: Vec<Input<'_>> = graph
            .input
            .iter()
            .filter(|v| !initialized.contains(v.name.as_deref().unwrap_or("")))
            .filter_map(Input::of)
            .collect();
        let image = inputs.iter().position(|i| i.dims.len() == 4);
        let packed = if image.is_some() {
            None
        } else {
            packed_image(&inputs)
        };
        for (index, input) in inputs.iter().enumerate() {
            let role = match input.dims.len() {
                4 if Some(index) != image && input.dims.get(1) == Some(&Dim::Value(3)) => {
                    Role::Pixels
                }
                4 => Role::Latent,
                3 if Some(index) == packed => Role::PackedTokens,
                _ => Role::Other,
            };
            let shape: Vec<i64> = input
                .dims
                .iter()
                .enumerate()
                .map(|(axis, dim)| match dim {
                    Dim::Value(v) => *v,
                    Dim::Symbol(s) => *symbols
                        .entry((*s).to_owned())
                        .or_insert_with(|| self.size(input.name, Some(s), role, axis)),
                    Dim::Unknown => self.size(input.name, None, role, axis),
                })
                .collect();
            facts.insert(input.name.to_owned(), Fact::shaped(shape, input.element));
        }
    }

    fn size(&self, name: &str, symbol: Option<&str>, role: Role, axis: usize) -> i64 {
        let (rows, cols) = self.latent;
        match (role, axis) {
            // Position ids ([tokens, 3], no batch) carry no batch dimension.
            (Role::Other, 0) if name.contains("img_ids") => (rows / 2) * (cols / 2),
            (Role::Other, 0) if name.contains("txt_ids") => self.text,
            (_, 0) if !symbol.is_some_and(|s| s.contains("seq") || s.contains("len")) => self.batch,
            (Role::Latent, 2) => rows,
            (Role::Latent, 3) => cols,
            (Role::Latent, _) => 4,
            (Role::Pixels, 2) => rows * 8,
            (Role::Pixels, _) => cols * 8,
            (Role::PackedTokens, 1) => (rows / 2) * (cols / 2),
            _ => self.text,
        }
    }
}

/// The input of packed image tokens: the one whose tokens the image's ids are of, else one
/// that is not named like text.
fn packed_image(inputs: &[Input<'_>]) -> Option<usize> {
    let ids = inputs.iter().find(|i| i.name.contains("img_ids"));
    let tokens = ids.and_then(|i| i.dims.get(i.dims.len().checked_sub(2)?));
    let sequences = || (0..inputs.len()).filter(|&i| inputs[i].dims.len() == 3);
    let is_text = |i: &usize| looks_like_text(inputs[*i].name);
    sequences()
        .find(|&i| {
            !is_text(&i)
                && tokens.is_some_and(|t| *t != Dim::Unknown && inputs[i].dims.get(1) == Some(t))
                && !inputs[i].name.contains("ids")
        })
        .or_else(|| sequences().find(|i| !is_text(i)))
        .or_else(|| sequences().next())
}

/// Whether an input is named as those that bring text, in any library.
#[must_use]
pub fn looks_like_text(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    [
        "encoder", "text", "txt", "context", "prompt", "caption", "cond",
    ]
    .iter()
    .any(|part| name.contains(part))
}

/// The elements of a stored int64 vector.
fn int64s(tensor: &TensorProto) -> Option<Vec<i64>> {
    if tensor.data_type != Some(super::eval::element::INT64) || tensor.dims.len() != 1 {
        return None;
    }
    let Some(raw) = tensor.raw_data.as_deref() else {
        return Some(tensor.int64_data.clone());
    };
    let (words, _) = raw.as_chunks::<8>();
    Some(words.iter().map(|w| i64::from_le_bytes(*w)).collect())
}

#[derive(Clone, Copy)]
enum Role {
    Latent,
    Pixels,
    PackedTokens,
    Other,
}

struct Input<'m> {
    name: &'m str,
    element: Option<i32>,
    dims: Vec<Dim<'m>>,
}

impl<'m> Input<'m> {
    fn of(info: &'m ValueInfoProto) -> Option<Self> {
        let (element, dims) = tensor_type(info)?;
        Some(Input {
            name: info.name.as_deref()?,
            element,
            dims: dims?,
        })
    }
}
