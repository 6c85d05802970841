//! Whom the client speaks to.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use forkvm::agent::{AgentClient, Way};

/// How long anything may take on a busy machine.
pub(crate) fn ample() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// The agent's program. It is written before any test starts a process: one that is open for writing cannot be executed.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = PROGRAM.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("forkvm-agent");
        fs::write(&path, forkvm_guest_images::AGENT).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        (directory, path)
    });
    path
}

/// An agent that ends with the test.
pub(crate) struct Agent {
    process: Child,
    directory: tempfile::TempDir,
}

impl Agent {
    pub(crate) fn start() -> Agent {
        let program = program();
        let directory = tempfile::tempdir().unwrap();
        let process = Command::new(program)
            .arg("--unix")
            .arg(directory.path().join("agent"))
            .args(["--no-local", "--no-doorbell"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Agent { process, directory }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn client(&self) -> AgentClient {
        AgentClient::by(&self.path("agent"), Way::Direct, ample()).unwrap()
    }

    /// A Unix socket like a machine's vsock has: `CONNECT`, `OK`, and then the agent.
    pub(crate) fn vsock(&self) -> Fake {
        let agent = self.path("agent");
        Fake::new(move |stream| {
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            lines.read_line(&mut line).unwrap();
            assert_eq!(line, "CONNECT 1024\n");
            // Not there yet: as a guest that refuses.
            let Ok(agent) = UnixStream::connect(&agent) else {
                return;
            };
            let mut to_client = stream.try_clone().unwrap();
            to_client.write_all(b"OK 1073741824\n").unwrap();
            let mut from_agent = agent.try_clone().unwrap();
            let back = thread::spawn(move || {
                // A client that has what it wanted hangs up.
                if std::io::copy(&mut from_agent, &mut to_client).is_ok() {
                    to_client.shutdown(std::net::Shutdown::Write).ok();
                }
            });
            let mut agent = agent;
            if std::io::copy(&mut lines, &mut agent).is_ok() {
                agent.shutdown(std::net::Shutdown::Write).ok();
            }
            back.join().unwrap();
        })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// A socket at which each client is served by a function.
pub(crate) struct Fake {
    directory: tempfile::TempDir,
}

impl Fake {
    pub(crate) fn new(serve: impl Fn(UnixStream) + Send + Sync + Clone + 'static) -> Fake {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, serve) = (stream.unwrap(), serve.clone());
                thread::spawn(move || serve(stream));
            }
        });
        Fake { directory }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("vsock")
    }
}
