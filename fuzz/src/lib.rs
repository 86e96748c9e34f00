//! Checks that several targets share.

use ecmpvpn::config::{Problems, PublicKey};

/// The keys in a text, also in the middle of a word. Messages about the text must not show them.
pub fn keys_in(text: &str) -> impl Iterator<Item = &str> {
    // 43 characters of base64, and one of padding.
    let before = |(end, _)| text.get(usize::checked_sub(end, 43)?..=end);
    text.match_indices('=').filter_map(before).filter(|word| word.parse::<PublicKey>().is_ok())
}

/// Checks that there is at least one problem, that each is one line of text, and that the line that it names exists.
///
/// # Panics
/// A check fails.
pub fn assert_sound(problems: &Problems, text: &str) {
    assert!(!problems.list.is_empty(), "refused without a problem");
    let last = text.lines().count() + 1;
    for problem in &problems.list {
        assert!(problem.line.is_none_or(|line| (1..=last).contains(&line)), "{problem:?} of {last} lines");
        assert!(!problem.message.contains('\n'), "{problem:?}");
    }
}

/// Checks that `message` shows no key of `text`.
///
/// # Panics
/// It shows one.
pub fn assert_hides_keys(message: &str, text: &str) {
    for key in keys_in(text) {
        assert!(!message.contains(key), "a key is shown: {message}");
    }
}
