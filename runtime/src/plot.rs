//! What all plots have in common: their colours, how they become a file, and what can stand in the way.

use std::path::{Path, PathBuf};

use plotters::style::RGBColor;

use crate::whole::write_whole;

/// Colours that can be told apart, also by the colour-blind; lines take them in turn.
pub const COLOURS: [RGBColor; 6] = [
    RGBColor(0xd1, 0x49, 0x5b),
    RGBColor(0x00, 0x79, 0x8c),
    RGBColor(0xed, 0xae, 0x49),
    RGBColor(0x30, 0x63, 0x8e),
    RGBColor(0x66, 0x66, 0x66),
    RGBColor(0x6a, 0x99, 0x4e),
];

/// Why there is no plot.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw {}: {problem}", path.display())]
pub struct PlotError {
    /// The file.
    pub path: PathBuf,
    /// What the drawing library or the operating system said.
    pub problem: String,
}

/// Lets `draw` make an SVG and writes it to `path`, whole or not at all.
///
/// # Errors
/// It cannot be drawn, or the file cannot be written.
pub fn write_svg(
    path: &Path,
    draw: impl FnOnce(&mut String) -> Result<(), String>,
) -> Result<(), PlotError> {
    let failed = |problem: String| PlotError {
        path: path.to_owned(),
        problem,
    };
    let mut svg = String::new();
    draw(&mut svg).map_err(failed)?;
    write_whole(path, svg.as_bytes()).map_err(|e| failed(e.to_string()))
}
