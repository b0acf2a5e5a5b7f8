//! What is left of a text of somebody who is not trusted, before it reaches a
//! log, a terminal or a client.

/// Long enough for an error with the end of a guest's console.
const MAX_CHARS: usize = 1024;

/// The beginning of `text`, on one line, without characters that do something
/// rather than show something.
#[must_use]
pub fn plain(text: &str) -> String {
    plain_within(text, MAX_CHARS)
}

/// The same with a length of its own, in characters.
#[must_use]
pub fn plain_within(text: &str, max_chars: usize) -> String {
    let shown = |c: char| if acts(c) { ' ' } else { c };
    text.chars().take(max_chars).map(shown).collect()
}

/// Control characters, and those of Unicode that hide or turn around what is
/// beside them, or end a line.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_shows_is_left_and_not_too_much_of_it() {
        assert_eq!(plain("a\x1b[2Jb\r\nc\u{202e}d"), "a [2Jb  c d");
        assert_eq!(plain("größer → 北"), "größer → 北");
        assert_eq!(plain(&"x".repeat(5000)).len(), MAX_CHARS);
        assert_eq!(plain_within("abc", 2), "ab");
    }
}
