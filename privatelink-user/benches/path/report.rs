//! Figures: the median of several rounds, with its spread.

use serde_json::{Value, json};
use std::path::Path;

/// What was measured so far.
#[derive(Default)]
pub(crate) struct Report(Vec<Value>);

impl Report {
    /// Adds a figure, and prints it.
    pub(crate) fn add(&mut self, name: &str, unit: &str, mut rounds: Vec<f64>) {
        rounds.sort_by(f64::total_cmp);
        let count = rounds.len();
        let (median, min, max) = (rounds[count / 2], rounds[0], rounds[count - 1]);
        println!("{name}: {median:.2} {unit} ({min:.2} to {max:.2}, {count} rounds)");
        self.0.push(
            json!({ "name": name, "unit": unit, "median": median, "min": min, "max": max, "rounds": count }),
        );
    }

    /// Writes them all as a JSON array.
    pub(crate) fn write(&self, path: &Path) {
        std::fs::write(path, format!("{:#}\n", Value::Array(self.0.clone()))).unwrap();
    }
}
