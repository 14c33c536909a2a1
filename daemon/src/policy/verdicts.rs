//! What the rules say of a connection: one by one for a question, as prefixes for the kernel.
//!
//! Rules only allow, and add up in no order. Of several that allow, the one that allows most is
//! named, then the first. Both forms take the best of the same [`Answer`]s.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
};

use reeve_common::{
    Action, Direction, VERDICT_PREFIX_ANY_PORT, VERDICT_PREFIX_ANY_PROTOCOL, protocol,
};

use super::{
    rule::{PortMatch, Rule},
    sets::SelectorId,
};

/// Place of a rule in the compiler's list.
pub(super) type RuleIndex = u32;

/// What of the far end makes a rule match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum By {
    /// Its address, or that it is anybody.
    Address,
    /// Who it is.
    Identity,
}

/// Whether the far end has proven who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    /// It is known by its address only.
    None,
    /// By a certificate.
    Certificate,
}

/// What one rule says. The least is the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Answer {
    /// Whether the connection has to come through a tunnel.
    tunnel_only: bool,
    /// The rule.
    pub(super) rule: RuleIndex,
}

/// A rule that matches a far end.
pub(super) type Match = (RuleIndex, By);

/// The rules for one direction of the workloads that are selected by the same policies.
#[derive(Clone, Debug)]
pub(super) struct RuleList {
    direction: Direction,
    anybody: Vec<RuleIndex>,
    by_selector: HashMap<SelectorId, (By, Vec<RuleIndex>)>,
}

/// Verdicts for ports that share the first bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Prefix {
    /// Bits of the verdict's key that count.
    pub(super) length: u32,
    pub(super) protocol: u8,
    pub(super) port: u16,
    pub(super) answer: Answer,
}

// === impl Answer ===

impl Answer {
    fn new((rule, by): Match, direction: Direction, protocol: u8, proof: Proof) -> Self {
        Self {
            tunnel_only: by == By::Identity
                && direction == Direction::Ingress
                && protocol == protocol::TCP
                && proof == Proof::None,
            rule,
        }
    }

    pub(super) fn action(self) -> Action {
        if self.tunnel_only {
            Action::TunnelOnly
        } else {
            Action::Allow
        }
    }
}

// === impl RuleList ===

impl RuleList {
    pub(super) fn new(direction: Direction) -> Self {
        Self {
            direction,
            anybody: Vec::new(),
            by_selector: HashMap::new(),
        }
    }

    /// Adds a rule for anybody.
    pub(super) fn add_for_anybody(&mut self, rule: RuleIndex) {
        self.anybody.push(rule);
    }

    /// Adds a rule for those whom a selector matches.
    pub(super) fn add(&mut self, rule: RuleIndex, selector: SelectorId, by: By) {
        let entry = self.by_selector.entry(selector);
        entry.or_insert((by, Vec::new())).1.push(rule);
    }

    /// The selectors that any rule names.
    pub(super) fn selectors(&self) -> impl Iterator<Item = SelectorId> {
        self.by_selector.keys().copied()
    }

    /// The rules that match a far end whom these selectors match.
    pub(super) fn matches<'a>(
        &'a self,
        selectors: impl IntoIterator<Item = &'a SelectorId>,
    ) -> impl Iterator<Item = Match> {
        let named = selectors
            .into_iter()
            .filter_map(|selector| self.by_selector.get(selector))
            .flat_map(|(by, rules)| rules.iter().map(|rule| (*rule, *by)));
        let anybody = self.anybody.iter().map(|rule| (*rule, By::Address));
        anybody.chain(named)
    }

    /// Judges a connection.
    pub(super) fn decide<'a>(
        &'a self,
        rules: &[Rule],
        selectors: impl IntoIterator<Item = &'a SelectorId>,
        protocol: u8,
        port: u16,
        proof: Proof,
    ) -> Option<Answer> {
        self.matches(selectors)
            .filter(|(rule, _)| {
                ports(rules, *rule)
                    .iter()
                    .any(|ports| ports.matches(protocol, port))
            })
            .map(|matched| Answer::new(matched, self.direction, protocol, proof))
            .min()
    }

    /// The same for every connection of far ends without proof whom `matches` match, as prefixes.
    /// A prefix is left out where a shorter one says the same.
    pub(super) fn prefixes(&self, rules: &[Rule], matches: &[Match]) -> Vec<Prefix> {
        let best = |protocol: u8, wanted: &dyn Fn(&PortMatch) -> bool| {
            matches
                .iter()
                .filter(|(rule, _)| ports(rules, *rule).iter().any(wanted))
                .map(|matched| Answer::new(*matched, self.direction, protocol, Proof::None))
                .min()
        };
        let mut prefixes = Vec::new();
        // Any protocol that no rule names, of which none has the number `ANY`.
        let rest = best(protocol::ANY, &|ports| *ports == PortMatch::Everything);
        if let Some(answer) = rest {
            prefixes.push(Prefix {
                length: VERDICT_PREFIX_ANY_PROTOCOL,
                protocol: protocol::ANY,
                port: 0,
                answer,
            });
        }
        for (protocol, ranges) in self.named_protocols(rules, matches) {
            let all_ports = best(protocol, &|ports| match ports {
                PortMatch::Everything => true,
                PortMatch::Protocol(number) => *number == protocol,
                PortMatch::Ports(..) => false,
            });
            if let Some(answer) = all_ports.filter(|answer| Some(*answer) != rest) {
                prefixes.push(Prefix {
                    length: VERDICT_PREFIX_ANY_PORT,
                    protocol,
                    port: 0,
                    answer,
                });
            }
            for (first, last, answer) in segments(&ranges) {
                // What holds for all ports is better here, or the same.
                if all_ports.is_some_and(|all_ports| all_ports <= answer) {
                    continue;
                }
                prefixes.extend(split(first, last).map(|(port, bits)| Prefix {
                    length: VERDICT_PREFIX_ANY_PORT + bits,
                    protocol,
                    port,
                    answer,
                }));
            }
        }
        prefixes
    }

    /// The protocols whose verdicts can differ from those of all others, with the port ranges
    /// that are named and what the rules say of each.
    fn named_protocols(
        &self,
        rules: &[Rule],
        matches: &[Match],
    ) -> BTreeMap<u8, Vec<(u16, u16, Answer)>> {
        // TCP from an identity has to come through a tunnel, whatever the others may.
        let mut protocols = BTreeMap::from([(protocol::TCP, Vec::new())]);
        for matched in matches {
            for ports in ports(rules, matched.0) {
                match ports {
                    PortMatch::Everything => {}
                    PortMatch::Protocol(number) => {
                        protocols.entry(*number).or_default();
                    }
                    PortMatch::Ports(number, range) => {
                        let answer = Answer::new(*matched, self.direction, *number, Proof::None);
                        let ranges: &mut Vec<_> = protocols.entry(*number).or_default();
                        ranges.push((*range.start(), *range.end(), answer));
                    }
                }
            }
        }
        protocols
    }
}

