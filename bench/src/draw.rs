//! The pictures. Light colours on white, so that they can be read on paper too.

use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::figures::{Epochs, Latency, Takeover};

const SIZE: (u32, u32) = (760, 420);
const BLUE: RGBColor = RGBColor(31, 95, 168);
const ORANGE: RGBColor = RGBColor(214, 118, 28);
const GREEN: RGBColor = RGBColor(62, 138, 80);
const GREY: RGBColor = RGBColor(170, 170, 170);
const FONT: &str = "sans-serif";

/// A row of figures in a picture: its name, its colour, and where a measurement has it.
type Row<M, V> = (&'static str, RGBColor, fn(&M) -> V);

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Every kill, the quickest first, and what its time went to.
pub fn takeovers(path: &Path, rounds: &[Takeover]) -> Result<(), String> {
    let mut rounds = rounds.to_vec();
    rounds.sort_by(|a, b| a.takeover_ms.total_cmp(&b.takeover_ms));
    let highest = rounds.last().map_or(1.0, |round| round.takeover_ms) * 1.15;
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(text)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("SIGKILL of the primary under load: kill to first packet", (FONT, 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..rounds.len() as f64, 0.0..highest)
        .map_err(text)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .disable_x_mesh()
        .x_labels(1)
        .x_label_formatter(&|_| String::new())
        .x_desc(format!("{} kills, the quickest first", rounds.len()))
        .y_desc("ms")
        .draw()
        .map_err(text)?;
    let parts: [Row<Takeover, (f64, f64)>; 3] = [
        ("noticed", BLUE, |round| (0.0, round.noticed_ms)),
        ("the arbiter decided", ORANGE, |round| (round.noticed_ms, round.noticed_ms + round.arbitrate_ms)),
        ("applied, restored, first packet", GREEN, |round| (round.noticed_ms + round.arbitrate_ms, round.takeover_ms)),
    ];
    for (label, color, part) in parts {
        let bars = rounds.iter().enumerate().map(|(number, round)| {
            let ((from, to), x) = (part(round), number as f64);
            Rectangle::new([(x + 0.15, from), (x + 0.85, to.max(from))], color.filled())
        });
        let series = chart.draw_series(bars).map_err(text)?;
        series.label(label).legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()));
    }
    legend(&mut chart, SeriesLabelPosition::UpperLeft)?;
    root.present().map_err(text)
}

/// Pause over dirty pages, with its floor.
pub fn pauses(path: &Path, epochs: &[Epochs]) -> Result<(), String> {
    let pages = |epochs: &Epochs| epochs.dirty_pages.p50 as f64;
    let largest = epochs.iter().map(pages).fold(100.0, f64::max);
    let highest = epochs.iter().map(|epochs| epochs.pause_us.p99 as f64).fold(100.0, f64::max);
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    let mut chart = log_chart(
        &root,
        "How long an epoch stops the guest, 10 ms interval",
        ("pages written in the epoch (4 KiB each)", 20.0..largest * 1.3),
        ("pause, µs", 50.0..highest * 1.5),
    )?;
    let low = epochs.iter().map(|epochs| (pages(epochs), epochs.pause_floor_us.low));
    let high = epochs.iter().rev().map(|epochs| (pages(epochs), epochs.pause_floor_us.high));
    let band = Polygon::new(low.chain(high).collect::<Vec<_>>(), GREY.mix(0.4));
    let series = chart.draw_series([band]).map_err(text)?;
    series
        .label("floor: pages in a cache, or not")
        .legend(|(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], GREY.mix(0.4).filled()));
    curve(&mut chart, "p50", BLUE, epochs.iter().map(|epochs| (pages(epochs), epochs.pause_us.p50 as f64)))?;
    curve(&mut chart, "p99", ORANGE, epochs.iter().map(|epochs| (pages(epochs), epochs.pause_us.p99 as f64)))?;
    legend(&mut chart, SeriesLabelPosition::UpperLeft)?;
    root.present().map_err(text)
}

