//! The shape rule: what the operator asks of its inputs' shapes, and the sizes it works with.

use thiserror::Error;

use super::{AttrError, ElementType, Layout, LinFusionAttentionAttrs};

/// Why shapes and attributes don't make a `LinFusionAttention`.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ShapeError {
    /// An attribute is out of range.
    #[error(transparent)]
    Attr(#[from] AttrError),
    /// q is neither rank 3 nor rank 4.
    #[error(
        "input `q`: expected rank 3 [B,N,H·D] or rank 4 [B,H,N,D], found rank {rank}, shape {shape:?}"
    )]
    Rank {
        /// q's rank.
        rank: usize,
        /// q's shape.
        shape: Vec<usize>,
    },
    /// k or v has another rank than q.
    #[error(
        "input `{input}`: expected rank {expected} as for input `q`, found rank {found}, shape {shape:?}"
    )]
    RankDiffers {
        /// Which input.
        input: &'static str,
        /// q's rank.
        expected: usize,
        /// The input's rank.
        found: usize,
        /// The input's shape.
        shape: Vec<usize>,
    },
    /// A dimension disagrees with another input or with an attribute.
    #[error(
        "input `{input}`: expected {what} (dimension {axis}) = {expected} as {because}, found {found}, shape {shape:?}"
    )]
    Dimension {
        /// Which input.
        input: &'static str,
        /// What the dimension means.
        what: &'static str,
        /// The dimension's index.
        axis: usize,
        /// The value it had to have.
        expected: usize,
        /// The value found.
        found: usize,
        /// Where the expected value comes from.
        because: &'static str,
        /// The input's shape.
        shape: Vec<usize>,
    },
    /// The packed width is no multiple of the number of heads.
    #[error(
        "input `{input}`: expected a last dimension that is a multiple of num_heads = {num_heads}, found {width}, shape {shape:?}"
    )]
    Width {
        /// Which input.
        input: &'static str,
        /// The attribute.
        num_heads: usize,
        /// The last dimension.
        width: usize,
        /// The input's shape.
        shape: Vec<usize>,
    },
    /// The head width is zero, for which the normaliser is not defined by any key.
    #[error("input `{input}`: expected a head width of at least 1, found 0, shape {shape:?}")]
    ZeroWidth {
        /// Which input.
        input: &'static str,
        /// The input's shape.
        shape: Vec<usize>,
    },
    /// The image does not lie in the tokens.
    #[error(
        "input `grid`: expected rows and columns of at least 1 with rows * columns <= {tokens}, the number of tokens of input `q`, found {grid:?}, q of shape {shape:?}"
    )]
    Grid {
        /// Rows and columns.
        grid: [i64; 2],
        /// Tokens, text and image.
        tokens: usize,
        /// q's shape.
        shape: Vec<usize>,
    },
    /// A tensor would hold more elements than the address space.
    #[error("the tensor `{tensor}` of shape {shape:?} has more elements than can be addressed")]
    TooLarge {
        /// Which tensor.
        tensor: &'static str,
        /// Its shape.
        shape: Vec<usize>,
    },
}

/// The checked sizes of one call.
///
/// B, N and M may be zero: with B = 0 or N = 0 the output is empty; with M = 0 both sums are
/// empty, so they are 0 (the factor 1/M is dropped) and the output is all zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dims {
    /// Memory layout of all four tensors.
    pub layout: Layout,
    /// Batch size B.
    pub batch: usize,
    /// Number of heads H.
    pub heads: usize,
    /// Number of queries N.
    pub queries: usize,
    /// Number of keys and values M.
    pub keys: usize,
    /// Width of one head of q and k, D.
    pub head_dim: usize,
    /// Width of one head of v and of the output, Dv.
    pub value_dim: usize,
}

