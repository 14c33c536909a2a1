//! What reeve needs in a workload's network namespace, and what others change there: rules, settings,
//! devices and address families come and go, and connections go on.

use std::{net::SocketAddr, time::Duration};

use harness::{Daemon, Place, eventually, holds_for};

use crate::arrange::{PORT, Pair, answers, denials, fails_fast, say, serve};

/// `ONWARD_MARK`, as `ip` writes it.
const MARK: &str = "fwmark 0x539";

fn ip(place: &Place, words: &str) -> String {
    place
        .exec([&["ip"], &*words.split(' ').collect::<Vec<_>>()].concat())
        .ok()
}

/// The rules of both families for reeve's mark.
fn rules(place: &Place) -> [Vec<String>; 2] {
    ["-4 rule show", "-6 rule show"].map(|show| {
        let all = ip(place, show);
        let found = all.lines().filter(|line| line.contains(MARK));
        found.map(str::to_owned).collect()
    })
}

fn both(pair: &Pair) -> [SocketAddr; 2] {
    let addresses = pair.server.addresses();
    [addresses.port4(PORT), addresses.port6(PORT)]
}

#[track_caller]
fn recovers(pair: &Pair, two: &Daemon, what: &str) {
    eventually(what, || {
        rules(&pair.server).map(|rules| rules.len()) == [1, 1]
    });
    for to in both(pair) {
        say(&pair.client, to, what);
    }
    assert!(two.is_ready(), "{what}");
}

#[test]
fn rules_and_routes_that_others_remove_are_put_back() {
    let (pair, _one, two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    for family in ["-4", "-6"] {
        ip(&pair.server, &format!("{family} rule del {MARK}"));
        recovers(&pair, &two, "the rule is back");
        ip(&pair.server, &format!("{family} route flush table 15008"));
        eventually("the route is back", || {
            !ip(&pair.server, &format!("{family} route show table 15008")).is_empty()
        });
        recovers(&pair, &two, "with its route");
    }
    ip(&pair.server, "link set lo down");
    ip(&pair.server, "link set lo up");
    eventually("the device is back with its routes", || {
        both(&pair).iter().all(|to| answers(&pair.client, to))
    });
    recovers(&pair, &two, "after the device was down");
    let said = ["it is put back", "the rule for marked packets"];
    assert!(two.logged(&said).len() >= 2);
}

#[test]
fn settings_that_others_change_are_put_back() {
    let (pair, _one, two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    pair.server.sysctl("ipv4/tcp_fwmark_accept", "0");
    two.wait_for_log(&["it is put back", "net.ipv4.tcp_fwmark_accept"]);
    recovers(&pair, &two, "with its settings");
}

#[test]
fn a_rule_by_source_address_does_not_take_replies_elsewhere() {
    let (pair, _one, two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    let server = pair.server.addresses();
    // As for a second line: what comes from this address leaves by it.
    for (family, source) in [("-4", server.v4.to_string()), ("-6", server.v6.to_string())] {
        ip(
            &pair.server,
            &format!("{family} route add default dev eth0 table 100"),
        );
        ip(
            &pair.server,
            &format!("{family} rule add from {source} lookup 100"),
        );
        ip(
            &pair.server,
            &format!("{family} rule add from {source} lookup 100 priority 5"),
        );
    }
    recovers(&pair, &two, "beside rules by source");
}

#[test]
fn rules_exist_once_however_often_reeve_starts_and_none_is_left_by_detach() {
    let pair = Pair::new();
    // What an earlier reeve has left: a rule without a place of its own.
    ip(&pair.server, &format!("-4 rule add {MARK} lookup 15008"));
    ip(&pair.server, &format!("-6 rule add {MARK} lookup 15008"));
    let mut two = pair.allowing_at_two().start();
    for _ in 0..2 {
        let found = rules(&pair.server);
        assert!(found.iter().all(|rules| rules.len() == 1), "{found:?}");
        assert!(
            found.iter().all(|rules| rules[0].starts_with("0:")),
            "{found:?}"
        );
        two.stop();
        two.start_again();
        two.wait_until_ready();
    }
    two.stop();
    two.detach().ok();
    assert!(rules(&pair.server).iter().all(Vec::is_empty));
}

#[test]
fn ipv6_that_comes_after_the_start_or_goes_and_comes_again_is_used() {
    let pair = Pair::new();
    let off = |place: &Place, value: &str| place.sysctl("ipv6/conf/all/disable_ipv6", value);
    for place in [&*pair.client, &*pair.server] {
        off(place, "1");
    }
    let (_one, two) = (
        pair.allowing_at_one().start(),
        pair.allowing_at_two().start(),
    );
    let _echo = serve(&pair.server, PORT, &[]);
    let [v4, v6] = both(&pair);
    say(&pair.client, v4, "without IPv6");
    for _ in 0..2 {
        for place in [&pair.client, &pair.server] {
            off(place, "0");
            let address = place.addresses().v6;
            ip(place, &format!("addr add {address}/64 dev eth0 nodad"));
        }
        eventually("IPv6 is used", || answers(&pair.client, v6));
        recovers(&pair, &two, "with IPv6");
        for place in [&*pair.client, &*pair.server] {
            off(place, "1");
        }
        say(&pair.client, v4, "again without");
    }
}

#[test]
fn more_processes_in_nested_namespaces_than_in_the_pods_own_move_nothing() {
    let (pair, mut one, mut two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    // As Docker in a pod, or a runner of continuous integration, has them.
    let nest = |place: &Place| place.spawn(["unshare", "--net", "sleep", "infinity"]);
    let places = [&*pair.client, &*pair.server];
    let _nested: Vec<_> = (0..12).map(|number| nest(places[number % 2])).collect();
    let works = |what: &str| {
        for to in both(&pair) {
            say(&pair.client, to, what);
        }
    };
    // Three times as long as the daemon takes to look again.
    holds_for(
        Duration::from_secs(3),
        "the workload is where it was",
        || both(&pair).iter().all(|to| answers(&pair.client, to)),
    );
    works("as ever");
    for daemon in [&mut one, &mut two] {
        daemon.stop();
        daemon.start_again();
        daemon.wait_until_ready();
    }
    works("found again by a daemon that has not seen who came first");
}

#[test]
fn a_family_without_a_route_is_as_unreachable_as_without_reeve() {
    let (pair, one, _two) = Pair::started();
    let _echo = serve(&pair.server, PORT, &[]);
    let [v4, v6] = both(&pair);
    say(&pair.client, v6, "by IPv6");
    ip(&pair.client, "-6 addr flush dev eth0 scope global");
    let unreachable = "Network is unreachable";
    let error = || crate::arrange::send(&pair.client, v6, &[]).stderr;
    eventually("it is known", || error().contains(unreachable));
    fails_fast(&pair.client, v6, unreachable);
    say(&pair.client, v4, "by IPv4");
    // Looking up names asks for the source address of each candidate, and connects to none.
    let before = denials(&one, "egress", "no_policy");
    let to = v6.to_string();
    let asked = pair
        .client
        .peer(["udp-send", &to, "--connect", "--patience", "100"]);
    assert!(asked.stderr.contains(unreachable), "{}", asked.stderr);
    assert_eq!(denials(&one, "egress", "no_policy"), before);
    let address = pair.client.addresses().v6;
    ip(
        &pair.client,
        &format!("addr add {address}/64 dev eth0 nodad"),
    );
    eventually("it is reachable again", || answers(&pair.client, v6));
}
