//! What is made of the command line's own description: completions of shells
//! and pages for man.

use std::io::{self, Write};

use clap::Command;
use clap_complete::Shell;

use super::CliError;

pub fn completions(mut command: Command, shell: Shell) -> Result<(), CliError> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, "drupe", &mut text);
    io::stdout().write_all(&text).map_err(CliError::Output)
}

/// The page of the program, or that of one of its commands. None: there is no
/// such command.
pub fn man(command: Command, of: Option<&str>) -> Option<Result<(), CliError>> {
    let text = page(command, of)?;
    Some(io::stdout().write_all(&text).map_err(CliError::Output))
}

fn page(command: Command, of: Option<&str>) -> Option<Vec<u8>> {
    let version = command.get_version().unwrap_or_default();
    let source = format!("drupe {version}");
    // The others have pages; help of help has none.
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let command = match of {
        None => command,
        Some(name) => command.find_subcommand(name)?.clone(),
    };
    let man = clap_mangen::Man::new(command)
        .section("8")
        .source(source)
        .manual("drupe");
    let mut text = Vec::new();
    // Into memory nothing fails.
    man.render(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_no_other() {
        let command = crate::command();
        let whole = String::from_utf8(page(command.clone(), None).unwrap()).unwrap();
        for sub in command.get_subcommands() {
            let name = sub.get_name();
            assert!(whole.contains(&format!("drupe\\-{name}(8)")), "{whole}");
            let own = page(command.clone(), Some(name)).unwrap();
            let own = String::from_utf8(own).unwrap();
            assert!(own.contains(&format!("drupe\\-{name}")), "{own}");
        }
        assert_eq!(page(command, Some("none")), None);
    }
}
