//! Charts as SVG text: for a page, for a paper.
//!
//! Fonts are the reader's (`sans-serif`), so widths of text are estimated. The legend has rows of its
//! own above the plot and covers nothing. Colours can be told apart by most colour-blind readers.

use std::fmt::Display;
use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use thiserror::Error;

use super::{Chart, Marks, Series};

const WIDTH: u32 = 620;
const PLOT_HEIGHT: u32 = 360;
const TITLE_HEIGHT: u32 = 34;
const LEGEND_ROW: u32 = 22;
const BAR_HEIGHT: u32 = 44;
const FONT: &str = "sans-serif";
const TITLE_SIZE: u32 = 19;
const TEXT_SIZE: u32 = 15;
/// Mean width of a character of a wide font, in parts of its size as plotters counts it.
const CHARACTER: f64 = 0.5;
const SWATCH: i32 = 22;
const GREY: RGBColor = RGBColor(0x99, 0x99, 0x99);

/// Paul Tol's "muted" qualitative colours, ordered for contrast between neighbours, and black.
const COLOURS: [RGBColor; 11] = [
    RGBColor(0x33, 0x22, 0x88),
    RGBColor(0xcc, 0x66, 0x77),
    RGBColor(0x11, 0x77, 0x33),
    RGBColor(0xdd, 0xcc, 0x77),
    RGBColor(0x88, 0xcc, 0xee),
    RGBColor(0x88, 0x22, 0x55),
    RGBColor(0x44, 0xaa, 0x99),
    RGBColor(0x99, 0x99, 0x33),
    RGBColor(0xaa, 0x44, 0x99),
    RGBColor(0xbb, 0xbb, 0xbb),
    RGBColor(0x00, 0x00, 0x00),
];

fn colour(index: usize) -> RGBColor {
    COLOURS[index % COLOURS.len()]
}

/// A chart could not be drawn.
#[derive(Debug, Error)]
#[error("drawing the chart {chart} failed: {why}")]
pub struct ChartError {
    /// Its name.
    pub chart: String,
    /// What the drawing said.
    pub why: String,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// The chart as a whole SVG document.
pub fn svg(chart: &Chart) -> Result<String, ChartError> {
    let mut text = String::new();
    draw(chart, &mut text).map_err(|why| ChartError {
        chart: chart.name.clone(),
        why,
    })?;
    Ok(text)
}

fn said(error: impl Display) -> String {
    error.to_string()
}

fn draw(chart: &Chart, text: &mut String) -> Result<(), String> {
    let names: Vec<&str> = match &chart.marks {
        Marks::Lines(series) => series.iter().map(|one| one.name.as_str()).collect(),
        Marks::Stacked { parts, .. } => parts.iter().map(String::as_str).collect(),
    };
    let rows = legend_rows(&names);
    let plot_height = match &chart.marks {
        Marks::Lines(_) => PLOT_HEIGHT,
        Marks::Stacked { bars, .. } => BAR_HEIGHT * bars.len() as u32 + 70,
    };
    let above = TITLE_HEIGHT + LEGEND_ROW * rows.len() as u32;
    let area = SVGBackend::with_string(text, (WIDTH, above + plot_height)).into_drawing_area();
    area.fill(&WHITE).map_err(said)?;
    let (head, plot) = area.split_vertically(above);
    let title = (FONT, TITLE_SIZE).into_font().color(&BLACK);
    head.draw_text(&chart.title, &title, (12, 8))
        .map_err(said)?;
    legend(&head, &rows)?;
    match &chart.marks {
        Marks::Lines(series) => lines(chart, series, &plot)?,
        Marks::Stacked { bars, .. } => stacked(chart, bars, &plot)?,
    }
    area.present().map_err(said)
}

/// A legend's entries: index, name, and where each begins.
type LegendRow<'a> = Vec<(usize, &'a str, i32)>;

