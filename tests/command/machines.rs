//! Commands that hold on to a machine which another process runs.

use std::io::Write;

use serde_json::{Value, json};
use tempfile::tempdir;

use super::common::need_kvm;
use super::harness::{Running, forkvm, names_in, wait_until};
use super::named::{Named, place};

/// Types a line on a console that was started with a pipe.
fn type_in(console: &mut Running, line: &str) {
    let stdin = console.child().stdin.as_mut().unwrap();
    stdin.write_all(line.as_bytes()).unwrap();
}

fn state(name: &str, state: &str) -> (String, String) {
    (name.into(), state.into())
}

#[test]
fn ps_and_info_tell_of_a_machine_and_of_its_clones() {
    need_kvm!();
    let web = Named::obedient("web");
    let forked = web.json(&["fork", "web", "-n", "2"]);
    assert_eq!(forked["clones"], json!(["web.1", "web.2"]));

    let ps = web.json(&["ps"]);
    assert_eq!(ps["unreachable"], json!([]));
    let vms = ps["vms"].as_array().unwrap();
    let names: Vec<&Value> = vms.iter().map(|vm| &vm["name"]).collect();
    assert_eq!(names, ["web", "web.1", "web.2"]);
    for (vm, depth) in vms.iter().zip([0, 1, 1]) {
        assert_eq!(vm["state"], "running");
        assert_eq!((&vm["vcpus"], &vm["memory_mib"]), (&json!(1), &json!(64)));
        assert_eq!(vm["depth"], depth);
        assert_eq!(vm["pid"], web.running.id());
        assert_eq!((&vm["cid"], &vm["vsock"]), (&Value::Null, &Value::Null));
        assert!(vm["since_unix_ms"].as_u64() > Some(0));
    }
    let table = web.forkvm(&["ps"]).stdout();
    assert!(table.contains("name") && table.contains("web.2"), "{table}");

    let info = web.json(&["info", "web.2"]);
    assert_eq!(
        (&info["name"], &info["clone_id"]),
        (&json!("web.2"), &json!(2))
    );
    assert_eq!(info["fork_count"], 1);
    assert_eq!(info["generation"].as_str().unwrap().len(), 32);
    assert!(info["memory"]["private_kib"].as_u64().is_some(), "{info}");
    assert_eq!(info["disks"], json!([]));
    assert!(web.forkvm(&["info", "web"]).stdout().contains("generation"));
}

#[test]
fn clones_in_workers_can_be_asked_the_same() {
    need_kvm!();
    let options = ["--guest", "obey pages=16", "--spawner", "process"];
    let web = Named::run("web", &options);
    assert_eq!(web.json(&["fork", "web"])["clones"], json!(["web.1"]));
    let info = web.json(&["info", "web.1"]);
    assert_ne!(info["pid"], web.running.id());
    assert_eq!(web.json(&["pause", "web.1"])["state"], "paused");
    assert_eq!(web.json(&["info", "web.1"])["state"], "paused");
    assert_eq!(web.json(&["fork", "web.1"])["clones"], json!(["web.1.1"]));
    assert_eq!(
        web.states(),
        [
            state("web", "running"),
            state("web.1", "paused"),
            state("web.1.1", "running")
        ]
    );
    assert_eq!(web.json(&["resume", "web.1"])["state"], "running");
    let mut console = web.console("web.1");
    type_in(&mut console, "w 3 7 1\nr 3 1\n");
    console.wait_until_said("= 3 7");
    web.json(&["save", "web.1", "saved"]);
    console.wait().expect(0, "web.1 was saved");
    assert_eq!(web.json(&["kill", "web.1.1"])["status"], 137);
    assert_eq!(web.states(), [state("web", "running")]);
}

