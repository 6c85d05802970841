//! What a user of a saved machine relies on: under its name there is a whole machine or nothing.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use forkvm_devices::{Section, Sections};
use forkvm_vmm::memory_file::{MemoryFault, Progress};
use forkvm_vmm::saved_machine::{SaveDir, SavedMachine, SavedMachineError};

const MEMORY_LEN: u64 = 8 << 20;

fn quiet(_: Progress) {}

fn sections() -> Sections {
    let mut sections = Sections::default();
    sections
        .push(Section {
            kind: "config".into(),
            version: 1,
            body: vec![0xa0],
        })
        .unwrap();
    sections
}

/// 8 MiB, a third of them data.
fn memory() -> File {
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(MEMORY_LEN).unwrap();
    for page in (0..MEMORY_LEN / 4096).step_by(3) {
        memory
            .write_all_at(&[page as u8 | 1; 4096], page * 4096)
            .unwrap();
    }
    memory
}

fn save_to(dir: &Path, memory: &File) -> Result<(), SavedMachineError> {
    let save = SaveDir::create(dir)?;
    save.write_memory(memory, &mut quiet)?;
    save.write_state(&sections())?;
    save.create_file("blk0.overlay")?
        .write_all(b"sectors")
        .unwrap();
    save.commit()
}

/// Opens a saved machine and compares all that was put into it.
fn check(dir: &Path) {
    let machine = SavedMachine::open(dir).unwrap();
    assert_eq!(machine.sections, sections());
    machine.memory.check_len(MEMORY_LEN).unwrap();
    machine.memory.verify(&mut quiet).unwrap();
    let mut disk = String::new();
    machine
        .open_file("blk0.overlay")
        .unwrap()
        .read_to_string(&mut disk)
        .unwrap();
    assert_eq!(disk, "sectors");
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_saved_machine_is_found_again_whole_and_for_its_owner_only() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("saved");
    save_to(&dir, &memory()).unwrap();
    check(&dir);
    assert_eq!(names(parent.path()), ["saved"]);
    assert_eq!(names(&dir), ["blk0.overlay", "memory", "state"]);
    assert_eq!(
        fs::metadata(&dir).unwrap().permissions().mode() & 0o777,
        0o700
    );
    for name in names(&dir) {
        assert_eq!(
            fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }
}

#[test]
fn whatever_is_there_already_is_never_touched() {
    let parent = tempfile::tempdir().unwrap();
    let at = |name: &str| parent.path().join(name);
    fs::create_dir(at("directory")).unwrap();
    fs::write(at("file"), "mine").unwrap();
    symlink("nowhere", at("link")).unwrap();
    for name in ["directory", "file", "link"] {
        let result = SaveDir::create(&at(name));
        assert!(
            matches!(result, Err(SavedMachineError::Exists { .. })),
            "{name}: {result:?}"
        );
    }
    assert_eq!(names(parent.path()), ["directory", "file", "link"]);
}

#[test]
fn what_appears_under_the_name_during_the_save_is_not_replaced() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("saved");
    let save = SaveDir::create(&dir).unwrap();
    save.write_memory(&memory(), &mut quiet).unwrap();
    save.write_state(&sections()).unwrap();
    fs::write(&dir, "mine").unwrap();
    assert!(matches!(
        save.commit(),
        Err(SavedMachineError::Exists { .. })
    ));
    assert_eq!(fs::read(&dir).unwrap(), b"mine");
    assert_eq!(names(parent.path()), ["saved"]);
}

#[test]
fn a_save_that_is_given_up_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let save = SaveDir::create(&parent.path().join("saved")).unwrap();
    save.write_memory(&memory(), &mut quiet).unwrap();
    drop(save);
    assert_eq!(names(parent.path()), [] as [&str; 0]);
}

