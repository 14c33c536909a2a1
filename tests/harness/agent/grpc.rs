//! gRPC as a server speaks it: HTTP/2, messages behind a head of five bytes, and a status in the
//! trailers.

use bytes::{BufMut, Bytes, BytesMut};
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, Request, Response};
use prost::Message;

/// Bytes before each message: one that says whether it is compressed, four for its length.
const HEAD: usize = 5;

/// `INVALID_ARGUMENT`
pub(super) const INVALID_ARGUMENT: u8 = 3;
/// `PERMISSION_DENIED`
pub(super) const PERMISSION_DENIED: u8 = 7;
/// `UNIMPLEMENTED`
pub(super) const UNIMPLEMENTED: u8 = 12;

/// The only message of a request.
pub(super) async fn message(request: &mut Request<RecvStream>) -> Result<Bytes, h2::Error> {
    let body = request.body_mut();
    let mut whole = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        whole.extend_from_slice(&chunk);
    }
    assert!(whole.len() >= HEAD, "a request has a message");
    Ok(whole.split_off(HEAD).freeze())
}

/// Begins an answer.
pub(super) fn begin(mut respond: SendResponse<Bytes>) -> Result<SendStream<Bytes>, h2::Error> {
    let head = Response::builder()
        .header("content-type", "application/grpc")
        .body(())
        .expect("it is a response");
    respond.send_response(head, false)
}

/// One message of an answer.
pub(super) fn send(stream: &mut SendStream<Bytes>, message: &[u8]) -> Result<(), h2::Error> {
    let mut framed = BytesMut::with_capacity(HEAD + message.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).expect("messages are small"));
    framed.extend_from_slice(message);
    stream.send_data(framed.freeze(), false)
}

/// Ends an answer with a status.
pub(super) fn end(
    stream: &mut SendStream<Bytes>,
    status: u8,
    message: &str,
) -> Result<(), h2::Error> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", status.to_string().parse().expect("a number"));
    trailers.insert("grpc-message", message.parse().expect("a plain text"));
    stream.send_trailers(trailers)
}

/// Reads a message of a known kind.
pub(super) fn read<M: Message + Default>(bytes: Bytes) -> M {
    M::decode(bytes).expect("the daemon sends what the definition says")
}
