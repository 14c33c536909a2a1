use super::*;

pub(in crate::telemetry) fn facts() -> Facts {
    Facts {
        verdict: "deny".into(),
        direction: "ingress".into(),
        transport: "plaintext".into(),
        protocol: "tcp".into(),
        source: "web".into(),
        source_id: Some(SpiffeId::parse("spiffe://example.org/ns/shop/sa/web").unwrap()),
        source_address: Some("192.0.2.7:40000".parse().unwrap()),
        destination: "db".into(),
        destination_id: None,
        destination_address: Some("192.0.2.1:5432".parse().unwrap()),
        reason: "no_policy".into(),
        cause: Some("policy".into()),
        connection: None,
        rule: "default deny".into(),
        rule_at: None,
        error: None,
        carried: None,
    }
}

pub(in crate::telemetry) fn refused(facts: Facts) -> Observed {
    Observed {
        time: SystemTime::UNIX_EPOCH,
        happening: Happening::Refused(facts),
    }
}

#[test]
fn json_is_one_flat_object_and_reads_back() {
    let observed = refused(facts());
    let json = serde_json::to_value(&observed).unwrap();
    let expected = serde_json::json!({
        "time": "1970-01-01T00:00:00.000000Z",
        "event": "refused",
        "verdict": "deny",
        "direction": "ingress",
        "transport": "plaintext",
        "protocol": "tcp",
        "source": "web",
        "sourceId": "spiffe://example.org/ns/shop/sa/web",
        "sourceAddress": "192.0.2.7:40000",
        "destination": "db",
        "destinationAddress": "192.0.2.1:5432",
        "reason": "no_policy",
            "cause": "policy",
        "rule": "default deny",
    });
    assert_eq!(json, expected);
    assert_eq!(serde_json::from_value::<Observed>(json).unwrap(), observed);

    let closed = Observed {
        happening: Happening::Closed(Facts {
            carried: Some(Carried {
                bytes_sent: 1,
                bytes_received: 2,
                duration_seconds: 0.5,
            }),
            ..facts()
        }),
        ..observed.clone()
    };
    let json = serde_json::to_value(&closed).unwrap();
    assert_eq!(
        (&json["bytesSent"], &json["durationSeconds"]),
        (&1.into(), &0.5.into())
    );
    assert_eq!(serde_json::from_value::<Observed>(json).unwrap(), closed);

    let lost = Observed {
        happening: Happening::Lost(Lost {
            place: LostIn::Kernel,
            events: Some(3),
        }),
        ..observed
    };
    let json = serde_json::to_value(&lost).unwrap();
    assert_eq!(json["where"], "kernel");
    assert_eq!(serde_json::from_value::<Observed>(json).unwrap(), lost);
}

#[test]
fn a_filter_wants_one_of_each_kind_that_it_names() {
    let observed = refused(facts());
    let who = |text: &str| vec![Who::from(text.to_owned())];
    let all = Filter::default();
    assert!(all.chooses(&observed));
    for (filter, chosen) in [
        (
            Filter {
                workloads: who("db"),
                ..all.clone()
            },
            true,
        ),
        (
            Filter {
                workloads: who("web"),
                ..all.clone()
            },
            false,
        ),
        (
            Filter {
                peers: who("web"),
                ..all.clone()
            },
            true,
        ),
        (
            Filter {
                peers: who("spiffe://example.org/ns/shop/sa/web"),
                ..all.clone()
            },
            true,
        ),
        (
            Filter {
                peers: who("192.0.2.7"),
                ..all.clone()
            },
            true,
        ),
        (
            Filter {
                peers: who("192.0.2.0/29"),
                ..all.clone()
            },
            true,
        ),
        (
            Filter {
                peers: who("192.0.2.8/29"),
                ..all.clone()
            },
            false,
        ),
        (
            Filter {
                ports: vec![80, 5432],
                ..all.clone()
            },
            true,
        ),
        (
            Filter {
                ports: vec![40000],
                ..all.clone()
            },
            false,
        ),
        (
            Filter {
                verdicts: vec!["allow".into()],
                ..all.clone()
            },
            false,
        ),
        (
            Filter {
                reasons: vec!["no_policy".into()],
                ..all.clone()
            },
            true,
        ),
        (
            Filter {
                directions: vec!["egress".into()],
                ..all.clone()
            },
            false,
        ),
        (
            Filter {
                protocols: vec!["udp".into(), "tcp".into()],
                ..all.clone()
            },
            true,
        ),
        (
            Filter {
                protocols: vec!["udp".into()],
                ports: vec![5432],
                ..all.clone()
            },
            false,
        ),
    ] {
        assert_eq!(filter.chooses(&observed), chosen, "{filter:?}");
    }
}

#[test]
fn protocols_have_names_or_numbers() {
    for (text, number) in [("tcp", 6), ("UDP", 17), ("47", 47), ("icmp", 1)] {
        assert_eq!(ProtocolName::parse(text), Some(ProtocolName(number)));
    }
    for text in ["", "0", "256", "quic"] {
        assert_eq!(ProtocolName::parse(text), None);
    }
}
