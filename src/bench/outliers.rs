//! Values that something else than the measured thing has made: found as hyperfine finds them.
//!
//! By the modified z-score (Iglewicz and Hoaglin, 1993): how far a value is from the median, in
//! units of the median absolute deviation, which outliers themselves hardly move. They are counted
//! and told, never dropped: a tail is a result as well.

/// A value is an outlier beyond so many standard deviations, as the median absolute deviation tells
/// them.
pub const THRESHOLD: f64 = 10.0;

/// Of fewer values it is not asked: their spread is hardly known. Tables show a dash then.
pub const FEWEST: usize = 10;

/// Standard deviation of a normal distribution whose median absolute deviation is 1.
const SIGMA_PER_MAD: f64 = 1.4826;

/// Standard deviation of a normal distribution whose mean absolute deviation is 1.
const SIGMA_PER_MEAN: f64 = 1.2533;

/// What stands out of a series of values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outliers {
    /// How many.
    pub count: usize,
    /// Whether the first value is one, and above the median: what was to be warm was cold.
    pub first_is_slow: bool,
}

/// Looks at values in the order in which they were measured. Fewer than [`FEWEST`] have no outlier.
pub fn find(values: &[f64]) -> Outliers {
    if values.len() < FEWEST {
        return Outliers::default();
    }
    let middle = median(values);
    let deviations: Vec<f64> = values.iter().map(|value| (value - middle).abs()).collect();
    let by_mad = median(&deviations) * SIGMA_PER_MAD;
    // Half of the values are the same: as sizes are. Then the mean tells what the others are like.
    let mean = deviations.iter().sum::<f64>() / deviations.len() as f64;
    let sigma = if by_mad > 0.0 {
        by_mad
    } else {
        mean * SIGMA_PER_MEAN
    };
    if sigma == 0.0 {
        return Outliers::default();
    }
    let is_outlier = |value: f64| (value - middle).abs() / sigma > THRESHOLD;
    Outliers {
        count: values.iter().filter(|value| is_outlier(**value)).count(),
        first_is_slow: values[0] > middle && is_outlier(values[0]),
    }
}

/// The median: the mean of the two in the middle when there are two. 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        len if len % 2 == 1 => sorted[len / 2],
        len => f64::midpoint(sorted[len / 2 - 1], sorted[len / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_far_off_is_an_outlier_and_a_wide_spread_is_none() {
        let mut values: Vec<f64> = (0..100)
            .map(|index| 100.0 + f64::from(index % 10))
            .collect();
        assert_eq!(find(&values).count, 0);
        values[50] = 1000.0;
        assert_eq!(
            find(&values),
            Outliers {
                count: 1,
                first_is_slow: false
            }
        );
    }

    #[test]
    fn a_cold_first_value_is_told_apart() {
        let mut values: Vec<f64> = (0..20).map(|index| 10.0 + f64::from(index % 3)).collect();
        values[0] = 500.0;
        assert!(find(&values).first_is_slow);
        values[0] = -500.0;
        assert_eq!(
            find(&values),
            Outliers {
                count: 1,
                first_is_slow: false
            }
        );
    }

    #[test]
    fn few_values_have_no_outlier() {
        let mut values = vec![1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1e9];
        assert_eq!(find(&values), Outliers::default());
        values.push(1.8);
        assert_eq!(find(&values).count, 1);
    }

    #[test]
    fn where_most_values_are_the_same_the_others_are_not_all_outliers() {
        let mut values = vec![16.0; 20];
        values.extend([20.0, 24.0, 28.0]);
        assert_eq!(find(&values).count, 0);
        values.push(1e6);
        assert_eq!(find(&values).count, 1);
    }

    #[test]
    fn equal_values_have_no_outlier() {
        assert_eq!(find(&[7.0; 50]), Outliers::default());
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_two_in_the_middle() {
        assert!((median(&[4.0, 1.0, 3.0, 2.0]) - 2.5).abs() < 1e-12);
    }
}
