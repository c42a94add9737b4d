//! What SD-XL is told about sizes.

/// What to tell SD-XL about sizes instead of the image's own: pixels, each as height and width. What is left out on the negative
/// side is as on the positive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SizeHints {
    /// Of the image before it was resized.
    pub original: Option<[usize; 2]>,
    /// Of what was cut off its top and left.
    pub crop: Option<[usize; 2]>,
    /// Of the image.
    pub target: Option<[usize; 2]>,
    /// `original` on the negative side.
    pub negative_original: Option<[usize; 2]>,
    /// `crop` on the negative side.
    pub negative_crop: Option<[usize; 2]>,
    /// `target` on the negative side.
    pub negative_target: Option<[usize; 2]>,
}

impl SizeHints {
    /// For an image of that size.
    pub fn at(&self, height: usize, width: usize) -> Sizes {
        Sizes {
            original: self.original.unwrap_or([height, width]),
            crop: self.crop.unwrap_or([0, 0]),
            target: self.target.unwrap_or([height, width]),
            negative_original: self.negative_original,
            // As diffusers has it: a negative side of its own is not cropped unless it is said to be.
            negative_crop: self.negative_crop.or_else(|| {
                self.negative_original.and(self.negative_target)?;
                Some([0, 0])
            }),
            negative_target: self.negative_target,
        }
    }
}

/// The sizes that SD-XL was trained to be told, in pixels, each as height and width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Of the image before it was resized.
    pub original: [usize; 2],
    /// Of what was cut off its top and left.
    pub crop: [usize; 2],
    /// Of the image.
    pub target: [usize; 2],
    /// `original` on the negative side.
    pub negative_original: Option<[usize; 2]>,
    /// `crop` on the negative side.
    pub negative_crop: Option<[usize; 2]>,
    /// `target` on the negative side.
    pub negative_target: Option<[usize; 2]>,
}

impl Sizes {
    pub(super) fn time_ids(&self, side: Side) -> [f32; 6] {
        let pick = |usual: [usize; 2], negative: Option<[usize; 2]>| match side {
            Side::Negative => negative.unwrap_or(usual),
            Side::Positive => usual,
        };
        let [a, b] = pick(self.original, self.negative_original);
        let [c, d] = pick(self.crop, self.negative_crop);
        let [e, f] = pick(self.target, self.negative_target);
        [a, b, c, d, e, f].map(|v| v as f32)
    }
}

/// A side of guidance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// What it leads away from.
    Negative,
    /// What it leads to.
    Positive,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_negative_side_is_told_its_own_sizes() {
        let own = SizeHints::default().at(768, 1024);
        for side in [Side::Positive, Side::Negative] {
            assert_eq!(own.time_ids(side), [768.0, 1024.0, 0.0, 0.0, 768.0, 1024.0]);
        }
        let hints = SizeHints {
            original: Some([2000, 3000]),
            crop: Some([5, 6]),
            negative_original: Some([512, 513]),
            negative_target: Some([32, 33]),
            ..SizeHints::default()
        };
        let sizes = hints.at(768, 1024);
        let positive = [2000.0, 3000.0, 5.0, 6.0, 768.0, 1024.0];
        assert_eq!(sizes.time_ids(Side::Positive), positive);
        let negative = [512.0, 513.0, 0.0, 0.0, 32.0, 33.0];
        assert_eq!(sizes.time_ids(Side::Negative), negative);
    }
}
