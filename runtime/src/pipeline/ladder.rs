//! How a large image comes about: at the size that the model was trained on, then enlarged again and again.

/// Direct generation up to so many times the area that the model was trained on; beyond, models repeat their subject.
const DIRECT_AREA: f64 = 2.25;
/// Enlarging a step.
const FACTOR: f64 = 2.0;

/// Width and height in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Size {
    /// Pixels across.
    pub width: usize,
    /// Pixels down.
    pub height: usize,
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl Size {
    pub(super) fn area(self) -> f64 {
        self.width as f64 * self.height as f64
    }

    /// This size times `scale`, each side a multiple of `multiple` and at least that.
    fn scaled(self, scale: f64, multiple: usize) -> Self {
        let side = |pixels: usize| {
            let steps = (pixels as f64 * scale / multiple as f64).round();
            (steps as usize).max(1) * multiple
        };
        Self {
            width: side(self.width),
            height: side(self.height),
        }
    }
}

/// The sizes of all stages, the last the wanted one. `native` is the side of the square that the model was trained on,
/// `multiple` what the sides of the first ones are to be divisible by.
pub fn stages(wanted: Size, native: usize, multiple: usize) -> Vec<Size> {
    let native_area = native as f64 * native as f64;
    if wanted.area() <= DIRECT_AREA * native_area {
        return vec![wanted];
    }
    let mut scale = (native_area / wanted.area()).sqrt();
    let mut sizes = Vec::new();
    while scale < 0.999 {
        sizes.push(wanted.scaled(scale, multiple));
        scale *= FACTOR;
    }
    sizes.push(wanted);
    // Rounding can make the last but one the wanted size already, which nothing is enlarged to then.
    sizes.dedup();
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sides(width: usize, height: usize, native: usize) -> Vec<(usize, usize)> {
        let stages = stages(Size { width, height }, native, 64);
        stages.iter().map(|s| (s.width, s.height)).collect()
    }

    #[test]
    fn each_stage_doubles_and_the_last_is_exact() {
        assert_eq!(sides(512, 512, 512), [(512, 512)]);
        assert_eq!(sides(768, 768, 512), [(768, 768)]);
        assert_eq!(sides(1024, 1024, 512), [(512, 512), (1024, 1024)]);
        assert_eq!(
            sides(16384, 8192, 1024),
            [
                (1472, 704),
                (2880, 1472),
                (5824, 2880),
                (11584, 5824),
                (16384, 8192)
            ]
        );
        assert_eq!(
            sides(1000, 1600, 512),
            [(384, 640), (832, 1280), (1000, 1600)]
        );
    }

    #[test]
    fn no_stage_is_of_the_size_before() {
        assert_eq!(sides(384, 192, 128), [(192, 64), (384, 192)]);
    }

    #[test]
    fn a_strip_keeps_a_side() {
        assert_eq!(sides(65536, 16, 512)[0], (32768, 64));
    }
}
