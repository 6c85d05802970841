//! Files, in and out.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use forkvm_agent_protocol::{AgentFrame, Bytes, ClientFrame, Request};

use crate::agent::{Agent, Session};

fn put(agent: &Agent, path: &Path, length: u64) -> Session {
    agent.ask(Request::Put {
        path: path.into(),
        mode: 0o640,
        length,
    })
}

#[test]
fn a_file_is_there_once_all_of_it_has_come() {
    let agent = Agent::start();
    let place = agent.path("file");
    fs::write(&place, "old").unwrap();
    let mut session = put(&agent, &place, 6);
    assert_eq!(session.hear(), Some(AgentFrame::Ready));
    session.say(&ClientFrame::Data("new".into()));
    assert_eq!(fs::read(&place).unwrap(), b"old");
    session.say(&ClientFrame::Data("est".into()));
    assert_eq!(session.hear(), Some(AgentFrame::Stored));
    assert_eq!(session.hear(), None);
    assert_eq!(fs::read(&place).unwrap(), b"newest");
    let mode = fs::metadata(&place).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o640);
}

#[test]
fn a_client_that_hangs_up_in_a_file_leaves_nothing() {
    let agent = Agent::start();
    let directory = agent.path("files");
    fs::create_dir(&directory).unwrap();
    let mut session = put(&agent, &directory.join("file"), 6);
    assert_eq!(session.hear(), Some(AgentFrame::Ready));
    session.say(&ClientFrame::Data("new".into()));
    // Its end is heard; the answer comes after the file is gone.
    let mut session = session.half_close();
    session.refusal();
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
}

#[test]
fn more_bytes_than_announced_are_refused() {
    let agent = Agent::start();
    let place = agent.path("file");
    let mut session = put(&agent, &place, 2);
    assert_eq!(session.hear(), Some(AgentFrame::Ready));
    session.say(&ClientFrame::Data("new".into()));
    assert!(session.refusal().text.contains("more than 2"));
    assert!(!place.exists());
}

#[test]
fn a_file_comes_with_its_mode() {
    let agent = Agent::start();
    let place = agent.path("file");
    let content: Vec<u8> = (0..300_000u32).map(|n| (n % 253) as u8).collect();
    fs::write(&place, &content).unwrap();
    fs::set_permissions(&place, fs::Permissions::from_mode(0o751)).unwrap();
    let mut session = agent.ask(Request::Get {
        path: place.as_path().into(),
    });
    let head = AgentFrame::File {
        mode: 0o751,
        length: 300_000,
    };
    assert_eq!(session.hear(), Some(head));
    let mut got = Vec::new();
    loop {
        match session.hear() {
            Some(AgentFrame::Data(Bytes(bytes))) => got.extend(bytes),
            Some(AgentFrame::DataEnd) => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(got == content);
}

#[test]
fn directories_and_what_is_not_there_are_refused_by_name() {
    let agent = Agent::start();
    let refusal = put(&agent, &agent.path(""), 1).refusal();
    assert_eq!(refusal.errno, libc::EISDIR);
    assert!(refusal.text.contains("tar"), "{refusal:?}");
    for (path, errno) in [
        ("/", libc::EISDIR),
        ("/usr", libc::EISDIR),
        ("/nowhere/at/all", libc::ENOENT),
        ("relative", libc::EINVAL),
        ("/dev/null", libc::EINVAL),
    ] {
        let refusal = agent.ask(Request::Get { path: path.into() }).refusal();
        assert_eq!(refusal.errno, errno, "{refusal:?}");
        assert!(refusal.text.contains(path), "{refusal:?}");
    }
}

#[test]
fn a_file_goes_in_beside_what_an_agent_of_a_killed_machine_left() {
    let agent = Agent::start();
    for number in 0..3 {
        let left = format!(".forkvm-{}-{number}", agent.pid());
        fs::write(agent.path(&left), "left").unwrap();
    }
    let place = agent.path("file");
    let mut session = put(&agent, &place, 0);
    assert_eq!(session.hear(), Some(AgentFrame::Ready));
    assert_eq!(session.hear(), Some(AgentFrame::Stored));
    assert_eq!(fs::read(&place).unwrap(), b"");
    let left = agent.path(&format!(".forkvm-{}-0", agent.pid()));
    assert_eq!(fs::read(left).unwrap(), b"left");
}

#[test]
fn a_device_or_a_socket_is_not_replaced_by_a_file() {
    let agent = Agent::start();
    agent.assert_well();
    let socket = agent.path("local");
    let refusal = put(&agent, &socket, 0).refusal();
    assert_eq!(refusal.errno, libc::EINVAL);
    assert!(refusal.text.contains("is no file"), "{refusal:?}");
    let there = fs::symlink_metadata(&socket).unwrap();
    assert!(there.file_type().is_socket());
}

#[test]
fn a_symbolic_link_is_replaced_and_what_it_points_to_is_not() {
    let agent = Agent::start();
    let (link, file) = (agent.path("link"), agent.path("file"));
    fs::write(&file, "old").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let mut session = put(&agent, &link, 0);
    assert_eq!(session.hear(), Some(AgentFrame::Ready));
    assert_eq!(session.hear(), Some(AgentFrame::Stored));
    assert!(fs::symlink_metadata(&link).unwrap().is_file());
    assert_eq!(fs::read(&file).unwrap(), b"old");
}

#[test]
fn no_copy_makes_a_program_that_runs_as_somebody_else() {
    let agent = Agent::start();
    let place = agent.path("file");
    let mut session = agent.ask(Request::Put {
        path: place.as_path().into(),
        mode: 0o6755,
        length: 0,
    });
    assert_eq!(session.hear(), Some(AgentFrame::Ready));
    assert_eq!(session.hear(), Some(AgentFrame::Stored));
    let mode = fs::metadata(&place).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o755);
}
