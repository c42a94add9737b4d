//! The measurements as an SVG: time and memory over image size.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::BenchReport;

/// Why there is no plot.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw {path}: {message}")]
pub struct PlotError {
    path: String,
    message: String,
}

const SIZE: (u32, u32) = (1000, 420);
const COLOURS: [RGBColor; 6] = [
    RGBColor(0xd1, 0x49, 0x5b),
    RGBColor(0x00, 0x79, 0x8c),
    RGBColor(0xed, 0xae, 0x49),
    RGBColor(0x30, 0x63, 0x8e),
    RGBColor(0x66, 0x66, 0x66),
    RGBColor(0x6a, 0x99, 0x4e),
];

/// Draws median time and peak memory of every model over image size, on logarithmic axes.
///
/// # Errors
/// The file cannot be written.
pub fn write(report: &BenchReport, path: &Path) -> Result<(), PlotError> {
    let failed = |message: String| PlotError {
        path: path.display().to_string(),
        message,
    };
    let mut svg = String::new();
    draw(report, &mut svg).map_err(failed)?;
    std::fs::write(path, svg).map_err(|e| failed(e.to_string()))
}

fn draw(report: &BenchReport, svg: &mut String) -> Result<(), String> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(|e| e.to_string())?;
    let (left, right) = root.split_horizontally(SIZE.0 / 2);
    let time = Panel {
        title: "one step, median",
        unit: "ms",
        value: |m| m.median_ms,
    };
    let memory = Panel {
        title: "peak memory of the process",
        unit: "MiB",
        value: |m| Some(m.peak_rss_bytes? as f64 / f64::from(1 << 20)),
    };
    time.draw(report, &left)?;
    memory.draw(report, &right)?;
    root.present().map_err(|e| e.to_string())
}

struct Panel {
    title: &'static str,
    unit: &'static str,
    value: fn(&super::Measurement) -> Option<f64>,
}

impl Panel {
    fn draw(
        &self,
        report: &BenchReport,
        area: &DrawingArea<SVGBackend<'_>, Shift>,
    ) -> Result<(), String> {
        let series: Vec<(String, Vec<(f64, f64)>)> = report
            .models
            .iter()
            .enumerate()
            .map(|(i, model)| (label(model), self.points(report, i)))
            .collect();
        let points = || series.iter().flat_map(|(_, points)| points);
        let Some((x, y)) = range(points().map(|p| p.0)).zip(range(points().map(|p| p.1))) else {
            return Ok(());
        };
        let mut chart = ChartBuilder::on(area)
            .caption(
                format!("{} ({})", self.title, self.unit),
                ("sans-serif", 18),
            )
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(x.log_scale(), y.log_scale())
            .map_err(|e| e.to_string())?;
        chart
            .configure_mesh()
            .x_desc("pixels along an edge")
            .y_desc(self.unit)
            .x_label_formatter(&|v| format!("{v:.0}"))
            .y_label_formatter(&|v| format!("{v}"))
            .light_line_style(BLACK.mix(0.06))
            .draw()
            .map_err(|e| e.to_string())?;
        for ((label, points), colour) in series.into_iter().zip(COLOURS.into_iter().cycle()) {
            chart
                .draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))
                .map_err(|e| e.to_string())?
                .label(label)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                });
            chart
                .draw_series(
                    points
                        .into_iter()
                        .map(|p| Circle::new(p, 3, colour.filled())),
                )
                .map_err(|e| e.to_string())?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .draw()
            .map_err(|e| e.to_string())
    }

    fn points(&self, report: &BenchReport, model: usize) -> Vec<(f64, f64)> {
        report
            .sizes
            .iter()
            .filter_map(|size| {
                let value = (self.value)(size.results.get(model)?)?;
                Some((size.pixels as f64, value))
            })
            .collect()
    }
}

fn label(model: &super::ModelSummary) -> String {
    let name = model.path.file_name().unwrap_or(model.path.as_os_str());
    let note = if model.untrained { " (untrained)" } else { "" };
    format!("{}{note}", name.to_string_lossy())
}

/// From a little below the smallest to a little above the largest.
fn range(values: impl Iterator<Item = f64>) -> Option<std::ops::Range<f64>> {
    let positive = values.filter(|v| *v > 0.0 && v.is_finite());
    let (lowest, highest) = positive.fold((f64::INFINITY, 0.0_f64), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    (highest > 0.0).then(|| lowest / 1.2..highest * 1.2)
}

#[cfg(test)]
mod tests {
    use super::super::{Measurement, ModelSummary, SizeReport};
    use super::*;

    #[test]
    fn the_plot_names_every_model() {
        let measurement = |ms: f64| Measurement {
            runs_ms: vec![ms],
            median_ms: Some(ms),
            peak_rss_bytes: Some(1 << 28),
            speedup: Some(1.0),
            failure: None,
        };
        let report = BenchReport {
            engine: "ort".to_owned(),
            threads: None,
            processors: 2,
            repeats: 1,
            models: [("soft.onnx", false), ("lin.onnx", true)]
                .map(|(path, untrained)| ModelSummary {
                    path: path.into(),
                    untrained,
                })
                .into(),
            sizes: [512, 1024]
                .map(|pixels| SizeReport {
                    latent: pixels / 8,
                    pixels,
                    results: vec![measurement(pixels as f64), measurement(12.0)],
                })
                .into(),
            crossovers: Vec::new(),
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.svg");
        write(&report, &path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in ["soft.onnx", "lin.onnx (untrained)", "MiB", "<svg"] {
            assert!(svg.contains(text), "{text}");
        }
        let nowhere = folder.path().join("no/x.svg");
        assert!(write(&report, &nowhere).is_err());
    }
}