#[test]
fn a_save_without_its_state_or_memory_is_not_given_a_name() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("saved");
    let save = SaveDir::create(&dir).unwrap();
    save.write_memory(&memory(), &mut quiet).unwrap();
    assert!(matches!(
        save.commit(),
        Err(SavedMachineError::Incomplete { missing: "state" })
    ));
    let save = SaveDir::create(&dir).unwrap();
    save.write_state(&sections()).unwrap();
    assert!(matches!(
        save.commit(),
        Err(SavedMachineError::Incomplete { missing: "memory" })
    ));
    assert_eq!(names(parent.path()), [] as [&str; 0]);
}

#[test]
fn a_path_without_a_name_and_a_missing_parent_are_refused() {
    let parent = tempfile::tempdir().unwrap();
    let create = |path: PathBuf| SaveDir::create(&path);
    assert!(matches!(
        create("/".into()),
        Err(SavedMachineError::NoName { .. })
    ));
    assert!(matches!(
        create(parent.path().join("a/..")),
        Err(SavedMachineError::NoName { .. })
    ));
    assert!(matches!(
        create(parent.path().join("a/b")),
        Err(SavedMachineError::Io { .. })
    ));
}

#[test]
fn other_files_stay_within_the_directory_and_off_state_and_memory() {
    let parent = tempfile::tempdir().unwrap();
    let save = SaveDir::create(&parent.path().join("saved")).unwrap();
    for name in ["", ".", "..", "a/b", "/etc/x", "b/", "state", "memory"] {
        let result = save.create_file(name);
        assert!(
            matches!(result, Err(SavedMachineError::FileName { .. })),
            "{name:?}: {result:?}"
        );
    }
}

