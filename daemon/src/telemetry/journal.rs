//! Standard error as the journal takes it: a line that begins with `<4>` is a warning
//! (sd-daemon(3)), and without that all lines are alike.

use std::{
    env, fs,
    io::{self, Write},
    os::unix::fs::MetadataExt,
    sync::LazyLock,
};

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Whether standard error is the journal's: `JOURNAL_STREAM` is systemd's, and names its device and inode.
static IS_JOURNAL: LazyLock<bool> = LazyLock::new(|| {
    let Ok(named) = env::var("JOURNAL_STREAM") else {
        return false;
    };
    fs::metadata("/dev/stderr")
        .is_ok_and(|stream| named == format!("{}:{}", stream.dev(), stream.ino()))
});

/// What a line of this severity begins with; nothing where standard error is not the journal's.
#[must_use]
pub fn prefix(level: Level) -> &'static str {
    if !*IS_JOURNAL {
        return "";
    }
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        _ => "<7>",
    }
}

/// Writes to standard error, each line with its severity where that is the journal's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lines;

/// A writer for one event.
#[derive(Debug)]
pub(super) struct Event(&'static str);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Event;

    fn make_writer(&'a self) -> Event {
        Event(prefix(Level::INFO))
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Event {
        Event(prefix(*event.level()))
    }
}

impl Write for Event {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        if self.0.is_empty() {
            return stderr.write(text);
        }
        // In one piece, so that other processes' lines come before or after it.
        stderr.write_all(&prefixed(self.0, text))?;
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn prefixed(prefix: &str, text: &[u8]) -> Vec<u8> {
    let mut lines = Vec::with_capacity(text.len() + 2 * prefix.len());
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        lines.extend(prefix.as_bytes());
        lines.extend(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_an_event_has_its_severity() {
        assert_eq!(prefixed("<4>", b"one\ntwo\n"), b"<4>one\n<4>two\n");
        assert_eq!(prefixed("<3>", b"one"), b"<3>one");
    }
}
