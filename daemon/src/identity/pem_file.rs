//! Reading PEM. Any file may hold a private key, whatever it should hold: errors say what is wrong
//! with the file and never repeat a byte of it.

use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
    pem::{self, PemObject},
};

/// Tag of an ASN.1 SEQUENCE, with which no PEM file begins.
const SEQUENCE: u8 = 0x30;
const BEGIN: &[u8] = b"-----BEGIN ";

/// Labels of blocks that these functions read (RFC 7468), of other blocks that often lie beside
/// them, and of those that hold certificates in a form that is not read.
const CERTIFICATE: &str = "CERTIFICATE";
const REVOCATION_LIST: &str = "X509 CRL";
const KEYS: [&str; 3] = ["PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY"];
const ENCRYPTED_KEY: &str = "ENCRYPTED PRIVATE KEY";
const OTHERS: [&str; 5] = [
    "PUBLIC KEY",
    "CERTIFICATE REQUEST",
    "EC PARAMETERS",
    "DH PARAMETERS",
    "OPENSSH PRIVATE KEY",
];
const FOREIGN: [&str; 5] = [
    "TRUSTED CERTIFICATE",
    "X509 CERTIFICATE",
    "PKCS7",
    "PKCS #7 SIGNED DATA",
    "CMS",
];

/// What is wrong with a file that should be PEM. A closed set of words: nothing of the file is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PemError {
    /// There is nothing in it.
    #[error("it is empty")]
    Empty,
    /// Text editors put it there.
    #[error("it begins with a byte order mark: save it as plain text without one")]
    ByteOrderMark,
    /// Not a text.
    #[error("it is DER, not PEM: convert it with `openssl {0}`")]
    Der(&'static str),
    /// Certificates and key in one encrypted container.
    #[error("it is PKCS #12, not PEM: convert it with `openssl pkcs12 -nodes`")]
    Pkcs12,
    /// Certificates in a container.
    #[error("it is PKCS #7, not plain PEM: convert it with `openssl pkcs7 -print_certs`")]
    Pkcs7,
    /// A passphrase would be needed.
    #[error("its private key is encrypted: store the key without a passphrase")]
    EncryptedKey,
    /// `cat a b`, where `a` does not end in a newline.
    #[error(
        "a BEGIN line does not start on a line of its own: files were joined without a newline \
         between them, or a block is indented"
    )]
    Joined,
    /// A variable of a shell that was not quoted, or a string of JSON.
    #[error("its line breaks are gone, or written as `\\n`: put each back as a line break")]
    OneLine,
    /// The end is missing.
    #[error("a block begins and does not end with its own END line: the file is cut off")]
    Unfinished,
    /// Not base64.
    #[error("a block in it is not base64")]
    Base64,
    /// A form of its own that OpenSSL and others write.
    #[error("it holds a `{0}` block, which is not read: convert it to `CERTIFICATE`")]
    Foreign(&'static str),
    /// Blocks of another kind.
    #[error("it holds only a block of the kind `{0}`")]
    Only(&'static str),
    /// No block at all.
    #[error("there is no PEM block in it")]
    NoBlock,
}

/// Every certificate, at least one.
///
/// # Errors
/// When there is none, or a block cannot be read: no block is left out in silence.
pub fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    all(text, CERTIFICATE, "x509 -inform der")
}

/// Every revocation list, at least one, or the one that a DER file is: an authority publishes them
/// so.
///
/// # Errors
/// As for [`certificates`].
pub fn revocation_lists(
    text: &[u8],
) -> Result<Vec<CertificateRevocationListDer<'static>>, PemError> {
    if text.first() == Some(&SEQUENCE) {
        return Ok(vec![text.to_vec().into()]);
    }
    all(text, REVOCATION_LIST, "crl -inform der")
}

/// The first private key.
///
/// # Errors
/// When there is none, or it is encrypted.
pub fn private_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, PemError> {
    const CONVERT: &str = "pkcs8 -inform der -nocrypt";
    check(text, CONVERT)?;
    match PrivateKeyDer::from_pem_slice(text) {
        Ok(key) => Ok(key),
        Err(error) => Err(because(text, &error, &KEYS)),
    }
}

