//! Quantiles of samples. Pure.

/// Least, 10%, median, 90% and greatest.
pub const SHARES: [f64; 5] = [0.0, 0.1, 0.5, 0.9, 1.0];

/// The quantiles of `values` at `shares`, interpolated between neighbours. NaN if there are no values.
pub fn quantiles<const N: usize>(values: impl IntoIterator<Item = f64>, shares: [f64; N]) -> [f64; N] {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    shares.map(|share| at(&values, share))
}

/// Least, median and greatest value.
pub fn spread(values: impl IntoIterator<Item = f64>) -> [f64; 3] {
    quantiles(values, [0.0, 0.5, 1.0])
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "places in a short list"
)]
fn at(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = share * last as f64;
    let below = place.floor() as usize;
    let above = sorted[(below + 1).min(last)];
    sorted[below] + (above - sorted[below]) * (place - below as f64)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::float_cmp, reason = "these are exact")]

    use super::*;

    #[test]
    fn quantiles_lie_between_neighbours() {
        let all = |values: &[f64]| quantiles(values.iter().copied(), SHARES);
        assert_eq!(all(&[3.0]), [3.0; 5]);
        assert_eq!(all(&[4.0, 2.0]), [2.0, 2.2, 3.0, 3.8, 4.0]);
        let eleven: Vec<f64> = (0..=10).rev().map(f64::from).collect();
        assert_eq!(all(&eleven), [0.0, 1.0, 5.0, 9.0, 10.0]);
        assert!(all(&[]).iter().all(|value| value.is_nan()));
    }

    #[test]
    fn the_middle_of_an_even_number_lies_between_both() {
        assert_eq!(spread([1.0, 9.0, 2.0, 3.0]), [1.0, 2.5, 9.0]);
        assert_eq!(spread([5.0, 1.0, 9.0]), [1.0, 5.0, 9.0]);
    }
}
