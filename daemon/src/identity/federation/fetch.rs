//! One answer of a bundle endpoint, by HTTPS.

use std::{error::Error, fmt, path::PathBuf, sync::Arc, time::Duration};

use http::{
    Request, StatusCode,
    header::{ACCEPT, CONNECTION, HOST, LOCATION, USER_AGENT},
};
use http_body_util::{BodyExt, Empty};
use hyper::{
    body::{Body, Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::CryptoProvider,
};
use rustls_native_certs::ErrorKind;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use super::{BundleDocument, EndpointError, EndpointUrl};
use crate::identity::{
    RejectReason, SpiffeId, SvidVerifier, TrustBundle, TrustDomain, TrustStore, crypto, judged,
    pem_file,
};

/// For the name's addresses and the TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For all of it: a server that drips bytes is given up as well.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest document that is taken: a thousand certificates fit.
const LARGEST_DOCUMENT: usize = 1 << 20;

/// What is to be fetched.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) trust_domain: TrustDomain,
    pub(super) url: EndpointUrl,
    pub(super) server: Server,
    /// Suites and groups of the handshake.
    pub(super) provider: Arc<CryptoProvider>,
}

/// Who has to be there.
#[derive(Debug)]
pub(super) enum Server {
    /// Whoever has the name in the URL, by these authorities or the operating system's.
    Named(Option<PathBuf>),
    /// Who has this SPIFFE ID.
    Identity(SpiffeId, Arc<TrustStore>),
}

/// A bundle, and the document that it was in.
#[derive(Debug)]
pub(super) struct Fetched {
    pub(super) text: String,
    pub(super) document: BundleDocument,
    pub(super) bundle: Arc<TrustBundle>,
}

/// Fetches and reads a bundle.
pub(super) async fn fetch(question: Question) -> Result<Fetched, EndpointError> {
    let body = timeout(WHOLE_TIMEOUT, get(&question))
        .await
        .map_err(|_| EndpointError::Timeout(WHOLE_TIMEOUT))??;
    Fetched::read(&body, question.trust_domain)
}

impl Fetched {
    pub(super) fn read(text: &[u8], trust_domain: TrustDomain) -> Result<Self, EndpointError> {
        let document = BundleDocument::parse(text)?;
        let bundle = Arc::new(document.bundle(trust_domain)?);
        Ok(Self {
            // What was read is JSON, which is UTF-8.
            text: String::from_utf8_lossy(text).into_owned(),
            document,
            bundle,
        })
    }
}

async fn get(question: &Question) -> Result<Vec<u8>, EndpointError> {
    let url = &question.url;
    let verifier = verifier(question)?;
    let name = ServerName::try_from(url.host().to_owned())
        .map_err(|error| EndpointError::Unreachable(error.to_string()))?;
    let tls = crypto::anonymous_client_config(question.provider.clone(), verifier)
        .map_err(|error| EndpointError::Handshake(error.to_string()))?;

    let connecting = TcpStream::connect((url.host(), url.port()));
    let tcp = timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| EndpointError::Timeout(CONNECT_TIMEOUT))?
        .map_err(|error| EndpointError::Unreachable(error.to_string()))?;
    let stream = judged(TlsConnector::from(Arc::new(tls)).connect(name, tcp))
        .await
        .map_err(|error| EndpointError::Handshake(RejectReason::explain(&error)))?;

    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| broken(&error))?;
    let asking = Request::get(url.path())
        .header(HOST, url.host_header())
        .header(USER_AGENT, concat!("reeve/", env!("CARGO_PKG_VERSION")))
        .header(ACCEPT, "application/json")
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| EndpointError::Broken(error.to_string()))?;
    let answering = async {
        let answer = sender
            .send_request(asking)
            .await
            .map_err(|error| broken(&error))?;
        match answer.status() {
            StatusCode::OK => body(answer.into_body()).await,
            status if status.is_redirection() => {
                let location = answer.headers().get(LOCATION);
                let location =
                    location.map_or("?".into(), |it| String::from_utf8_lossy(it.as_bytes()));
                Err(EndpointError::Redirect(location.escape_debug().to_string()))
            }
            status => Err(EndpointError::Status(status.as_u16())),
        }
    };
    let mut connection = std::pin::pin!(connection);
    let mut answering = std::pin::pin!(answering);
    tokio::select! {
        answer = &mut answering => answer,
        // The connection may be over before its last bytes have been looked at.
        over = &mut connection => match over {
            Ok(()) => answering.await,
            Err(error) => Err(broken(&error)),
        },
    }
}

async fn body(mut body: Incoming) -> Result<Vec<u8>, EndpointError> {
    let too_large = EndpointError::TooLarge(LARGEST_DOCUMENT);
    if body.size_hint().lower() > LARGEST_DOCUMENT as u64 {
        return Err(too_large);
    }
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|error| broken(&error))?.into_data() else {
            continue;
        };
        if whole.len() + data.len() > LARGEST_DOCUMENT {
            return Err(too_large);
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole)
}

fn verifier(question: &Question) -> Result<Arc<dyn ServerCertVerifier>, EndpointError> {
    match &question.server {
        Server::Identity(id, trust) => {
            Ok(Arc::new(SvidVerifier::exactly(trust.clone(), id.clone())))
        }
        Server::Named(file) => {
            let unusable = |error: String| EndpointError::Authorities(error);
            let mut roots = RootCertStore::empty();
            let (used, _) = roots.add_parsable_certificates(authorities(file.as_ref())?);
            if used == 0 {
                return Err(unusable("there is none".into()));
            }
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), question.provider.clone())
                .build()
                .map(|verifier| verifier as Arc<dyn ServerCertVerifier>)
                .map_err(|error| unusable(error.to_string()))
        }
    }
}

/// Read anew each time, so that what the operating system's updates change is followed.
fn authorities(file: Option<&PathBuf>) -> Result<Vec<CertificateDer<'static>>, EndpointError> {
    let Some(file) = file else {
        let found = rustls_native_certs::load_native_certs();
        return match &found.errors[..] {
            [error, ..] if found.certs.is_empty() => {
                // Of a file that is no PEM the library's error repeats the bytes.
                let why = match &error.kind {
                    ErrorKind::Io { inner, path } => format!("{}: {inner}", path.display()),
                    _ => "the operating system's files are no PEM".to_owned(),
                };
                Err(EndpointError::Authorities(why))
            }
            _ => Ok(found.certs),
        };
    };
    let unusable = |error: &dyn fmt::Display| {
        EndpointError::Authorities(format!("{}: {error}", file.display()))
    };
    let text = std::fs::read(file).map_err(|error| unusable(&error))?;
    pem_file::certificates(&text).map_err(|error| unusable(&error))
}

/// With what lies below an error: the outermost says little.
fn broken(error: &hyper::Error) -> EndpointError {
    match error.source() {
        Some(source) => EndpointError::Broken(format!("{error}: {source}")),
        None => EndpointError::Broken(error.to_string()),
    }
}