fn all<T: PemObject>(
    text: &[u8],
    label: &'static str,
    convert: &'static str,
) -> Result<Vec<T>, PemError> {
    check(text, convert)?;
    if let Some(foreign) = labels(text).find(|found| FOREIGN.contains(found)) {
        return Err(PemError::Foreign(foreign));
    }
    let found: Result<Vec<T>, pem::Error> = T::pem_slice_iter(text).collect();
    match found {
        Ok(found) if found.is_empty() => Err(because(text, &pem::Error::NoItemsFound, &[label])),
        Ok(found) => Ok(found),
        Err(error) => Err(because(text, &error, &[label])),
    }
}

/// What is wrong with the file as a whole. The parser passes over blocks whose BEGIN is not at the
/// start of a line, and so would lose a certificate or a revocation list.
fn check(text: &[u8], convert: &'static str) -> Result<(), PemError> {
    if text.trim_ascii().is_empty() {
        return Err(PemError::Empty);
    }
    for mark in [&b"\xef\xbb\xbf"[..], b"\xff\xfe", b"\xfe\xff"] {
        if text.starts_with(mark) {
            return Err(PemError::ByteOrderMark);
        }
    }
    if text.first() == Some(&SEQUENCE) {
        return Err(container(text).unwrap_or(PemError::Der(convert)));
    }
    for line in lines(text) {
        let Some(at) = find(line, BEGIN) else {
            continue;
        };
        // An END in the line, or text behind the label.
        let rest = line.get(at + BEGIN.len()..).unwrap_or_default();
        let label_end = find(rest, b"-----").map(|end| rest.get(end + 5..).unwrap_or_default());
        if label_end.is_some_and(|behind| !behind.trim_ascii().is_empty()) {
            return Err(PemError::OneLine);
        }
        if at > 0 {
            return Err(PemError::Joined);
        }
    }
    Ok(())
}

/// What a DER file is, where it is neither certificate, list nor key.
fn container(der: &[u8]) -> Option<PemError> {
    /// SEQUENCE's tag and the longest length that such a file has.
    const HEADER: usize = 6;
    let start = der.get(..der.len().min(HEADER + 8))?;
    // PFX begins with its version, 3 (RFC 7292, section 4), ContentInfo with pkcs-7's identifier.
    let pkcs12 = find(start, &[0x02, 0x01, 0x03, SEQUENCE]).is_some_and(|at| at <= HEADER);
    let pkcs7 = find(start, &[0x06, 0x09, 0x2a, 0x86, 0x48]).is_some_and(|at| at <= HEADER);
    match (pkcs12, pkcs7) {
        (true, _) => Some(PemError::Pkcs12),
        (_, true) => Some(PemError::Pkcs7),
        _ => None,
    }
}

