//! What was proven, and what follows from it: the rewritten graph at one size.

use std::collections::BTreeMap;

use linfusion_models::onnx::proto::{ModelProto, NodeProto};

use super::columns::{Clash, Columns, Numbers, Role};
use super::image::{Images, Sizes};
use super::reading::{Dimension, Element, Reading, Sized};
use crate::graph::input;
use crate::shapes::TensorReader;

/// What the constants of a graph stand for.
pub struct Proof {
    /// The nodes in execution order.
    pub order: Vec<usize>,
    /// By node, the reading of its constants; nodes that keep all are not in it.
    pub readings: BTreeMap<usize, Reading>,
    /// What open dimensions were taken to be.
    pub open: Open,
    /// By value, its dimensions at the sizes that it was looked at; those of the image vary.
    pub dims: BTreeMap<String, Vec<Numbers>>,
    /// Columns of `dims` that differ in nothing but the image.
    pub images: Vec<usize>,
}

/// Sizes of open dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// Images.
    pub batch: i64,
    /// Another number of images, where any runs.
    pub other: Option<i64>,
}

/// Text tokens, where they are open: no size that models have.
pub const TEXT: i64 = 13;

impl Proof {
    /// Walks the rewritten graph at one size.
    ///
    /// # Errors
    /// The node that cannot run, and why. `None` for a size at which an image is no whole number.
    pub fn walk<'m>(
        &self,
        model: &'m ModelProto,
        read: TensorReader<'m>,
        images: &Images,
        [height, width]: [i64; 2],
    ) -> Result<Columns<'m>, Option<(usize, Clash)>> {
        let sizes = self.sizes([height, width]);
        let mut columns =
            Columns::new(model, read, images, &[(Role::Export, sizes)]).ok_or(None)?;
        for &index in &self.order {
            let Some(node) = model.graph.node.get(index) else {
                continue;
            };
            let numbers = match self.readings.get(&index) {
                None => Vec::new(),
                Some(reading) => evaluate(node, reading, &columns),
            };
            columns
                .step(node, &numbers)
                .map_err(|clash| Some((index, clash)))?;
        }
        Ok(columns)
    }

    /// One image where the batch is open.
    fn sizes(&self, [height, width]: [i64; 2]) -> Sizes {
        Sizes {
            height,
            width,
            batch: self.open.other.map_or(self.open.batch, |_| 1),
            text: TEXT,
        }
    }

    /// Shapes of the inputs at a size of the image, as [`Proof::walk`] takes them.
    pub fn inputs(&self, images: &Images, size: [i64; 2]) -> Option<Vec<(String, Vec<i64>)>> {
        images.shapes(&self.sizes(size))
    }

    /// Shapes of the outputs there, as far as they are known.
    pub fn outputs(
        &self,
        model: &ModelProto,
        read: TensorReader<'_>,
        images: &Images,
        size: [i64; 2],
    ) -> Vec<(String, Vec<i64>)> {
        let Ok(columns) = self.walk(model, read, images, size) else {
            return Vec::new();
        };
        let outputs = model.graph.output.iter().filter_map(|o| o.name.clone());
        let shape = |name: String| {
            let rows = columns.shape(&name)?;
            let dims = rows
                .iter()
                .map(|n| n.first().copied())
                .collect::<Option<_>>()?;
            Some((name, dims))
        };
        outputs.filter_map(shape).collect()
    }

    /// The least power of two, or the export's own size, whose multiples the graph runs at.
    pub fn multiple(&self, model: &ModelProto, read: TensorReader<'_>, images: &Images) -> i64 {
        let largest = images.image.height.max(images.image.width);
        let mut step: i64 = 1;
        while step < largest {
            // Odd multiples: none of the next power of two.
            if self
                .walk(
                    model,
                    read,
                    images,
                    [step.saturating_mul(3), step.saturating_mul(5)],
                )
                .is_ok()
            {
                return step;
            }
            step = step.saturating_mul(2);
        }
        largest
    }
}

/// The elements of a node's sizes in `columns`, where earlier nodes were walked.
pub fn evaluate(
    node: &NodeProto,
    reading: &Reading,
    columns: &Columns<'_>,
) -> Vec<(usize, Vec<Numbers>)> {
    let of = |(slot, elements): &(usize, Vec<Sized>)| {
        let given = input(node, *slot).and_then(|name| columns.ints(name));
        let given = given.unwrap_or_default();
        let number = |(i, sized): (usize, &Sized)| match &sized.element {
            Element::AsIs => given.get(i).cloned().unwrap_or_default(),
            Element::Remaining => vec![-1],
            computed => vec![compute(computed, columns).unwrap_or(0)],
        };
        (*slot, elements.iter().enumerate().map(number).collect())
    };
    reading.slots.iter().map(of).collect()
}

/// A computed element in the only column.
pub fn compute(element: &Element, columns: &Columns<'_>) -> Option<i64> {
    let Element::Computed {
        factor,
        times,
        over,
        divisor,
    } = element
    else {
        return None;
    };
    let size = |d: &Dimension| columns.shape(&d.value)?.get(d.axis)?.first().copied();
    let mut result = *factor;
    for dimension in times {
        result = result.checked_mul(size(dimension)?)?;
    }
    for dimension in over {
        result = result.checked_div(size(dimension)?)?;
    }
    result.checked_div(*divisor)
}
