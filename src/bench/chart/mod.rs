//! What figures look like: charts as data, and their drawing as SVG (`draw`).

mod draw;

pub use draw::{ChartError, short, svg};

/// A chart that is to be drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Chart {
    /// Name of its file, without the ending.
    pub name: String,
    /// What it shows.
    pub title: String,
    /// The horizontal axis, with its unit.
    pub x: String,
    /// The vertical axis, with its unit; empty where it has none.
    pub y: String,
    /// Whether the axes are logarithmic: horizontal, vertical.
    pub log: (bool, bool),
    /// What is on it.
    pub marks: Marks,
}

/// What is on a chart.
#[derive(Clone, Debug, PartialEq)]
pub enum Marks {
    /// Curves.
    Lines(Vec<Series>),
    /// Horizontal bars, one below the other, each made of the same parts.
    Stacked {
        /// Names of the parts.
        parts: Vec<String>,
        /// Name of each bar, and the length of each of its parts.
        bars: Vec<(String, Vec<f64>)>,
    },
}

/// One curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// Its points, by rising x.
    pub points: Vec<(f64, f64)>,
    /// Whether each point is a measurement of its own, which gets a mark.
    pub marked: bool,
}

/// Points of a distribution that are drawn.
const STEPS: usize = 400;

/// Cumulative distributions of several series of values, on a logarithmic axis.
pub fn distribution<'a>(
    name: &str,
    title: &str,
    x: &str,
    series: impl Iterator<Item = (String, &'a [f64])>,
) -> Chart {
    let curve = |(name, values): (String, &[f64])| {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let len = sorted.len();
        let stride = len.div_ceil(STEPS).max(1);
        // Each value, and the last one in any case.
        let ranks = (0..len).filter(|rank| rank % stride == 0 || rank + 1 == len);
        let mut reached = 0.0;
        let mut points = Vec::new();
        for rank in ranks {
            points.push((sorted[rank], reached));
            reached = 100.0 * (rank + 1) as f64 / len as f64;
            points.push((sorted[rank], reached));
        }
        Series {
            name,
            points,
            marked: false,
        }
    };
    Chart {
        name: name.to_owned(),
        title: title.to_owned(),
        x: x.to_owned(),
        y: "had got there by then, %".to_owned(),
        log: (true, false),
        marks: Marks::Lines(
            series
                .map(curve)
                .filter(|one| !one.points.is_empty())
                .collect(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_ends_at_its_largest_value_and_at_one_hundred_percent() {
        let values: Vec<f64> = (1..=1001).rev().map(f64::from).collect();
        let chart = distribution("n", "t", "x", [("a".to_owned(), &values[..])].into_iter());
        let Marks::Lines(series) = &chart.marks else {
            panic!("no curves");
        };
        assert!(series[0].points.len() <= 2 * (STEPS + 1));
        assert_eq!(*series[0].points.last().unwrap(), (1001.0, 100.0));
        assert!(
            series[0]
                .points
                .is_sorted_by(|one, next| one.0 <= next.0 && one.1 <= next.1)
        );
    }
}
