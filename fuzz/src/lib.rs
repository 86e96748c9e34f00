//! What several targets need.

use ecmpvpn::config::{Problems, PublicKey};

/// The keys in a text, whatever stands around them: what messages about it must not show.
pub fn keys_in(text: &str) -> impl Iterator<Item = &str> {
    // 43 characters of base64, and one that fills up.
    let before = |(end, _)| text.get(usize::checked_sub(end, 43)?..=end);
    text.match_indices('=').filter_map(before).filter(|word| word.parse::<PublicKey>().is_ok())
}

/// There are problems, each of them of one line, and each at a line that there is.
///
/// # Panics
/// If not.
pub fn assert_sound(problems: &Problems, text: &str) {
    assert!(!problems.list.is_empty(), "refused, and no word why");
    let last = text.lines().count() + 1;
    for problem in &problems.list {
        assert!(problem.line.is_none_or(|line| (1..=last).contains(&line)), "{problem:?} of {last} lines");
        assert!(!problem.message.contains('\n'), "{problem:?}");
    }
}

/// No key that stands in `text` stands in `message`.
///
/// # Panics
/// If one does.
pub fn assert_hides_keys(message: &str, text: &str) {
    for key in keys_in(text) {
        assert!(!message.contains(key), "a key is shown: {message}");
    }
}
