//! Where the rows and columns of the image's tokens can be read off a graph.

use linfusion_ops::schema::TextSide;

use crate::attention::origin::{Origin, Origins};
use crate::graph::{Graph, tensor_name};
use crate::shapes::{Dim, Shapes, looks_like_text, tensor_type};

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
    /// Two adjacent dimensions of a value, the first at `axis`.
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

impl GridSource<'_> {
    /// rows · cols at the sizes that `shapes` has, if known.
    #[must_use]
    pub fn tokens(&self, shapes: &Shapes) -> Option<i64> {
        match *self {
            Self::Spatial { value, axis } => {
                let axis = usize::try_from(axis).ok()?;
                let shape = shapes.shape(value)?;
                shape.get(axis)?.checked_mul(*shape.get(axis + 1)?)
            }
            Self::Ids { input, rank } => shapes.shape(input)?.get(rank.checked_sub(2)?).copied(),
            Self::Fixed(size) => Some(size.tokens()),
        }
    }
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

/// Why an attention's tokens are no image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoImage {
    /// They are the tokens of another input, beside an image: text, attending to itself.
    OtherInput(String),
    /// It cannot be told, in one sentence.
    Unknown(String),
}

impl std::fmt::Display for NoImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OtherInput(name) => {
                write!(f, "its tokens are those of input '{name}', not the image's")
            }
            Self::Unknown(reason) => f.write_str(reason),
        }
    }
}

impl From<String> for NoImage {
    fn from(reason: String) -> Self {
        Self::Unknown(reason)
    }
}

impl From<&str> for NoImage {
    fn from(reason: &str) -> Self {
        Self::Unknown(reason.to_owned())
    }
}

/// What a graph says of its image's rows and columns.
pub struct Grids<'g, 'm> {
    shapes: &'g Shapes,
    again: &'g Shapes,
    origins: Origins<'g, 'm>,
    /// The ids of packed tokens, with their rank.
    ids: Option<(&'m str, usize)>,
    /// Whether an input is an image itself: tokens that come in are something else then.
    pictures: bool,
    stated: Option<GridSize>,
}

/// The image among the tokens of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout<'m> {
    /// Its grid.
    pub grid: Grid<'m>,
    /// Where text lies beside it.
    pub text: Option<TextSide>,
}

impl<'g, 'm> Grids<'g, 'm> {
    /// Of `graph`; `again` has its shapes under another probe. A stated size is taken where
    /// the graph says nothing.
    #[must_use]
    pub fn new(
        graph: &'g Graph<'m>,
        shapes: &'g Shapes,
        again: &'g Shapes,
        stated: Option<GridSize>,
    ) -> Self {
        let stored: Vec<&str> = graph.proto.initializer.iter().map(tensor_name).collect();
        let inputs = graph.proto.input.iter();
        let inputs: Vec<_> = inputs
            .filter_map(|v| Some((v.name.as_deref()?, tensor_type(v)?.1)))
            .filter(|(name, _)| !stored.contains(name))
            .collect();
        let ids = inputs
            .iter()
            .find(|(name, dims)| is_image_ids(name, dims.as_deref()))
            .map(|(name, dims)| (*name, dims.as_ref().map_or(2, Vec::len)));
        let picture = |dims: &Option<Vec<Dim<'_>>>| dims.as_ref().is_some_and(|d| d.len() > 3);
        let pictures = inputs.iter().any(|(_, dims)| picture(dims));
        Grids {
            shapes,
            again,
            origins: Origins::new(graph, shapes),
            ids,
            pictures,
            stated,
        }
    }