/// Why the parser found nothing of what was `wanted`, or something broken.
fn because(text: &[u8], error: &pem::Error, wanted: &[&'static str]) -> PemError {
    let is_encrypted = labels(text).any(|label| label == ENCRYPTED_KEY)
        || find(text, b"Proc-Type: 4,ENCRYPTED").is_some();
    match error {
        _ if is_encrypted && wanted == KEYS => PemError::EncryptedKey,
        pem::Error::NoItemsFound => match labels(text).next() {
            Some(label) => PemError::Only(label),
            None => PemError::NoBlock,
        },
        pem::Error::Base64Decode(_) => PemError::Base64,
        _ => PemError::Unfinished,
    }
}

/// The labels of the blocks, as far as they are known ones: any other text could be a key's.
fn labels(text: &[u8]) -> impl Iterator<Item = &'static str> + '_ {
    let known = || {
        [CERTIFICATE, REVOCATION_LIST, ENCRYPTED_KEY]
            .into_iter()
            .chain(KEYS)
            .chain(OTHERS)
            .chain(FOREIGN)
    };
    lines(text).filter_map(move |line| {
        let label = line
            .strip_prefix(BEGIN)?
            .trim_ascii()
            .strip_suffix(b"-----")?;
        known().find(|known| known.as_bytes() == label)
    })
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| matches!(byte, b'\n' | b'\r'))
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::tests::certs::Authority;

    fn refusal(text: &[u8]) -> [PemError; 2] {
        [
            certificates(text).unwrap_err(),
            private_key(text).unwrap_err(),
        ]
    }

    #[test]
    fn each_common_mistake_is_named() {
        let root = Authority::root("example.org");
        let certificate = root.certificate_pem().replace('\r', "");
        let without_newline = certificate.trim_end();
        let one_line = certificate.replace('\n', " ");
        let escaped = certificate.replace('\n', "\\n");
        let indented = certificate.replace("-----BEGIN", "  -----BEGIN");
        let joined = format!("{without_newline}{certificate}");
        let cut = &certificate[..certificate.len() / 2];
        let marked = format!("\u{feff}{certificate}");
        let trusted = certificate.replace(" CERTIFICATE", " TRUSTED CERTIFICATE");
        for (text, wanted) in [
            (" \n", PemError::Empty),
            (&marked, PemError::ByteOrderMark),
            (&joined, PemError::Joined),
            (&indented, PemError::Joined),
            (&one_line, PemError::OneLine),
            (&escaped, PemError::OneLine),
            (cut, PemError::Unfinished),
            (&trusted, PemError::Foreign("TRUSTED CERTIFICATE")),
            ("hello", PemError::NoBlock),
        ] {
            assert_eq!(certificates(text.as_bytes()), Err(wanted), "{text}");
        }
        assert_eq!(
            private_key(certificate.as_bytes()),
            Err(PemError::Only("CERTIFICATE"))
        );
        let der = refusal(&root.certificate());
        assert!(der.iter().all(|error| matches!(error, PemError::Der(_))));
        // What is before a block, and Windows' line breaks, do no harm.
        let dressed = format!("Subject: CN = root\n{}", certificate.replace('\n', "\r\n"));
        assert_eq!(certificates(dressed.as_bytes()).unwrap().len(), 1);
        let two = format!("{certificate}{without_newline}");
        assert_eq!(certificates(two.as_bytes()).unwrap().len(), 2);
    }

    #[test]
    fn containers_and_encrypted_keys_are_named() {
        // The first bytes of files that OpenSSL wrote.
        let pkcs12 = [0x30, 0x82, 0x04, 0x9e, 2, 1, 3, 0x30, 0x82, 0x04, 0x54];
        assert_eq!(refusal(&pkcs12), [PemError::Pkcs12; 2]);
        let pkcs7 = [0x30, 0x82, 0x02, 0x10, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7];
        assert_eq!(refusal(&pkcs7), [PemError::Pkcs7; 2]);
        for encrypted in [
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
            "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\n\
             AAAA\n-----END EC PRIVATE KEY-----\n",
        ] {
            let error = private_key(encrypted.as_bytes()).unwrap_err();
            assert_eq!(error, PemError::EncryptedKey);
        }
    }

    #[test]
    fn no_error_repeats_a_byte_of_the_file() {
        let key = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg";
        let mut said = Vec::new();
        for text in [
            format!("-----BEGIN PRIVATE KEY----- {key} -----END PRIVATE KEY-----"),
            format!("-----BEGIN PRIVATE KEY-----\\n{key}\\n-----END PRIVATE KEY-----"),
            format!("-----BEGIN {key}-----\n{key}\n-----END {key}-----"),
            format!("-----BEGIN {key}\n{key}\n"),
            format!("-----BEGIN PRIVATE KEY-----\n{key}\n"),
            format!("-----BEGIN PRIVATE KEY-----\n{key}!\n-----END PRIVATE KEY-----"),
            format!("-----BEGIN PRIVATE KEY-----\n{key}\n-----END {key}-----"),
            key.to_owned(),
        ] {
            for error in refusal(text.as_bytes()) {
                said.push(format!("{error} {error:?}"));
            }
            said.push(format!("{:?}", revocation_lists(text.as_bytes())));
        }
        let decimal = format!("{:?}", key.as_bytes());
        for text in said {
            assert!(!text.contains(&key[..4]), "{text}");
            assert!(!text.contains(&decimal[1..12]), "{text}");
        }
    }
}
