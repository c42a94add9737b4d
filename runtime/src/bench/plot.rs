//! The measurements as an SVG: time and memory over image size.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::{BenchReport, Measurement};
use crate::plot::{COLOURS, PlotError, write_svg};

const SIZE: (u32, u32) = (1000, 420);
/// Draws median time and peak memory of every model over image size, on logarithmic axes.
///
/// # Errors
/// The file cannot be written.
pub fn write(report: &BenchReport, path: &Path) -> Result<(), PlotError> {
    write_svg(path, |svg| draw(report, svg))
}

fn draw(report: &BenchReport, svg: &mut String) -> Result<(), String> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(|e| e.to_string())?;
    let (left, right) = root.split_horizontally(SIZE.0 / 2);
    let results = || report.sizes.iter().flat_map(|size| &size.results);
    let time = Panel {
        title: match results().any(|r| r.step_ms.is_some()) {
            true => "one image, median; dashed: by arithmetic",
            false => "one step, median; dashed: by arithmetic",
        },
        unit: "ms",
        value: |m| m.median_ms,
        theory: arithmetic,
    };
    let memory = Panel {
        title: "peak memory; dashed: counted",
        unit: "MiB",
        // A GPU's, where there is one.
        value: |m| Some(mib(m.device_bytes.or(m.peak_rss_bytes)?)),
        theory: counted,
    };
    time.draw(report, &left)?;
    memory.draw(report, &right)?;
    root.present().map_err(|e| e.to_string())
}

struct Panel {
    title: &'static str,
    unit: &'static str,
    value: fn(&Measurement) -> Option<f64>,
    theory: fn(&BenchReport, usize) -> Vec<(f64, f64)>,
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// What a model's operations take at the rate of the largest size that it got through.
fn arithmetic(report: &BenchReport, model: usize) -> Vec<(f64, f64)> {
    let results = || of(report, model);
    let rate = results().filter_map(|(_, r)| Some(r.expected?.operations / r.median_ms?));
    let Some(rate) = rate.last() else {
        return Vec::new();
    };
    results()
        .filter_map(|(pixels, r)| Some((pixels, r.expected?.operations / rate)))
        .collect()
}

/// Weights and values, as counted in the graph.
fn counted(report: &BenchReport, model: usize) -> Vec<(f64, f64)> {
    of(report, model)
        .filter_map(|(pixels, r)| Some((pixels, mib(r.expected?.bytes))))
        .collect()
}

/// A model's results by pixels along an edge, smallest first.
fn of(report: &BenchReport, model: usize) -> impl Iterator<Item = (f64, &Measurement)> {
    report
        .sizes
        .iter()
        .filter_map(move |size| Some((size.pixels?.side(), size.results.get(model)?)))
}

impl Panel {
    fn draw(
        &self,
        report: &BenchReport,
        area: &DrawingArea<SVGBackend<'_>, Shift>,
    ) -> Result<(), String> {
        let series: Vec<Series> = report
            .models
            .iter()
            .enumerate()
            .map(|(i, model)| Series {
                label: label(model),
                points: of(report, i)
                    .filter_map(|(pixels, r)| Some((pixels, (self.value)(r)?)))
                    .collect(),
                theory: (self.theory)(report, i),
            })
            .collect();
        let points = || series.iter().flat_map(|s| s.points.iter().chain(&s.theory));
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
        for (series, colour) in series.into_iter().zip(COLOURS.into_iter().cycle()) {
            let points = series.points;
            chart
                .draw_series(DashedLineSeries::new(
                    series.theory,
                    5,
                    4,
                    colour.mix(0.7).stroke_width(1),
                ))
                .map_err(|e| e.to_string())?;
            chart
                .draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))
                .map_err(|e| e.to_string())?
                .label(series.label)
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
}

struct Series {
    label: String,
    points: Vec<(f64, f64)>,
    theory: Vec<(f64, f64)>,
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
    use super::super::{Expected, ModelSummary, Pixels, SizeReport};
    use super::*;

    #[test]
    fn theory_is_scaled_by_what_was_measured_and_goes_on_where_nothing_was() {
        let size = |pixels: usize, operations, median_ms| SizeReport {
            pixels: Some(Pixels::square(pixels)),
            results: vec![Measurement {
                median_ms,
                expected: Some(Expected {
                    operations,
                    bytes: 3 << 20,
                }),
                ..Measurement::default()
            }],
        };
        let report = BenchReport {
            sizes: vec![
                size(512, 100.0, Some(30.0)),
                size(1024, 1600.0, Some(160.0)),
                size(2048, 25600.0, None),
            ],
            ..empty()
        };
        let expected = [(512.0, 10.0), (1024.0, 160.0), (2048.0, 2560.0)];
        assert_eq!(arithmetic(&report, 0), expected);
        assert_eq!(counted(&report, 0)[2], (2048.0, 3.0));
        assert!(arithmetic(&report, 1).is_empty());
    }

    fn empty() -> BenchReport {
        BenchReport {
            engine: "ort".to_owned(),
            threads: None,
            processors: 2,
            repeats: 1,
            models: Vec::new(),
            sizes: Vec::new(),
            crossovers: Vec::new(),
            stopped_at: None,
        }
    }

    #[test]
    fn the_plot_names_every_model() {
        let measurement = |ms: f64| Measurement {
            runs_ms: vec![ms],
            median_ms: Some(ms),
            peak_rss_bytes: Some(1 << 28),
            ..Measurement::default()
        };
        let report = BenchReport {
            models: [("soft.onnx", false), ("lin.onnx", true)]
                .map(|(path, untrained)| ModelSummary {
                    path: path.into(),
                    untrained,
                })
                .into(),
            sizes: [512, 1024]
                .map(|pixels| SizeReport {
                    pixels: Some(Pixels::square(pixels)),
                    results: vec![measurement(pixels as f64), measurement(12.0)],
                })
                .into(),
            ..empty()
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