impl Dims {
    /// Checks the three shapes against each other and against the attributes.
    ///
    /// # Errors
    /// [`ShapeError`] naming the input, the expected and the found value.
    pub fn new(
        q_shape: &[usize],
        k_shape: &[usize],
        v_shape: &[usize],
        attrs: &LinFusionAttentionAttrs,
    ) -> Result<Self, ShapeError> {
        attrs.check()?;
        let layout = Layout::from_rank(q_shape.len()).ok_or_else(|| ShapeError::Rank {
            rank: q_shape.len(),
            shape: q_shape.to_vec(),
        })?;
        for (input, shape) in [("k", k_shape), ("v", v_shape)] {
            if shape.len() != q_shape.len() {
                return Err(ShapeError::RankDiffers {
                    input,
                    expected: q_shape.len(),
                    found: shape.len(),
                    shape: shape.to_vec(),
                });
            }
        }
        let q = Part::read("q", q_shape, layout, attrs.num_heads)?;
        let k = Part::read("k", k_shape, layout, attrs.num_heads)?;
        let v = Part::read("v", v_shape, layout, attrs.num_heads)?;
        k.same(Axis::Batch, q.batch, "in input `q`")?;
        v.same(Axis::Batch, q.batch, "in input `q`")?;
        k.same(Axis::Width, q.width, "in input `q`")?;
        v.same(Axis::Rows, k.rows, "in input `k`")?;
        let dims = Self {
            layout,
            batch: q.batch,
            heads: attrs.num_heads,
            queries: q.rows,
            keys: k.rows,
            head_dim: q.width,
            value_dim: v.width,
        };
        for (tensor, shape) in [("q", q_shape), ("k", k_shape), ("v", v_shape)] {
            checked_elements(tensor, shape)?;
        }
        checked_elements("out", &dims.out_shape())?;
        Ok(dims)
    }

    /// The output's shape: `[B, N, H·Dv]` or `[B, H, N, Dv]`.
    pub fn out_shape(&self) -> Vec<usize> {
        self.shape(self.queries, self.value_dim)
    }

    /// q's shape.
    pub fn q_shape(&self) -> Vec<usize> {
        self.shape(self.queries, self.head_dim)
    }

    /// k's shape.
    pub fn k_shape(&self) -> Vec<usize> {
        self.shape(self.keys, self.head_dim)
    }

    /// v's shape.
    pub fn v_shape(&self) -> Vec<usize> {
        self.shape(self.keys, self.value_dim)
    }

    /// Multiplications and additions of the two products, 2·B·H·(M + N)·D·Dv.
    pub fn flops(&self) -> f64 {
        2.0 * (self.batch as f64)
            * (self.heads as f64)
            * (self.keys as f64 + self.queries as f64)
            * (self.head_dim as f64)
            * (self.value_dim as f64)
    }

    /// Bytes of q, k, v read once and the output written once.
    pub fn bytes(&self, element: ElementType) -> f64 {
        (self.batch as f64)
            * (self.heads as f64)
            * (self.queries as f64 + self.keys as f64)
            * (self.head_dim as f64 + self.value_dim as f64)
            * element.size() as f64
    }

    fn shape(&self, rows: usize, width: usize) -> Vec<usize> {
        match self.layout {
            Layout::Packed => vec![self.batch, rows, self.heads.saturating_mul(width)],
            Layout::Heads => vec![self.batch, self.heads, rows, width],
        }
    }
}

fn checked_elements(tensor: &'static str, shape: &[usize]) -> Result<usize, ShapeError> {
    // isize::MAX bytes is the largest object; 8 bytes is the widest element.
    shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .filter(|&n| n <= isize::MAX as usize / 8)
        .ok_or_else(|| ShapeError::TooLarge {
            tensor,
            shape: shape.to_vec(),
        })
}

#[derive(Clone, Copy)]
enum Axis {
    Batch,
    Rows,
    Width,
}

/// One input's shape, read by its layout.
struct Part<'a> {
    input: &'static str,
    shape: &'a [usize],
    layout: Layout,
    heads: usize,
    batch: usize,
    rows: usize,
    width: usize,
}

impl<'a> Part<'a> {
    fn read(
        input: &'static str,
        shape: &'a [usize],
        layout: Layout,
        heads: usize,
    ) -> Result<Self, ShapeError> {
        let (batch, rows, width) = match *shape {
            [batch, rows, packed] => {
                if packed % heads != 0 {
                    return Err(ShapeError::Width {
                        input,
                        num_heads: heads,
                        width: packed,
                        shape: shape.to_vec(),
                    });
                }
                (batch, rows, packed / heads)
            }
            [batch, found, rows, width] => {
                if found != heads {
                    return Err(ShapeError::Dimension {
                        input,
                        what: "the number of heads",
                        axis: 1,
                        expected: heads,
                        found,
                        because: "in attribute `num_heads`",
                        shape: shape.to_vec(),
                    });
                }
                (batch, rows, width)
            }
            _ => {
                return Err(ShapeError::Rank {
                    rank: shape.len(),
                    shape: shape.to_vec(),
                });
            }
        };
        if width == 0 {
            return Err(ShapeError::ZeroWidth {
                input,
                shape: shape.to_vec(),
            });
        }
        Ok(Self {
            input,
            shape,
            layout,
            heads,
            batch,
            rows,
            width,
        })
    }

