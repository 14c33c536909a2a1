//! What becomes of a connection, in both halves, and why.

use std::net::IpAddr;

use reeve_common::{Action, Direction, Reason, WorkloadId, protocol};
use serde::{Deserialize, Serialize};

use super::{ends::End, offline::is_stand_in};
use crate::{
    config::Ports,
    identity::SpiffeId,
    policy::{Decision, Misfit, Near, Part, Question, Snapshot},
    telemetry::{ProtocolName, direction_name},
};

/// Rules that are named beside "no policy allows this".
const NEAREST: usize = 3;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Enquiry {
    /// Who opens the connection: name, SPIFFE ID or address.
    pub from: String,
    /// To whom.
    pub to: String,
    /// To which port; 0 for protocols without ports.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// The source has no reeve: what it sends comes as plaintext, whoever it is.
    #[serde(default)]
    pub plaintext: bool,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Verdict {
    /// It may go on.
    Allow,
    /// It is refused.
    Deny,
}

/// The answer. Fields of its JSON are never renamed, only added to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The source.
    pub from: String,
    /// The destination.
    pub to: String,
    /// Name of the protocol.
    pub protocol: String,
    /// Port of the destination.
    pub port: u16,
    /// What becomes of the connection, as far as this node says.
    pub verdict: Verdict,
    /// Each end that is a workload of this node.
    pub halves: Vec<Half>,
    /// What else is to be said, a sentence each.
    pub notes: Vec<String>,
}

/// What one end says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Half {
    /// `egress` at the source, `ingress` at the destination.
    pub direction: String,
    /// The workload whose policies are asked.
    pub workload: String,
    /// The far end.
    pub far_end: String,
    /// Address of the far end.
    pub address: IpAddr,
    /// Its identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub far_end_id: Option<SpiffeId>,
    /// What becomes of the connection here.
    pub verdict: Verdict,
    /// `tunnel` or `plaintext`.
    pub transport: String,
    /// Why: a name of the closed set of reasons.
    pub reason: String,
    /// The same in a sentence.
    pub because: String,
    /// The rule that said so, as `policy/rule`.
    pub rule: String,
    /// File and line of the rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule_at: Option<String>,
    /// Where no policy allows it: the rules that came nearest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nearest: Vec<NearRule>,
    /// What the kernel's maps say, where a daemon was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelVerdict>,
}

/// A rule that does not allow the connection, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NearRule {
    /// `policy/rule`.
    pub rule: String,
    /// File and line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule_at: Option<String>,
    /// What does not fit.
    pub misfits: Vec<NearMisfit>,
}

/// What of a rule does not fit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NearMisfit {
    /// Which part of it.
    pub part: Part,
    /// What it asks for, and what there is.
    pub why: String,
}

/// What the kernel's maps say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KernelVerdict {
    /// Whether it is what was explained.
    pub agrees: bool,
    /// What they hold, for people.
    pub holds: String,
}

/// Reads the kernel's maps.
pub trait Kernel {
    /// Action and rule that the programs would find for a connection.
    ///
    /// # Errors
    /// A sentence.
    fn verdict(
        &self,
        workload: WorkloadId,
        direction: Direction,
        address: IpAddr,
        protocol: u8,
        port: u16,
    ) -> Result<(u32, u32), String>;

    /// Whether the programs know the workload's cgroups as its own.
    ///
    /// # Errors
    /// A sentence.
    fn is_enrolled(&self, workload: WorkloadId) -> Result<bool, String>;
}

struct Explainer<'a> {
    snapshot: &'a Snapshot,
    ports: Ports,
    enquiry: &'a Enquiry,
    kernel: Option<&'a dyn Kernel>,
}

/// Answers.
///
/// # Errors
/// A sentence, where nobody of that name is known, or neither end is a workload of this node.
pub fn explain(
    snapshot: &Snapshot,
    ports: Ports,
    enquiry: &Enquiry,
    kernel: Option<&dyn Kernel>,
) -> Result<Explanation, String> {
    let (from, to) = (
        End::find(snapshot, &enquiry.from)?,
        End::find(snapshot, &enquiry.to)?,
    );
    let explainer = Explainer {
        snapshot,
        ports,
        enquiry,
        kernel,
    };
    explainer.explain(&from, &to)
}

