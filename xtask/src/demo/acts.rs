//! The acts, in the order in which they are played.

use std::time::{Duration, Instant};

use harness::{Place, Workload};

use super::{
    counted::{FOREIGN, HANDSHAKES, counted},
    scene::{SECRET, Scene, TRUST_DOMAIN},
    show::{curl, field, refusal},
    stage::Stage,
};

/// One act.
pub(crate) type Act = fn(&mut Stage, &Scene);

/// All of them; the stage itself was the first.
pub(crate) const ALL: [Act; 7] = [
    allowed,
    refused_by_egress,
    refused_by_ingress,
    intruder,
    impostor,
    forger,
    counted,
];

/// Where tunnels arrive.
const TUNNEL: u16 = 15008;

/// The record header of a ClientHello: handshake, and the version that TLS 1.3 writes for the
/// sake of old boxes on the way.
const CLIENT_HELLO: [u8; 3] = [0x16, 0x03, 0x01];

fn allowed(stage: &mut Stage, scene: &Scene) {
    stage.act(
        "What a policy allows: cart reads the ledger",
        "curl and nginx know nothing of reeve, and there is no proxy setting and no iptables rule. \
         Meanwhile tcpdump listens on the wire in front of ledger.",
    );
    let capture = scene.ledger.capture(&scene.network);
    let url = scene.ledger.url(80, "/");
    let answer = curl(
        stage,
        "cart@alpha",
        &scene.cart,
        &["--max-time", "10", &url],
    );
    let captured = capture.finish();
    stage.claim(
        "nginx answers with its page",
        answer.stdout.contains(SECRET),
    );
    let client = scene.cart.addresses().v4.to_string();
    let requests = scene.ledger_server.requests();
    let seen = requests
        .last()
        .is_some_and(|line| line.starts_with(&client));
    stage.claim(
        &format!("nginx saw the client's own address, {client}"),
        seen,
    );

    stage.pause();
    stage.say("What crossed the wire meanwhile:");
    let tunnel = captured.packets(&format!("tcp port {TUNNEL}"));
    let with_data = tunnel.iter().filter(|packet| !packet.ends_with("length 0"));
    for packet in with_data.take(4) {
        stage.output(&shortened(packet));
    }
    stage.output(&format!("… {} packets in all", tunnel.len()));
    stage.claim(
        &format!("a tunnel to port {TUNNEL} of ledger"),
        !tunnel.is_empty(),
    );
    stage.claim(
        "it opens with a TLS handshake",
        captured.contains(CLIENT_HELLO),
    );
    let plain = captured.packets("tcp port 80");
    stage.claim("not one packet to nginx's port 80", plain.is_empty());
    let leaked = [SECRET, "gold", "GET /", "nginx"].map(|text| captured.contains(text));
    stage.claim("neither request nor page in clear", !leaked.contains(&true));

    stage.pause();
    stage.say("Whom the two daemons saw, by certificate:");
    let expected = [&scene.cart, &scene.ledger].map(identity);
    for (node, daemon, direction) in [
        ("alpha", &scene.alpha_daemon, "egress"),
        ("beta", &scene.beta_daemon, "ingress"),
    ] {
        let line = daemon.wait_for_log(&["connection closed", direction, "cart", "ledger"]);
        let ids = ["source_id", "destination_id"].map(|name| field(&line, name));
        let bytes = ["bytes_sent", "bytes_received"].map(|name| field(&line, name));
        stage.output(&format!("{node}, {direction}: {}", ids[0]));
        stage.output(&format!(
            "  → {}, {} bytes sent, {} received",
            ids[1], bytes[0], bytes[1]
        ));
        stage.claim(&format!("{node} authenticated both ends"), ids == expected);
    }
}

fn refused_by_egress(stage: &mut Stage, scene: &Scene) {
    stage.act(
        "Refused on the way out: cart tries the vault",
        "No policy lets cart talk to vault. The kernel on alpha refuses at connect(), before a \
         single packet leaves; the answer is immediate, not a time-out.",
    );
    let capture = scene.vault.capture(&scene.network);
    let url = scene.vault.url(80, "/");
    let started = Instant::now();
    let answer = curl(
        stage,
        "cart@alpha",
        &scene.cart,
        &["--verbose", "--max-time", "10", &url],
    );
    let took = started.elapsed();
    let captured = capture.finish();
    let refused = answer.stderr.contains("Operation not permitted");
    stage.claim(
        "connect() was not permitted",
        refused && !answer.status.success(),
    );
    stage.claim(
        &format!("after {} ms", took.as_millis()),
        took < Duration::from_secs(2),
    );
    stage.claim(
        "no packet reached vault",
        captured.packets("tcp").is_empty(),
    );
    stage.claim(
        "nginx saw nothing",
        scene.vault_server.requests().is_empty(),
    );
    let texts = ["egress", "cart", "vault"];
    refusal(stage, "alpha", &scene.alpha_daemon, &texts, "no_policy");
}

