//! What the rules say of a connection: one by one for a question, as prefixes for the kernel.
//!
//! Of the rules that fit, the [`Effect`] that stands first in the order of precedence holds; of
//! several with that effect the first is named. Both forms take the best of the same [`Answer`]s,
//! twice: of the rules in force, and of those that would be in force if the dry runs were.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
};

use reeve_common::{
    Action, Direction, DryRun, Reason, VERDICT_PREFIX_ANY_PORT, VERDICT_PREFIX_ANY_PROTOCOL,
    protocol,
};

use super::{
    rule::{Effect, Mode, PortMatch, Rule},
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
    rank: Rank,
    /// The rule.
    pub(super) rule: RuleIndex,
    mode: Mode,
}

/// The order of precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Rank {
    NoRoom,
    Node,
    Deny,
    Allow,
    Permissive,
    /// Allowed, but not as plaintext.
    TunnelOnly,
}

/// The best answers of some rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Best {
    enforced: Option<Answer>,
    /// With the policies in dry run.
    dry_run: Option<Answer>,
}

/// What is to be done, and what the policies in dry run would change of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Told {
    /// None is the default deny.
    pub(super) enforced: Option<Answer>,
    pub(super) dry_run: DryRun,
    /// The rule that would say so; none is the default deny.
    pub(super) dry_run_rule: Option<RuleIndex>,
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
    pub(super) told: Told,
}

// === impl Answer ===

impl Answer {
    /// What a rule says; none where it does not apply to a connection with this proof.
    fn new(
        (index, by): Match,
        rules: &[Rule],
        direction: Direction,
        protocol: u8,
        proof: Proof,
    ) -> Option<Self> {
        let rule = rules.get(index as usize)?;
        let unproven = proof == Proof::None;
        let tunnel_only = by == By::Identity
            && direction == Direction::Ingress
            && protocol == protocol::TCP
            && unproven;
        let rank = match rule.effect {
            Effect::NoRoom => Rank::NoRoom,
            Effect::Node => Rank::Node,
            Effect::Deny => Rank::Deny,
            Effect::Allow if tunnel_only => Rank::TunnelOnly,
            Effect::Allow => Rank::Allow,
            Effect::Permissive if unproven => Rank::Permissive,
            Effect::Permissive => return None,
        };
        Some(Self {
            rank,
            rule: index,
            mode: rule.mode,
        })
    }

    pub(super) fn action(self) -> Action {
        match self.rank {
            Rank::Node | Rank::Allow => Action::Allow,
            Rank::NoRoom => Action::NoRoom,
            Rank::Deny => Action::Deny,
            Rank::Permissive => Action::Permissive,
            Rank::TunnelOnly => Action::TunnelOnly,
        }
    }

    pub(super) fn reason(self) -> Reason {
        match self.rank {
            Rank::Node | Rank::Allow => Reason::Policy,
            Rank::NoRoom => Reason::MapFailure,
            Rank::Deny => Reason::PolicyDeny,
            Rank::Permissive => Reason::Permissive,
            Rank::TunnelOnly => Reason::PlaintextRefused,
        }
    }

    /// Whether the connection may go on as it is.
    fn allows(self) -> bool {
        matches!(self.action(), Action::Allow | Action::Permissive)
    }
}

// === impl Best ===

impl Best {
    fn add(&mut self, answer: Answer) {
        let better = |best: &mut Option<Answer>| {
            *best = Some(best.map_or(answer, |best| best.min(answer)));
        };
        if answer.mode != Mode::DryRun {
            better(&mut self.enforced);
        }
        if answer.mode != Mode::NotInDryRun {
            better(&mut self.dry_run);
        }
    }

    fn with(mut self, other: Self) -> Self {
        for answer in [other.enforced, other.dry_run].into_iter().flatten() {
            self.add(answer);
        }
        self
    }

    fn told(self) -> Told {
        let allows = |answer: Option<Answer>| answer.is_some_and(Answer::allows);
        let dry_run = match (allows(self.enforced), allows(self.dry_run)) {
            (true, false) => DryRun::Deny,
            (false, true) => DryRun::Allow,
            _ => DryRun::Same,
        };
        let rule = self.dry_run.map(|answer| answer.rule);
        Told {
            enforced: self.enforced,
            dry_run,
            dry_run_rule: rule.filter(|_| dry_run != DryRun::Same),
        }
    }
}

