//! The losses as an SVG: error on the samples held out over steps, a line a site.

use std::path::Path;

use linfusion_runtime::plot::{COLOURS, PlotError, write_svg};
use plotters::prelude::*;

use super::report::{Report, SiteReport};

const SIZE: (u32, u32) = (900, 520);

/// Draws the curves of all sites, on a logarithmic axis.
///
/// # Errors
/// The file cannot be written.
pub(super) fn write(report: &Report, path: &Path) -> Result<(), PlotError> {
    write_svg(path, |svg| draw(report, svg))
}

/// Step and relative error, from before the first step on.
fn points(site: &SiteReport) -> Vec<(f64, f64)> {
    let first = (0.0, site.before.relative);
    let rest = site.curve.iter().map(|p| (p.step as f64, p.held_out));
    std::iter::once(first)
        .chain(rest)
        .filter(|(_, error)| *error > 0.0 && error.is_finite())
        .collect()
}

fn draw(report: &Report, svg: &mut String) -> Result<(), String> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(|e| e.to_string())?;
    let lines: Vec<(&str, Vec<(f64, f64)>)> = report
        .sites
        .iter()
        .map(|site| (site.module.as_str(), points(site)))
        .collect();
    let all = || lines.iter().flat_map(|(_, points)| points);
    let steps = all().map(|p| p.0).fold(1.0, f64::max);
    let lowest = all().map(|p| p.1).fold(1.0, f64::min);
    let highest = all().map(|p| p.1).fold(lowest * 10.0, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .caption(
            "unexplained energy on samples held out, a line a site",
            ("sans-serif", 18),
        )
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..steps, (lowest / 1.2..highest * 1.2).log_scale())
        .map_err(|e| e.to_string())?;
    chart
        .configure_mesh()
        .x_desc("steps")
        .x_label_formatter(&|v| format!("{v:.0}"))
        .y_label_formatter(&|v| format!("{v:.0e}"))
        .light_line_style(BLACK.mix(0.06))
        .draw()
        .map_err(|e| e.to_string())?;
    for ((_, points), colour) in lines.into_iter().zip(COLOURS.into_iter().cycle()) {
        let line = LineSeries::new(points, colour.mix(0.8).stroke_width(1));
        chart.draw_series(line).map_err(|e| e.to_string())?;
    }
    root.present().map_err(|e| e.to_string())
}
