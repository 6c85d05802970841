//! `forkvm template` and `forkvm fork TEMPLATE -- PROGRAM`: booted once, forked at any later time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use forkvm::templates::Templates;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::common::need_kvm;
use super::harness::{Ended, forkvm};
use super::template::{Image, MEMORY_MIB, template};

/// A user with templates of their own.
struct User(TempDir);

impl User {
    fn new() -> User {
        User(tempfile::tempdir().unwrap())
    }

    /// One who has made the template `web`, of the machine that all tests here are of.
    fn with_web() -> User {
        let user = User::new();
        let draft = user.templates().begin("web").unwrap();
        fs::create_dir(draft.machine()).unwrap();
        for entry in fs::read_dir(template(1)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), draft.machine().join(entry.file_name())).unwrap();
        }
        draft.finish(json!({}), &[]).unwrap();
        user
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn templates(&self) -> Templates {
        Templates::at(self.path("data/forkvm/templates"))
    }

    fn forkvm(&self, args: &[&str]) -> Ended {
        forkvm(self.0.path(), args)
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let ended = self.forkvm(&[&["--json", "-"], args].concat());
        assert_eq!(ended.code(), 0, "{args:?}: {}", ended.stderr());
        serde_json::from_str(&ended.stdout()).unwrap()
    }
}

fn sorted_lines(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
fn a_program_runs_in_each_clone_of_a_template_and_the_worst_status_is_the_commands() {
    need_kvm!();
    let user = User::with_web();
    let script = "read -r host < /proc/sys/kernel/hostname; echo $host $FORKVM_CLONE_ID; echo no >&2; \
                  exit $((FORKVM_CLONE_ID * 3))";
    let ended = user.forkvm(&["fork", "web", "-n", "2", "--", "sh", "-c", script]);
    ended.expect(6, "web.1: no").expect(6, "web.2: no");
    let stdout = ended.stdout();
    assert_eq!(sorted_lines(&stdout), ["web.1: web-1 1", "web.2: web-2 2"]);
    let lazy = user.forkvm(&["fork", "web", "--memory-mode", "lazy", "--", "uname", "-s"]);
    assert_eq!(lazy.expect(0, "").stdout(), "web.1: Linux\n");
    let absent = user.forkvm(&["fork", "web", "--", "/bin/nothing"]);
    absent.expect(255, "/bin/nothing");
    user.forkvm(&["fork", "other", "--", "true"])
        .expect(1, "other");
}

#[test]
fn a_template_is_booted_once_and_names_what_has_changed_since() {
    need_kvm!();
    let user = User::new();
    let image = Image::find();
    for file in ["vmlinux", "initramfs.cpio"] {
        fs::copy(image.directory.join(file), user.path(file)).unwrap();
    }
    let memory = MEMORY_MIB.to_string();
    let create = [
        "template",
        "create",
        "mine",
        "--kernel",
        "vmlinux",
        "--initrd",
        "initramfs.cpio",
        "--memory",
        &memory,
        "--cmdline",
        &image.cmdline,
        "--",
        "sh",
        "-c",
        "echo warm > /tmp/warm",
    ];
    let made = user.json(&create);
    assert!(made["about"]["boot_ms"].as_u64() > Some(0));
    user.forkvm(&create)
        .expect(1, "there is a template mine already");
    let listed = user.json(&["template", "ls"]);
    assert_eq!(listed["templates"][0]["name"], "mine");
    user.forkvm(&["template", "verify", "mine"]).expect(0, "");
    let warm = user.forkvm(&["fork", "mine", "--", "cat", "/tmp/warm"]);
    assert_eq!(warm.expect(0, "").stdout(), "mine.1: warm\n");

    touch(&user.path("vmlinux"));
    user.forkvm(&["fork", "mine", "--", "true"])
        .expect(1, "vmlinux has changed");
    user.forkvm(&["template", "rm", "mine"]).expect(0, "");
    assert!(user.templates().names().unwrap().is_empty());
}

#[test]
fn a_machine_without_an_agent_makes_no_template_and_shows_its_console() {
    need_kvm!();
    let user = User::new();
    let image = Image::find();
    let (kernel, initrd) = (
        image.directory.join("vmlinux"),
        image.directory.join("initramfs.cpio"),
    );
    let cmdline = format!("{} rdinit=/bin/no-such-init", image.cmdline);
    let refused = user.forkvm(&[
        "template",
        "create",
        "mine",
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--memory",
        "64",
        "--cmdline",
        &cmdline,
    ]);
    refused
        .expect(1, "mine did not become itself")
        .expect(1, "Kernel panic");
    assert!(user.templates().names().unwrap().is_empty());
    let left = fs::read_dir(user.templates().directory()).unwrap();
    assert_eq!(left.count(), 0);
}

#[test]
fn a_disk_that_is_full_gets_no_part_of_a_template() {
    need_kvm!();
    let user = User::new();
    let image = Image::find();
    let data = user.path("data");
    fs::create_dir(&data).unwrap();
    let templates = user.templates().directory().display().to_string();
    let script = format!(
        "mount -t tmpfs -o size=4m none {} && {{ \"$0\" \"$@\"; status=$?; echo \"left: $(ls -A {templates})\"; exit $status; }}",
        data.display()
    );
    let kernel = image.directory.join("vmlinux");
    let initrd = image.directory.join("initramfs.cpio");
    let created = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .arg(env!("CARGO_BIN_EXE_forkvm"))
        .args(["template", "create", "mine", "--memory", "64", "--kernel"])
        .arg(kernel)
        .arg("--initrd")
        .arg(initrd)
        .args(["--cmdline", &image.cmdline])
        .env("XDG_RUNTIME_DIR", user.0.path())
        .env("XDG_DATA_HOME", &data)
        .output();
    let Ok(created) = created else {
        println!("skipped: {}", created.unwrap_err());
        return;
    };
    let (said, errors) = (
        String::from_utf8_lossy(&created.stdout),
        String::from_utf8_lossy(&created.stderr),
    );
    if errors.contains("unshare:") || errors.contains("mount:") {
        println!("skipped: no mount namespace can be had here: {errors}");
        return;
    }
    assert_eq!(created.status.code(), Some(1), "{errors}");
    assert!(errors.contains("No space left on device"), "{errors}");
    assert!(said.ends_with("left: \n"), "{said}");
}

/// As somebody who has written to it.
fn touch(path: &Path) {
    let file = fs::OpenOptions::new().append(true).open(path).unwrap();
    file.set_modified(std::time::SystemTime::now()).unwrap();
}
