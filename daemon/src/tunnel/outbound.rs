//! One connection that a workload opened and the kernel redirected: taken through a tunnel to the
//! peer that it was meant for, or reset. Never is a byte of it sent as plaintext.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    rc::Rc,
    sync::Arc,
};

use reeve_common::Origin;
use tokio::net::TcpStream;

use crate::{
    datapath::netns::Netns,
    policy::{Decision, Snapshot},
    telemetry::ConnectionId,
};

use super::{
    TunnelError, authority,
    bounds::Place,
    connection::{Call, Parties, Would},
    copy::copy,
    first::FirstBytes,
    pool::{Stream, Wanted},
    socket, source,
    worker::Worker,
};

/// Serves an accepted connection to its end.
pub(super) async fn serve(
    worker: Rc<Worker>,
    netns: Arc<Netns>,
    mut app: TcpStream,
    source: SocketAddr,
) {
    let origin = worker.shared.storage.origin(app.as_fd());
    let mut call = Call {
        parties: Parties::Outbound {
            workload: None,
            peer: None,
        },
        source,
        destination: source,
        netns: netns.cookie,
        rule: 0,
        would: Would::default(),
        id: Some(ConnectionId::new()),
    };
    let connected = match origin {
        Some(origin) => {
            let connected = connect(&worker, &netns, &mut call, &origin, &mut app).await;
            match &connected {
                Ok(_) => worker.failing.stands(&origin),
                Err(error) => worker.failing.failed(&origin, error),
            }
            connected
        }
        None => Err(TunnelError::NoOrigin),
    };
    let (stream, sent, place) = match connected {
        Ok(connected) => connected,
        Err(error) => {
            call.refused(&worker, &error);
            socket::reset(app);
            return;
        }
    };
    // The redirected socket has an address of the loopback device. The connection comes from where its
    // tunnel does, which the peer's log shows as well.
    if call.source.ip().is_loopback() {
        call.source.set_ip(stream.slot.link().ends.local.ip());
    }
    let live = call.open(&worker, stream.slot.link(), place);
    let connection = live.connection().clone();
    connection.moved_out(sent);
    // What changed while the tunnel was opened has not been judged yet.
    connection.judge_again(&worker, &worker.shared.snapshot.load());
    let reason = copy(app, stream.send, stream.recv, connection).await;
    live.ended(reason);
}

/// Judges the connection and gets it a stream, in which so many of the application's bytes were sent
/// already. What is found out about it goes into `call`.
async fn connect(
    worker: &Rc<Worker>,
    netns: &Arc<Netns>,
    call: &mut Call,
    origin: &Origin,
    app: &mut TcpStream,
) -> Result<(Stream, usize, Place), TunnelError> {
    call.destination = SocketAddr::new(authority::from_map(origin.address), origin.port);
    call.rule = origin.rule;
    let (to, from, decision) = identify(&worker.shared.snapshot.load(), call, origin)?;
    call.allowed_by(&decision);
    let place = worker.bounds.place(origin.workload, None)?;
    let Parties::Outbound {
        workload: Some(workload),
        peer: Some((_, expected)),
    } = &call.parties
    else {
        return Err(TunnelError::Stale("the workload or the peer"));
    };
    let allowed = || call.judge(&worker.shared.snapshot.load()).map(drop);
    let mut first = FirstBytes::new(app, &allowed);
    let wanted = Wanted {
        netns,
        own: &workload.attributes.spiffe_id,
        source: from,
        peer: to,
        expected,
        id: call.id,
    };
    let stream = worker
        .pool
        .stream(worker, wanted, call.destination, &mut first)
        .await?;
    Ok((stream, first.sent(), place))
}

/// Finds the ends and judges the connection. Gives the peer's tunnel port, the address from which the
/// tunnel is to come, and the verdict.
fn identify(
    snapshot: &Snapshot,
    call: &mut Call,
    origin: &Origin,
) -> Result<(SocketAddr, Option<IpAddr>, Decision), TunnelError> {
    let running = snapshot
        .workload(origin.workload)
        .ok_or(TunnelError::Stale("the workload"))?;
    let mut parties = (running.workload.clone(), None);
    let peer = snapshot.peer(origin.peer);
    let known = peer.and_then(|peer| {
        let expected = peer.attributes.as_ref()?.spiffe_id.clone();
        Some((peer.clone(), expected, peer.tunnel_port?))
    });
    let port = known.map(|(peer, expected, port)| {
        parties.1 = Some((peer, expected));
        port
    });
    call.parties = Parties::Outbound {
        workload: Some(parties.0),
        peer: parties.1,
    };
    let port = port.ok_or(TunnelError::Stale("the peer"))?;
    let decision = call.judge(snapshot)?;
    let source = source::of_tunnel(snapshot, running, call.source.ip(), call.destination)?;
    let peer = SocketAddr::new(call.destination.ip(), port);
    Ok((peer, source, decision))
}
