//! Inputs for a graph that nobody gave inputs for: seeded, of the right types, and of sensible values.
//!
//! Open dimensions are resolved from their names (`batch`, `height`, `sequence`, …) and, where an exporter
//! lost the names, from the rank: images are `[batch, channels, height, width]`, texts
//! `[batch, tokens, width]`. Equal symbols always get equal sizes. Where an image comes in packed, two by two latent pixels a
//! token, `img_ids` says where each token lies (FLUX): the ids are those of a whole image in raster order.

use linfusion_models::random::SplitMix64;
use std::collections::HashMap;

use ndarray::{ArrayD, IxDyn};

use crate::engine::{Dim, Port};
pub use crate::packed::raster_ids;
use crate::packed::{self, Ids, squarest, tokens};
use crate::tensor::Tensor;

/// What to make inputs for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Height and width of the latent image where the graph leaves them open.
    pub latent: Option<usize>,
    /// Batch size where the graph leaves it open.
    pub batch: usize,
    /// Text tokens where the graph leaves them open.
    pub sequence: usize,
    /// Whole shapes of named inputs, before every rule.
    pub shapes: Vec<(String, Vec<usize>)>,
    /// Seed of the random values.
    pub seed: u64,
}

impl Default for Request {
    /// One image with and without its prompt, as classifier-free guidance runs, at 512 × 512 pixels.
    fn default() -> Self {
        Self {
            latent: None,
            batch: 2,
            sequence: 77,
            shapes: Vec::new(),
            seed: 0,
        }
    }
}

/// Latent size where neither graph nor request say one: 512 pixels.
pub const DEFAULT_LATENT: usize = 64;
/// Pixels along an edge of the image that one latent pixel stands for.
pub const PIXELS_PER_LATENT: usize = 8;

/// Why inputs cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InputsError {
    /// The graph runs at one size only, and another was asked for.
    #[error(
        "input `{name}` has the fixed shape {declared}, so the graph cannot run with {asked} rows and columns \
         (hint: `linfusion-convert MODEL --resize dynamic --attention keep` makes a model for any size, as does an export \
         with dynamic axes)"
    )]
    FixedSize {
        /// The input.
        name: String,
        /// Its declared type and shape.
        declared: String,
        /// The size asked for.
        asked: usize,
    },
    /// Nothing says how large a dimension is.
    #[error(
        "dimension {axis} of input `{name}` ({declared}) is open; give its shape with --set {name}=…"
    )]
    Open {
        /// The input.
        name: String,
        /// The axis.
        axis: usize,
        /// Its declared type and shape.
        declared: String,
    },
    /// A shape was given for an input that the graph lacks.
    #[error("a shape was given for `{name}`, but the graph's inputs are {inputs:?}")]
    Unknown {
        /// The name given.
        name: String,
        /// The graph's inputs.
        inputs: Vec<String>,
    },
    /// A shape was given that the graph does not take.
    #[error(
        "the shape {given:?} was given for `{name}`, but the graph takes {declared} (hint: --set {name}=… with a size for each dimension)"
    )]
    Shape {
        /// The input.
        name: String,
        /// The shape given.
        given: Vec<usize>,
        /// Its declared type and shape.
        declared: String,
    },
    /// A tensor would not fit into memory.
    #[error("input `{name}` would have the shape {shape:?}, which is too large")]
    TooLarge {
        /// The input.
        name: String,
        /// The shape.
        shape: Vec<usize>,
    },
}

/// Makes an input for each port.
///
/// # Errors
/// A dimension stays open, a fixed one or the number of tokens contradicts the request, or a size is beyond reason.
pub fn make(ports: &[Port], request: &Request) -> Result<Vec<(String, Tensor)>, InputsError> {
    if let Some((name, _)) = request
        .shapes
        .iter()
        .find(|(name, _)| !ports.iter().any(|port| port.name == *name))
    {
        return Err(InputsError::Unknown {
            name: name.clone(),
            inputs: ports.iter().map(|p| p.name.clone()).collect(),
        });
    }
    let mut sizes = Sizes::new(ports, request);
    let mut random = SplitMix64::new(request.seed);
    ports
        .iter()
        .map(|port| {
            let shape = sizes.shape_of(port)?;
            Ok((port.name.clone(), values(port, &shape, &mut random)?))
        })
        .collect()
}