#[test]
fn a_paused_machine_stays_so_through_a_fork_a_failed_save_and_a_look_and_answers_afterwards() {
    need_kvm!();
    let mut web = Named::obedient("web");
    assert_eq!(web.json(&["pause", "web"])["state"], "paused");
    // It is nothing to pause it twice.
    assert_eq!(web.json(&["pause", "web"])["state"], "paused");
    web.json(&["fork", "web", "-n", "1"]);
    std::fs::create_dir(web.dir().join("taken")).unwrap();
    web.forkvm(&["save", "web", "taken"])
        .expect(1, "taken: it exists already");
    web.json(&["info", "web"]);
    assert_eq!(
        web.states(),
        [state("web", "paused"), state("web.1", "running")]
    );

    let mut typed = web.console("web");
    type_in(&mut typed, "w 1 5 1\n");
    // A clone, which has been asked later, has answered by the time at which the machine has not.
    let mut clone = web.console("web.1");
    type_in(&mut clone, "r 1 1\n");
    clone.wait_until_said("= 1 0");
    clone.wait_until_said("ok ");
    assert_eq!(typed.said(), "");

    assert_eq!(web.json(&["resume", "web"])["state"], "running");
    typed.wait_until_said("ok 1");
    type_in(&mut typed, "q 0\n");
    typed.wait().expect(0, "web exited with status 0");
    web.json(&["kill", "web.1"]);
    clone.wait().expect(0, "web.1 was killed");
    assert!(web.running.child().wait().unwrap().success());
}

#[test]
fn wait_ends_with_the_status_of_the_vm_also_when_it_has_ended_before() {
    need_kvm!();
    let mut web = Named::obedient("web");
    web.json(&["fork", "web", "-n", "2"]);
    let waiting = Running::start(web.dir(), &["wait", "web.1"]);
    let mut console = web.console("web.1");
    type_in(&mut console, "q 7\n");
    waiting.wait().expect(7, "web.1 exited with status 7");
    console.wait().expect(0, "web.1 exited with status 7");
    web.forkvm(&["wait", "web.1"])
        .expect(7, "web.1 exited with status 7");
    web.forkvm(&["info", "web.1"])
        .expect(1, "VM web.1 has ended: it exited with status 7");
    web.forkvm(&["kill", "web.1"])
        .expect(1, "VM web.1 has ended");

    let waiting = Running::start(web.dir(), &["wait", "web", "--json", "-"]);
    let (killed, clone) = (web.json(&["kill", "web"]), web.json(&["kill", "web.2"]));
    assert_eq!(
        (&killed["end"], &killed["status"]),
        (&json!("was killed"), &json!(137))
    );
    assert_eq!(clone["vm"], "web.2");
    let waited = waiting.wait();
    assert_eq!(waited.code(), 137);
    let waited: Value = serde_json::from_str(&waited.stdout()).unwrap();
    assert_eq!(waited["status"], 137);
    assert_eq!(web.running.child().wait().unwrap().code(), Some(137));
}

#[test]
fn a_machine_and_a_clone_are_saved_where_they_are_told_and_run_on_from_there() {
    need_kvm!();
    let web = Named::obedient("web");
    web.json(&["fork", "web"]);
    let mut clone = web.console("web.1");
    type_in(&mut clone, "w 2 9 1\n");
    clone.wait_until_said("ok 1");
    let saved = web.json(&["save", "web.1", "clone"]);
    let dir = std::fs::canonicalize(web.dir().join("clone")).unwrap();
    assert_eq!(saved["saved_to"], json!(dir));
    let saving = web.forkvm(&["save", "web", "root"]);
    saving.expect(0, "`forkvm restore root` lets it run on");

    let restored = ["restore", "clone", "--name", "other"];
    let mut restored = Running::start(web.dir(), &restored);
    let socket = place(web.dir(), "other").join("control.sock");
    restored.wait_until("it can be asked", || socket.exists());
    let mut other = Running::start_with(
        web.dir(),
        &["console", "other"],
        std::process::Stdio::piped(),
    );
    type_in(&mut other, "r 2 1\nq 0\n");
    other.wait_until_said("= 2 9");
    other.wait().expect(0, "other exited with status 0");
    assert!(restored.child().wait().unwrap().success());
    assert!(!place(web.dir(), "other").exists());
}