fn legend_rows<'a>(names: &[&'a str]) -> Vec<LegendRow<'a>> {
    let mut rows: Vec<LegendRow<'_>> = Vec::new();
    let mut at = i32::MAX;
    for (index, name) in names.iter().enumerate() {
        let wide = SWATCH
            + 10
            + (name.chars().count() as f64 * f64::from(TEXT_SIZE) * CHARACTER) as i32
            + 14;
        if at.saturating_add(wide) > WIDTH as i32 - 8 {
            rows.push(Vec::new());
            at = 14;
        }
        if let Some(row) = rows.last_mut() {
            row.push((index, name, at));
        }
        at += wide;
    }
    rows
}

fn legend(area: &Area<'_>, rows: &[LegendRow<'_>]) -> Result<(), String> {
    let style = (FONT, TEXT_SIZE).into_font().color(&BLACK);
    for (row, entries) in rows.iter().enumerate() {
        let y = (TITLE_HEIGHT + LEGEND_ROW * row as u32) as i32;
        for (index, name, x) in entries {
            let swatch = [(*x, y + 5), (x + SWATCH, y + 15)];
            area.draw(&Rectangle::new(swatch, colour(*index).filled()))
                .map_err(said)?;
            area.draw_text(name, &style, (x + SWATCH + 6, y + 2))
                .map_err(said)?;
        }
    }
    Ok(())
}

/// Least and largest of the finite values, above 0 on a logarithmic axis, with some air.
fn bounds(values: impl Iterator<Item = f64>, log: bool) -> Range<f64> {
    let usable = values.filter(|value| value.is_finite() && (!log || *value > 0.0));
    let (least, most) = usable.fold((f64::MAX, f64::MIN), |(least, most), value| {
        (least.min(value), most.max(value))
    });
    match (least > most, log) {
        (true, _) => 0.1..1.0,
        (false, true) => least / 1.15..most * 1.15,
        (false, false) => least.min(0.0)..(most + (most - least.min(0.0)) * 0.05).max(1e-9),
    }
}

/// An axis with round ticks. (plotters has no logarithmic and linear axis of one type.)
struct Axis {
    range: Range<f64>,
    log: bool,
    ticks: Vec<f64>,
}

impl Axis {
    /// For `values`.
    fn of(values: impl Iterator<Item = f64>, log: bool) -> Axis {
        let range = bounds(values, log);
        let ticks = ticks(&range, log);
        Axis { range, log, ticks }
    }

    /// Puts the ticks where `values` are, of a logarithmic axis, if these are few.
    fn tick_at(&mut self, values: impl Iterator<Item = f64>) {
        let mut ticks: Vec<f64> = values.filter(|value| self.range.contains(value)).collect();
        ticks.sort_by(f64::total_cmp);
        // Measured values that are meant to be one differ a little, and labels need room.
        let room = (self.range.end / self.range.start).powf(0.05);
        ticks.dedup_by(|next, kept| *next < *kept * room);
        if ticks.len() as f64 <= TICKS {
            self.ticks = ticks;
        }
    }

    fn place(&self, value: f64) -> f64 {
        if self.log { value.log10() } else { value }
    }
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let [from, at, to] = [self.range.start, *value, self.range.end].map(|one| self.place(one));
        let share = (at - from) / (to - from);
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Nothing between the ticks.
        if hint.weight().allow_light_points() {
            Vec::new()
        } else {
            self.ticks.clone()
        }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// Ticks that an axis has at most, more or less.
const TICKS: f64 = 7.0;

/// Round numbers within `range`, in steps that look even on the axis.
fn ticks(range: &Range<f64>, log: bool) -> Vec<f64> {
    let decades = (range.end / range.start).log10();
    if log && decades > 0.8 {
        let steps: &[f64] = match () {
            () if decades * 3.0 <= TICKS => &[1.0, 2.0, 5.0],
            () if decades * 2.0 <= TICKS => &[1.0, 3.0],
            () => &[1.0],
        };
        let powers = range.start.log10().floor() as i32..=range.end.log10().ceil() as i32;
        let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
        return all.filter(|tick| range.contains(tick)).collect();
    }
    let rough = (range.end - range.start) / TICKS;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|step| step * power)
        .into_iter()
        .find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    let first = (range.start / step).ceil() as i64;
    let all = (first..).map(|index| index as f64 * step);
    all.take_while(|tick| *tick <= range.end).collect()
}

