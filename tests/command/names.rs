//! Names of machines: who holds one, how it becomes free, and where it leads.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};

use tempfile::tempdir;

use super::common::need_kvm;
use super::harness::{Running, forkvm, forkvm_at, names_in};
use super::named::{Named, place};

const HELLO: [&str; 5] = ["run", "--guest", "hello", "--memory", "64"];

fn named(name: &str) -> Vec<&str> {
    [&HELLO[..], &["--name", name]].concat()
}

#[test]
fn without_a_name_nothing_is_left_to_be_found() {
    need_kvm!();
    let dir = tempdir().unwrap();
    assert_eq!(forkvm(dir.path(), &HELLO).code(), 0);
    assert!(names_in(dir.path()).is_empty());
}

#[test]
fn a_name_has_a_directory_that_is_its_owners_alone_and_goes_with_the_machine() {
    need_kvm!();
    let web = Named::obedient("web");
    let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(web.dir().join("forkvm")), 0o700);
    assert_eq!(mode(web.place()), 0o700);
    assert_eq!(mode(web.socket()), 0o600);
    assert_eq!(names_in(&web.place()), ["control.sock", "lock"]);
    web.json(&["kill", "web"]);
    let (dir, place) = (web.dir().to_owned(), web.place());
    let Named { running, .. } = web;
    running.wait().expect(137, "web was killed");
    assert!(!place.exists() && !dir.join("forkvm/web").exists());
}

#[test]
fn a_name_that_is_held_is_refused_with_the_process_that_holds_it() {
    need_kvm!();
    let web = Named::obedient("web");
    let said = format!(
        "a machine named web runs already, in process {}",
        web.running.id()
    );
    forkvm(web.dir(), &named("web")).expect(1, &said);
    forkvm(web.dir(), &["restore", "nowhere", "--name", "web"]).expect(1, &said);
    assert_eq!(forkvm(web.dir(), &named("web2")).code(), 0);
    web.json(&["info", "web"]);
}

#[test]
fn a_process_that_was_killed_leaves_a_name_that_the_next_one_takes_over() {
    need_kvm!();
    let mut web = Named::obedient("web");
    web.running.signal("KILL").child().wait().unwrap();
    assert_eq!(names_in(&web.place()), ["control.sock", "lock"]);
    fs::write(web.place().join("vsock_1024"), "").unwrap();
    let next = forkvm(web.dir(), &named("web"));
    assert_eq!(next.code(), 0, "{}", next.stderr());
    assert!(!web.place().exists());
}

#[test]
fn what_fails_to_start_gives_its_name_back() {
    let dir = tempdir().unwrap();
    let args = [&named("web")[..], &["--disk", "nowhere.img"]].concat();
    forkvm(dir.path(), &args).expect(1, "nowhere.img");
    forkvm(dir.path(), &["restore", "nowhere", "--name", "web"]).expect(1, "nowhere");
    assert!(names_in(&dir.path().join("forkvm")).is_empty());
}

#[test]
fn a_name_that_no_socket_could_have_is_refused_before_anything_is_built() {
    let dir = tempdir().unwrap();
    let long = "n".repeat(107);
    for args in [
        named(&long),
        vec!["info", &long],
        vec!["restore", "x", "--name", &long],
    ] {
        forkvm(dir.path(), &args)
            .expect(1, "has at most 107")
            .expect(1, &long);
    }
    forkvm(dir.path(), &named("a/b")).expect(2, "a/b");
    forkvm(dir.path(), &named("..")).expect(2, "..");
    assert!(names_in(dir.path()).is_empty());
}

#[test]
fn a_runtime_directory_that_others_can_enter_or_that_leads_elsewhere_is_refused() {
    let dir = tempdir().unwrap();
    let forkvms = dir.path().join("forkvm");
    fs::create_dir(&forkvms).unwrap();
    fs::set_permissions(&forkvms, Permissions::from_mode(0o755)).unwrap();
    let said = "must be a directory of the user's own with mode 0700";
    forkvm(dir.path(), &named("web")).expect(1, said);
    forkvm(dir.path(), &["ps"]).expect(1, said);
    fs::set_permissions(&forkvms, Permissions::from_mode(0o700)).unwrap();

    let elsewhere = tempdir().unwrap();
    symlink(elsewhere.path(), forkvms.join("web")).unwrap();
    forkvm(dir.path(), &named("web")).expect(1, said);
    assert!(names_in(elsewhere.path()).is_empty());

    let missing = dir.path().join("missing");
    forkvm_at(dir.path(), &missing, &named("web")).expect(1, "which XDG_RUNTIME_DIR names");
}

#[test]
fn a_machine_that_is_just_starting_is_told_of_by_its_process() {
    let dir = tempdir().unwrap();
    let place = place(dir.path(), "web");
    fs::create_dir_all(&place).unwrap();
    for dir in [place.parent().unwrap(), &place] {
        fs::set_permissions(dir, Permissions::from_mode(0o700)).unwrap();
    }
    fs::write(place.join("lock"), "4711\n").unwrap();
    let lock = fs::File::open(place.join("lock")).unwrap();
    lock.lock().unwrap();
    forkvm(dir.path(), &["info", "web"]).expect(1, "process 4711 is just starting or ending it");
    let ps = forkvm(dir.path(), &["ps"]);
    ps.expect(0, "web does not answer: process 4711");
    drop(lock);
    forkvm(dir.path(), &["info", "web"]).expect(1, "no machine web runs");
}

#[test]
fn the_vsock_of_a_kernel_with_a_name_lies_in_its_directory() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    fs::write(&kernel, forkvm_guest_images::BARE).unwrap();
    let args = [
        "run",
        "--kernel",
        "kernel",
        "--cmdline",
        "job=obey pages=16",
    ];
    let args = [&args[..], &["--memory", "64", "--name", "web"]].concat();
    let mut web = Running::start(dir.path(), &args);
    let place = place(dir.path(), "web");
    web.wait_until("it can be asked", || place.join("control.sock").exists());
    assert_eq!(forkvm(dir.path(), &["fork", "web"]).code(), 0);
    assert_eq!(
        names_in(&place),
        ["control.sock", "lock", "vsock", "vsock.1"]
    );
    let info = forkvm(dir.path(), &["info", "web.1", "--json", "-"]).stdout();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["vsock"], place.join("vsock.1").to_str().unwrap());
    let whole = forkvm(dir.path(), &["info", "web", "--json", "-"]).stdout();
    let whole: serde_json::Value = serde_json::from_str(&whole).unwrap();
    assert!(info["cid"].as_u64().is_some_and(|cid| cid > 2), "{info}");
    assert_ne!(info["cid"], whole["cid"]);
    web.signal("TERM");
    web.wait().expect(143, "web.1 was killed");
    assert!(!place.exists());
}