/// What an engine that refuses these inputs may mean: ids of a packed image, or of its text, that are not as many as the tokens of
/// any input. It tells it of a node somewhere in the graph; graphs that join tokens inside have ids of their own number.
#[must_use]
pub fn ids_hint(ports: &[Port], inputs: &[(String, Tensor)]) -> Option<String> {
    let shape = |port: &Port| {
        let (_, tensor) = inputs.iter().find(|(name, _)| *name == port.name)?;
        Some(tensor.shape().to_vec()).filter(|shape| shape.len() >= 2)
    };
    ports.iter().find_map(|port| {
        let (whose, positions) = (ids(port)?, shape(port)?);
        let is_of = |other: &&Port| ids(other).is_none() && tokens_of(other) == Some(whose);
        let of: Vec<_> = ports
            .iter()
            .filter(is_of)
            .filter_map(|other| Some((&other.name, shape(other)?)))
            .collect();
        if of.iter().any(|(_, shape)| rows(shape) == rows(&positions)) {
            return None;
        }
        let (name, tokens) = of.first()?;
        Some(format!(
            "`{}` {positions:?} has the position ids of {} tokens, but `{name}` {tokens:?} has {} \
             (hint: --set takes the shape of each input; one of the two is enough)",
            port.name,
            rows(&positions),
            rows(tokens)
        ))
    })
}

/// Tokens of a tensor that has a row for each.
fn rows(shape: &[usize]) -> usize {
    shape.iter().rev().nth(1).copied().unwrap_or(0)
}

/// Names, types and shapes, for messages: `` `sample` f32[2, 4, 8, 8] ``.
pub fn described(inputs: &[(String, Tensor)]) -> String {
    let described = inputs
        .iter()
        .map(|(name, tensor)| format!("`{name}` {}{:?}", tensor.dtype(), tensor.shape()));
    described.collect::<Vec<_>>().join(", ")
}

/// What a dimension stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Role {
    Batch,
    Edge,
    PixelEdge,
    Sequence,
    /// Tokens of a packed image.
    Packed,
    /// A vector's only dimension, one value a run.
    Single,
}

struct Sizes<'a> {
    request: &'a Request,
    batch: usize,
    /// Whether the image comes in packed.
    packed: bool,
    /// Tokens of it and of its text, where a given shape has them: exporters give the dimensions names of their own.
    tokens: HashMap<Role, usize>,
    symbols: HashMap<String, usize>,
}

impl<'a> Sizes<'a> {
    fn new(ports: &[Port], request: &'a Request) -> Self {
        // Exports with a fixed batch in one input often leave it open in another.
        let fixed_batch = ports.iter().find_map(|port| {
            let dims = port.shape.as_ref().filter(|dims| dims.len() >= 3)?;
            match dims.first() {
                Some(Dim::Fixed(size)) => Some(*size),
                _ => None,
            }
        });
        let mut sizes = Self {
            request,
            batch: fixed_batch.unwrap_or(request.batch),
            packed: ports.iter().any(|port| ids(port) == Some(Ids::Image)),
            tokens: HashMap::new(),
            symbols: HashMap::new(),
        };
        let mut given: Vec<(Role, usize)> = Vec::new();
        for (name, shape) in &request.shapes {
            let port = ports.iter().find(|port| port.name == *name);
            for (dim, size) in port.iter().flat_map(|p| &p.shape).flatten().zip(shape) {
                if let Dim::Symbol(symbol) = dim {
                    sizes.symbols.insert(symbol.clone(), *size);
                }
            }
            if let Some(port) = port.filter(|_| sizes.packed) {
                let roles = shape.iter().enumerate();
                let roles =
                    roles.filter_map(|(axis, size)| Some((tokens_role(port, axis)?, *size)));
                given.extend(roles);
            }
        }
        // Inputs of different numbers of tokens are joined inside the graph; nobody knows which is meant.
        for (role, size) in &given {
            if given
                .iter()
                .all(|(other, same)| other != role || same == size)
            {
                sizes.tokens.insert(*role, *size);
            }
        }
        sizes
    }

    fn shape_of(&mut self, port: &Port) -> Result<Vec<usize>, InputsError> {
        if let Some((_, shape)) = self.request.shapes.iter().find(|(n, _)| *n == port.name) {
            return match port.takes(shape) {
                true => Ok(shape.clone()),
                false => Err(InputsError::Shape {
                    name: port.name.clone(),
                    given: shape.clone(),
                    declared: port.to_string(),
                }),
            };
        }
        let dims = port.shape.as_deref().unwrap_or_default();
        dims.iter()
            .enumerate()
            .map(|(axis, dim)| self.size_of(port, axis, dim))
            .collect()
    }

