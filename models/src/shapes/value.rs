//! Small known tensors, as shape arithmetic makes them.

/// The elements of a known tensor, row-major. Integers and booleans are `Int`,
/// everything else `Float`.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// Integer or boolean elements.
    Int(Vec<i64>),
    /// Floating-point elements.
    Float(Vec<f64>),
}

impl Elements {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Int(v) => v.len(),
            Self::Float(v) => v.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `i` as a float.
    #[must_use]
    pub fn float(&self, i: usize) -> Option<f64> {
        match self {
            Self::Int(v) => v.get(i).map(|&x| x as f64),
            Self::Float(v) => v.get(i).copied(),
        }
    }

    /// All elements as integers, if they are integers.
    #[must_use]
    pub fn ints(&self) -> Option<&[i64]> {
        match self {
            Self::Int(v) => Some(v),
            Self::Float(_) => None,
        }
    }

    /// The elements at `indices`, in that order.
    #[must_use]
    pub fn select(&self, indices: &[usize]) -> Option<Self> {
        Some(match self {
            Self::Int(v) => Self::Int(
                indices
                    .iter()
                    .map(|&i| v.get(i).copied())
                    .collect::<Option<_>>()?,
            ),
            Self::Float(v) => Self::Float(
                indices
                    .iter()
                    .map(|&i| v.get(i).copied())
                    .collect::<Option<_>>()?,
            ),
        })
    }

    /// The elements as ONNX `Cast` to an integer or a floating-point type.
    #[must_use]
    pub fn cast(&self, to_float: bool) -> Self {
        match (self, to_float) {
            (Self::Int(v), true) => Self::Float(v.iter().map(|&x| x as f64).collect()),
            (Self::Float(v), false) => Self::Int(v.iter().map(|&x| x as i64).collect()),
            (same, _) => same.clone(),
        }
    }
}

/// What is known of a value: any part may be missing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fact {
    /// Concrete dimensions under the probe sizes.
    pub shape: Option<Vec<i64>>,
    /// ONNX element type number.
    pub element: Option<i32>,
    /// The elements, for small tensors.
    pub elements: Option<Elements>,
    /// Whether the value depends on no graph input.
    pub constant: bool,
}

impl Fact {
    /// A fact with a shape only.
    #[must_use]
    pub fn shaped(shape: Vec<i64>, element: Option<i32>) -> Self {
        Fact {
            shape: Some(shape),
            element,
            ..Fact::default()
        }
    }

    /// Number of elements, `None` if the shape is unknown or overflows.
    #[must_use]
    pub fn count(&self) -> Option<i64> {
        count(self.shape.as_deref()?)
    }

    /// The only element of a one-element tensor.
    #[must_use]
    pub fn scalar(&self) -> Option<f64> {
        let e = self.elements.as_ref()?;
        if e.len() == 1 { e.float(0) } else { None }
    }

    /// The elements of an integer tensor.
    #[must_use]
    pub fn ints(&self) -> Option<&[i64]> {
        self.elements.as_ref()?.ints()
    }
}

/// The product of `shape`; `None` on a negative dimension or overflow.
#[must_use]
pub fn count(shape: &[i64]) -> Option<i64> {
    shape
        .iter()
        .try_fold(1i64, |a, &d| if d < 0 { None } else { a.checked_mul(d) })
}

/// NumPy broadcasting of two shapes.
#[must_use]
pub fn broadcast(a: &[i64], b: &[i64]) -> Option<Vec<i64>> {
    let rank = a.len().max(b.len());
    let dim = |s: &[i64], i: usize| {
        if i + s.len() < rank {
            1
        } else {
            s[i + s.len() - rank]
        }
    };
    (0..rank)
        .map(|i| match (dim(a, i), dim(b, i)) {
            (x, y) if x == y => Some(x),
            (1, y) => Some(y),
            (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

/// A possibly negative axis as an index below `rank`.
#[must_use]
pub fn axis(axis: i64, rank: usize) -> Option<usize> {
    let rank = i64::try_from(rank).ok()?;
    let a = if axis < 0 {
        axis.checked_add(rank)?
    } else {
        axis
    };
    if (0..rank).contains(&a) {
        usize::try_from(a).ok()
    } else {
        None
    }
}
