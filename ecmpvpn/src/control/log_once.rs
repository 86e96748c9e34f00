//! Logs a warning when it first occurs and when it changes, not at every repetition.

/// The last warning about one subject.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOnce(Option<String>);

impl LogOnce {
    /// Logs `text` as a warning, unless it equals the last one.
    pub fn warn(&mut self, text: String) {
        if self.0.as_ref() != Some(&text) {
            tracing::warn!("{text}");
            self.0 = Some(text);
        }
    }

    /// Call it when all is well. The same warning is then logged again if it comes back.
    pub fn clear(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_that_came_back_counts_as_new() {
        let mut log = LogOnce::default();
        log.warn("no route".to_owned());
        assert_eq!(log, LogOnce(Some("no route".to_owned())));
        log.clear();
        assert_eq!(log, LogOnce::default());
    }
}
