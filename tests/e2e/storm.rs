//! Certificates that rotate every second break nothing that is carried meanwhile. `cargo xtask
//! storm` does the same for longer.

use std::time::Duration;

use harness::Storm;

#[test]
fn nothing_breaks_while_certificates_rotate_every_second() {
    let storm = Storm::run(Duration::from_secs(20));
    assert_eq!(storm.wrong, [""; 0], "{storm:?}");
    assert_eq!(storm.failed, 0, "{storm:?}");
    assert!(storm.connections >= 2000, "{storm:?}");
    assert!(storm.transfers >= 2, "{storm:?}");
    // Both daemons have followed: what is written within a second of the other may be one change.
    assert!(storm.rotations >= 8, "{storm:?}");
    assert!(storm.accepted >= storm.rotations, "{storm:?}");
}