// === impl Explainer ===

impl Explainer<'_> {
    fn explain(&self, from: &End<'_>, to: &End<'_>) -> Result<Explanation, String> {
        if from.local.is_none() && to.local.is_none() {
            return Err(format!(
                "neither `{}` nor `{}` is a workload of this node: ask a node that one of them \
                 runs on",
                from.name, to.name
            ));
        }
        let mut notes = Vec::new();
        let mut halves = Vec::new();
        let same = match (from.local, to.local) {
            (Some(from), Some(to)) => from.workload.id == to.workload.id,
            _ => false,
        } || to.addresses.iter().all(IpAddr::is_loopback);
        if same {
            notes.push("it stays in the workload: never in question".to_owned());
        } else {
            self.egress(from, to, &mut halves)?;
            self.ingress(from, to, &mut halves)?;
            for (end, other) in [(from, "egress"), (to, "ingress")] {
                if end.local.is_none() && end.id.is_some() {
                    notes.push(format!(
                        "{} is on another node, which judges its {other}",
                        end.name
                    ));
                }
            }
        }
        for end in [from, to] {
            if end.addresses.iter().copied().any(is_stand_in) {
                notes.push(format!(
                    "no address of {} is known here: a rule by `cidr` may decide otherwise",
                    end.name
                ));
            }
        }
        let allowed = halves.iter().all(|half| half.verdict == Verdict::Allow);
        Ok(Explanation {
            from: from.name.clone(),
            to: to.name.clone(),
            protocol: ProtocolName(self.enquiry.protocol).to_string(),
            port: self.enquiry.port,
            verdict: Verdict::of(allowed),
            halves,
            notes,
        })
    }

    /// What the source says, by each address of the destination.
    fn egress(&self, from: &End<'_>, to: &End<'_>, halves: &mut Vec<Half>) -> Result<(), String> {
        let Some(running) = from.local else {
            return Ok(());
        };
        let (protocol, port) = (self.enquiry.protocol, self.enquiry.port);
        for address in &to.addresses {
            let question = Question {
                workload: running.workload.id,
                direction: Direction::Egress,
                address: *address,
                client: None,
                protocol,
                port,
            };
            let decision = self.snapshot.judge(&question);
            let there = self.snapshot.peer_at(*address, protocol, port);
            let tunnel =
                protocol == protocol::TCP && there.is_some_and(|there| there.tunnel_port.is_some());
            let mut half = self.half(&question, decision, tunnel, &from.name, to);
            if decision.action == Action::Allow {
                if tunnel && port == self.ports.tunnel {
                    half.refuse(Reason::ReservedPort);
                } else if !tunnel {
                    half.say(if protocol == protocol::TCP {
                        Reason::NoTunnel
                    } else {
                        Reason::NotTunnelled
                    });
                }
            }
            half.kernel = self.kernel(&question, decision)?;
            push(halves, half);
        }
        Ok(())
    }

    /// What the destination says, by each address of the source.
    fn ingress(&self, from: &End<'_>, to: &End<'_>, halves: &mut Vec<Half>) -> Result<(), String> {
        let Some(running) = to.local else {
            return Ok(());
        };
        let (protocol, port) = (self.enquiry.protocol, self.enquiry.port);
        let tunnel = protocol == protocol::TCP && from.tunnel && !self.enquiry.plaintext;
        for address in &from.addresses {
            let plaintext = Question {
                workload: running.workload.id,
                direction: Direction::Ingress,
                address: *address,
                client: None,
                protocol,
                port,
            };
            let question = Question {
                client: from.id.as_ref().filter(|_| tunnel),
                ..plaintext
            };
            let decision = self.snapshot.judge(&question);
            let tunnel = question.client.is_some();
            let mut half = self.half(&question, decision, tunnel, &to.name, from);
            if tunnel && [self.ports.outbound, self.ports.tunnel].contains(&port) {
                half.refuse(Reason::ReservedPort);
            } else if !tunnel && decision.action == Action::Allow {
                half.say(if protocol == protocol::TCP {
                    Reason::NoTunnel
                } else {
                    Reason::NotTunnelled
                });
            }
            // The kernel's part is to refuse what does not come through the tunnel.
            half.kernel = self.kernel(&plaintext, self.snapshot.judge(&plaintext))?;
            push(halves, half);
        }
        Ok(())
    }

    fn half(
        &self,
        question: &Question<'_>,
        decision: Decision,
        tunnel: bool,
        workload: &str,
        far_end: &End<'_>,
    ) -> Half {
        let allowed = decision.allows();
        let nearest = if decision.reason == Reason::NoPolicy {
            self.snapshot.nearest(question, NEAREST)
        } else {
            Vec::new()
        };
        let place = self.snapshot.rule_place(decision.rule);
        Half {
            direction: direction_name(question.direction).to_owned(),
            workload: workload.to_owned(),
            far_end: far_end.name.clone(),
            address: question.address,
            far_end_id: far_end.id.clone(),
            verdict: Verdict::of(allowed),
            transport: if tunnel { "tunnel" } else { "plaintext" }.to_owned(),
            reason: decision.reason.as_str().to_owned(),
            because: decision.reason.describe().to_owned(),
            rule: self.snapshot.rule_name(decision.rule).to_owned(),
            rule_at: place.map(|place| place.to_string()),
            nearest: nearest.into_iter().map(NearRule::from).collect(),
            kernel: None,
        }
    }

    /// What the kernel's maps say of what the snapshot decided.
    fn kernel(
        &self,
        question: &Question<'_>,
        decision: Decision,
    ) -> Result<Option<KernelVerdict>, String> {
        let Some(kernel) = self.kernel else {
            return Ok(None);
        };
        // Without an address, nothing can be looked up.
        if is_stand_in(question.address) {
            return Ok(None);
        }
        let Question {
            workload,
            direction,
            address,
            protocol,
            port,
            ..
        } = *question;
        if !kernel.is_enrolled(workload)? {
            return Ok(Some(KernelVerdict {
                agrees: false,
                holds: "the workload's cgroups are not enrolled".to_owned(),
            }));
        }
        let (action, rule) = kernel.verdict(workload, direction, address, protocol, port)?;
        let agrees = (action, rule) == (decision.action as u32, decision.rule);
        let name = match action {
            action if action == Action::Allow as u32 => "allow",
            action if action == Action::Permissive as u32 => "allow, permissive",
            action if action == Action::TunnelOnly as u32 => "only through a tunnel",
            action if action == Action::NoRoom as u32 => "deny, since the map has no room",
            _ => "deny",
        };
        let rule = self.snapshot.rule_name(rule);
        Ok(Some(KernelVerdict {
            agrees,
            holds: format!("{name}, rule {rule}"),
        }))
    }
}

