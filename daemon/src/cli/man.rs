//! `reeve man`: the manual pages, made of the same words as `--help`.

use std::{
    fs,
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use clap::{Command, CommandFactory};
use clap_mangen::{
    Man,
    roff::{Roff, roman},
};

use super::{Cli, EXIT_USAGE, failed, print};

/// Section of the manual that commands are in.
const SECTION: &str = "1";

/// `reeve man`: prints the page of a command, or writes those of all commands into a folder.
#[must_use]
pub fn man(words: &[String], folder: Option<&Path>) -> ExitCode {
    let root = commands();
    if let Some(folder) = folder {
        return match write(&root, folder) {
            Ok(written) => print(&format!("{written} pages in {}\n", folder.display())),
            Err(error) => failed(&error),
        };
    }
    let mut command = &root;
    for word in words {
        let Some(found) = command.find_subcommand(word) else {
            let above = command.get_bin_name().unwrap_or("reeve");
            let _ = writeln!(
                io::stderr(),
                "reeve: `{above}` has no command `{word}`: `{above} --help` lists them"
            );
            return ExitCode::from(EXIT_USAGE);
        };
        command = found;
    }
    match page(command) {
        Ok(page) => print(&page),
        Err(error) => failed(&error),
    }
}

/// All commands, with the names that their pages have.
fn commands() -> Command {
    let mut root = Cli::command().disable_help_subcommand(true);
    root.build();
    root
}

fn write(command: &Command, folder: &Path) -> io::Result<usize> {
    let name = command
        .get_display_name()
        .unwrap_or_else(|| command.get_name());
    fs::write(folder.join(format!("{name}.{SECTION}")), page(command)?)?;
    let mut written = 1;
    for below in command.get_subcommands() {
        written += write(below, folder)?;
    }
    Ok(written)
}

fn page(command: &Command) -> io::Result<String> {
    let man = Man::new(command.clone())
        .section(SECTION)
        .source(concat!("reeve ", env!("CARGO_PKG_VERSION")))
        .manual("reeve");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(text) = command.get_after_help() {
        closing(&text.to_string()).to_writer(&mut page)?;
    }
    String::from_utf8(page).map_err(io::Error::other)
}

/// What `--help` ends with, each part under a heading: the generator would make one paragraph of
/// the examples.
fn closing(text: &str) -> Roff {
    let mut page = Roff::new();
    let mut heading = "";
    let mut verbatim = false;
    for line in text.lines() {
        let example = line.starts_with("  ");
        if verbatim && !example {
            page.control("fi", []);
            verbatim = false;
        }
        let belongs = match line {
            "" => heading,
            "Examples:" => "EXAMPLES",
            _ if line.starts_with("Exit codes:") => "EXIT STATUS",
            _ if example => heading,
            _ if heading == "EXAMPLES" => "NOTES",
            _ if heading.is_empty() => "NOTES",
            _ => heading,
        };
        if belongs != heading {
            page.control("SH", [belongs]);
            heading = belongs;
        } else if line.is_empty() {
            page.control("PP", []);
        }
        if example && !verbatim {
            page.control("nf", []);
            verbatim = true;
        }
        if !line.is_empty() && line != "Examples:" {
            page.text([roman(
                line.strip_prefix("Exit codes:")
                    .unwrap_or(line)
                    .trim_start(),
            )]);
        }
    }
    if verbatim {
        page.control("fi", []);
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_keep_their_lines_and_every_part_has_a_heading() {
        let page = closing(
            "Examples:\n  reeve run\n  reeve run --takeover\n\nThe log goes elsewhere.\n\nExit codes: 0 done",
        );
        let page = page.render();
        let lines: Vec<_> = page.lines().filter(|line| *line != ".PP").collect();
        let from = lines.iter().position(|line| *line == ".SH EXAMPLES");
        assert_eq!(
            lines[from.unwrap()..],
            [
                ".SH EXAMPLES",
                ".nf",
                "reeve run",
                "reeve run \\-\\-takeover",
                ".fi",
                ".SH NOTES",
                "The log goes elsewhere.",
                ".SH \"EXIT STATUS\"",
                "0 done",
            ]
        );
    }

    #[test]
    fn every_command_has_a_page_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let root = commands();
        let written = write(&root, folder.path()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), written);
        for name in ["reeve.1", "reeve-run.1", "reeve-ca-issue.1"] {
            assert!(folder.path().join(name).is_file(), "{name}");
        }
    }
}
