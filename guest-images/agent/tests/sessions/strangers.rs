//! Who does not speak the protocol is told so, and disturbs nobody.

use std::io::Read;

use forkvm_agent_protocol::{
    AgentFrame, Bytes, ClientFrame, FRAME_MAX, Hello, Request, STDIN_WINDOW,
};

use crate::agent::{Agent, Session, shell};

#[test]
fn an_agent_is_well_and_says_its_version() {
    let agent = Agent::start();
    let AgentFrame::Healthy(healthy) = agent.answer(Request::Health) else {
        panic!("health");
    };
    assert_eq!(healthy.version, env!("CARGO_PKG_VERSION"));
    assert!(healthy.uptime_ms > 0);
    assert_eq!(healthy.generation, None);
}

#[test]
fn another_version_is_refused_by_name_and_hears_which_one_this_is() {
    let agent = Agent::start();
    let mut session = Session::new(agent.stream());
    let mut hello = Hello::new(0);
    hello.version = 9;
    session.say(&ClientFrame::Hello(hello));
    assert_eq!(session.hear(), Some(AgentFrame::Hello(Hello::new(0))));
    let refusal = session.refusal();
    assert!(refusal.text.contains("version 9"), "{refusal:?}");
    assert_eq!(session.hear(), None);
    agent.assert_well();
}

#[test]
fn features_that_are_not_known_are_ignored() {
    let agent = Agent::start();
    let mut session = Session::new(agent.stream());
    session.say(&ClientFrame::Hello(Hello::new(u64::MAX)));
    session.say(&ClientFrame::Request(Request::Health));
    session.hear();
    assert!(matches!(session.hear(), Some(AgentFrame::Healthy(_))));
}

#[test]
fn garbage_is_called_garbage() {
    let agent = Agent::start();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[3, 0, 0, 0, 0xff, 0xff, 0xff],
    ] {
        let mut session = Session::new(agent.stream());
        session.say_bytes(garbage);
        assert_eq!(session.refusal().errno, libc::EPROTO);
    }
    agent.assert_well();
}

#[test]
fn a_frame_that_is_too_long_is_refused_by_its_length() {
    let agent = Agent::start();
    let mut session = Session::new(agent.stream());
    session.say_bytes(&(FRAME_MAX as u32 + 1).to_le_bytes());
    let refusal = session.refusal();
    assert!(refusal.text.contains("262145"), "{refusal:?}");
}

#[test]
fn a_request_before_the_greeting_is_refused() {
    let agent = Agent::start();
    let mut session = Session::new(agent.stream());
    session.say(&ClientFrame::Request(Request::Health));
    assert!(session.refusal().text.contains("Request"));
}

#[test]
fn a_client_that_hangs_up_at_once_disturbs_nobody() {
    let agent = Agent::start();
    for _ in 0..20 {
        drop(agent.stream());
    }
    agent.assert_well();
}

#[test]
fn more_input_than_there_is_room_for_ends_the_session() {
    let agent = Agent::start();
    let mut session = agent.ask(Request::Exec(shell("sleep 1000")));
    session.say(&ClientFrame::Stdin(Bytes(vec![
        0;
        STDIN_WINDOW as usize + 1
    ])));
    loop {
        match session.hear() {
            Some(AgentFrame::Refused(refusal)) => {
                assert!(refusal.text.contains("room"), "{refusal:?}");
                break;
            }
            Some(AgentFrame::Started { .. } | AgentFrame::StdinRoom(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn forks_are_refused_where_there_is_no_doorbell() {
    let agent = Agent::start();
    let refusal = agent.ask(Request::Fork { clones: 2 }).refusal();
    assert_eq!(refusal.errno, libc::ENOSYS);
    assert!(refusal.text.contains("doorbell"), "{refusal:?}");
    let refusal = agent.ask(Request::PowerOff).refusal();
    assert!(refusal.text.contains("PID 1"), "{refusal:?}");
}

#[test]
fn nothing_is_sent_to_who_says_nothing() {
    let agent = Agent::start();
    let mut stream = agent.stream();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    // The refusal of a client that went away, and no greeting.
    let mut session = &said[..];
    let first = forkvm_agent_protocol::frame::read::<AgentFrame>(&mut session).unwrap();
    assert!(matches!(first, Some(AgentFrame::Refused(_))), "{first:?}");
    assert!(session.is_empty());
}
