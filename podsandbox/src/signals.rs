//! Signal names as images give them (`SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`).

use std::str::FromStr;

use nix::sys::signal::Signal;

/// glibc keeps 32 and 33 for itself.
const SIGRTMIN: u32 = 34;
const SIGRTMAX: u32 = 64;

#[must_use]
pub fn parse(name: &str) -> Option<u32> {
    let upper = name.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse::<u32>() {
        return (1..=SIGRTMAX).contains(&number).then_some(number);
    }
    let short = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = short.strip_prefix("RTMIN") {
        return real_time(SIGRTMIN, rest);
    }
    if let Some(rest) = short.strip_prefix("RTMAX") {
        return real_time(SIGRTMAX, rest);
    }
    // Second names of the same numbers.
    let short = match short {
        "CLD" => "CHLD",
        "IOT" => "ABRT",
        "POLL" => "IO",
        other => other,
    };
    Signal::from_str(&format!("SIG{short}"))
        .ok()
        .and_then(|signal| u32::try_from(signal as i32).ok())
}

fn real_time(base: u32, offset: &str) -> Option<u32> {
    let offset: i32 = if offset.is_empty() {
        0
    } else {
        offset.parse().ok()?
    };
    base.checked_add_signed(offset)
        .filter(|n| (SIGRTMIN..=SIGRTMAX).contains(n))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn all_spellings_of_a_signal_are_understood() {
        for name in ["SIGTERM", "TERM", "sigterm", "15"] {
            assert_eq!(parse(name), Some(15), "{name}");
        }
        assert_eq!(parse("SIGRTMIN+3"), Some(37));
        assert_eq!(parse("RTMAX-1"), Some(63));
        assert_eq!(parse("SIGCLD"), Some(17));
        assert_eq!(parse("SIGNONE"), None);
        assert_eq!(parse("0"), None);
        assert_eq!(parse("65"), None);
    }
}
