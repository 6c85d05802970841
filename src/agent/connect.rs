//! The way to an agent, and patience.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use forkvm_agent_protocol::{AgentFrame, PORT, Request};

use super::error::{AgentError, is_timeout};
use super::session::Session;

/// How long one try may take while a machine boots: one that was begun before the guest's driver was there is lost.
const TRY: Duration = Duration::from_secs(5);

/// Between the first two tries. Then more and more, up to [`LONGEST_PAUSE`]: a guest without an agent costs little.
const PAUSE: Duration = Duration::from_millis(20);

const LONGEST_PAUSE: Duration = Duration::from_millis(320);

/// Most bytes of the answer to `CONNECT`.
const LINE: usize = 64;

/// How a stream to an agent is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `CONNECT 1024` on a machine's Unix socket.
    Vsock,
    /// The socket is the agent's own (`forkvm-agent --unix`).
    Direct,
}

/// Tries until the agent says that it is well.
pub(super) fn until_it_answers(
    socket: &Path,
    way: Way,
    deadline: Instant,
) -> Result<(), AgentError> {
    let mut pause = PAUSE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // One try at least, even where the deadline has passed.
        let limit = left.clamp(Duration::from_millis(1), TRY);
        let last = match try_once(socket, way, limit) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if !last.may_pass() {
            return Err(last);
        }
        if Instant::now() + pause >= deadline {
            return Err(AgentError::NotYet {
                socket: socket.to_owned(),
                last: Box::new(last),
            });
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn try_once(socket: &Path, way: Way, limit: Duration) -> Result<(), AgentError> {
    let stream = open(socket, way, limit)?;
    match Session::begin(stream, Request::Health, limit)?.hear()? {
        AgentFrame::Healthy(_) => Ok(()),
        other => Err(AgentError::unexpected(&other)),
    }
}

/// A stream to the agent, whose reads and writes take `limit` at most.
pub(super) fn open(socket: &Path, way: Way, limit: Duration) -> Result<UnixStream, AgentError> {
    let connect = || {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        Ok(stream)
    };
    let mut stream = connect().map_err(|source| AgentError::Connect {
        socket: socket.to_owned(),
        source,
    })?;
    if way == Way::Vsock {
        stream
            .write_all(format!("CONNECT {PORT}\n").as_bytes())
            .map_err(AgentError::Broken)?;
        hear_ok(&mut stream, limit)?;
    }
    Ok(stream)
}

/// Reads `OK PORT\n`, and no byte more: the rest is the stream's.
fn hear_ok(stream: &mut UnixStream, limit: Duration) -> Result<(), AgentError> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        match stream.read(&mut byte) {
            Ok(0) if line.is_empty() => return Err(AgentError::NobodyListens(PORT)),
            Ok(0) => return Err(AgentError::Broken(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(AgentError::NobodyListens(PORT));
            }
            Err(error) if is_timeout(&error) => return Err(AgentError::Silent(limit)),
            Err(error) => return Err(AgentError::Broken(error)),
        }
        if line.len() > LINE {
            break;
        }
    }
    if line.starts_with(b"OK ") && line.ends_with(b"\n") {
        return Ok(());
    }
    let said = line.escape_ascii();
    Err(AgentError::Nonsense(format!(
        "\"{said}\" in answer to CONNECT"
    )))
}