    fn same(&self, axis: Axis, expected: usize, because: &'static str) -> Result<(), ShapeError> {
        let last = self.layout.rank() - 1;
        let (what, index, found, scale) = match axis {
            Axis::Batch => ("the batch size", 0, self.batch, 1),
            Axis::Rows => ("the number of keys", last - 1, self.rows, 1),
            Axis::Width => (
                "the width",
                last,
                self.width,
                if self.layout == Layout::Packed {
                    self.heads
                } else {
                    1
                },
            ),
        };
        if found == expected {
            return Ok(());
        }
        Err(ShapeError::Dimension {
            input: self.input,
            what,
            axis: index,
            expected: expected.saturating_mul(scale),
            found: found.saturating_mul(scale),
            because,
            shape: self.shape.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use super::*;

    fn attrs(num_heads: usize) -> LinFusionAttentionAttrs {
        LinFusionAttentionAttrs {
            num_heads,
            eps: DEFAULT_EPS,
        }
    }

    #[test]
    fn shapes_that_fit() {
        let packed = Dims::new(&[2, 7, 12], &[2, 5, 12], &[2, 5, 20], &attrs(4)).unwrap();
        assert_eq!(packed.out_shape(), [2, 7, 20]);
        assert_eq!((packed.head_dim, packed.value_dim), (3, 5));
        let heads = Dims::new(&[2, 4, 7, 3], &[2, 4, 5, 3], &[2, 4, 5, 6], &attrs(4)).unwrap();
        assert_eq!(heads.out_shape(), [2, 4, 7, 6]);
        for (q, k) in [
            ([0, 7, 12], [0, 5, 12]),
            ([2, 0, 12], [2, 5, 12]),
            ([2, 7, 12], [2, 0, 12]),
        ] {
            Dims::new(&q, &k, &k, &attrs(4)).unwrap();
        }
    }

    #[test]
    fn near_misses_name_expected_and_found() {
        type Case = (
            &'static [usize],
            &'static [usize],
            &'static [usize],
            usize,
            &'static str,
        );
        let cases: &[Case] = &[
            (&[7, 12], &[7, 12], &[7, 12], 4, "`q`: expected rank 3"),
            (
                &[2, 7, 12],
                &[2, 4, 7, 3],
                &[2, 7, 12],
                4,
                "`k`: expected rank 3 as for input `q`, found rank 4",
            ),
            (
                &[2, 7, 12],
                &[3, 5, 12],
                &[2, 5, 12],
                4,
                "`k`: expected the batch size (dimension 0) = 2",
            ),
            (
                &[2, 7, 12],
                &[2, 5, 16],
                &[2, 5, 12],
                4,
                "`k`: expected the width (dimension 2) = 12 as in input `q`, found 16",
            ),
            (
                &[2, 7, 12],
                &[2, 5, 12],
                &[2, 6, 12],
                4,
                "`v`: expected the number of keys (dimension 1) = 5 as in input `k`, found 6",
            ),
            (
                &[2, 7, 12],
                &[2, 5, 12],
                &[2, 5, 10],
                4,
                "`v`: expected a last dimension that is a multiple of num_heads = 4, found 10",
            ),
            (
                &[2, 3, 7, 4],
                &[2, 4, 5, 4],
                &[2, 4, 5, 4],
                4,
                "`q`: expected the number of heads (dimension 1) = 4 as in attribute `num_heads`, found 3",
            ),
            (
                &[2, 7, 0],
                &[2, 5, 0],
                &[2, 5, 4],
                4,
                "`q`: expected a head width of at least 1",
            ),
            (
                &[2, 7, 12],
                &[2, 5, 12],
                &[2, 5, 12],
                0,
                "`num_heads` must be at least 1, found 0",
            ),
            (
                &[1 << 40, 1 << 20, 12],
                &[1 << 40, 1, 12],
                &[1 << 40, 1, 12],
                4,
                "more elements than can be addressed",
            ),
        ];
        let mut failures = Vec::new();
        for (q, k, v, heads, expected) in cases {
            match Dims::new(q, k, v, &attrs(*heads)) {
                Err(e) if e.to_string().contains(expected) => {}
                other => failures.push(format!("{q:?} {k:?} {v:?}: {other:?}, not `{expected}`")),
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn attributes_out_of_range() {
        assert!(LinFusionAttentionAttrs::new(8, None).is_ok());
        for eps in [0.0, -1e-4, f32::NAN, f32::INFINITY] {
            assert!(LinFusionAttentionAttrs::new(8, Some(eps)).is_err(), "{eps}");
        }
        for heads in [0, -1, i64::MIN] {
            assert!(
                LinFusionAttentionAttrs::new(heads, None).is_err(),
                "{heads}"
            );
        }
    }
}
