//! The control socket as others speak to it who know docs/control-socket.md, or do not.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::thread;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::geteuid;
use rustix::thread::set_thread_res_uid;
use serde_json::{Value, json};

use super::common::need_kvm;
use super::harness::wait_until;
use super::named::{Client, Named};

fn kind(answer: &Value) -> &str {
    answer["error"]["kind"].as_str().unwrap_or_default()
}

#[test]
fn each_line_is_answered_by_one() {
    need_kvm!();
    let web = Named::obedient("web");
    let mut client = web.client();
    let info = client.ask(json!({ "do": "info", "vm": "web" }));
    assert_eq!(
        (&info["forkvm"], &info["ok"]["name"]),
        (&json!(1), &json!("web"))
    );
    // Several at once, and a line that comes in pieces.
    client.send(
        b"{\"forkvm\":1,\"do\":\"ps\"}\n{\"forkvm\":1,\"do\":\"pause\",\"vm\":\"web\"}\n{\"for",
    );
    assert_eq!(client.hear().unwrap()["ok"]["vms"][0]["state"], "running");
    assert_eq!(client.hear().unwrap()["ok"]["state"], "paused");
    client.send(b"kvm\":1,\"do\":\"resume\",\"vm\":\"web\"}\n");
    assert_eq!(client.hear().unwrap()["ok"]["state"], "running");
    let forked = client.ask(
        json!({ "do": "fork", "vm": "web", "count": 2, "memory_mode": "cow", "freeze": "copy" }),
    );
    assert_eq!(forked["ok"]["clones"], json!(["web.1", "web.2"]));
}

#[test]
fn garbage_and_other_versions_are_answered_and_disturb_nobody() {
    need_kvm!();
    let web = Named::obedient("web");
    let (mut client, mut other) = (web.client(), web.client());
    for (line, due) in [
        ("", "usage"),
        ("\u{0}\u{1}garbage", "usage"),
        ("{\"forkvm\":1}", "usage"),
        ("{\"forkvm\":1,\"do\":\"explode\"}", "usage"),
        (
            "{\"forkvm\":1,\"do\":\"fork\",\"vm\":\"web\",\"count\":-1}",
            "usage",
        ),
        (
            "{\"forkvm\":1,\"do\":\"save\",\"vm\":\"web\",\"dir\":\"relative\"}",
            "usage",
        ),
        ("{\"forkvm\":2,\"do\":\"ps\"}", "version"),
        (
            "{\"forkvm\":1,\"do\":\"info\",\"vm\":\"web.7\"}",
            "no-such-vm",
        ),
        (
            "{\"forkvm\":1,\"do\":\"fork\",\"vm\":\"web\",\"count\":0}",
            "refused",
        ),
    ] {
        client.send(format!("{line}\n").as_bytes());
        let answer = client.hear().unwrap();
        assert_eq!(kind(&answer), due, "{line}: {answer}");
        assert_eq!(
            other.ask(json!({ "do": "ps" }))["ok"]["vms"]
                .as_array()
                .unwrap()
                .len(),
            1
        );
    }
    client.send(&[0xff, 0xfe, b'\n']);
    assert_eq!(kind(&client.hear().unwrap()), "usage");
    // A line without end is not read to its end.
    client.send(&vec![b'x'; 64 * 1024 + 1]);
    assert_eq!(kind(&client.hear().unwrap()), "usage");
    assert!(client.hear().is_none());
    assert_eq!(web.states().len(), 1);
}

#[test]
fn a_client_may_hang_up_at_any_point() {
    need_kvm!();
    let web = Named::obedient("web");
    drop(web.client());
    for unfinished in [
        "{\"forkvm\":1,",
        "{\"forkvm\":1,\"do\":\"ps\"}\n",
        "{\"forkvm\":1,\"do\":\"fork\",\"vm\":\"web\",\"count\":1}\n",
        "{\"forkvm\":1,\"do\":\"wait\",\"vm\":\"web\"}\n",
        "{\"forkvm\":1,\"do\":\"console\",\"vm\":\"web\"}\n{\"forkvm\":1,\"input\":\"ZgoK\"}\n",
    ] {
        web.client().send(unfinished.as_bytes());
    }
    // None of them is still served.
    drop(web.all_clients());
    wait_until("what was asked for was done", || {
        web.forkvm(&["info", "web.1"]).code() == 0
    });
}

