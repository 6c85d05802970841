//! Those that are no agent: a client says so, and in time.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use forkvm::agent::protocol::{
    AgentFrame, Bytes, ClientFrame, Exec, Exit, FRAME_MAX, Generation, Healthy, Hello, Identity,
    Request, frame,
};
use forkvm::agent::{AgentClient, AgentError, Way};

use crate::agents::{Fake, ample};

/// Soon enough for a test, and long enough for one try.
fn soon() -> Instant {
    Instant::now() + Duration::from_millis(300)
}

/// Reads on until the client has gone.
fn outlast(mut stream: UnixStream) {
    io::copy(&mut stream, &mut io::sink()).ok();
}

fn last_of(error: AgentError) -> AgentError {
    match error {
        AgentError::NotYet { last, .. } => *last,
        other => panic!("{other}"),
    }
}

fn error_of(serve: impl Fn(UnixStream) + Send + Sync + Clone + 'static, way: Way) -> AgentError {
    let fake = Fake::new(serve);
    AgentClient::by(&fake.socket(), way, soon()).unwrap_err()
}

#[test]
fn a_machine_that_is_not_there_is_waited_for_and_then_named() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vsock");
    let error = AgentClient::connect(&socket, soon()).unwrap_err();
    assert!(error.to_string().contains("vsock"), "{error}");
    assert!(matches!(last_of(error), AgentError::Connect { .. }));
}

#[test]
fn a_guest_where_nobody_listens_is_told_so() {
    let refuse = |stream: UnixStream| {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
    };
    let last = last_of(error_of(refuse, Way::Vsock));
    assert!(matches!(last, AgentError::NobodyListens(1024)), "{last}");
}

#[test]
fn an_agent_that_never_answers_is_silent() {
    for way in [Way::Vsock, Way::Direct] {
        let last = last_of(error_of(outlast, way));
        assert!(matches!(last, AgentError::Silent(_)), "{last}");
    }
}

#[test]
fn nonsense_is_called_nonsense() {
    let rubbish = |mut stream: UnixStream| {
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").ok();
        outlast(stream);
    };
    for way in [Way::Vsock, Way::Direct] {
        let last = last_of(error_of(rubbish, way));
        assert!(matches!(last, AgentError::Nonsense(_)), "{last}");
    }
}

#[test]
fn a_frame_that_is_too_long_is_nonsense() {
    let long = |mut stream: UnixStream| {
        let length = FRAME_MAX as u32 + 1;
        stream.write_all(&length.to_le_bytes()).ok();
        outlast(stream);
    };
    let last = last_of(error_of(long, Way::Direct));
    assert!(last.to_string().contains("262145"), "{last}");
}

#[test]
fn an_agent_of_another_version_is_not_waited_for() {
    let other = |mut stream: UnixStream| {
        let mut hello = Hello::new(0);
        hello.version = 2;
        frame::write(&mut stream, &AgentFrame::Hello(hello)).ok();
        outlast(stream);
    };
    let fake = Fake::new(other);
    let error = AgentClient::by(&fake.socket(), Way::Direct, ample()).unwrap_err();
    assert!(matches!(&error, AgentError::Stranger(_)), "{error}");
    assert!(error.to_string().contains("version 2"), "{error}");
}

#[test]
fn a_machine_that_ends_in_the_middle_breaks_the_session() {
    let ends = |mut stream: UnixStream| {
        let hello = frame::encode(&AgentFrame::Hello(Hello::new(0))).unwrap();
        stream.write_all(&hello).ok();
        stream.read_exact(&mut [0; 4]).ok();
        stream.write_all(&hello[..7]).ok();
    };
    let last = last_of(error_of(ends, Way::Direct));
    assert!(matches!(last, AgentError::Broken(_)), "{last}");
}

/// Hears a client's greeting and request; answers for health, and by `answers` whatever else it is asked.
fn answer(stream: &mut UnixStream, answers: &[AgentFrame]) {
    frame::write(stream, &AgentFrame::Hello(Hello::new(0))).unwrap();
    let hello: Option<ClientFrame> = frame::read(stream).unwrap();
    assert!(matches!(hello, Some(ClientFrame::Hello(_))), "{hello:?}");
    let healthy = [AgentFrame::Healthy(Healthy {
        version: String::new(),
        uptime_ms: 1,
        clock_source: String::new(),
        generation: None,
        clone_id: None,
    })];
    let answers = match frame::read(stream).unwrap() {
        Some(ClientFrame::Request(Request::Health)) => &healthy,
        _ => answers,
    };
    for one in answers {
        frame::write(stream, one).unwrap();
    }
}

#[test]
fn a_program_that_has_ended_before_its_input_is_closed_still_has_its_status() {
    let (hung_up, has_hung_up) = channel();
    let fast = move |mut stream: UnixStream| {
        let ran = [
            AgentFrame::Started { pid: 7 },
            AgentFrame::Stdout("said".into()),
            AgentFrame::Ended(Exit::Code(5)),
        ];
        answer(&mut stream, &ran);
        drop(stream);
        hung_up.send(()).unwrap();
    };
    let fake = Fake::new(fast);
    let client = AgentClient::by(&fake.socket(), Way::Direct, ample()).unwrap();
    has_hung_up.recv().unwrap();
    let running = client.exec(&Exec::default()).unwrap();
    has_hung_up.recv().unwrap();
    let mut out = Vec::new();
    let exit = running.pump(None, &mut out, &mut io::sink()).unwrap();
    assert_eq!((exit, &out[..]), (Exit::Code(5), &b"said"[..]));
}

#[test]
fn a_machine_that_never_takes_its_identity_on_is_given_up_at_the_deadline() {
    let stuck = |mut stream: UnixStream| {
        answer(&mut stream, &[]);
        outlast(stream);
    };
    let fake = Fake::new(stuck);
    let client = AgentClient::by(&fake.socket(), Way::Direct, ample()).unwrap();
    let identity = Identity {
        clone_id: 1,
        generation: Generation([1; 16]),
        hostname: "clone".into(),
        machine_id: "0".repeat(32),
        entropy: Bytes(vec![0; 32]),
        wall_clock: 0,
        cid: 3,
    };
    let error = client.identify(&identity, soon()).unwrap_err();
    assert!(
        matches!(error, AgentError::Silent(limit) if limit <= Duration::from_millis(300)),
        "{error}"
    );
    // Also one that is over is a deadline.
    client.identify(&identity, Instant::now()).unwrap_err();
}
