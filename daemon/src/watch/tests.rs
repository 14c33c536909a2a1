use std::{io::Write, os::unix::fs::symlink, path::Path, process::Command, time::Duration};

use tokio::time::{Instant, timeout};

use super::*;

/// How long a change may take to be told, where nothing else keeps the machine busy.
const WITHIN: Duration = Duration::from_secs(1);
/// How long the test waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

impl Files {
    /// Waits for a change, and gives the time that it took.
    async fn told(&mut self) -> Duration {
        let start = Instant::now();
        timeout(PATIENCE, self.changed()).await.expect("no change");
        start.elapsed()
    }

    async fn is_quiet(&mut self) -> bool {
        timeout(2 * LONGEST, self.changed()).await.is_err()
    }
}

const LONGEST: Duration = Duration::from_millis(500);

fn file(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("set/tls.crt")
}

/// Watches one file in a folder that is or is not there, once the thread has begun to.
async fn watching(path: &Path) -> Files {
    let files = Files::watch(Vec::new(), vec![path.to_owned()]);
    tokio::time::sleep(Duration::from_millis(300)).await;
    files
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

#[tokio::test]
async fn writes_in_a_row_are_one_change() {
    let folder = tempfile::tempdir().unwrap();
    let mut files = Files::watch(vec![folder.path().to_owned()], Vec::new());
    tokio::time::sleep(Duration::from_millis(300)).await;
    loop {
        let (start, before) = (Instant::now(), *files.changes.borrow_and_update());
        for number in 0..5 {
            fs::write(folder.path().join("a.yaml"), format!("{number}")).unwrap();
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        let took = start.elapsed();
        files.told().await;
        assert!(files.is_quiet().await, "it is told twice");
        // On a busy machine there may be pauses between the writes.
        if took < LONGEST / 2 {
            assert_eq!(*files.changes.borrow(), before + 1, "{took:?}");
            break;
        }
    }
    fs::write(folder.path().join("b.yaml"), "new").unwrap();
    files.told().await;
    fs::remove_file(folder.path().join("a.yaml")).unwrap();
    files.told().await;
}

#[tokio::test]
async fn what_changes_between_a_look_and_the_watch_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder);
    write(&path, "before");
    let look = |path: &Path| Look::at(Vec::new(), vec![path.to_owned()]);
    let mut same = look(&path).watch();
    let before = look(&path);
    fs::remove_file(&path).unwrap();
    before.watch().told().await;
    same.told().await;
    assert!(look(&path).watch().is_quiet().await, "nothing has changed");
}

#[tokio::test]
async fn what_is_written_in_place_is_told_when_its_writer_has_closed_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder);
    write(&path, "the whole of it");
    let link = folder.path().join("link.crt");
    symlink(&path, &link).unwrap();
    let of_folder = vec![path.parent().unwrap().to_owned()];
    for (folders, files) in [
        (Vec::new(), vec![path.clone()]),
        (Vec::new(), vec![link]),
        (of_folder, Vec::new()),
    ] {
        let mut files = Files::watch(folders, files);
        tokio::time::sleep(Duration::from_millis(300)).await;
        // Truncates at once.
        let mut writer = fs::File::create(&path).unwrap();
        assert!(files.is_quiet().await, "nothing is there yet");
        writer.write_all(b"half of ").unwrap();
        assert!(files.is_quiet().await, "half of it is there");
        writer.write_all(b"it").unwrap();
        drop(writer);
        let took = files.told().await;
        assert!(took < WITHIN, "{took:?}");
    }
}

#[tokio::test]
async fn a_writer_who_never_closes_is_not_waited_for_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let mut files = Files::watch(vec![folder.path().to_owned()], Vec::new());
    tokio::time::sleep(Duration::from_millis(300)).await;
    let hidden = fs::File::create(folder.path().join(".a.yaml.swp")).unwrap();
    (&hidden).write_all(b"an editor's").unwrap();
    fs::write(folder.path().join("a.yaml"), "new").unwrap();
    let took = files.told().await;
    assert!(took < WITHIN, "a hidden file is nobody's: {took:?}");
    let open = fs::File::create(folder.path().join("b.yaml")).unwrap();
    (&open).write_all(b"and no end").unwrap();
    let took = files.told().await;
    assert!(took > WITHIN, "it may have been closed: {took:?}");
}

#[tokio::test]
async fn a_file_that_is_replaced_is_told_within_a_second_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder);
    write(&path, "0");
    let mut files = watching(&path).await;
    for number in 1..4 {
        let new = path.with_extension("new");
        write(&new, &number.to_string());
        fs::rename(&new, &path).unwrap();
        let took = files.told().await;
        assert!(took < WITHIN, "{took:?}");
    }
}

