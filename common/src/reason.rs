//! Why a verdict is what it is: one closed set for kernel, tunnel, metrics, logs and `explain`.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $number:literal => $name:literal,)+) => {
        /// Why a connection was allowed, refused or closed. The names are label values of metrics
        /// and fields of logs: never renamed, only added to.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[doc = $doc])+ $variant = $number,)+ }

        impl Reason {
            /// Every reason, in the order of its number.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)+];

            /// Name in metrics, logs and output.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Reason::$variant => $name,)+ }
            }

            /// What it means, in a sentence for people.
            #[must_use]
            pub const fn describe(self) -> &'static str {
                match self { $(Reason::$variant => concat!($($doc,)+).trim_ascii(),)+ }
            }

            /// The reason with this number.
            #[must_use]
            pub const fn from_number(number: u8) -> Option<Reason> {
                match number { $($number => Some(Reason::$variant),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// A policy allows it.
    Policy = 0 => "policy",
    /// No policy allows it: the default deny.
    NoPolicy = 1 => "no_policy",
    /// A policy denies it.
    PolicyDeny = 2 => "policy_deny",
    /// The policy allows the identity, but the connection came without mutual TLS.
    PlaintextRefused = 3 => "plaintext_refused",
    /// The cgroup lies under an enforced parent and is not enrolled.
    UnknownWorkload = 4 => "unknown_workload",
    /// The port is one of reeve's own.
    ReservedPort = 5 => "reserved_port",
    /// A tunnel is needed and the daemon has no listener in the namespace.
    NoListener = 6 => "no_listener",
    /// A kernel map could not be read or written, or is full.
    MapFailure = 7 => "map_failure",
    /// The packet could not be understood: truncated, a fragment, or too many headers.
    Malformed = 8 => "malformed",
    /// A raw socket may not speak TCP or UDP.
    RawSocket = 9 => "raw_socket",
    /// Traffic to a peer behind a tunnel tried to leave as plaintext.
    TunnelBypassed = 10 => "tunnel_bypassed",
    /// Allowed as plaintext: no tunnel reaches the far end.
    NoTunnel = 11 => "no_tunnel",
    /// Allowed as plaintext: the protocol cannot be tunnelled.
    NotTunnelled = 12 => "not_tunnelled",
    /// The daemon found no original destination for the connection.
    NoOrigin = 13 => "no_origin",
    /// The certificate source has nothing for the identity, or what it had has expired.
    NoCertificate = 14 => "no_certificate",
    /// The TCP connection to the peer's tunnel port failed.
    PeerUnreachable = 15 => "peer_unreachable",
    /// The TLS handshake failed.
    HandshakeFailed = 16 => "handshake_failed",
    /// The peer's certificate was refused.
    PeerCertificate = 17 => "peer_certificate",
    /// The peer's certificate is valid and names another identity than expected.
    PeerIdentity = 18 => "peer_identity",
    /// The peer's policy refused the connection.
    PeerDenied = 19 => "peer_denied",
    /// The peer could not reach the application, or answered with an error.
    PeerFailed = 20 => "peer_failed",
    /// The CONNECT request is not one that reeve serves.
    BadRequest = 21 => "bad_request",
    /// The CONNECT authority is not an address of the workload whose identity was presented.
    WrongAuthority = 22 => "wrong_authority",
    /// The application refused the connection or did not answer in time.
    ApplicationUnreachable = 23 => "application_unreachable",
    /// A limit was reached.
    Limit = 24 => "limit",
    /// A time limit was reached.
    Timeout = 25 => "timeout",
    /// The connection was reset, or the transport below it broke.
    Reset = 26 => "reset",
    /// The daemon is shutting down.
    Shutdown = 27 => "shutdown",
    /// Both ends closed in good order.
    Closed = 28 => "closed",
    /// A change of policy, workload or certificate no longer allows the connection.
    Revoked = 29 => "revoked",
    /// The packet names a route of its own: where it goes is not what its header says.
    SourceRouted = 30 => "source_routed",
    /// The packet claims an address that is not its sender's.
    ForgedSource = 31 => "forged_source",
    /// A revocation list names the peer's certificate, or none that is valid vouches for it.
    PeerRevoked = 32 => "peer_revoked",
    /// The trust bundle no longer vouches for the peer's certificate.
    PeerUntrusted = 33 => "peer_untrusted",
    /// A certificate of the tunnel's, or the authority behind it, has expired.
    CertificateExpired = 34 => "certificate_expired",
    /// Plaintext that no policy allows, let in since the workload is declared permissive.
    Permissive = 35 => "permissive",
    /// The peer sent more frames, headers or resets than a tunnel puts up with.
    Flood = 36 => "flood",
    /// The tunnel's certificate was replaced, and the connection did not end by itself in time.
    CertificateReplaced = 37 => "certificate_replaced",
    /// The port of the workload that was admitted is held by a listener that is not its own.
    WrongListener = 38 => "wrong_listener",
    /// A tunnel is needed, and the socket is bound to a device that does not lead to it.
    BoundToDevice = 39 => "bound_to_device",
}
