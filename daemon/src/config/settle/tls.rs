//! Cryptography: what a profile says, narrowed by what is written.

use super::Report;
use crate::{
    config::file::RawTls,
    identity::{CryptoProfile, CryptoRules},
    yaml::Located,
};

impl Report<'_> {
    pub(super) fn tls(&mut self, raw: Option<Located<RawTls>>) -> CryptoRules {
        let Some(raw) = raw else {
            return CryptoRules::default();
        };
        let raw = raw.value;
        let mut rules = CryptoRules::of(raw.profile);
        let fips = (raw.profile == CryptoProfile::Fips).then(|| rules.clone());
        let fips = fips.as_ref();
        self.choose(
            raw.key_types,
            &mut rules.key_types,
            fips.map(|fips| &*fips.key_types),
        );
        self.choose(
            raw.groups,
            &mut rules.groups,
            fips.map(|fips| &*fips.groups),
        );
        self.choose(
            raw.cipher_suites,
            &mut rules.cipher_suites,
            fips.map(|fips| &*fips.cipher_suites),
        );
        if let Some(bits) = raw.min_rsa_bits {
            rules.min_rsa_bits = bits.0;
        }
        if let Some(lifetime) = raw.max_lifetime {
            rules.max_lifetime = lifetime.0;
        }
        rules
    }

    /// Takes what is written in place of what the profile says; a profile that allows only some is
    /// not widened.
    fn choose<T: PartialEq + Clone>(
        &mut self,
        written: Option<Located<Vec<T>>>,
        chosen: &mut Vec<T>,
        allowed: Option<&[T]>,
    ) {
        let Some(written) = written else {
            return;
        };
        if written.is_empty() {
            // What is written and was not understood has been told already.
            if self.document.items(written.node) == Some(0) {
                self.mistake(written.node, "is empty; expected at least one");
            }
        } else if allowed.is_some_and(|allowed| written.iter().any(|one| !allowed.contains(one))) {
            self.mistake(
                written.node,
                "has something that the profile `fips` does not approve; take it out, or use the \
                 profile `default`",
            );
        } else {
            chosen.clone_from(&written.value);
        }
    }
}