/// Adds what one address says, unless another said the same.
fn push(halves: &mut Vec<Half>, half: Half) {
    let says = |half: &Half| {
        (
            half.direction.clone(),
            half.verdict,
            half.reason.clone(),
            half.rule.clone(),
            half.transport.clone(),
            half.kernel.as_ref().is_none_or(|kernel| kernel.agrees),
        )
    };
    if !halves.iter().any(|other| says(other) == says(&half)) {
        halves.push(half);
    }
}

// === impl Half ===

impl Half {
    fn say(&mut self, reason: Reason) {
        reason.as_str().clone_into(&mut self.reason);
        reason.describe().clone_into(&mut self.because);
    }

    fn refuse(&mut self, reason: Reason) {
        self.verdict = Verdict::Deny;
        self.say(reason);
    }
}

// === impl Verdict ===

impl Verdict {
    fn of(allowed: bool) -> Self {
        if allowed { Self::Allow } else { Self::Deny }
    }

    /// Its name, as in output and test files.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

// === impl Explanation ===

impl Explanation {
    /// Whether the kernel's maps hold something else than what was explained.
    #[must_use]
    pub fn disagrees(&self) -> bool {
        let kernels = self.halves.iter().filter_map(|half| half.kernel.as_ref());
        kernels.into_iter().any(|kernel| !kernel.agrees)
    }
}

// === impl NearRule ===

impl From<Near<'_>> for NearRule {
    fn from(near: Near<'_>) -> Self {
        let misfit = |Misfit { part, why }| NearMisfit { part, why };
        Self {
            rule: near.rule.to_owned(),
            rule_at: near.place.map(|place| place.to_string()),
            misfits: near.misfits.into_iter().map(misfit).collect(),
        }
    }
}
