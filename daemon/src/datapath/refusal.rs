//! What is told when the kernel refuses a program or a map: five lines. All that its verifier
//! says, which can be a hundred thousand lines, goes to the debug log.

use std::{error::Error as StdError, fmt, fs, io};

use aya::{EbpfError, programs::ProgramError};

/// The oldest kernel on which reeve is tested.
const OLDEST_TESTED: (u32, u32) = (6, 1);

/// Characters of a verifier's line that are shown.
const LONGEST: usize = 200;

/// Starts of the verifier's lines about its own work, which follow what it found.
const STATISTICS: [&str; 5] = [
    "verification time",
    "stack depth",
    "processed ",
    "mark_precise",
    "subprog ",
];

/// Why the kernel does not take a part of reeve's programs.
#[derive(Debug)]
pub struct Refusal {
    /// The program, or the maps.
    part: String,
    /// The error of the call.
    error: String,
    /// What the verifier said last.
    said: Option<String>,
    /// What the running kernel lacks.
    lacks: String,
    /// What to do about it.
    remedy: &'static str,
}

impl Refusal {
    /// A program was refused.
    #[must_use]
    pub fn of_program(name: &str, error: &ProgramError) -> Self {
        let part = format!("the program {name}");
        match error {
            ProgramError::LoadError {
                io_error,
                verifier_log,
            } => {
                let log = verifier_log.to_string();
                tracing::debug!(program = name, "the kernel's verifier says:\n{log}");
                Self::new(part, io_error.to_string(), Some(io_error), &log)
            }
            other => Self::new(part, other.to_string(), errno(other), ""),
        }
    }

    /// The object as a whole was refused: its maps, or its type information.
    #[must_use]
    pub fn of_object(error: &EbpfError) -> Self {
        tracing::debug!("the kernel refuses maps or type information: {error}");
        let text = error.to_string();
        let (text, log) = text
            .split_once("Verifier output: ")
            .unwrap_or((text.as_str(), ""));
        let first = text.lines().next().unwrap_or_default();
        Self::new(
            "a map, or the type information".to_owned(),
            shortened(first),
            errno(error),
            log,
        )
    }