    fn size_of(&mut self, port: &Port, axis: usize, dim: &Dim) -> Result<usize, InputsError> {
        let role = match self.packed {
            true => tokens_role(port, axis).or_else(|| role(port, axis, dim)),
            false => role(port, axis, dim),
        };
        if let Dim::Fixed(size) = dim {
            return match (role, self.request.latent) {
                (Some(Role::Edge), Some(asked)) if asked != *size => Err(InputsError::FixedSize {
                    name: port.name.clone(),
                    declared: port.to_string(),
                    asked,
                }),
                (Some(Role::Packed), Some(asked)) if tokens(asked) != *size => {
                    Err(InputsError::FixedSize {
                        name: port.name.clone(),
                        declared: port.to_string(),
                        asked,
                    })
                }
                _ => Ok(*size),
            };
        }
        if let Dim::Symbol(symbol) = dim
            && let Some(size) = self.symbols.get(symbol)
        {
            return Ok(*size);
        }
        let latent = self.request.latent.unwrap_or(DEFAULT_LATENT);
        let given = role.and_then(|role| self.tokens.get(&role)).copied();
        let size = match role {
            _ if given.is_some() => given.unwrap_or_default(),
            Some(Role::Batch) => self.batch,
            Some(Role::Edge) => latent,
            Some(Role::PixelEdge) => latent.saturating_mul(PIXELS_PER_LATENT),
            Some(Role::Sequence) => self.request.sequence,
            Some(Role::Packed) => tokens(latent),
            Some(Role::Single) => 1,
            None => {
                return Err(InputsError::Open {
                    name: port.name.clone(),
                    axis,
                    declared: port.to_string(),
                });
            }
        };
        if let Dim::Symbol(symbol) = dim {
            self.symbols.insert(symbol.clone(), size);
        }
        Ok(size)
    }
}

fn role(port: &Port, axis: usize, dim: &Dim) -> Option<Role> {
    if let Dim::Symbol(symbol) = dim {
        let symbol = symbol.to_lowercase();
        let has = |part: &str| symbol.contains(part);
        if has("pixel") {
            return Some(Role::PixelEdge);
        } else if has("batch") {
            return Some(Role::Batch);
        } else if has("seq") || has("token") || has("text") {
            return Some(Role::Sequence);
        } else if !is_image(port) && (has("height") || has("width")) {
            return Some(Role::Edge);
        }
    }
    let rank = port.shape.as_ref().map_or(0, Vec::len);
    match (rank, axis) {
        (4, 2 | 3) if is_image(port) => Some(Role::PixelEdge),
        (4, 2 | 3) => Some(Role::Edge),
        (3, 1) => Some(Role::Sequence),
        (2.., 0) => Some(Role::Batch),
        (1, 0) => Some(Role::Single),
        _ => None,
    }
}

fn ids(port: &Port) -> Option<Ids> {
    Ids::of(&port.name, &fixed(port)?)
}

fn tokens_of(port: &Port) -> Option<Ids> {
    packed::tokens_of(&port.name, &fixed(port)?)
}

/// The sizes that a graph fixes.
fn fixed(port: &Port) -> Option<Vec<Option<usize>>> {
    let dims = port.shape.as_deref()?.iter().map(|dim| match dim {
        Dim::Fixed(size) => Some(*size),
        Dim::Symbol(_) | Dim::Any => None,
    });
    Some(dims.collect())
}

/// What a dimension of a graph stands for whose image comes in packed, where it is of tokens.
fn tokens_role(port: &Port, axis: usize) -> Option<Role> {
    let rank = port.shape.as_ref()?.len();
    match tokens_of(port).filter(|_| axis + 2 == rank)? {
        Ids::Image => Some(Role::Packed),
        Ids::Text => Some(Role::Sequence),
    }
}

/// A ControlNet's hint is an image, not a latent.
fn is_image(port: &Port) -> bool {
    let channels = port.shape.as_ref().and_then(|dims| dims.get(1));
    port.name.contains("cond") && channels == Some(&Dim::Fixed(3))
}

/// 16 GiB of f32: more than any input of a diffusion graph.
const MAX_ELEMENTS: usize = 1 << 32;

fn values(port: &Port, shape: &[usize], random: &mut SplitMix64) -> Result<Tensor, InputsError> {
    let too_large = || InputsError::TooLarge {
        name: port.name.clone(),
        shape: shape.to_vec(),
    };
    let count = shape
        .iter()
        .try_fold(1_usize, |n, d| n.checked_mul(*d))
        .filter(|n| *n <= MAX_ELEMENTS)
        .ok_or_else(too_large)?;
    if let (Some(of), Some(tokens)) = (
        ids(port),
        shape.len().checked_sub(2).map(|axis| shape[axis]),
    ) {
        let [rows, cols] = squarest(tokens);
        let values: Vec<f64> = match of {
            Ids::Image => raster_ids(rows, cols).cycle().take(count).collect(),
            Ids::Text => vec![0.0; count],
        };
        let array = ArrayD::from_shape_vec(IxDyn(shape), values).map_err(|_| too_large())?;
        return Ok(Tensor::from_f64(array, port.dtype));
    }
    let is_step = port.name.contains("timestep") || (shape.len() <= 1 && port.name.contains('t'));
    let mut draw = || {
        if is_step {
            // The middle of the schedule.
            500.0
        } else if port.dtype.is_float() {
            random.normal()
        } else {
            // Valid as a token, a class, a size and a flag.
            1.0
        }
    };
    let values: Vec<f64> = (0..count).map(|_| draw()).collect();
    let array = ArrayD::from_shape_vec(IxDyn(shape), values).map_err(|_| too_large())?;
    Ok(Tensor::from_f64(array, port.dtype))
}

#[cfg(test)]
mod tests;
