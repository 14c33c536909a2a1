//! What a node lives through costs no connection that plain TCP would keep, and what daemons hold does
//! not grow with what they carry. `cargo xtask soak` does the same for longer.

use std::time::Duration;

use harness::{Happening, Soak};

#[test]
fn nothing_grows_and_nothing_fails_under_mixed_traffic() {
    let soak = Soak::run(Duration::from_secs(48));
    println!("{soak}");
    assert_eq!(soak.wrong, [""; 0], "{soak}");
    // It was mixed indeed.
    assert!(soak.connections > 500, "{soak}");
    assert!(soak.denied > 100, "{soak}");
    assert!(soak.transfers > 5, "{soak}");
    assert!(soak.datagrams > 20, "{soak}");
    for (happening, times) in [
        (Happening::Upgrade, 2),
        (Happening::Cut, 1),
        (Happening::Mend, 1),
        (Happening::Clock, 4),
        (Happening::Root, 3),
        (Happening::Renewal, 5),
        (Happening::Policy, 4),
    ] {
        assert!(soak.times(happening) >= times, "{happening}: {soak}");
    }
    assert!(
        soak.long.values().map(|tally| tally.times).sum::<usize>() > 20,
        "{soak}"
    );
}
