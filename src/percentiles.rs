//! Percentiles as every output of forkvm has them. Demo and laboratory make them here.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Percentiles of one measure.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Least.
    pub min: f64,
    /// Most.
    pub max: f64,
    /// Number of values.
    pub n: u64,
}

impl Percentiles {
    /// Of durations, in microseconds with a resolution of 1 ns up to 1 h; `None` for none.
    pub fn of(times: impl IntoIterator<Item = Duration>) -> Option<Percentiles> {
        let mut histogram = Histogram::<u64>::new_with_bounds(1, 3_600_000_000_000, 3).ok()?;
        for time in times {
            histogram.saturating_record((time.as_nanos() as u64).max(1));
        }
        Percentiles::of_nanoseconds(&histogram)
    }

    /// Of values that are not below `least`, in their own unit: four digits of what lies above
    /// `least`, and not finer than a thousandth. `None` for none.
    pub fn of_values(values: &[f64], least: f64) -> Option<Percentiles> {
        const PER_UNIT: f64 = 1000.0;
        let mut histogram = Histogram::<u64>::new(4).ok()?;
        for value in values {
            let above = ((value - least) * PER_UNIT).round().max(0.0);
            histogram.record(above as u64).ok()?;
        }
        let value = |above: u64| above as f64 / PER_UNIT + least;
        Percentiles::of_histogram(&histogram, value)
    }

    /// Of nanoseconds, in microseconds; `None` for none.
    pub fn of_nanoseconds(histogram: &Histogram<u64>) -> Option<Percentiles> {
        Percentiles::of_histogram(histogram, |nanoseconds| nanoseconds as f64 / 1000.0)
    }

    fn of_histogram(histogram: &Histogram<u64>, value: impl Fn(u64) -> f64) -> Option<Percentiles> {
        let at = |quantile| value(histogram.value_at_quantile(quantile));
        (!histogram.is_empty()).then(|| Percentiles {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            min: value(histogram.min()),
            max: value(histogram.max()),
            n: histogram.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_below_zero_are_kept_as_they_are_given_a_floor() {
        let found = Percentiles::of_values(&[-2.5, 0.5, 3.0], -100.0).unwrap();
        let close = |found: f64, due: f64| (found - due).abs() < 0.02;
        assert!(
            close(found.min, -2.5) && close(found.p50, 0.5) && close(found.max, 3.0),
            "{found:?}"
        );
        assert_eq!(found.n, 3);
    }

    #[test]
    fn nothing_has_no_percentiles() {
        assert!(Percentiles::of_values(&[], 0.0).is_none());
    }
}
