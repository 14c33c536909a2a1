//! What the programs cost when they are loaded: on old kernels the verifier is allowed less and
//! follows more.

use std::time::{Duration, SystemTime};

use aya::programs::loaded_programs;
use reeve::config::EbpfLog;

use crate::world::World;

/// Instructions that the verifier may follow in one program: three fifths of what every kernel allows.
/// The most so far: 310,223, for `reeve_egress` on Linux 6.18; Linux 6.1 followed half as many again when
/// it was last asked.
const MOST: u32 = 600_000;

#[test]
fn the_verifier_follows_few_instructions_of_each_program() {
    let mut world = World::new();
    for log in [EbpfLog::Off, EbpfLog::Debug] {
        world.stop();
        world.settings.log = log;
        let before = SystemTime::now() - Duration::from_millis(10);
        world.start().unwrap();
        let mut seen = 0;
        for program in loaded_programs() {
            // One of another test may go at this moment.
            let Ok(program) = program else { continue };
            let name = program.name_as_str().unwrap_or_default().to_owned();
            if !name.starts_with("reeve_") || program.loaded_at().is_none_or(|at| at < before) {
                continue;
            }
            let Some(verified) = program.verified_instruction_count() else {
                continue;
            };
            println!("{name}, log {log:?}: {verified} instructions verified");
            assert!(verified <= MOST, "{name}: {verified} of {MOST}");
            seen += 1;
        }
        assert!(seen > 5, "{seen} programs");
    }
}
