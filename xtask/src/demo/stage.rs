//! How the demo tells what happens: numbered acts, commands with their output, claims with a mark.

use std::{
    env,
    io::{self, IsTerminal},
};

/// Columns of running text.
const WIDTH: usize = 88;

/// Tells, and counts the claims that did not hold.
#[derive(Debug)]
pub(crate) struct Stage {
    colours: bool,
    pause: bool,
    act: usize,
    held: usize,
    failed: Vec<String>,
}

#[derive(Clone, Copy)]
enum Style {
    Bold,
    Dim,
    Red,
    Green,
    Blue,
}

impl Stage {
    pub(crate) fn new(pause: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        Self {
            // https://no-color.org
            colours: terminal && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
            pause: pause && terminal,
            act: 0,
            held: 0,
            failed: Vec::new(),
        }
    }

    /// Begins the next act.
    pub(crate) fn act(&mut self, title: &str, explanation: &str) {
        if self.act > 0 {
            self.pause();
        }
        self.act += 1;
        let heading = format!("{}  {title}", self.act);
        let rule = "─".repeat(WIDTH.saturating_sub(heading.chars().count() + 4));
        println!(
            "{} {}",
            self.styled(Style::Bold, &format!("── {heading}")),
            self.styled(Style::Dim, &rule)
        );
        self.say(explanation);
        println!();
    }

    /// Leaves room, and waits for Enter where that was asked for.
    pub(crate) fn pause(&self) {
        println!();
        if self.pause {
            println!("{}", self.styled(Style::Dim, "  Enter goes on …"));
            // Without input there is nothing to wait for.
            let _ = io::stdin().read_line(&mut String::new());
        }
    }

    /// Adds what only some will want to know.
    pub(crate) fn aside(&self, text: &str) {
        println!("     {}", self.styled(Style::Dim, text));
    }

    /// Tells something in running text.
    pub(crate) fn say(&self, text: &str) {
        let mut line = String::new();
        for word in text.split_whitespace() {
            if !line.is_empty() && line.chars().count() + word.chars().count() + 1 > WIDTH - 3 {
                println!("   {line}");
                line.clear();
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        println!("   {line}");
    }

    /// Shows who runs which command.
    pub(crate) fn command(&self, who: &str, words: &[&str]) {
        let who = self.styled(Style::Blue, who);
        println!(
            "   {who} {} {}",
            self.styled(Style::Dim, "$"),
            self.styled(Style::Bold, &words.join(" "))
        );
    }

    /// Shows what a program printed, or a daemon logged.
    pub(crate) fn output(&self, text: &str) {
        for line in text.trim_end().lines() {
            let characters: Vec<_> = line.chars().collect();
            for part in characters.chunks(WIDTH) {
                let part: String = part.iter().collect();
                println!("     {} {part}", self.styled(Style::Dim, "│"));
            }
        }
    }

    /// Claims that something is so.
    pub(crate) fn claim(&mut self, what: &str, holds: bool) {
        if holds {
            self.held += 1;
            println!("   {} {what}", self.styled(Style::Green, "✔"));
        } else {
            println!(
                "   {} {}",
                self.styled(Style::Red, "✘ NOT SO:"),
                self.styled(Style::Red, what)
            );
            self.failed.push(format!("act {}: {what}", self.act));
        }
    }

    /// Sums up; returns how many claims did not hold.
    pub(crate) fn finish(&self) -> usize {
        println!();
        if self.failed.is_empty() {
            let all = format!(
                "All {} claims hold, and nothing of this is left on the machine.",
                self.held
            );
            println!("{}", self.styled(Style::Green, &all));
        }
        for failed in &self.failed {
            println!(
                "{}",
                self.styled(Style::Red, &format!("did not hold: {failed}"))
            );
        }
        self.failed.len()
    }

    fn styled(&self, style: Style, text: &str) -> String {
        let code = match style {
            Style::Bold => "1",
            Style::Dim => "2",
            Style::Red => "1;31",
            Style::Green => "32",
            Style::Blue => "34",
        };
        if self.colours {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}
