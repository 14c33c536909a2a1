//! What daemons hold does not grow with what they carry. `cargo xtask soak` does the same for
//! longer.

use std::time::Duration;

use harness::Soak;

#[test]
fn nothing_grows_and_nothing_fails_under_mixed_traffic() {
    let soak = Soak::run(Duration::from_secs(45));
    println!("{soak}");
    assert_eq!(soak.wrong, [""; 0], "{soak}");
    // It was mixed indeed.
    assert!(soak.connections > 500, "{soak}");
    assert!(soak.denied > 100, "{soak}");
    assert!(soak.transfers > 5, "{soak}");
    assert!(soak.datagrams > 20, "{soak}");
    assert!(soak.rotations >= 5, "{soak}");
}