#[test]
fn state_and_memory_of_different_saves_are_refused_by_name() {
    let parent = tempfile::tempdir().unwrap();
    let (one, two) = (parent.path().join("one"), parent.path().join("two"));
    save_to(&one, &memory()).unwrap();
    save_to(&two, &memory()).unwrap();
    fs::rename(two.join("memory"), one.join("memory")).unwrap();
    match SavedMachine::open(&one) {
        Err(SavedMachineError::Memory(error)) => {
            assert!(matches!(error.fault, MemoryFault::OtherSave { .. }));
            assert!(error.file.ends_with("one/memory"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_missing_or_damaged_part_is_named_by_its_path() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("saved");
    save_to(&dir, &memory()).unwrap();
    let state = fs::read(dir.join("state")).unwrap();
    fs::write(dir.join("state"), &state[..state.len() - 1]).unwrap();
    let error = SavedMachine::open(&dir).unwrap_err();
    assert!(error.to_string().contains("saved/state"), "{error}");
    assert!(matches!(error, SavedMachineError::State { .. }));

    fs::write(dir.join("state"), &state).unwrap();
    fs::remove_file(dir.join("memory")).unwrap();
    let error = SavedMachine::open(&dir).unwrap_err();
    assert!(error.to_string().contains("saved/memory"), "{error}");
}

#[test]
fn two_saves_to_one_place_do_not_meet() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("saved");
    let first = SaveDir::create(&dir).unwrap();
    assert!(matches!(
        SaveDir::create(&dir),
        Err(SavedMachineError::Busy { .. })
    ));
    first.write_memory(&memory(), &mut quiet).unwrap();
    first.write_state(&sections()).unwrap();
    first
        .create_file("blk0.overlay")
        .unwrap()
        .write_all(b"sectors")
        .unwrap();
    first.commit().unwrap();
    check(&dir);
}

#[test]
fn only_what_a_save_has_left_is_removed() {
    let parent = tempfile::tempdir().unwrap();
    let keep = [
        "saved.partial-",
        "saved.partial-1x",
        "saved2.partial-1",
        "saved.partial",
    ];
    for name in keep.iter().chain(&["saved.partial-4194999"]) {
        fs::create_dir(parent.path().join(name)).unwrap();
        fs::write(parent.path().join(name).join("memory"), "half").unwrap();
    }
    save_to(&parent.path().join("saved"), &memory()).unwrap();
    let mut expected = keep.to_vec();
    expected.push("saved");
    expected.sort();
    assert_eq!(names(parent.path()), expected);
}

/// Tells the child of the tests below what to do: a directory, and a step to stop at or `-`.
const CHILD: &str = "FORKVM_TEST_SAVE_CHILD";

/// Not a test: the process that the tests below kill. It does nothing unless they run it.
#[test]
#[ignore = "run by other tests, to be killed"]
fn child_that_is_killed() {
    let Ok(order) = std::env::var(CHILD) else {
        return;
    };
    let (stop, dir) = order.split_once(' ').unwrap();
    let dir = Path::new(dir);
    let reached = |step: &str| {
        println!("at {step}");
        if step == stop {
            std::thread::sleep(Duration::from_secs(600));
        }
    };
    let memory = memory();
    reached("ready");
    for round in 0.. {
        let save = SaveDir::create(&dir.join(format!("saved{round}"))).unwrap();
        reached("created");
        save.write_memory(&memory, &mut |progress| {
            if progress.done >= MEMORY_LEN / 2 {
                reached("half");
            }
        })
        .unwrap();
        reached("memory");
        save.write_state(&sections()).unwrap();
        reached("state");
        save.create_file("blk0.overlay")
            .unwrap()
            .write_all(b"sectors")
            .unwrap();
        reached("disk");
        save.commit().unwrap();
        reached("committed");
    }
}

/// The child, killed with SIGKILL when dropped: also when a test fails.
struct Victim(Child);

impl Drop for Victim {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Starts the child and waits until it has said `at <step>`.
fn child_at(step: &str, stop: &str, dir: &Path) -> Victim {
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "child_that_is_killed",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CHILD, format!("{stop} {}", dir.display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut victim = Victim(child);
    let mut lines = BufReader::new(victim.0.stdout.take().unwrap()).lines();
    let wanted = format!("at {step}");
    let found = lines.by_ref().any(|line| line.unwrap().ends_with(&wanted));
    assert!(found, "the child ended before it was at {step}");
    // Somebody has to read on, or the child would stop at a full pipe instead of saving.
    std::thread::spawn(move || lines.count());
    victim
}

#[test]
fn killed_at_any_step_a_save_is_there_whole_or_not_at_all() {
    for step in ["created", "half", "memory", "state", "disk", "committed"] {
        let parent = tempfile::tempdir().unwrap();
        drop(child_at(step, step, parent.path()));
        let dir = parent.path().join("saved0");
        if step == "committed" {
            assert_eq!(names(parent.path()), ["saved0"]);
        } else {
            assert!(
                !dir.exists(),
                "killed at {step}, but there is something under the name"
            );
            assert_eq!(
                names(parent.path()).len(),
                1,
                "the partial directory is the test's proof"
            );
            save_to(&dir, &memory()).unwrap();
            assert_eq!(
                names(parent.path()),
                ["saved0"],
                "killed at {step}: something is left"
            );
        }
        check(&dir);
    }
}

#[test]
fn killed_at_any_moment_a_save_is_there_whole_or_not_at_all() {
    let seed = 0x666f_726b;
    println!("seed {seed:#x}");
    let mut random: u64 = seed;
    let mut cut_short = 0;
    for _ in 0..12 {
        let parent = tempfile::tempdir().unwrap();
        let child = child_at("ready", "-", parent.path());
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        std::thread::sleep(Duration::from_micros((random >> 33) % 60_000));
        drop(child);
        for name in names(parent.path()) {
            if name.contains(".partial-") {
                cut_short += 1;
            } else {
                check(&parent.path().join(name));
            }
        }
    }
    assert!(
        cut_short > 0,
        "no kill hit a save: the test has shown nothing"
    );
}

#[test]
fn the_save_of_a_living_process_is_left_alone() {
    let parent = tempfile::tempdir().unwrap();
    let child = child_at("memory", "memory", parent.path());
    let alive = names(parent.path());
    assert_eq!(alive, [format!("saved0.partial-{}", child.0.id())]);
    drop(SaveDir::create(&parent.path().join("saved0")).unwrap());
    assert_eq!(names(parent.path()), alive);
    drop(child);
    drop(SaveDir::create(&parent.path().join("saved0")).unwrap());
    assert_eq!(names(parent.path()), [] as [&str; 0]);
}
