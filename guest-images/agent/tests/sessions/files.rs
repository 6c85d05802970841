//! Files, in and out.

use std::fs;
use std::os::unix::fs::PermissionsExt;
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
