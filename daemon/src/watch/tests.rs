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
    for number in 0..5 {
        fs::write(folder.path().join("a.yaml"), format!("{number}")).unwrap();
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    files.told().await;
    assert!(
        files.is_quiet().await,
        "five writes in a row are one change"
    );
    fs::write(folder.path().join("b.yaml"), "new").unwrap();
    files.told().await;
    fs::remove_file(folder.path().join("a.yaml")).unwrap();
    files.told().await;
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
    // The limits of a user namespace of its own: those of the machine are everybody's.
    for limit in ["max_inotify_watches", "max_inotify_instances"] {
        let script = format!(
            "echo 0 > /proc/sys/user/{limit} && exec \"$0\" --exact --ignored watch::tests::polled"
        );
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