#[tokio::test]
async fn a_folder_that_is_deleted_and_made_again_is_watched_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder);
    write(&path, "1");
    let mut files = watching(&path).await;
    for number in 2..5 {
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
        files.told().await;
        write(&path, &number.to_string());
        let took = files.told().await;
        assert!(took < WITHIN, "{took:?}");
        // And what happens in the new folder.
        fs::write(&path, "again").unwrap();
        let took = files.told().await;
        assert!(took < WITHIN, "{took:?}");
    }
}

#[tokio::test]
async fn a_folder_that_is_made_again_before_anybody_looks_is_watched_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder);
    write(&path, "1");
    let mut files = watching(&path).await;
    for number in 2..6 {
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
        write(&path, &number.to_string());
        files.told().await;
        fs::write(&path, "again").unwrap();
        let took = files.told().await;
        assert!(took < WITHIN, "{took:?}");
    }
}

#[tokio::test]
async fn a_folder_that_is_not_there_yet_is_seen_when_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("not/yet/there/tls.crt");
    let mut files = watching(&path).await;
    write(&path, "1");
    let took = files.told().await;
    assert!(took < WITHIN, "{took:?}");
}

#[tokio::test]
async fn the_swap_of_a_link_to_a_folder_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&at("..1/tls.crt"), "1");
    symlink("..1", at("..data")).unwrap();
    symlink("..data/tls.crt", at("tls.crt")).unwrap();
    let mut files = watching(&at("tls.crt")).await;
    for number in 2..5 {
        write(&at(&format!("..{number}/tls.crt")), "another");
        symlink(format!("..{number}"), at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        fs::remove_dir_all(at(&format!("..{}", number - 1))).unwrap();
        let took = files.told().await;
        assert!(took < WITHIN, "{took:?}");
    }
}

#[tokio::test]
async fn the_swap_of_a_link_higher_up_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&at("1/certs/shop/tls.crt"), "1");
    symlink("1", at("current")).unwrap();
    let mut files = watching(&at("current/certs/shop/tls.crt")).await;
    for number in 2..5 {
        write(&at(&format!("{number}/certs/shop/tls.crt")), "another");
        symlink(number.to_string(), at("new")).unwrap();
        fs::rename(at("new"), at("current")).unwrap();
        let took = files.told().await;
        assert!(took < WITHIN, "{took:?}");
    }
}

/// A file, and another name of it in a folder that nobody watches: what is written by that name
/// changes the file, and inotify does not tell.
fn two_names(folder: &tempfile::TempDir) -> [PathBuf; 2] {
    let (path, other) = (file(folder), folder.path().join("elsewhere/other"));
    write(&path, "1");
    fs::create_dir(other.parent().unwrap()).unwrap();
    fs::hard_link(&path, &other).unwrap();
    [path, other]
}

/// One test, since events are lost for all tests at once.
#[tokio::test]
async fn what_inotify_does_not_tell_is_found_by_looking_and_at_once_when_it_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let [path, other] = two_names(&folder);
    let mut files = watching(&path).await;
    assert!(!files.polled().get());
    fs::write(&other, "2").unwrap();
    files.told().await;
    for number in 3..6 {
        fs::write(&other, number.to_string()).unwrap();
        WATCHER.has_lost_events();
        let took = files.told().await;
        assert!(took < WITHIN, "{took:?}");
    }
}

/// Run by [`without_watches_files_are_polled_and_that_is_said`] where nothing can be watched.
#[tokio::test]
#[ignore = "for a process whose user has no inotify watches"]
async fn polled() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder);
    write(&path, "1");
    let mut files = watching(&path).await;
    assert!(files.polled().get());
    for number in 2..5 {
        write(&path, &format!("number {number}"));
        let took = files.told().await;
        assert!(took < WITHIN + LONGEST, "{took:?}");
    }
}

#[test]
fn without_watches_files_are_polled_and_that_is_said() {
    without_watches("watch::tests::polled");
}

/// Runs an ignored test in a process whose user has no inotify watches, or no inotify at all.
pub(crate) fn without_watches(test: &str) {
    // The limits of a user namespace of its own: those of the machine are everybody's.
    for limit in ["max_inotify_watches", "max_inotify_instances"] {
        let script =
            format!("echo 0 > /proc/sys/user/{limit} && exec \"$0\" --exact --ignored {test}");
        let output = Command::new("unshare")
            .args(["--user", "--map-root-user", "sh", "-c", &script])
            .arg(std::env::current_exe().unwrap())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{limit}: {text}");
        assert!(text.contains("1 passed"), "{limit}: {text}");
    }
}

#[tokio::test]
async fn watching_ends_with_its_last_receiver() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder);
    write(&path, "1");
    let files = watching(&path).await;
    let polled = files.polled().clone();
    drop(files);
    let gone = async {
        while Arc::strong_count(&polled.0) > 1 {
            write(&path, &format!("{:?}", Instant::now()));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, gone).await.unwrap();
}
