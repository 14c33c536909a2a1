//! The fuzz targets in the ordinary tests: every input of their corpus, and some thousand mutations of
//! each, the same at every run. `cargo xtask fuzz` is what looks further.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    unreachable_pub,
    reason = "these are tests"
)]

#[path = "../../../tests/fuzz/src/targets.rs"]
mod targets;

use std::{fs, path::Path};

/// Mutations of each input.
const MUTATIONS: usize = 300;

#[test]
fn every_target_stands_its_corpus_and_mutations_of_it() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
    for (name, target) in targets::TARGETS {
        let mut inputs: Vec<_> = fs::read_dir(corpus.join(name))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        inputs.sort();
        assert!(!inputs.is_empty(), "{name} has no corpus");
        let mut random = Random(0x5eed_0fe0);
        for input in &inputs {
            let whole = fs::read(input).unwrap();
            target(&whole);
            for _ in 0..MUTATIONS {
                target(&random.mutated(&whole));
            }
        }
    }
    let folders = fs::read_dir(&corpus).unwrap().count();
    assert_eq!(folders, targets::TARGETS.len(), "a corpus without a target");
}

/// A small generator (xorshift), which need not be good.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % bound.max(1)
    }

    /// A copy with a few bytes changed, dropped, doubled or cut off.
    fn mutated(&mut self, whole: &[u8]) -> Vec<u8> {
        let mut bytes = whole.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            let Some(byte) = bytes.get_mut(at) else {
                return bytes;
            };
            match self.below(6) {
                0 => *byte ^= 1 << self.below(8),
                1 => *byte = u8::try_from(self.below(256)).unwrap(),
                2 => drop(bytes.remove(at)),
                3 => bytes.truncate(at),
                4 => {
                    let end = (at + self.below(32)).min(bytes.len());
                    let part = bytes[at..end].to_vec();
                    bytes.splice(at..at, part);
                }
                _ => bytes.insert(at, b" \n:/.-_{}[]\"'&*!0"[self.below(17)]),
            }
        }
        bytes
    }
}