#[test]
fn one_client_too_many_is_told_so() {
    need_kvm!();
    let web = Named::obedient("web");
    let clients = web.all_clients();
    let mut late = web.client();
    assert_eq!(kind(&late.hear().unwrap()), "refused");
    assert!(late.hear().is_none());
    web.forkvm(&["info", "web"])
        .expect(1, "32 clients are connected already");
    drop(clients);
    wait_until("there is room", || web.forkvm(&["info", "web"]).code() == 0);
}

#[test]
fn a_console_is_a_stream_in_both_directions_until_the_vm_ends() {
    need_kvm!();
    let web = Named::obedient("web");
    let (mut console, mut waiting) = (web.client(), web.client());
    waiting.send(b"{\"forkvm\":1,\"do\":\"wait\",\"vm\":\"web\"}\n");
    assert_eq!(
        console.ask(json!({ "do": "console", "vm": "web" }))["ok"],
        json!({})
    );
    // More than the guest's UART holds.
    let typed = "f\n".repeat(200) + "q 3\n";
    let input = STANDARD.encode(typed);
    console.send(format!("{}\n", json!({ "forkvm": 1, "input": input })).as_bytes());
    let mut printed = Vec::new();
    let ended = loop {
        let shown = console.hear().unwrap();
        match shown["printed"].as_str() {
            Some(bytes) => printed.extend(STANDARD.decode(bytes).unwrap()),
            None => break shown,
        }
    };
    let printed = String::from_utf8(printed).unwrap();
    assert!(
        printed.starts_with("> 1\nok 1\n") && printed.ends_with("> 201\nok 201\n"),
        "{printed}"
    );
    assert_eq!(ended["ended"]["end"], "exited with status 3");
    assert!(console.hear().is_none());
    let waited = waiting.hear().unwrap();
    assert_eq!(
        (&waited["ok"]["status"], &waited["ok"]["exit_code"]),
        (&json!(3), &json!(3))
    );
}

#[test]
fn what_is_no_input_ends_the_console_and_not_the_vm() {
    need_kvm!();
    let web = Named::obedient("web");
    for nonsense in [
        "{\"forkvm\":1,\"input\":\"*\"}",
        "{\"forkvm\":1,\"do\":\"ps\"}",
        "?",
    ] {
        let mut console = web.client();
        console.ask(json!({ "do": "console", "vm": "web" }));
        console.send(format!("{nonsense}\n").as_bytes());
        assert_eq!(kind(&console.hear().unwrap()), "usage", "{nonsense}");
        assert!(console.hear().is_none());
    }
    web.json(&["info", "web"]);
}

/// Needs root, to be somebody else; says so where it is not.
#[test]
fn only_the_owner_is_served() {
    need_kvm!();
    if !geteuid().is_root() {
        println!("the user of this test cannot become another one: only root can");
        return;
    }
    let web = Named::obedient("web");
    // As if all that stands before were not there.
    for dir in [web.dir(), &web.dir().join("forkvm"), &web.place()] {
        fs::set_permissions(dir, Permissions::from_mode(0o711)).unwrap();
    }
    fs::set_permissions(web.socket(), Permissions::from_mode(0o666)).unwrap();
    let socket = web.socket();
    let stranger = move || {
        // Of this thread alone.
        let nobody = rustix::fs::Uid::from_raw(65534);
        set_thread_res_uid(nobody, nobody, nobody).unwrap();
        let mut client = Client::connect(&socket);
        let answer = client.hear().unwrap();
        assert!(client.hear().is_none());
        answer
    };
    let answer = thread::spawn(stranger).join().unwrap();
    assert_eq!(kind(&answer), "refused");
    assert!(web.client().ask(json!({ "do": "ps" }))["ok"].is_object());
}
