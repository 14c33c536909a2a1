//! What is read of a NetworkPolicy as it is written, and what is wrong with one.

use std::path::Path;

use super::{
    super::world::{are_the_mistakes, config, policies},
    cluster::{Cluster, configuration},
};
use crate::policy::PolicySet;

#[test]
fn what_kubectl_writes_is_read() {
    let text = "
apiVersion: v1
kind: List
metadata: {resourceVersion: ''}
items:
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata:
    annotations:
      kubectl.kubernetes.io/last-applied-configuration: |
        {\"apiVersion\":\"networking.k8s.io/v1\",\"kind\":\"NetworkPolicy\"}
    creationTimestamp: '2024-05-01T10:00:00Z'
    generation: 1
    labels: {app: web}
    managedFields:
    - {apiVersion: networking.k8s.io/v1, fieldsType: FieldsV1, fieldsV1: {'f:spec': {}}, manager: kubectl}
    name: web
    namespace: x
    resourceVersion: '4242'
    uid: 6f5c4a3e-0000-4000-8000-000000000000
  spec:
    podSelector: {}
    policyTypes: [Ingress]
  status: {}
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: other, creationTimestamp: null}
  spec:
    podSelector:
      matchLabels: {pod: a}
";
    let set = PolicySet::parse_alone(Path::new("list.yaml"), text);
    let set = set.unwrap_or_else(|mistakes| panic!("{mistakes}"));
    assert_eq!((set.len(), set.rules()), (2, 0));
    Cluster::new(text).expect(|call| call.to.0 != "x");
}

#[test]
fn what_is_wrong_with_a_network_policy_is_said() {
    let text = "
apiVersion: networking.k8s.io/v1beta1
kind: NetworkPolicy
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: x, annotations: {reeve.dev/mode: Dry}}
spec:
  podSelector: {}
  policyTypes: [Ingres]
  ingress:
  - from: [{}, {ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}, {ipBlock: {except: [10.0.0.0/8]}}]
  - from: [{ipBlock: {cidr: 10.0.0.0}}, {ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/8]}}]
  - ports: [{port: 80, endPort: 79}, {endPort: 80}, {port: web, endPort: 80}, {port: Web}, {protocol: ICMP}]
  - froms: []
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: x}
spec: {podSelector: {matchExpressions: [{key: a, operator: In}]}}
";
    let found = policies(&config(&configuration("")), text).unwrap_err();
    let wanted = [
        (
            2,
            "`networking.k8s.io/v1beta1` is not known here; expected `networking.k8s.io/v1`",
        ),
        (7, "`Dry` is not known here; expected `Enforce` or `DryRun`"),
        (10, "`Ingres` is not known here"),
        (12, "from[0]: says nobody"),
        (12, "from[1]: has an `ipBlock` and a selector"),
        (12, "from[2].ipBlock: `cidr` is missing"),
        (13, "`10.0.0.0` has no prefix length; write `10.0.0.0/32`"),
        (13, "`11.0.0.0/8` is not a smaller network in `10.0.0.0/8`"),
        (14, "`endPort` 79 lies below `port` 80"),
        (14, "has `endPort` without `port`"),
        (14, "has `endPort` with a `port` that is a name"),
        (14, "`Web` is not the name of a port"),
        (14, "`ICMP` is not known here"),
        (15, "there is no such field; did you mean `from`?"),
        (
            19,
            "there is a NetworkPolicy `x/p` already, in policy.yaml on line 7",
        ),
        (20, "`In` needs `values`"),
    ];
    are_the_mistakes(&found, &wanted);
}
