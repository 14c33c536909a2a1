//! Certificates that are wrong in ways in which rcgen makes none, by the `openssl` program.

use std::{fs, path::Path, process::Command};

use rcgen::KeyPair;
use rustls_pki_types::{CertificateDer, pem::PemObject};

use super::{Authority, Issued};

/// A way in which only openssl makes a certificate wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpensslFlaw {
    /// Signed with SHA-1.
    Sha1,
    /// A certificate of X.509 version 1, which has no extensions.
    Version1,
    /// Below an intermediate with an RSA key of 1024 bits.
    SmallRsaIntermediate,
    /// Below an intermediate with a key on a curve that is not NIST's.
    OtherCurveIntermediate,
}

impl OpensslFlaw {
    /// Every flaw.
    pub const ALL: &'static [Self] = &[
        Self::Sha1,
        Self::Version1,
        Self::SmallRsaIntermediate,
        Self::OtherCurveIntermediate,
    ];

    /// What reeve calls the reason for its refusal.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Sha1 | Self::OtherCurveIntermediate => "algorithm",
            Self::Version1 => "no_uri_san",
            Self::SmallRsaIntermediate => "bad_signature",
        }
    }

    /// A certificate for `spiffe_id`, signed by `root` as far as the flaw lets it be. Files are made
    /// in `folder`.
    pub fn issue(self, root: &Authority, spiffe_id: &str, folder: &Path) -> Issued {
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        let key = KeyPair::generate().unwrap();
        write("root.pem", &root.certificate_pem());
        write("root.key", &root.key_pem());
        write("leaf.key", &key.serialize_pem());
        write(
            "leaf.ext",
            &format!(
                "subjectAltName=critical,URI:{spiffe_id}\n\
                 basicConstraints=critical,CA:FALSE\n\
                 keyUsage=critical,digitalSignature\n\
                 extendedKeyUsage=serverAuth,clientAuth\n"
            ),
        );
        write(
            "ca.ext",
            "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n",
        );
        let ca_key = match self {
            Self::SmallRsaIntermediate => Some("genrsa -out ca.key 1024"),
            Self::OtherCurveIntermediate => {
                Some("ecparam -name secp256k1 -genkey -noout -out ca.key")
            }
            _ => None,
        };
        let run = |words: &str| openssl(folder, words);
        let mut chain = vec!["leaf.pem"];
        let mut signer = "root";
        if let Some(ca_key) = ca_key {
            run(ca_key);
            run("req -new -key ca.key -subj /CN=below -out ca.csr");
            run(
                "x509 -req -in ca.csr -CA root.pem -CAkey root.key -set_serial 7 -days 1 -extfile ca.ext -out ca.pem",
            );
            (signer, chain) = ("ca", vec!["leaf.pem", "ca.pem"]);
        }
        let special = match self {
            Self::Sha1 => "-sha1 -set_serial 8 -extfile leaf.ext",
            Self::Version1 => "-set_serial 8",
            _ => "-set_serial 8 -extfile leaf.ext",
        };
        run("req -new -key leaf.key -subj /CN=leaf -out leaf.csr");
        run(&format!(
            "x509 -req -in leaf.csr -CA {signer}.pem -CAkey {signer}.key -days 1 {special} -out leaf.pem"
        ));
        let read = |name: &str| CertificateDer::from_pem_file(folder.join(name)).unwrap();
        Issued {
            chain: chain.into_iter().map(read).collect(),
            key: key.serialize_der().into(),
        }
    }
}

fn openssl(folder: &Path, words: &str) {
    let mut command = Command::new("openssl");
    let output = command
        .args(words.split(' '))
        .current_dir(folder)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "openssl {words}: {said}");
}