#[test]
fn forks_are_done_as_they_are_asked_for() {
    need_kvm!();
    let web = Named::obedient("web");
    let refused = web.forkvm(&["fork", "web", "--freeze", "remap", "--memory-mode", "lazy"]);
    refused.expect(2, "remap and copy give memory mode cow");
    web.forkvm(&["fork", "web", "-n", "0"])
        .expect(2, "0 is not in 1..");
    web.forkvm(&["fork", "web", "-n", "1000000"])
        .expect(1, "1000000");
    assert_eq!(web.states(), [state("web", "running")]);
    let copied = web.json(&["fork", "web", "--freeze", "copy"]);
    assert_eq!(copied["clones"], json!(["web.1"]));
    let deeper = web.forkvm(&["fork", "web.1", "-n", "2"]);
    assert_eq!(deeper.stdout(), "web.1.1\nweb.1.2\n");
    // The parent does not go on, its clones do.
    web.json(&["fork", "web.1.1", "--freeze", "stop"]);
    web.forkvm(&["wait", "web.1.1"])
        .expect(0, "stopped at its fork point");
    web.json(&["info", "web.1.1.1"]);
}

#[test]
fn what_is_no_machine_is_told_so() {
    need_kvm!();
    let web = Named::obedient("web");
    web.forkvm(&["info", "web.9"])
        .expect(1, "there is no VM web.9");
    web.forkvm(&["info", "mail"])
        .expect(1, "no machine mail runs");
    web.forkvm(&["info", "we"]).expect(1, "no machine we runs");
    for command in ["info", "pause", "resume", "fork", "kill", "wait", "console"] {
        web.forkvm(&[command, "we/b"]).expect(2, "we/b");
        web.forkvm(&[command, "../web"]).expect(2, "../web");
    }
    let dir = tempdir().unwrap();
    let none = forkvm(dir.path(), &["ps"]);
    assert!(
        none.stdout().contains("no machines in"),
        "{}",
        none.stdout()
    );
    assert!(names_in(dir.path()).is_empty(), "a look makes nothing");
}

#[test]
fn a_machine_of_a_longer_name_is_preferred_to_a_clone_of_a_shorter_one() {
    need_kvm!();
    let web = Named::obedient("web");
    web.json(&["fork", "web"]);
    let args = [
        "run", "--name", "web.1", "--guest", "obey", "--memory", "32",
    ];
    let mut second = Running::start(web.dir(), &args);
    let socket = place(web.dir(), "web.1").join("control.sock");
    second.wait_until("it can be asked", || socket.exists());
    assert_eq!(web.json(&["info", "web.1"])["memory_mib"], 32);
    web.json(&["kill", "web.1"]);
    second.wait().expect(137, "web.1 was killed");
    assert_eq!(web.json(&["info", "web.1"])["memory_mib"], 64);
}

#[test]
fn clones_in_the_process_end_with_it_and_workers_end_themselves() {
    need_kvm!();
    for spawner in ["in-process", "process"] {
        let options = ["--guest", "obey pages=16", "--spawner", spawner];
        let mut web = Named::run("web", &options);
        web.json(&["fork", "web", "-n", "2"]);
        let pids: Vec<u64> = web.json(&["ps"])["vms"]
            .as_array()
            .unwrap()
            .iter()
            .map(|vm| vm["pid"].as_u64().unwrap())
            .collect();
        assert_eq!(pids[0] == pids[1], spawner == "in-process");
        let mut waiting = web.client();
        waiting.send(b"{\"forkvm\":1,\"do\":\"wait\",\"vm\":\"web.1\"}\n");
        let console = web.console("web.2");
        web.running.signal("KILL").child().wait().unwrap();
        assert!(waiting.hear().is_none());
        console.wait().expect(1, "the process of web.2 has gone");
        for pid in pids {
            let gone = || {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
                stat.map_or(true, |stat| stat.contains(") Z "))
            };
            wait_until("it ends with the engine", gone);
        }
        assert_eq!(web.states(), []);
        web.forkvm(&["info", "web"])
            .expect(1, "no machine web runs");
    }
}