impl FromIterator<Answer> for Best {
    fn from_iter<T: IntoIterator<Item = Answer>>(answers: T) -> Self {
        let mut best = Self::default();
        for answer in answers {
            best.add(answer);
        }
        best
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

    /// Every rule, each once.
    pub(super) fn rules(&self) -> BTreeSet<RuleIndex> {
        let named = self.by_selector.values().flat_map(|(_, rules)| rules);
        self.anybody.iter().chain(named).copied().collect()
    }

    /// The rules that name each selector.
    pub(super) fn naming(&self) -> impl Iterator<Item = (SelectorId, By, &[RuleIndex])> {
        let named = self.by_selector.iter();
        named.map(|(selector, (by, rules))| (*selector, *by, rules.as_slice()))
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
    ) -> Told {
        let fits = |rule| {
            let mut ports = ports(rules, rule).iter();
            ports.any(|ports| ports.matches(protocol, port))
        };
        self.matches(selectors)
            .filter(|(rule, _)| fits(*rule))
            .filter_map(|matched| Answer::new(matched, rules, self.direction, protocol, proof))
            .collect::<Best>()
            .told()
    }

    /// The same for every connection of far ends without proof whom `matches` match, as prefixes.
    /// A prefix is left out where a shorter one says the same.
    pub(super) fn prefixes(&self, rules: &[Rule], matches: &[Match]) -> Vec<Prefix> {
        let best = |protocol: u8, wanted: &dyn Fn(&PortMatch) -> bool| -> Best {
            matches
                .iter()
                .filter(|(rule, _)| ports(rules, *rule).iter().any(wanted))
                .filter_map(|matched| self.unproven(*matched, rules, protocol))
                .collect()
        };
        let mut prefixes = Vec::new();
        // Any protocol that no rule names, of which none has the number `ANY`.
        let rest = best(protocol::ANY, &|ports| *ports == PortMatch::Everything).told();
        if rest != Told::default() {
            prefixes.push(Prefix {
                length: VERDICT_PREFIX_ANY_PROTOCOL,
                protocol: protocol::ANY,
                port: 0,
                told: rest,
            });
        }
        for (protocol, ranges) in self.named_protocols(rules, matches) {
            let all_ports = best(protocol, &|ports| match ports {
                PortMatch::Everything => true,
                PortMatch::Protocol(number) => *number == protocol,
                PortMatch::Ports(..) | PortMatch::Named(..) => false,
            });
            let told = all_ports.told();
            if told != rest {
                prefixes.push(Prefix {
                    length: VERDICT_PREFIX_ANY_PORT,
                    protocol,
                    port: 0,
                    told,
                });
            }
            for (first, last, told) in segments(&ranges, all_ports) {
                prefixes.extend(split(first, last).map(|(port, bits)| Prefix {
                    length: VERDICT_PREFIX_ANY_PORT + bits,
                    protocol,
                    port,
                    told,
                }));
            }
        }
        prefixes
    }

    fn unproven(&self, matched: Match, rules: &[Rule], protocol: u8) -> Option<Answer> {
        Answer::new(matched, rules, self.direction, protocol, Proof::None)
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
                    PortMatch::Everything | PortMatch::Named(..) => {}
                    PortMatch::Protocol(number) => {
                        protocols.entry(*number).or_default();
                    }
                    PortMatch::Ports(number, range) => {
                        let ranges: &mut Vec<_> = protocols.entry(*number).or_default();
                        if let Some(answer) = self.unproven(*matched, rules, *number) {
                            ranges.push((*range.start(), *range.end(), answer));
                        }
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

/// Cuts overlapping ranges into ranges that do not overlap, each with what is told of it. Ranges
/// of which nothing else is told than of all ports are left out.
fn segments(ranges: &[(u16, u16, Answer)], all_ports: Best) -> Vec<(u16, u16, Told)> {
    let mut edges: Vec<(u32, bool, Answer)> = Vec::with_capacity(2 * ranges.len());
    for (first, last, answer) in ranges {
        edges.push((u32::from(*first), true, *answer));
        edges.push((u32::from(*last) + 1, false, *answer));
    }
    edges.sort_unstable_by_key(|(port, opens, _)| (*port, Reverse(*opens)));
    // How many ranges with this answer are open.
    let mut open: BTreeMap<Answer, usize> = BTreeMap::new();
    let mut segments: Vec<(u16, u16, Told)> = Vec::new();
    let mut start = 0;
    for (port, opens, answer) in edges {
        if port > start
            && !open.is_empty()
            && let (Ok(first), Ok(last)) = (u16::try_from(start), u16::try_from(port - 1))
        {
            let told = best_of(&open).with(all_ports).told();
            match segments.last_mut() {
                Some((_, end, same)) if *same == told && u32::from(*end) + 1 == start => {
                    *end = last;
                }
                _ if told == all_ports.told() => {}
                _ => segments.push((first, last, told)),
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

/// The answers are in order, so the first of each kind is the best.
fn best_of(open: &BTreeMap<Answer, usize>) -> Best {
    let first = |left_out| open.keys().find(|answer| answer.mode != left_out);
    Best {
        enforced: first(Mode::DryRun).copied(),
        dry_run: first(Mode::NotInDryRun).copied(),
    }
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
            rank: Rank::Allow,
            rule,
            mode: Mode::Enforce,
        }
    }

    fn told(rule: u32) -> Told {
        Best::from_iter([answer(rule)]).told()
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
            segments(&ranges, Best::default()),
            [
                (10, 14, told(2)),
                (15, 30, told(1)),
                (31, 40, told(2)),
                (50, 50, told(3))
            ]
        );
        assert_eq!(segments(&[], Best::default()), []);
        let touching = [(1, 5, answer(1)), (6, 9, answer(1)), (9, 65535, answer(1))];
        assert_eq!(segments(&touching, Best::default()), [(1, 65535, told(1))]);
        let all = Best::from_iter([answer(2)]);
        assert_eq!(segments(&ranges, all), [(15, 30, told(1))]);
    }

    #[test]
    fn a_deny_goes_before_what_allows_and_a_dry_run_changes_nothing() {
        let deny = |mode| Answer {
            rank: Rank::Deny,
            rule: 9,
            mode,
        };
        let enforced = Best::from_iter([answer(1), deny(Mode::Enforce)]).told();
        assert_eq!(enforced.enforced.unwrap().action(), Action::Deny);
        assert_eq!(enforced.dry_run, DryRun::Same);
        let dry_run = Best::from_iter([answer(1), deny(Mode::DryRun)]).told();
        assert_eq!(dry_run.enforced, Some(answer(1)));
        assert_eq!(
            (dry_run.dry_run, dry_run.dry_run_rule),
            (DryRun::Deny, Some(9))
        );
    }
}
