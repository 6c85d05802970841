//! An agent, and a client that says exactly what a test wants.

use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use forkvm_agent_protocol::{
    AgentFrame, Bytes, ClientFrame, Exec, Exit, Hello, Refusal, Request, frame,
};

/// How long anything may take on a busy machine.
pub(crate) const AMPLE: Duration = Duration::from_secs(60);

/// An agent that ends with the test.
pub(crate) struct Agent {
    process: Child,
    directory: tempfile::TempDir,
}

impl Agent {
    pub(crate) fn start() -> Agent {
        let directory = tempfile::tempdir().unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_forkvm-agent"))
            .arg("--unix")
            .arg(directory.path().join("host"))
            .arg("--local")
            .arg(directory.path().join("local"))
            .arg("--no-doorbell")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Agent { process, directory }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A stream of the host, once the agent listens.
    pub(crate) fn stream(&self) -> UnixStream {
        connect(&self.path("host"))
    }

    /// A session in which `request` was sent and both have greeted.
    pub(crate) fn ask(&self, request: Request) -> Session {
        Session::ask(self.stream(), request)
    }

    /// The first answer to `request`.
    pub(crate) fn answer(&self, request: Request) -> AgentFrame {
        self.ask(request).hear().unwrap()
    }

    /// The agent still serves.
    pub(crate) fn assert_well(&self) {
        let answer = self.answer(Request::Health);
        assert!(matches!(answer, AgentFrame::Healthy(_)), "{answer:?}");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Waits for whoever makes the socket; a socket gives no sign of it.
pub(crate) fn connect(path: &Path) -> UnixStream {
    let deadline = Instant::now() + AMPLE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(AMPLE)).unwrap();
                return stream;
            }
            Err(error) if Instant::now() > deadline => panic!("{}: {error}", path.display()),
            Err(_) => thread::yield_now(),
        }
    }
}

/// A client.
pub(crate) struct Session {
    stream: UnixStream,
    inbox: BufReader<UnixStream>,
}

impl Session {
    pub(crate) fn new(stream: UnixStream) -> Session {
        let inbox = BufReader::new(stream.try_clone().unwrap());
        Session { stream, inbox }
    }

    pub(crate) fn ask(stream: UnixStream, request: Request) -> Session {
        let mut session = Session::new(stream);
        session.say(&ClientFrame::Hello(Hello::new(0)));
        session.say(&ClientFrame::Request(request));
        let first = session.hear();
        assert!(matches!(first, Some(AgentFrame::Hello(_))), "{first:?}");
        session
    }

    pub(crate) fn say(&mut self, one: &ClientFrame) {
        frame::write(&mut self.stream, one).unwrap();
    }

    /// The client has no more to say.
    pub(crate) fn half_close(self) -> Session {
        self.stream.shutdown(std::net::Shutdown::Write).unwrap();
        self
    }

    pub(crate) fn say_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next frame; `None` at the end of the stream.
    pub(crate) fn hear(&mut self) -> Option<AgentFrame> {
        frame::read(&mut self.inbox).unwrap()
    }

    /// The refusal that ends the session.
    pub(crate) fn refusal(&mut self) -> Refusal {
        loop {
            match self.hear() {
                Some(AgentFrame::Refused(refusal)) => return refusal,
                Some(AgentFrame::Hello(_) | AgentFrame::Started { .. }) => {}
                other => panic!("{other:?} in place of a refusal"),
            }
        }
    }

    /// Reads to the end of a program.
    pub(crate) fn finish(&mut self) -> Ran {
        let mut ran = Ran {
            stdout: Vec::new(),
            stderr: Vec::new(),
            exit: Exit::Code(0),
        };
        loop {
            match self.hear() {
                Some(AgentFrame::Started { .. } | AgentFrame::StdinRoom(_)) => {}
                Some(AgentFrame::Stdout(Bytes(bytes))) => ran.stdout.extend(bytes),
                Some(AgentFrame::Stderr(Bytes(bytes))) => ran.stderr.extend(bytes),
                Some(AgentFrame::Ended(exit)) => {
                    ran.exit = exit;
                    assert_eq!(self.hear(), None, "the session ends with the program");
                    return ran;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Reads until the program has written `text` to its standard output.
    pub(crate) fn hear_out(&mut self, text: &str) {
        let mut said = Vec::new();
        while !String::from_utf8_lossy(&said).contains(text) {
            match self.hear() {
                Some(AgentFrame::Started { .. } | AgentFrame::StdinRoom(_)) => {}
                Some(AgentFrame::Stdout(Bytes(bytes))) => said.extend(bytes),
                other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&said)),
            }
        }
    }
}

/// What a program did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) exit: Exit,
}

/// `sh -c script`.
pub(crate) fn shell(script: &str) -> Exec {
    Exec {
        argv: ["sh", "-c", script].map(Bytes::from).to_vec(),
        ..Exec::default()
    }
}

/// Waits until nobody writes `fifo` any more: whoever held it open has ended.
pub(crate) fn wait_for_end_of_fifo(fifo: &Path) {
    assert_eq!(fs::read(fifo).unwrap(), b"");
}