    /// The image among the tokens on axis `axis` of `value`.
    ///
    /// # Errors
    /// One sentence: it cannot be told, or there is more than one.
    pub fn of(&self, value: &'m str, axis: usize) -> Result<Layout<'m>, NoImage> {
        let tokens = |shapes: &Shapes| shapes.shape(value)?.get(axis).copied();
        let (Some(here), Some(there)) = (tokens(self.shapes), tokens(self.again)) else {
            return Err(format!("the tokens of '{value}' cannot be counted").into());
        };
        let parts = match self.origins.of(value, axis) {
            Origin::Joined(parts) => parts,
            origin => vec![(origin, here)],
        };
        let named = parts.len() == 1;
        let images: Vec<_> = parts
            .iter()
            .enumerate()
            .filter_map(|(i, (origin, count))| {
                let stored = || self.stated.filter(|_| named || !is_text(origin));
                let grid = self.grid(origin, *count, stored, here == there);
                grid.map(|grid| (i, grid))
            })
            .collect();
        let unknown = |why: &str| {
            NoImage::Unknown(format!(
                "the rows and columns of the {here} tokens cannot be told from the graph: {why}; --grid ROWSxCOLS states them"
            ))
        };
        let layout = |grid: Grid<'m>, text: Option<TextSide>| Ok(Layout { grid, text });
        match (&images[..], &parts[..]) {
            (&[(_, grid)], [_]) => match self.size_again(grid) {
                Some(n) if n != there => Err(unknown("they depend on more than the image's size")),
                _ => layout(grid, None),
            },
            (&[(0, grid)], _) => layout(grid, Some(TextSide::Suffix)),
            (&[(i, grid)], _) if i + 1 == parts.len() => layout(grid, Some(TextSide::Prefix)),
            (&[_], _) => Err("text tokens lie on both sides of the image's".into()),
            ([], [(Origin::Unknown(why), _)]) => Err(unknown(why)),
            ([], [(Origin::Input(name), _)]) if self.pictures || self.ids.is_some() => {
                Err(NoImage::OtherInput((*name).to_owned()))
            }
            ([], [(Origin::Input(name), _)]) => {
                Err(unknown(&format!("they are the tokens of input '{name}'")))
            }
            ([], _) => Err(unknown("none of the joined sequences is an image")),
            _ => Err("the tokens are of several images, one after the other".into()),
        }
    }

    /// Whether `value`, `[B, N, C]` of so many tokens, is the image's alone.
    #[must_use]
    pub fn is_image(&self, value: &'m str, tokens: i64) -> bool {
        let shape = self.shapes.shape(value).unwrap_or(&[]);
        let axis = shape.iter().rev().skip(1).position(|&n| n == tokens);
        let axis = axis.and_then(|from_right| shape.len().checked_sub(2 + from_right));
        axis.is_some_and(|axis| self.of(value, axis).is_ok_and(|l| l.text.is_none()))
    }

    /// The grid of tokens of this origin, if they are an image's.
    fn grid(
        &self,
        origin: &Origin<'m>,
        tokens: i64,
        stated: impl Fn() -> Option<GridSize>,
        fixed: bool,
    ) -> Option<Grid<'m>> {
        match *origin {
            Origin::Plane { value, axis } => {
                let shape = self.shapes.shape(value)?;
                Some(Grid {
                    source: GridSource::Spatial {
                        value,
                        axis: i64::try_from(axis).ok()?,
                    },
                    size: GridSize {
                        rows: *shape.get(axis)?,
                        cols: *shape.get(axis + 1)?,
                    },
                })
            }
            Origin::Input(name) if self.is_packed_image(name) => {
                let (input, rank) = self.ids?;
                some_grid(GridSource::Ids { input, rank }, tokens)
            }
            // Beside ids or an image, whatever else is an input is none of the image's.
            Origin::Input(_) if self.ids.is_some() || self.pictures => None,
            Origin::Input(_) => {
                let size = stated()?;
                let possible = !fixed || size.tokens() == tokens;
                possible.then_some(())?;
                some_grid(GridSource::Fixed(size), tokens)
            }
            Origin::Unknown(_) => {
                let size = stated()?;
                (fixed && size.tokens() == tokens).then_some(Grid {
                    source: GridSource::Fixed(size),
                    size,
                })
            }
            Origin::Joined(_) => None,
        }
    }

    /// Whether an input's tokens are those that the ids are of.
    fn is_packed_image(&self, name: &str) -> bool {
        let Some((ids, rank)) = self.ids else {
            return false;
        };
        let tokens = |shapes: &Shapes| shapes.shape(ids)?.get(rank.checked_sub(2)?).copied();
        let of_input = |shapes: &Shapes| {
            let shape = shapes.shape(name)?;
            shape.get(shape.len().checked_sub(2)?).copied()
        };
        let same = |shapes: &Shapes| tokens(shapes).is_some() && tokens(shapes) == of_input(shapes);
        name == ids || (same(self.shapes) && same(self.again) && !looks_like_text(name))
    }

    /// The number of tokens of a grid under the other probe, where the graph tells.
    fn size_again(&self, grid: Grid<'m>) -> Option<i64> {
        match grid.source {
            GridSource::Spatial { .. } => grid.source.tokens(self.again),
            GridSource::Ids { .. } | GridSource::Fixed(_) => None,
        }
    }
}

/// A grid of a source whose size under the probe is not known: any of as many tokens
/// serves.
fn some_grid(source: GridSource<'_>, tokens: i64) -> Option<Grid<'_>> {
    let rows = (1..=tokens)
        .take_while(|&r| r.saturating_mul(r) <= tokens)
        .filter(|&r| tokens % r == 0)
        .last()?;
    let size = GridSize {
        rows,
        cols: tokens / rows,
    };
    Some(Grid { source, size })
}

/// Whether an origin is an input that is named like text.
fn is_text(origin: &Origin<'_>) -> bool {
    matches!(origin, Origin::Input(name) if looks_like_text(name))
}

/// FLUX's `img_ids`: `[tokens, 3]`, named so in every export.
fn is_image_ids(name: &str, dims: Option<&[Dim<'_>]>) -> bool {
    name.contains("img_ids")
        && matches!(
            dims,
            Some([.., Dim::Value(3)]) | Some([_, _]) | Some([_, _, _])
        )
}
