//! What the tests of tunnels rely on: the harness's own client and server of tunnels.

use harness::{
    Network, Node,
    certs::Authority,
    hbone::{Client, Conduct, PORT, Server},
};

const CLIENT: &str = "spiffe://example.org/client";
const SERVER: &str = "spiffe://example.org/server";

#[test]
fn a_stream_carries_bytes_both_ways() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let (here, there) = (node.pod("here"), node.pod("there"));
    let root = Authority::root("example.org");
    let server = Server::start(&there, PORT, &root.leaf(SERVER), Conduct::Echo);
    let client = Client::new(&here).presenting(&root.leaf(CLIENT));
    let tunnel = client.tunnel(there.addresses().port4(PORT)).unwrap();
    let mut stream = tunnel.connect("192.0.2.1:80").unwrap();
    stream.send("there and back").unwrap();
    stream.finish().unwrap();
    assert_eq!(stream.receive().unwrap(), b"there and back");
    assert_eq!(tunnel.presented, SERVER);
    assert_eq!(server.authorities(), ["192.0.2.1:80"]);
    assert_eq!(server.seen()[0].presented, CLIENT);
}

#[test]
fn client_and_server_resume_a_session() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let (here, there) = (node.pod("here"), node.pod("there"));
    let root = Authority::root("example.org");
    let server = Server::start(&there, PORT, &root.leaf(SERVER), Conduct::Echo);
    let client = Client::new(&here).presenting(&root.leaf(CLIENT));
    let to = there.addresses().port6(PORT);
    let first = client.handshake(to).unwrap();
    assert!(first.tickets > 0 && !first.resumed);
    assert!(client.handshake(to).unwrap().resumed);
    assert!(server.seen()[1].resumed);
}
