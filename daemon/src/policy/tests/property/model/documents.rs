//! Policies as they are written.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{Item, Kind, NetworkPeer, NetworkPolicy, NetworkRule, Policy, Port, Rule};

impl Policy {
    /// A policy with a namespace cannot select in another.
    pub(super) fn one_namespace(mut self) -> Self {
        if self.namespace.is_some() {
            self.subjects.namespace = None;
        }
        self
    }

    pub(super) fn document(&self) -> Value {
        let mut metadata = json!({"name": self.name});
        if let Some(namespace) = self.namespace {
            metadata["namespace"] = json!(namespace);
        }
        let mut workloads = self.subjects.document("matchLabels");
        if !self.names.is_empty() {
            workloads["names"] = json!(self.names);
        }
        let rules = |rules: &[Rule], field: &str| -> Vec<Value> {
            rules.iter().map(|rule| rule.document(field)).collect()
        };
        json!({
            "apiVersion": "reeve.dev/v1alpha1",
            "kind": "ConnectionPolicy",
            "metadata": metadata,
            "spec": {
                "action": if self.deny { "Deny" } else { "Allow" },
                "mode": if self.dry_run { "DryRun" } else { "Enforce" },
                "workloads": workloads,
                "ingress": rules(&self.ingress, "from"),
                "egress": rules(&self.egress, "to"),
            },
        })
    }
}

impl NetworkPolicy {
    pub(super) fn document(&self) -> Value {
        let mut metadata = json!({"name": self.name, "namespace": self.namespace});
        if self.dry_run {
            metadata["annotations"] = json!({"reeve.dev/mode": "DryRun"});
        }
        let rules = |rules: &[NetworkRule], field: &str| -> Vec<Value> {
            rules.iter().map(|rule| rule.document(field)).collect()
        };
        let mut spec = json!({
            "podSelector": self.subjects.document("matchLabels"),
            "ingress": rules(&self.ingress, "from"),
            "egress": rules(&self.egress, "to"),
        });
        if let Some(types) = &self.types {
            spec["policyTypes"] = json!(types);
        }
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata,
            "spec": spec,
        })
    }
}

impl NetworkRule {
    pub(super) fn document(&self, field: &str) -> Value {
        let peers = self.peers.iter().map(|peer| match peer {
            NetworkPeer::Pods(namespaces, pods) => {
                let mut map = Map::new();
                for (field, selector) in [("namespaceSelector", namespaces), ("podSelector", pods)]
                {
                    if let Some(selector) = selector {
                        map.insert(field.into(), selector.document("matchLabels"));
                    }
                }
                Value::Object(map)
            }
            NetworkPeer::Block(block, except) => {
                let except: Vec<_> = except.iter().map(ToString::to_string).collect();
                json!({"ipBlock": {"cidr": block.to_string(), "except": except}})
            }
        });
        let ports = self.ports.iter().map(|port| {
            let mut map = Map::new();
            if let Some(protocol) = port.protocol {
                map.insert("protocol".into(), json!(protocol));
            }
            if let Some(number) = port.port {
                map.insert("port".into(), json!(number));
            }
            if let Some(name) = port.name {
                map.insert("port".into(), json!(name));
            }
            if let Some(end) = port.end {
                map.insert("endPort".into(), json!(end));
            }
            Value::Object(map)
        });
        json!({field: peers.collect::<Vec<_>>(), "ports": ports.collect::<Vec<_>>()})
    }
}

impl Kind {
    pub(super) fn everybody() -> Self {
        Self {
            namespace: None,
            account: None,
            labels: BTreeMap::new(),
            expressions: Vec::new(),
        }
    }

    pub(super) fn document(&self, labels: &str) -> Value {
        let mut map = Map::new();
        if let Some(namespace) = self.namespace {
            map.insert("namespace".into(), json!(namespace));
        }
        if let Some(account) = self.account {
            map.insert("serviceAccount".into(), json!(account));
        }
        if !self.labels.is_empty() {
            map.insert(labels.into(), json!(self.labels));
        }
        if !self.expressions.is_empty() {
            let expressions = self.expressions.iter().map(|expression| {
                let mut value = json!({"key": expression.key, "operator": expression.operator});
                if !expression.values.is_empty() {
                    value["values"] = json!(expression.values);
                }
                value
            });
            map.insert("matchExpressions".into(), expressions.collect());
        }
        Value::Object(map)
    }
}

impl Rule {
    pub(super) fn document(&self, field: &str) -> Value {
        let mut map = Map::new();
        if let Some(items) = &self.items {
            map.insert(field.into(), items.iter().map(Item::document).collect());
        }
        if !self.ports.is_empty() {
            map.insert(
                "ports".into(),
                self.ports.iter().map(Port::document).collect(),
            );
        }
        Value::Object(map)
    }
}

impl Item {
    pub(super) fn document(&self) -> Value {
        match self {
            Self::Any => json!({"any": {}}),
            Self::Identity(id) => json!({"identity": id}),
            Self::Prefix(prefix) => json!({"identityPrefix": prefix}),
            Self::Kind(kind) => {
                let mut value = kind.document("labels");
                if value.as_object().unwrap().is_empty() {
                    value["labels"] = json!({});
                }
                value
            }
            Self::Cidr(block, except) => {
                let except: Vec<_> = except.iter().map(ToString::to_string).collect();
                json!({"cidr": block.to_string(), "except": except})
            }
        }
    }
}

impl Port {
    pub(super) fn document(&self) -> Value {
        let mut map = Map::new();
        if let Some(protocol) = self.protocol {
            map.insert("protocol".into(), json!(protocol));
        }
        if let Some(port) = self.port {
            map.insert("port".into(), json!(port));
        }
        if let Some(end) = self.end {
            map.insert("endPort".into(), json!(end));
        }
        Value::Object(map)
    }
}
