//! From an `IdentityGroup` to the far ends that its name stands for.

use std::collections::BTreeMap;

use super::{Context, Lowering};
use crate::{
    policy::{
        document::{IdentityGroup, Member},
        rule::FarEnd,
        selector::AttributeSelector,
    },
    yaml::{Located, Mistakes, NodeId},
};

/// Groups by their names.
#[derive(Debug, Default)]
pub(in crate::policy) struct Groups(BTreeMap<String, Group>);

#[derive(Debug)]
struct Group {
    members: Vec<FarEnd>,
    line: usize,
}

/// Reads a group. What comes with mistakes is not to be used.
pub(in crate::policy) fn identity_group(
    context: Context<'_>,
    group: IdentityGroup,
    groups: &mut Groups,
    mistakes: &mut Mistakes,
) {
    let mut lowering = Lowering::new(context, mistakes);
    let metadata = lowering.require(context.root, "metadata", group.metadata);
    let spec = lowering.require(context.root, "spec", group.spec);
    let mut members = Vec::new();
    if let Some(spec) = spec
        && let Some(raw) = lowering.require(spec.node, "members", spec.value.members)
    {
        if raw.is_empty() && context.document.items(raw.node) == Some(0) {
            lowering.mistake(raw.node, "is empty; name somebody, or remove the group");
        }
        members.extend(raw.iter().filter_map(|member| lowering.member(member)));
    }
    let Some(metadata) = metadata else { return };
    let Some(name) = lowering.require(metadata.node, "name", metadata.value.name) else {
        return;
    };
    if let Some(first) = groups.0.get(name.as_str()) {
        let what = format!(
            "there is a group `{}` already, on line {}; give one of them another name",
            name.as_str(),
            first.line
        );
        lowering.mistake(name.node, what);
        return;
    }
    let line = context.document.line(name.node);
    let group = Group { members, line };
    groups.0.insert(name.as_str().to_owned(), group);
}

// === impl Groups ===

impl Groups {
    /// Whom a name stands for.
    pub(in crate::policy) fn members(&self, name: &str) -> Option<&[FarEnd]> {
        self.0.get(name).map(|group| group.members.as_slice())
    }

    /// The names.
    pub(in crate::policy) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

// === impl Lowering ===

impl Lowering<'_> {
    fn member(&mut self, raw: &Located<Member>) -> Option<FarEnd> {
        let attributes = ["namespace", "serviceAccount", "labels", "matchExpressions"];
        let by_attributes = attributes
            .into_iter()
            .any(|field| self.is_written(raw.node, field));
        let given = [
            self.is_written(raw.node, "identity"),
            self.is_written(raw.node, "identityPrefix"),
            by_attributes,
        ];
        if given.into_iter().filter(|given| *given).count() != 1 {
            self.mistake(
                raw.node,
                "expected exactly one of `identity`, `identityPrefix`, or some of `namespace`, \
                 `serviceAccount`, `labels`, `matchExpressions`",
            );
            return None;
        }
        if by_attributes {
            return Some(FarEnd::Attributes(AttributeSelector {
                namespace: self.namespace_of(raw.namespace.as_ref()),
                service_account: raw.service_account.as_ref().map(|a| a.as_str().to_owned()),
                labels: self.requirements(&raw.labels, &raw.match_expressions),
                port: None,
            }));
        }
        let prefix = raw.identity_prefix.as_ref();
        let identity = raw.identity.as_ref().map(|id| FarEnd::Identity(id.clone()));
        identity.or_else(|| prefix.map(|prefix| FarEnd::IdentityPrefix(prefix.0.clone())))
    }

    fn is_written(&self, mapping: NodeId, field: &str) -> bool {
        self.document.child(mapping, field).is_some()
    }
}
