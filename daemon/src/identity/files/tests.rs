use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::stat::Mode,
    unistd::mkfifo,
};

use super::{
    CertificateSource, FilesLayout, FilesSource, PathPattern, Paths, Remark, SpiffeId,
    read::{self, Set},
};
use crate::watch::tests::without_watches;

/// How long something that is to happen at once may take on a busy machine.
const SOON: Duration = Duration::from_secs(20);

fn paths(folder: &Path) -> Paths {
    Paths {
        certificate: folder.join("tls.crt"),
        key: folder.join("tls.key"),
        bundle: None,
        revocation_lists: None,
    }
}

/// The next version of a Kubernetes secret, swapped in as the kubelet does it.
fn swap(folder: &Path, version: u32) {
    let data = folder.join(format!("..{version}"));
    fs::create_dir(&data).unwrap();
    for name in ["tls.crt", "tls.key"] {
        fs::write(data.join(name), version.to_string()).unwrap();
        let _ = symlink(Path::new("..data").join(name), folder.join(name));
    }
    symlink(format!("..{version}"), folder.join("..data_tmp")).unwrap();
    fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
}

fn id() -> SpiffeId {
    SpiffeId::parse("spiffe://example.org/ns/shop/sa/cart").unwrap()
}

fn layout(folder: &Path) -> FilesLayout {
    let pattern = |text: &str| PathPattern::parse(text).unwrap();
    FilesLayout {
        folder: pattern(folder.to_str().unwrap()),
        certificate: pattern("tls.crt"),
        key: pattern("tls.key"),
        bundle: None,
        revocation_lists: None,
    }
}

fn contents(set: &Set) -> [String; 2] {
    [&set.certificate, &set.key].map(|bytes| String::from_utf8(bytes.to_vec()).unwrap())
}

#[test]
fn a_set_is_read_from_one_version_of_a_secret() {
    let folder = tempfile::tempdir().unwrap();
    swap(folder.path(), 1);
    let pinned = paths(folder.path()).pinned();
    // Between the link and the files.
    swap(folder.path(), 2);
    assert_eq!(contents(&read::read(&pinned).unwrap()), ["1", "1"]);
    let now = read::read(&paths(folder.path())).unwrap();
    assert_eq!(contents(&now), ["2", "2"]);
}

#[test]
fn however_often_a_secret_is_swapped_no_set_is_mixed() {
    let folder = tempfile::tempdir().unwrap();
    swap(folder.path(), 1);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for version in 2..300 {
                swap(folder.path(), version);
                fs::remove_dir_all(folder.path().join(format!("..{}", version - 1))).unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        let (mut sets, mut last) = (0, 0);
        while !done.load(Ordering::Relaxed) {
            // A swap at each attempt is nobody's fault.
            if let Ok(set) = read::read(&paths(folder.path())) {
                let [certificate, key] = contents(&set);
                assert_eq!(certificate, key);
                let version: u32 = key.parse().unwrap();
                assert!(version >= last);
                last = version;
                sets += 1;
            }
        }
        assert!(sets > 0);
    });
}

#[test]
fn files_that_change_while_they_are_read_are_of_one_moment() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // Each version stays under another name: no inode is given again.
    let put = |name: &str, version: u32| {
        let (kept, new) = (folder.join(format!("{name}.{version}")), folder.join("new"));
        fs::write(&kept, version.to_string()).unwrap();
        fs::hard_link(&kept, &new).unwrap();
        fs::rename(&new, folder.join(name)).unwrap();
    };
    let put_both = |version| {
        for name in ["tls.crt", "tls.key"] {
            put(name, version);
        }
    };
    put_both(0);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            (1..4000).for_each(put_both);
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            if let Ok(set) = read::read(&paths(folder)) {
                let [certificate, key] = contents(&set).map(|text| text.parse::<u32>().unwrap());
                // The certificate is written first.
                assert!(
                    certificate == key || certificate == key + 1,
                    "{certificate} {key}"
                );
            }
        }
    });
    assert_eq!(contents(&read::read(&paths(folder)).unwrap()), ["3999"; 2]);
}

#[test]
fn what_is_no_file_is_refused_and_waits_for_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    mkfifo(&at("pipe"), Mode::S_IRWXU).unwrap();
    fs::create_dir(at("folder")).unwrap();
    let large = fs::File::create(at("large")).unwrap();
    large.set_len(17 << 20).unwrap();
    for (name, why) in [
        ("pipe", "not a regular file"),
        ("folder", "not a regular file"),
        ("large", "more than 16777216 bytes"),
        ("nothing", "No such file"),
    ] {
        let error = read::read_file(&at(name)).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains(name), "{error}");
    }
}