fn lines(chart: &Chart, series: &[Series], area: &Area<'_>) -> Result<(), String> {
    let points = || series.iter().flat_map(|one| &one.points);
    let mut x = Axis::of(points().map(|point| point.0), chart.log.0);
    if x.log && series.iter().all(|one| one.marked) {
        x.tick_at(points().map(|point| point.0));
    }
    let y = Axis::of(points().map(|point| point.1), chart.log.1);
    let mut plot = ChartBuilder::on(area)
        .margin(8)
        .margin_right(24)
        .x_label_area_size(50)
        .y_label_area_size(68)
        .build_cartesian_2d(x, y)
        .map_err(said)?;
    let number = |value: &f64| short(*value);
    plot.configure_mesh()
        .x_desc(chart.x.as_str())
        .y_desc(chart.y.as_str())
        .x_label_formatter(&number)
        .y_label_formatter(&number)
        .label_style((FONT, TEXT_SIZE - 1))
        .axis_desc_style((FONT, TEXT_SIZE))
        .bold_line_style(BLACK.mix(0.18))
        .light_line_style(BLACK.mix(0.05))
        .draw()
        .map_err(said)?;
    let drawable =
        |point: &&(f64, f64)| (!chart.log.0 || point.0 > 0.0) && (!chart.log.1 || point.1 > 0.0);
    for (index, one) in series.iter().enumerate() {
        let points: Vec<(f64, f64)> = one.points.iter().filter(drawable).copied().collect();
        let style = colour(index).stroke_width(2);
        plot.draw_series(LineSeries::new(points.iter().copied(), style))
            .map_err(said)?;
        if one.marked {
            let marks = points
                .iter()
                .map(|point| Circle::new(*point, 4, colour(index).filled()));
            plot.draw_series(marks).map_err(said)?;
        }
    }
    Ok(())
}

fn stacked(chart: &Chart, bars: &[(String, Vec<f64>)], area: &Area<'_>) -> Result<(), String> {
    let most = bars
        .iter()
        .map(|(_, parts)| parts.iter().sum::<f64>())
        .fold(0.0, f64::max);
    let height = bars.len() as f64;
    let mut plot = ChartBuilder::on(area)
        .margin(8)
        .margin_right(24)
        .margin_left(16)
        .x_label_area_size(50)
        .build_cartesian_2d(0.0..(most * 1.12).max(1e-9), height..0.0)
        .map_err(said)?;
    plot.configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_desc(chart.x.as_str())
        .x_label_formatter(&|value| short(*value))
        .label_style((FONT, TEXT_SIZE - 1))
        .axis_desc_style((FONT, TEXT_SIZE))
        .bold_line_style(BLACK.mix(0.18))
        .light_line_style(TRANSPARENT)
        .draw()
        .map_err(said)?;
    let name_style = (FONT, TEXT_SIZE - 1).into_font().color(&BLACK);
    let sum_style = name_style.pos(Pos::new(HPos::Left, VPos::Center));
    for (index, (name, parts)) in bars.iter().enumerate() {
        let top = index as f64;
        let mut from = 0.0;
        for (part, len) in parts.iter().enumerate().filter(|(_, len)| **len > 0.0) {
            let corners = [(from, top + 0.46), (from + len, top + 0.9)];
            plot.draw_series([Rectangle::new(corners, colour(part).filled())])
                .map_err(said)?;
            from += len;
        }
        let above = Text::new(name.clone(), (0.0, top + 0.1), name_style.clone());
        let beside = Text::new(
            format!(" {}", short(from)),
            (from, top + 0.68),
            sum_style.clone(),
        );
        plot.draw_series([above, beside]).map_err(said)?;
        let edge = [(from, top + 0.46), (from, top + 0.9)];
        plot.draw_series(LineSeries::new(edge, GREY))
            .map_err(said)?;
    }
    Ok(())
}

/// A number with three digits that count.
pub fn short(value: f64) -> String {
    let size = value.abs();
    match size {
        _ if size == 0.0 => "0".to_owned(),
        _ if size >= 100.0 => format!("{value:.0}"),
        _ if size >= 10.0 => trimmed(format!("{value:.1}")),
        _ if size >= 1.0 => trimmed(format!("{value:.2}")),
        _ => trimmed(format!("{value:.3}")),
    }
}