fn ports(rules: &[Rule], rule: RuleIndex) -> &[PortMatch] {
    rules.get(rule as usize).map_or(&[], |rule| &rule.ports)
}

/// Cuts overlapping ranges into ranges that do not overlap, each with the best answer.
fn segments(ranges: &[(u16, u16, Answer)]) -> Vec<(u16, u16, Answer)> {
    let mut edges: Vec<(u32, bool, Answer)> = Vec::with_capacity(2 * ranges.len());
    for (first, last, answer) in ranges {
        edges.push((u32::from(*first), true, *answer));
        edges.push((u32::from(*last) + 1, false, *answer));
    }
    edges.sort_unstable_by_key(|(port, opens, _)| (*port, Reverse(*opens)));
    // How many ranges with this answer are open.
    let mut open: BTreeMap<Answer, usize> = BTreeMap::new();
    let mut segments: Vec<(u16, u16, Answer)> = Vec::new();
    let mut start = 0;
    for (port, opens, answer) in edges {
        if let Some(best) = open.keys().next().filter(|_| port > start)
            && let (Ok(first), Ok(last)) = (u16::try_from(start), u16::try_from(port - 1))
        {
            match segments.last_mut() {
                Some((_, end, same)) if same == best && u32::from(*end) + 1 == start => *end = last,
                _ => segments.push((first, last, *best)),
            }
        }
        start = port;
        let count = open.entry(answer).or_default();
        if opens {
            *count += 1;
        } else {
            *count -= 1;
            if *count == 0 {
                open.remove(&answer);
            }
        }
    }
    segments
}

/// Splits a range into prefixes: the port and how many of its bits count.
fn split(first: u16, last: u16) -> impl Iterator<Item = (u16, u32)> {
    let mut next = u32::from(first);
    let end = u32::from(last) + 1;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        // As large as the alignment and what is left allow.
        let aligned = if next == 0 {
            u16::BITS
        } else {
            next.trailing_zeros()
        };
        let bits = aligned.min((end - next).ilog2());
        let port = u16::try_from(next).ok()?;
        next += 1 << bits;
        Some((port, u16::BITS - bits))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(rule: u32) -> Answer {
        Answer {
            tunnel_only: false,
            rule,
        }
    }

    #[test]
    fn a_range_is_a_handful_of_prefixes() {
        let prefixes = |first, last| split(first, last).collect::<Vec<_>>();
        assert_eq!(prefixes(80, 80), [(80, 16)]);
        assert_eq!(prefixes(0, 65535), [(0, 0)]);
        assert_eq!(prefixes(8000, 8007), [(8000, 13)]);
        assert_eq!(prefixes(1, 4), [(1, 16), (2, 15), (4, 16)]);
        assert_eq!(prefixes(65535, 65535), [(65535, 16)]);
        assert_eq!(prefixes(1, 65535).len(), 16);
        assert_eq!(prefixes(1, 65534).len(), 30);
    }

    #[test]
    fn where_ranges_overlap_the_best_answer_holds() {
        let ranges = [
            (10, 20, answer(2)),
            (15, 30, answer(1)),
            (30, 40, answer(2)),
            (50, 50, answer(3)),
        ];
        assert_eq!(
            segments(&ranges),
            [
                (10, 14, answer(2)),
                (15, 30, answer(1)),
                (31, 40, answer(2)),
                (50, 50, answer(3))
            ]
        );
        assert_eq!(segments(&[]), []);
        let touching = [(1, 5, answer(1)), (6, 9, answer(1)), (9, 65535, answer(1))];
        assert_eq!(segments(&touching), [(1, 65535, answer(1))]);
    }
}