#[test]
fn a_file_that_is_mounted_by_itself_is_found() {
    let folder = tempfile::tempdir().unwrap();
    swap(folder.path(), 1);
    assert!(!read::read(&paths(folder.path())).unwrap().mounted);
    let (elsewhere, place) = (tempfile::tempdir().unwrap(), folder.path().to_owned());
    for name in ["tls.crt", "tls.key"] {
        fs::write(elsewhere.path().join(name), "mounted over").unwrap();
    }
    // The mount is in a namespace of this thread alone, and goes with it.
    let elsewhere = elsewhere.path().to_owned();
    thread::spawn(move || {
        let none = None::<&Path>;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).unwrap();
        let file = place.join("..1/tls.crt");
        mount(
            Some(&file),
            &elsewhere.join("tls.crt"),
            none,
            MsFlags::MS_BIND,
            none,
        )
        .unwrap();
        let set = read::read(&paths(&elsewhere)).unwrap();
        assert!(set.mounted);
        assert_eq!(contents(&set), ["1", "mounted over"]);
        let source = FilesSource::new(layout(&elsewhere));
        assert!(source.remarks(&id()).is_empty());
        assert!(source.read(&id()).is_err(), "they hold nothing in PEM");
        assert_eq!(source.remarks(&id()), [Remark::MountedFile]);
        // A whole folder that is mounted changes as it should.
        mount(Some(&place), &elsewhere, none, MsFlags::MS_BIND, none).unwrap();
        assert!(!read::read(&paths(&elsewhere)).unwrap().mounted);
    })
    .join()
    .unwrap();
}

#[test]
fn a_systemd_credential_is_remarked() {
    // A mount namespace of this thread alone, with a `/run` of its own.
    thread::spawn(|| {
        let none = None::<&Path>;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).unwrap();
        mount(none, "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        let folder = Path::new("/run/credentials/reeve.service");
        fs::create_dir_all(folder).unwrap();
        for name in ["tls.crt", "tls.key"] {
            fs::write(folder.join(name), "not read here").unwrap();
        }
        let source = FilesSource::new(layout(folder));
        assert!(source.read(&id()).is_err(), "they hold nothing in PEM");
        assert_eq!(source.remarks(&id()), [Remark::SystemdCredential]);
        // A link to it is the same; a copy elsewhere is not.
        let (link, copy) = (Path::new("/run/link"), Path::new("/run/copy"));
        symlink(folder, link).unwrap();
        fs::create_dir(copy).unwrap();
        for name in ["tls.crt", "tls.key"] {
            fs::copy(folder.join(name), copy.join(name)).unwrap();
        }
        for (folder, remarks) in [(link, &[Remark::SystemdCredential][..]), (copy, &[])] {
            let source = FilesSource::new(layout(folder));
            let _ = source.read(&id());
            assert_eq!(source.remarks(&id()), remarks);
        }
    })
    .join()
    .unwrap();
}

/// Run by [`that_files_are_only_polled_is_said`] where nothing can be watched.
#[tokio::test]
#[ignore = "for a process whose user has no inotify watches"]
async fn polled() {
    let folder = tempfile::tempdir().unwrap();
    let source = FilesSource::new(layout(folder.path()));
    let _changes = source.changes(&id());
    let said = async {
        while source.remarks(&id()) != [Remark::Polled] {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(SOON, said).await.unwrap();
}

#[test]
fn that_files_are_only_polled_is_said() {
    without_watches("identity::files::tests::polled");
}

#[test]
fn paths_name_parts_of_the_identity() {
    let pattern = |text: &str| PathPattern::parse(text).unwrap();
    let layout = |folder: &str| FilesLayout {
        folder: pattern(folder),
        certificate: pattern("{serviceAccount}.pem"),
        key: pattern("/keys/{namespace}/{serviceAccount}"),
        bundle: None,
        revocation_lists: None,
    };
    let usual = SpiffeId::parse("spiffe://example.org/ns/shop/sa/cart").unwrap();
    let found = layout("/tls/{namespace}").paths(&usual).unwrap();
    assert_eq!(found.certificate, PathBuf::from("/tls/shop/cart.pem"));
    assert_eq!(found.key, PathBuf::from("/keys/shop/cart"));

    let unusual = SpiffeId::parse("spiffe://example.org/any/path").unwrap();
    let error = layout("/tls").paths(&unusual).unwrap_err().to_string();
    assert!(error.contains("`{path}`"), "{error}");
    let by_path = FilesLayout {
        certificate: pattern("tls.crt"),
        key: pattern("tls.key"),
        ..layout("/tls/{path}")
    };
    let found = by_path.paths(&unusual).unwrap();
    assert_eq!(found.certificate, PathBuf::from("/tls/any/path/tls.crt"));
}

#[test]
fn braces_around_something_else_are_no_pattern() {
    for text in ["{name}", "a}", "{", "{{namespace}}", ""] {
        assert!(PathPattern::parse(text).is_err(), "{text}");
    }
    // A key where its file's name should be.
    let error = PathPattern::parse("-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMG").unwrap_err();
    assert!(
        error.contains("found PEM") && !error.contains("MIG"),
        "{error}"
    );
    let shown = crate::yaml::shown("-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMG");
    assert!(!shown.contains("MIG"), "{shown}");
}