    fn new(part: String, error: String, errno: Option<&io::Error>, log: &str) -> Self {
        let release = release();
        let (lacks, remedy) = cause(&release, errno, log);
        Self {
            part,
            error,
            said: last_line(log).map(shortened),
            lacks,
            remedy,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = self.said.as_deref().unwrap_or("nothing");
        writeln!(
            formatter,
            "the kernel refuses reeve's programs: {}",
            self.error
        )?;
        writeln!(formatter, "  what:     {}", self.part)?;
        writeln!(formatter, "  verifier: {said}")?;
        writeln!(formatter, "  kernel:   {}", self.lacks)?;
        write!(formatter, "  do:       {}", self.remedy)
    }
}

/// The error of the system call below an error of the library's.
fn errno<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<io::Error>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// What the running kernel lacks, and what to do.
fn cause(release: &str, errno: Option<&io::Error>, log: &str) -> (String, &'static str) {
    const NEWER: &str = "boot Linux 6.1 or later";
    const REPORT: &str = "report this, with what `log.level: debug` says";
    let errno = errno.and_then(io::Error::raw_os_error);
    if errno == Some(libc::EPERM) && log.is_empty() {
        return (
            format!("Linux {release}; this process may not load programs"),
            "start reeve as root with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN; a security module, \
             or lockdown, may refuse as well",
        );
    }
    if errno == Some(libc::ENOMEM) {
        return (
            format!("Linux {release}; memory, or room in a limit of it"),
            "give the host more memory, or lower the capacities under maps in the configuration",
        );
    }
    let lacks = if let Some(helper) = unknown_helper(log) {
        format!("the helper {helper} for programs of this kind")
    } else if log.contains("combined stack size") {
        "room for the stack of these calls".to_owned()
    } else if log.contains("program is too large") {
        "patience for a program of this length".to_owned()
    } else {
        String::new()
    };
    let old = version(release).is_some_and(|version| version < OLDEST_TESTED);
    let (major, minor) = OLDEST_TESTED;
    let tested = if old {
        format!("Linux {release}, older than {major}.{minor}, the oldest that reeve is tested on")
    } else {
        format!("Linux {release}")
    };
    let lacks = match (lacks.is_empty(), old) {
        (true, true) => tested,
        (true, false) => format!("{tested}, of which nothing is known to be missing"),
        (false, _) => format!("{tested}, lacks {lacks}"),
    };
    (lacks, if old { NEWER } else { REPORT })
}

/// `bpf_x` of the verifier's `unknown func bpf_x#1` or `program of this type cannot use helper bpf_x#1`.
fn unknown_helper(log: &str) -> Option<&str> {
    let line = last_line(log)?;
    let after = ["unknown func ", "cannot use helper "]
        .iter()
        .find_map(|text| line.split_once(text))?
        .1;
    after.split(['#', ' ']).next()
}

/// What the verifier said last, without its statistics.
fn last_line(log: &str) -> Option<&str> {
    log.lines()
        .rev()
        .map(|line| line.trim_matches(|c: char| c.is_whitespace() || c == '\0'))
        .find(|line| !line.is_empty() && !STATISTICS.iter().any(|start| line.starts_with(start)))
}

fn shortened(line: &str) -> String {
    let mut characters = line.chars();
    let mut shown: String = characters.by_ref().take(LONGEST).collect();
    if characters.next().is_some() {
        shown.push('…');
    }
    shown
}

/// The running kernel's release.
fn release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

/// Major and minor number of a kernel release such as `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-', '+']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// What is to be said of a kernel on which reeve is not tested; none of one on which it is.
#[must_use]
pub fn untested_kernel() -> Option<String> {
    untested(&release())
}

fn untested(release: &str) -> Option<String> {
    let (major, minor) = OLDEST_TESTED;
    (version(release)? < OLDEST_TESTED).then(|| {
        format!(
            "Linux {release} is untried: reeve is tested on Linux {major}.{minor} and later; it \
             runs where every program loads"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linux 6.1 of a program whose calls take too much stack.
    const TOO_DEEP: &str = "func#0 @0\nfunc#1 @1128\n\
        combined stack size of 4 calls is 544. Too large\n\
        verification time 3521 usec\nstack depth 208+144+112+0\n\
        processed 9 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0\n";

    /// Linux 6.18 of a program that may return what its hook does not take.
    const WRONG_RETURN: &str = "297: (bf) r0 = r7\n298: (95) exit\n\
        At program exit the register R0 has smin=0 smax=4294967295 should have been in [0, 1]\n\
        verification time 1672 usec\nstack depth 80+0+0+0+0+0+0\n\
        processed 353 insns (limit 1000000) max_states_per_insn 1 total_states 24 peak_states 24 mark_read 0\n\0";

    /// Linux 7.3 of a program that sets what is no error.
    const WRONG_ERROR: &str = "827: (85) call bpf_set_retval#187\n\
        At bpf_set_retval the register R1 has smin=-4294967295 smax=0 should have been in [-4095, 0]\n\
        verification time 301591 usec\nstack depth max 0\n\
        subprog 0 (reeve_connect4) main insns_self 851 insns_total 4078 stack 256\n\
        subprog 8 (reeve_judge) global insns_self 0 insns_total 0 stack 0\n\
        processed 4078 insns (limit 1000000) max_states_per_insn 4 total_states 129 peak_states 121 mark_read 0\n";

    fn refused(release: &str, code: i32, log: &str) -> Refusal {
        let error = io::Error::from_raw_os_error(code);
        let (lacks, remedy) = cause(release, Some(&error), log);
        Refusal {
            part: "the program reeve_egress".to_owned(),
            error: error.to_string(),
            said: last_line(log).map(shortened),
            lacks,
            remedy,
        }
    }

    #[test]
    fn a_refusal_is_five_lines_and_says_what_the_verifier_said_last() {
        let text = refused("5.14.0-503.el9.x86_64", libc::EINVAL, TOO_DEEP).to_string();
        assert_eq!(
            text,
            "the kernel refuses reeve's programs: Invalid argument (os error 22)\n  \
             what:     the program reeve_egress\n  \
             verifier: combined stack size of 4 calls is 544. Too large\n  \
             kernel:   Linux 5.14.0-503.el9.x86_64, older than 6.1, the oldest that reeve is tested on, \
             lacks room for the stack of these calls\n  \
             do:       boot Linux 6.1 or later"
        );
        let text = refused("6.18.1", libc::EINVAL, WRONG_RETURN).to_string();
        assert_eq!(text.lines().count(), 5);
        assert!(
            text.contains("verifier: At program exit the register R0 has smin=0"),
            "{text}"
        );
        assert!(
            text.contains("kernel:   Linux 6.18.1, of which nothing is known to be missing"),
            "{text}"
        );
        assert!(text.contains("do:       report this"), "{text}");
        let text = refused("7.3.4", libc::EINVAL, WRONG_ERROR).to_string();
        assert!(
            text.contains("verifier: At bpf_set_retval the register R1"),
            "{text}"
        );
    }

    #[test]
    fn a_helper_that_the_kernel_lacks_is_named() {
        for log in [
            "12: (85) call bpf_get_netns_cookie#122\nunknown func bpf_get_netns_cookie#122\nprocessed 12 insns\n",
            "program of this type cannot use helper bpf_get_netns_cookie#122\nprocessed 12 insns\n",
        ] {
            let text = refused("6.1.0-50", libc::EINVAL, log).to_string();
            assert!(
                text.contains("lacks the helper bpf_get_netns_cookie for"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_process_that_may_not_is_told_apart_from_a_kernel_that_cannot() {
        let text = refused("6.1.0-50", libc::EPERM, "").to_string();
        assert!(text.contains("verifier: nothing"), "{text}");
        assert!(
            text.contains("do:       start reeve as root with CAP_BPF"),
            "{text}"
        );
    }

    #[test]
    fn a_long_line_is_cut() {
        let said = refused("6.1.0", libc::EINVAL, &"é".repeat(10_000))
            .said
            .unwrap();
        assert_eq!(said.chars().count(), LONGEST + 1);
    }

    #[test]
    fn kernels_before_6_1_are_told_as_untried() {
        for release in ["5.14.0-503.el9.x86_64", "5.15.0-91-generic", "6.0.19"] {
            assert!(untested(release).is_some_and(|said| said.contains(release)));
        }
        for release in [
            "6.1.0-50-cloud-amd64",
            "6.12.117+deb13",
            "7.3.4",
            "nonsense",
        ] {
            assert_eq!(untested(release), None);
        }
    }
}