/// Without zeros at the end of a fraction.
fn trimmed(text: String) -> String {
    let text = text.trim_end_matches('0').trim_end_matches('.');
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(marks: Marks, log: (bool, bool)) -> Chart {
        Chart {
            name: "c".into(),
            title: "A title <of> & a chart".into(),
            x: "time, us".into(),
            y: "share, %".into(),
            log,
            marks,
        }
    }

    fn series(points: &[(f64, f64)]) -> Marks {
        let one = |name: &str| Series {
            name: name.into(),
            points: points.to_vec(),
            marked: true,
        };
        Marks::Lines(vec![one("first"), one("second")])
    }

    #[test]
    fn a_chart_holds_its_words_escaped_and_every_curve_its_colour() {
        for log in [(false, false), (true, false), (false, true), (true, true)] {
            let text = svg(&chart(series(&[(1.0, 2.0), (300.0, 40.0)]), log)).unwrap();
            assert!(text.contains("A title &lt;of&gt; &amp; a chart"), "{text}");
            for word in ["time, us", "share, %", "first", "second"] {
                assert!(text.contains(word), "{word} is not in {text}");
            }
            assert!(
                text.contains("#332288") && text.contains("#CC6677"),
                "{text}"
            );
        }
    }

    #[test]
    fn what_a_logarithmic_axis_has_no_place_for_is_left_out() {
        svg(&chart(
            series(&[(0.0, 1.0), (-3.0, 1.0), (5.0, 0.0)]),
            (true, true),
        ))
        .unwrap();
        svg(&chart(series(&[]), (true, true))).unwrap();
        svg(&chart(series(&[(7.0, 7.0)]), (false, false))).unwrap();
    }

    #[test]
    fn a_stacked_bar_says_its_name_and_its_sum() {
        let marks = Marks::Stacked {
            parts: vec!["pause".into(), "save".into()],
            bars: vec![("lazy/delta".into(), vec![0.5, 0.75])],
        };
        let text = svg(&chart(marks, (false, false))).unwrap();
        assert!(
            text.contains("lazy/delta") && text.contains("1.25"),
            "{text}"
        );
    }

    #[test]
    fn a_long_legend_gets_more_rows() {
        let name = "a name of some length";
        assert_eq!(legend_rows(&[name; 2]).len(), 1);
        assert_eq!(legend_rows(&[name; 8]).len(), 4);
    }

    #[test]
    fn ticks_are_round_and_neither_few_nor_many() {
        for (range, log) in [
            (0.87..15_000.0, true),
            (40.0..200.0, true),
            (300.0..900.0, true),
            (0.9..1150.0, true),
            (0.0..21.0, false),
            (0.0..105.0, false),
            (0.0..0.004, false),
        ] {
            let ticks = ticks(&range, log);
            assert!((3..=10).contains(&ticks.len()), "{range:?}: {ticks:?}");
            assert!(
                ticks
                    .iter()
                    .all(|tick| range.start <= *tick && *tick <= range.end),
                "{range:?}: {ticks:?}"
            );
        }
        assert_eq!(
            ticks(&(0.0..105.0), false),
            [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
        );
        assert_eq!(
            ticks(&(0.9..11_500.0), true),
            [1.0, 10.0, 100.0, 1000.0, 10_000.0]
        );
    }

    #[test]
    fn ticks_stand_where_few_values_were_measured() {
        let ticks = |values: &[f64]| {
            let mut axis = Axis::of(values.iter().copied(), true);
            axis.tick_at(values.iter().copied());
            axis.ticks
        };
        assert_eq!(ticks(&[64.0, 4.0, 16.0, 64.4]), [4.0, 16.0, 64.0]);
        let many: Vec<f64> = (1..=20).map(f64::from).collect();
        assert!(ticks(&many).len() < 10, "{:?}", ticks(&many));
    }

    #[test]
    fn numbers_are_short() {
        let told = [0.0, 0.0042, 1.5, 12.34, 123.4, -7.25].map(short);
        assert_eq!(told, ["0", "0.004", "1.5", "12.3", "123", "-7.25"]);
    }
}