/// Latency over the interval.
pub fn latencies(path: &Path, measured: &[(u64, Latency)]) -> Result<(), String> {
    let highest = measured.iter().map(|(_, latency)| latency.protected.p99 as f64).fold(100.0, f64::max);
    let lowest = measured.iter().map(|(_, latency)| latency.solo.p50 as f64).fold(100.0, f64::min);
    let intervals = measured.iter().map(|(interval_ms, _)| *interval_ms as f64);
    let range = intervals.clone().fold(f64::MAX, f64::min) * 0.8..intervals.fold(1.0, f64::max) * 1.25;
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    let mut chart = log_chart(
        &root,
        "Latency of a client with one request in flight",
        ("--interval-ms: the longest an epoch lasts", range),
        ("µs", lowest * 0.7..highest * 2.0),
    )?;
    let curves: [Row<Latency, u64>; 4] = [
        ("protected p99", ORANGE, |latency| latency.protected.p99),
        ("protected p50", BLUE, |latency| latency.protected.p50),
        ("solo p99", GREY, |latency| latency.solo.p99),
        ("solo p50", GREEN, |latency| latency.solo.p50),
    ];
    for (label, color, value) in curves {
        curve(&mut chart, label, color, measured.iter().map(|(ms, latency)| (*ms as f64, value(latency) as f64)))?;
    }
    legend(&mut chart, SeriesLabelPosition::UpperRight)?;
    root.present().map_err(text)
}

/// A chart whose axes are both logarithmic.
type LogChart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::combinators::LogCoord<f64>, plotters::coord::combinators::LogCoord<f64>>,
>;

/// An empty chart of two axes, each with what it shows and from where to where.
fn log_chart<'a, 'b>(
    root: &DrawingArea<SVGBackend<'b>, Shift>,
    caption: &str,
    (x_shows, x): (&str, Range<f64>),
    (y_shows, y): (&str, Range<f64>),
) -> Result<LogChart<'a, 'b>, String> {
    root.fill(&WHITE).map_err(text)?;
    let mut chart = ChartBuilder::on(root)
        .caption(caption, (FONT, 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(x.log_scale(), y.log_scale())
        .map_err(text)?;
    let mesh = &mut chart.configure_mesh();
    mesh.light_line_style(TRANSPARENT).x_label_formatter(&|x| format!("{x}")).y_label_formatter(&|y| format!("{y}"));
    mesh.x_desc(x_shows).y_desc(y_shows).draw().map_err(text)?;
    Ok(chart)
}

fn curve(
    chart: &mut LogChart<'_, '_>,
    label: &str,
    color: RGBColor,
    points: impl Iterator<Item = (f64, f64)> + Clone,
) -> Result<(), String> {
    let line = LineSeries::new(points.clone(), color.stroke_width(2));
    let series = chart.draw_series(line).map_err(text)?;
    series.label(label).legend(move |(x, y)| PathElement::new([(x, y), (x + 12, y)], color.stroke_width(2)));
    chart.draw_series(points.map(|point| Circle::new(point, 4, color.filled()))).map_err(text)?;
    Ok(())
}

fn legend<'a, X, Y, V, W>(
    chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>,
    position: SeriesLabelPosition,
) -> Result<(), String>
where
    X: Ranged<ValueType = V>,
    Y: Ranged<ValueType = W>,
    V: 'static,
    W: 'static,
{
    let mut style = chart.configure_series_labels();
    style.position(position).background_style(WHITE.mix(0.8)).border_style(GREY).label_font((FONT, 14));
    style.draw().map_err(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::{Floor, Quantiles};

    #[test]
    fn pictures_have_every_figure() {
        let directory = std::env::temp_dir().join(format!("mcd-bench-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let path = directory.join("picture.svg");
        let circles = || std::fs::read_to_string(&path).expect("a picture").matches("<circle").count();
        let bars = || std::fs::read_to_string(&path).expect("a picture").matches("<rect").count();
        let quantiles = |p50| Quantiles { p50, p99: p50 * 3 };
        let latency = Latency { solo: quantiles(80), protected: quantiles(380) };
        latencies(&path, &[(1, latency), (10, latency), (100, latency)]).expect("drawn");
        assert_eq!(circles(), 4 * 3);
        let epochs = |pages| Epochs {
            pause_us: quantiles(100 + pages / 2),
            dirty_pages: quantiles(pages),
            pause_floor_us: Floor { low: 67.0, high: 90.0 + pages as f64 / 3.0 },
        };
        pauses(&path, &[epochs(50), epochs(5000)]).expect("drawn");
        assert_eq!(circles(), 2 * 2);
        let round = |takeover_ms| Takeover { noticed_ms: 2.0, arbitrate_ms: 1.0, takeover_ms };
        takeovers(&path, &[round(4.0)]).expect("drawn");
        let one = bars();
        takeovers(&path, &[round(4.0), round(3.5)]).expect("drawn");
        assert_eq!(bars(), one + 3);
        // Nothing measured is an empty picture, not a panic.
        takeovers(&path, &[]).expect("drawn");
        latencies(&path, &[]).expect("drawn");
        pauses(&path, &[]).expect("drawn");
        std::fs::remove_dir_all(&directory).expect("removed");
    }
}
