//! The JSON lines that `cargo xtask bench` collects, and medians.

use serde_json::Value;

/// Begin of the line with JSON, which `cargo xtask bench` collects.
const JSON: &str = "@json ";

pub fn print(series: &Value) {
    println!("{JSON}{series}");
}

/// The median. NaN without values.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
