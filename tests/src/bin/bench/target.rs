//! What transfers must reach.

/// What the transfers of a row must reach.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Target {
    /// Least median of the ratios to one tunnel.
    pub median: f64,
    /// Least ratio of each transfer to one tunnel.
    pub worst: f64,
    /// Least and greatest goodput of each transfer, Mbit/s.
    pub goodput: Option<[f64; 2]>,
}

impl Target {
    /// A target for the median of the ratios.
    pub fn median(median: f64) -> Self {
        Self { median, ..Self::default() }
    }

    /// A target for each ratio.
    pub fn each(worst: f64) -> Self {
        Self { worst, ..Self::default() }
    }

    /// A target for each goodput, Mbit/s.
    pub fn between(least: f64, most: f64) -> Self {
        Self { goodput: Some([least, most]), ..Self::default() }
    }

    pub fn words(&self) -> String {
        let mut words = Vec::new();
        if self.median > 0.0 {
            words.push(format!("median >= {:.3}", self.median));
        }
        if self.worst > 0.0 {
            words.push(format!("each >= {:.2}", self.worst));
        }
        if let Some([least, most]) = self.goodput {
            words.push(format!("each {least:.0} to {most:.0} Mbit/s"));
        }
        words.join(", ")
    }

    /// Whether a single transfer meets the target.
    pub fn is_met_by(&self, goodput: f64, ratio: f64) -> bool {
        ratio >= self.worst && self.goodput.is_none_or(|[least, most]| (least..=most).contains(&goodput))
    }
}
