//! Where the rows and columns of the image's tokens can be read off a graph.

use std::collections::HashMap;

use linfusion_models::onnx::proto::NodeProto;

use crate::graph::{Graph, op, tensor_name};
use crate::shapes::eval::element::is_float;
use crate::shapes::{Dim, Shapes, tensor_type};

/// A size in tokens that the user states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GridSize {
    /// Rows.
    pub rows: i64,
    /// Columns.
    pub cols: i64,
}

impl GridSize {
    /// rows · cols.
    #[must_use]
    pub fn tokens(self) -> i64 {
        self.rows.saturating_mul(self.cols)
    }
}

/// What the grid is computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GridSource<'m> {
    /// Two adjacent dimensions of a rank-4 value, the first at `axis`.
    Spatial {
        /// The value.
        value: &'m str,
        /// 2 for `[B, C, rows, cols]`, 1 for `[B, rows, cols, C]`.
        axis: i64,
    },
    /// The (_, row, column) ids of packed image tokens, `[tokens, 3]` or
    /// `[B, tokens, 3]` in raster order (FLUX).
    Ids {
        /// The graph input.
        input: &'m str,
        /// Its rank.
        rank: usize,
    },
    /// Stated.
    Fixed(GridSize),
}

impl std::fmt::Display for GridSource<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Spatial { value, .. } => write!(f, "shape of '{value}'"),
            Self::Ids { input, .. } => write!(f, "ids '{input}'"),
            Self::Fixed(size) => write!(f, "stated {}x{}", size.rows, size.cols),
        }
    }
}

/// A grid of image tokens: its source and its size under the probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid<'m> {
    /// Where it comes from.
    pub source: GridSource<'m>,
    /// Its size under the probe.
    pub size: GridSize,
}

/// Every grid of a graph, by its number of tokens under the probe.
#[derive(Clone, Debug, Default)]
pub struct Grids<'m> {
    by_tokens: HashMap<i64, Grid<'m>>,
}

impl<'m> Grids<'m> {
    /// Finds the grids of `graph`. `again` has its shapes under another probe: what
    /// keeps the image's proportions under both is the image. A stated size is taken
    /// where the graph says nothing.
    #[must_use]
    pub fn find(
        graph: &Graph<'m>,
        shapes: &Shapes,
        again: &Shapes,
        stated: Option<GridSize>,
    ) -> Self {
        let mut grids = Self::default();
        let stored: Vec<&str> = graph.proto.initializer.iter().map(tensor_name).collect();
        let inputs = || {
            let all = graph.proto.input.iter();
            all.filter_map(|v| Some((v.name.as_deref()?, tensor_type(v)?)))
                .filter(|(name, _)| !stored.contains(name))
        };
        let of_rank = |rank: usize| {
            let mut names = inputs().map(|(name, _)| name);
            names.find(|name| shapes.shape(name).is_some_and(|s| s.len() == rank))
        };
        let packed = of_rank(3).and_then(|name| shapes.shape(name)?.get(1).copied());
        if let Some(size) = stated {
            grids.add(Grid {
                source: GridSource::Fixed(size),
                size,
            });
            // Under the probe there are as many tokens as the probe has.
            grids.add_packed(GridSource::Fixed(size), packed);
        }
        match of_rank(4) {
            Some(image) => grids.spatial(graph, shapes, again, image),
            None => {
                let ids = inputs().find(|(name, (_, dims))| is_image_ids(name, dims.as_deref()));
                if let Some((input, (_, dims))) = ids {
                    let rank = dims.map_or(2, |d| d.len());
                    grids.add_packed(GridSource::Ids { input, rank }, packed);
                }
            }
        }
        grids
    }

    /// The grid of this many tokens.
    #[must_use]
    pub fn of(&self, tokens: i64) -> Option<Grid<'m>> {
        self.by_tokens.get(&tokens).copied()
    }

    /// The numbers of tokens that there is a grid for.
    pub fn tokens(&self) -> impl Iterator<Item = i64> {
        self.by_tokens.keys().copied()
    }

    fn add(&mut self, grid: Grid<'m>) {
        self.by_tokens.entry(grid.size.tokens()).or_insert(grid);
    }

    fn spatial(&mut self, graph: &Graph<'m>, shapes: &Shapes, again: &Shapes, image: &'m str) {
        let side = |s: &Shapes| match s.shape(image) {
            Some(&[_, _, rows, cols]) if rows > 0 && cols > 0 => Some((rows, cols)),
            _ => None,
        };
        let (Some(here), Some(there)) = (side(shapes), side(again)) else {
            return;
        };
        let proportional = |(rows, cols): (i64, i64), (r, c): (i64, i64)| {
            r > 0 && c > 0 && rows.checked_mul(c) == cols.checked_mul(r) && rows % r == 0
        };
        // Patch embeddings and resolutions of a UNet begin with a convolution; a value
        // of any other node could have two equal sides by chance.
        let convs = graph.nodes().filter(|(_, n)| is_convolution(n));
        let others = graph.nodes().filter(|(_, n)| !is_convolution(n));
        let made = convs.chain(others).flat_map(|(_, n)| n.output.first());
        for value in std::iter::once(image).chain(made.map(String::as_str)) {
            let fact = shapes.fact(value);
            if fact.constant || !fact.element.is_some_and(is_float) {
                continue;
            }
            let (Some(&[_, a, b, c]), Some(&[_, d, e, f])) =
                (shapes.shape(value), again.shape(value))
            else {
                continue;
            };
            for (axis, size, other) in [(2, (b, c), (e, f)), (1, (a, b), (d, e))] {
                if proportional(here, size)
                    && proportional(there, other)
                    && here.0 / size.0 == there.0 / other.0
                {
                    self.add(Grid {
                        source: GridSource::Spatial { value, axis },
                        size: GridSize {
                            rows: size.0,
                            cols: size.1,
                        },
                    });
                    break;
                }
            }
        }
    }

    /// A source whose size under the probe is not known: any grid of as many tokens
    /// serves.
    fn add_packed(&mut self, source: GridSource<'m>, tokens: Option<i64>) {
        let Some(tokens) = tokens else { return };
        let rows = (1..=tokens)
            .take_while(|&r| r.saturating_mul(r) <= tokens)
            .filter(|&r| tokens % r == 0)
            .last();
        if let Some(rows) = rows {
            let cols = tokens / rows;
            self.add(Grid {
                source,
                size: GridSize { rows, cols },
            });
        }
    }
}

fn is_convolution(node: &NodeProto) -> bool {
    op(node).contains("Conv")
}

/// FLUX's `img_ids`: `[tokens, 3]`, named so in every export.
fn is_image_ids(name: &str, dims: Option<&[Dim<'_>]>) -> bool {
    name.contains("img_ids")
        && matches!(
            dims,
            Some([.., Dim::Value(3)]) | Some([_, _]) | Some([_, _, _])
        )
}
