//! Stop signals. CRI numbers them itself and has names without `+` and `-`;
//! images and the pods' records have Linux's names.

use cri_api::v1::Signal;
use podsandbox::signals;
use tonic::Status;

use super::invalid;

/// Linux's name of the signal asked for, if one is.
pub fn parse(field: &str, number: i32) -> Result<Option<String>, Status> {
    let signal = Signal::try_from(number)
        .map_err(|_| invalid(field, format_args!("{number} is no signal")))?;
    Ok((signal != Signal::RuntimeDefault).then(|| name(signal)))
}

/// From a name as an image or [`parse`] gives it. One that Linux does not know
/// is not sent: SIGTERM is.
pub fn show(given: &str) -> Signal {
    let known = || (1..).map_while(|number| Signal::try_from(number).ok());
    // Some numbers have two names, and the first is the usual one.
    known()
        .find(|&signal| name(signal) == given)
        .or_else(|| {
            let number = signals::parse(given)?;
            known().find(|&signal| signals::parse(&name(signal)) == Some(number))
        })
        .unwrap_or(Signal::Sigterm)
}

fn name(signal: Signal) -> String {
    let name = signal.as_str_name();
    name.replace("PLUS", "+").replace("MINUS", "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_cri_is_one_of_linux_and_comes_back() {
        for number in 1..=65 {
            let asked = parse("f", number).unwrap().unwrap();
            assert!(signals::parse(&asked).is_some(), "{asked}");
            assert_eq!(show(&asked) as i32, number, "{asked}");
        }
    }

    #[test]
    fn an_images_signal_has_many_spellings() {
        for (given, shown) in [
            ("TERM", Signal::Sigterm),
            ("3", Signal::Sigquit),
            ("17", Signal::Sigchld),
            ("sigrtmin+3", Signal::Sigrtminplus3),
            ("64", Signal::Sigrtmax),
            ("no such", Signal::Sigterm),
        ] {
            assert_eq!(show(given), shown, "{given}");
        }
        assert_eq!(signals::parse(&name(Signal::Sigrtmaxminus14)), Some(50));
    }

    #[test]
    fn the_default_is_left_to_the_image_and_an_unknown_number_refused() {
        assert_eq!(parse("f", 0).unwrap(), None);
        assert!(
            parse("f", 66)
                .unwrap_err()
                .message()
                .contains("66 is no signal")
        );
    }
}
