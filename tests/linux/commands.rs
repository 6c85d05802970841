//! `forkvm exec`, `cp` and `fork` of a Linux machine with a name: as somebody at a shell uses them.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use tempfile::TempDir;

use super::common::need_kvm;
use super::harness::{Ended, Running};
use super::template::template;

/// `forkvm restore TEMPLATE --name web`, and whoever asks it.
struct Web {
    dir: TempDir,
    running: Running,
}

impl Web {
    fn restore() -> Web {
        let dir = tempfile::tempdir().unwrap();
        let template = template(1);
        let args = ["restore", template.to_str().unwrap(), "--name", "web"];
        let mut running = Running::start(dir.path(), &args);
        let socket = dir.path().join("forkvm/web/control.sock");
        running.wait_until("it listens", || socket.exists());
        Web { dir, running }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn forkvm(&self, args: &[&str]) -> Ended {
        self.forkvm_with(args, Stdio::null())
    }

    fn forkvm_with(&self, args: &[&str], stdin: Stdio) -> Ended {
        Running::start_with(self.dir.path(), args, stdin).wait()
    }

    /// The same, which succeeds; what it says.
    #[track_caller]
    fn said(&self, args: &[&str]) -> String {
        self.forkvm(args).expect(0, "").stdout()
    }
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_program_runs_in_the_machine_as_if_it_ran_here() {
    need_kvm!();
    let web = Web::restore();
    fs::write(web.path("input"), "yes\n").unwrap();
    let stdin = File::open(web.path("input")).unwrap();
    let script = "cat; pwd; echo $GREETING; echo no >&2; exit 7";
    let args = [
        "exec",
        "web",
        "--dir",
        "/tmp",
        "--env",
        "GREETING=hello",
        "--",
        "sh",
        "-c",
        script,
    ];
    let ended = web.forkvm_with(&args, stdin.into());
    assert_eq!(ended.expect(7, "no\n").stdout(), "yes\n/tmp\nhello\n");
    let killed = web.forkvm(&["exec", "web", "--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(killed.code(), 128 + 9);
    web.forkvm(&["exec", "web", "--", "/bin/nothing"])
        .expect(1, "/bin/nothing");
}

#[test]
fn a_file_is_copied_in_and_out_with_its_permissions() {
    need_kvm!();
    let web = Web::restore();
    let content: Vec<u8> = (0..300_000u32)
        .map(|at| (at.wrapping_mul(at) >> 7) as u8)
        .collect();
    fs::write(web.path("in"), &content).unwrap();
    fs::set_permissions(web.path("in"), PermissionsExt::from_mode(0o4750)).unwrap();
    web.said(&["cp", "in", "web:/tmp/file"]);
    let listed = web.said(&["exec", "web", "--", "ls", "-l", "/tmp/file"]);
    assert!(
        listed.starts_with("-rwxr-x---"),
        "a setuid program of the host is none in the guest: {listed}"
    );
    web.said(&["cp", "web:/tmp/file", "out"]);
    assert_eq!(mode(&web.path("out")), 0o750);
    assert!(fs::read(web.path("out")).unwrap() == content);
    // What stands at the place on the host is written to, if it is no file.
    let null = web.path("null");
    std::os::unix::fs::symlink("/dev/null", &null).unwrap();
    web.said(&["cp", "web:/tmp/file", "null"]);
    assert!(!Path::new("/dev/null").metadata().unwrap().is_file());
    web.forkvm(&["cp", "web:/tmp/no-file", "out"])
        .expect(1, "/tmp/no-file");
    assert!(
        fs::read(web.path("out")).unwrap() == content,
        "what failed has replaced nothing"
    );
}

#[test]
fn a_clone_is_itself_for_the_first_program_that_runs_in_it() {
    need_kvm!();
    let web = Web::restore();
    web.said(&["exec", "web", "--", "true"]);
    web.said(&["fork", "web", "-n", "2"]);
    let id = ["cat", "/proc/sys/kernel/hostname", "/etc/machine-id"];
    let who = |vm: &str| web.said(&[&["exec", vm, "--"][..], &id[..]].concat());
    let said = ["web.1", "web.2", "web"].map(who);
    for (said, name) in said.iter().zip(["web-1", "web-2", "web"]) {
        assert_eq!(said.lines().next(), Some(name));
    }
    let machine_ids: Vec<_> = said.iter().map(|said| said.lines().nth(1)).collect();
    assert_ne!(machine_ids[0], machine_ids[1]);
    assert_ne!(machine_ids[0], machine_ids[2]);
}

#[test]
fn a_machine_that_is_stopped_powers_off_in_order_and_its_clones_run_on() {
    need_kvm!();
    let web = Web::restore();
    web.said(&["exec", "web", "--", "true"]);
    web.said(&["fork", "web"]);
    web.said(&["stop", "web"]);
    let again = web.forkvm(&["stop", "web"]);
    again.expect(1, "web");
    let hostname = ["exec", "web.1", "--", "cat", "/proc/sys/kernel/hostname"];
    assert_eq!(web.said(&hostname), "web-1\n");
    web.said(&["stop", "web.1"]);
    web.running.wait().expect(0, "web.1 exited with status 0");
}