fn refused_by_ingress(stage: &mut Stage, scene: &Scene) {
    stage.act(
        "Refused on the way in: report tries the ledger",
        "A policy lets report talk to ledger, but ledger's own policy admits cart alone. So alpha \
         opens a tunnel with report's certificate, and beta's daemon judges the identity in it: 401.",
    );
    try_ledger(stage, scene, "report@alpha", &scene.report);
    let texts = ["egress", "report", "ledger"];
    refusal(stage, "alpha", &scene.alpha_daemon, &texts, "peer_denied");
    let texts = ["ingress", "report", "ledger"];
    let line = refusal(stage, "beta", &scene.beta_daemon, &texts, "no_policy");
    let asked = field(&line, "source_id");
    stage.claim(
        "beta knew who asked, by certificate",
        asked == identity(&scene.report),
    );
}

fn intruder(stage: &mut Stage, scene: &Scene) {
    stage.act(
        "The intruder: plaintext, straight to nginx",
        "The stranger is on the same network and no daemon governs it. It calls ledger's port 80 as \
         it is. No policy speaks of it: beta's kernel refuses.",
    );
    try_ledger(stage, scene, "stranger", &scene.stranger);
    let texts = ["ingress", "ledger", "plaintext", "no_policy"];
    refusal(stage, "beta", &scene.beta_daemon, &texts, "no_policy");
}

fn impostor(stage: &mut Stage, scene: &Scene) {
    stage.act(
        "The impostor: plaintext, from cart's own address",
        "Somebody got into cart's network namespace, though not into its cgroup, and so has cart's \
         address and nothing else of it. An address is not an identity: ledger admits cart by \
         certificate, and refuses plaintext from its address.",
    );
    try_ledger(stage, scene, "impostor", &scene.impostor);
    let texts = ["ingress", "ledger", "plaintext_refused"];
    refusal(
        stage,
        "beta",
        &scene.beta_daemon,
        &texts,
        "plaintext_refused",
    );
}

/// Somebody asks for the page who must not get it.
fn try_ledger(stage: &mut Stage, scene: &Scene, who: &str, place: &Place) {
    let before = scene.ledger_server.requests().len();
    let url = scene.ledger.url(80, "/");
    let answer = curl(stage, who, place, &["--max-time", "3", &url]);
    stage.claim(
        "curl gets no page",
        !answer.status.success() && answer.stdout.is_empty(),
    );
    stage.claim(
        "nginx saw nothing",
        scene.ledger_server.requests().len() == before,
    );
}

fn forger(stage: &mut Stage, scene: &Scene) {
    stage.act(
        "The forger: a certificate of the wrong trust domain",
        "The stranger has learnt to speak TLS. It makes itself a certificate with cart's name, in a \
         trust domain of its own, and knocks at the tunnel's door.",
    );
    let folder = scene.stranger.folder();
    let [key, certificate] = ["key", "certificate"].map(|name| {
        folder
            .join(name)
            .with_extension("pem")
            .display()
            .to_string()
    });
    let name = "subjectAltName=URI:spiffe://evil.example/ns/default/sa/cart";
    let make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 \
                -subj /O=Evil -addext keyUsage=critical,digitalSignature \
                -addext extendedKeyUsage=serverAuth,clientAuth -addext basicConstraints=CA:FALSE";
    stage.command(
        "stranger",
        &["openssl", "req", "-x509", "…", "-addext", name],
    );
    let words =
        make.split_whitespace()
            .chain(["-addext", name, "-keyout", &key, "-out", &certificate]);
    scene.stranger.exec(words).ok();

    let door = scene.ledger.addresses().port4(TUNNEL).to_string();
    let knock = [
        "openssl",
        "s_client",
        "-connect",
        &door,
        "-alpn",
        "h2",
        "-cert",
        &certificate,
    ];
    stage.command(
        "stranger",
        &[
            "openssl", "s_client", "-connect", &door, "-cert", "…", "-key", "…",
        ],
    );
    // It waits for what the server has to say to the certificate.
    let answer = scene
        .stranger
        .exec(knock.iter().chain(&["-key", &key, "-brief", "-ign_eof"]));
    let alert = answer.stderr.lines().find(|line| line.contains("alert"));
    // openssl puts its own functions and source lines around it.
    let told = alert.and_then(|line| line.split(':').find(|part| part.contains("alert")));
    stage.output(told.unwrap_or(&answer.stderr));
    stage.claim("beta ended the handshake with an alert", alert.is_some());
    scene.beta_daemon.wait_for_metric(HANDSHAKES, FOREIGN, 1.0);
    stage.claim("beta says why: unknown_trust_domain", true);
}

/// The SPIFFE ID that a workload's certificate must hold.
fn identity(workload: &Workload) -> String {
    workload.spiffe_id(TRUST_DOMAIN)
}

/// A line of tcpdump without the time and the options.
fn shortened(packet: &str) -> String {
    let start = packet.find("IP").unwrap_or_default();
    let length = packet.rsplit(' ').next().unwrap_or_default();
    let rest = packet.get(start..).unwrap_or(packet);
    let head = rest.split(", seq").next().unwrap_or(rest);
    format!("{head}, {length} bytes")
}
