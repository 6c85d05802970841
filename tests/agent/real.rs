//! A client and a real agent.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::sync::mpsc::{Receiver, Sender, channel};

use forkvm::agent::protocol::{Bytes, Exec, Exit, Generation, Identity, Size};
use forkvm::agent::{AgentClient, AgentError};

use crate::agents::{Agent, ample};

fn shell(script: &str) -> Exec {
    Exec {
        argv: ["sh", "-c", script].map(Bytes::from).to_vec(),
        ..Exec::default()
    }
}

/// Output that a test can wait for.
struct Heard(Sender<Vec<u8>>);

impl Heard {
    fn new() -> (Heard, Receiver<Vec<u8>>) {
        let (said, heard) = channel();
        (Heard(said), heard)
    }
}

impl Write for Heard {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Input that never comes, like that of a terminal where nobody types.
struct Silence(Receiver<()>);

impl Read for Silence {
    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Ok(self.0.recv().map_or(0, |()| 0))
    }
}

#[test]
fn the_way_through_a_vsock_leads_to_the_agent() {
    let agent = Agent::start();
    let vsock = agent.vsock();
    let client = AgentClient::connect(&vsock.socket(), ample()).unwrap();
    let healthy = client.health().unwrap();
    assert_eq!(healthy.version, env!("CARGO_PKG_VERSION"));
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let running = client.exec(&shell("cat; echo e >&2; exit 3")).unwrap();
    let input = Box::new(io::Cursor::new(b"in".to_vec()));
    let exit = running.pump(Some(input), &mut out, &mut err).unwrap();
    assert_eq!(
        (exit, &out[..], &err[..]),
        (Exit::Code(3), &b"in"[..], &b"e\n"[..])
    );
}

#[test]
fn ten_megabytes_go_through_a_program() {
    let agent = Agent::start();
    let data: Vec<u8> = (0..10u32 << 20).map(|n| (n % 251) as u8).collect();
    let mut back = Vec::new();
    let running = agent.client().exec(&shell("cat")).unwrap();
    let input = Box::new(io::Cursor::new(data.clone()));
    let exit = running
        .pump(Some(input), &mut back, &mut io::sink())
        .unwrap();
    assert_eq!(exit, Exit::Code(0));
    assert!(back == data, "{} of {} bytes", back.len(), data.len());
}

#[test]
fn a_signal_reaches_a_program_that_reads_nothing_and_input_that_never_comes_holds_nobody() {
    let agent = Agent::start();
    let running = agent
        .client()
        .exec(&shell("echo up; exec sleep 1000"))
        .unwrap();
    let control = running.control();
    let (mut out, heard) = Heard::new();
    let (_typist, silence) = channel();
    let pump = std::thread::spawn(move || {
        let input = Box::new(Silence(silence));
        running.pump(Some(input), &mut out, &mut io::sink())
    });
    assert_eq!(heard.recv().unwrap(), b"up\n");
    // One that there is not does the program no harm.
    let error = control.signal(64).unwrap_err();
    assert!(matches!(error, AgentError::NoSignal(64)), "{error}");
    control.signal(15).unwrap();
    assert_eq!(pump.join().unwrap().unwrap(), Exit::Signal(15));
}

#[test]
fn a_terminal_is_resized_while_it_is_pumped() {
    let agent = Agent::start();
    let exec = Exec {
        terminal: Some(Size {
            rows: 10,
            columns: 20,
        }),
        ..shell("stty size; read line; stty size")
    };
    let running = agent.client().exec(&exec).unwrap();
    running
        .control()
        .resize(Size {
            rows: 30,
            columns: 40,
        })
        .unwrap();
    let mut out = Vec::new();
    let input = Box::new(io::Cursor::new(b"\n".to_vec()));
    running
        .pump(Some(input), &mut out, &mut io::sink())
        .unwrap();
    let said = String::from_utf8(out).unwrap();
    assert!(said.ends_with("30 40\r\n"), "{said:?}");
}

#[test]
fn a_program_that_is_let_go_is_ended() {
    let agent = Agent::start();
    let client = agent.client();
    let fifo = agent.path("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    let script = format!("exec 3>'{}'; exec sleep 1000", fifo.display());
    let running = client.exec(&shell(&script)).unwrap();
    // Opening it waits for the program, its end for the program's.
    let mut held = fs::File::open(&fifo).unwrap();
    drop(running);
    assert_eq!(held.read(&mut [0]).unwrap(), 0);
}

#[test]
fn what_cannot_be_run_is_told_with_its_name() {
    let agent = Agent::start();
    let exec = Exec {
        argv: vec!["no-such-program".into()],
        ..Exec::default()
    };
    let Err(AgentError::Refused(refusal)) = agent.client().exec(&exec) else {
        panic!("a refusal");
    };
    assert_eq!(refusal.errno, libc::ENOENT);
}

#[test]
fn files_go_in_and_out() {
    let agent = Agent::start();
    let client = agent.client();
    let place = agent.path("file");
    let data: Vec<u8> = (0..3u32 << 20).map(|n| (n % 241) as u8).collect();
    client
        .put(&place, 0o750, data.len() as u64, &mut &data[..])
        .unwrap();
    let mode = fs::metadata(&place).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o750);
    let mut back = Vec::new();
    let got = client.get(&place, &mut back).unwrap();
    assert_eq!((got.mode, got.length), (0o750, data.len() as u64));
    assert!(back == data);
}

#[test]
fn a_source_that_ends_early_leaves_no_file() {
    let agent = Agent::start();
    let place = agent.path("file");
    let error = agent
        .client()
        .put(&place, 0o600, 10, &mut &b"short"[..])
        .unwrap_err();
    assert!(matches!(error, AgentError::Source(_)), "{error}");
    assert!(!place.exists());
}

#[test]
fn a_directory_is_refused_by_name() {
    let agent = Agent::start();
    let text = agent
        .client()
        .get(&agent.path(""), &mut io::sink())
        .unwrap_err()
        .to_string();
    assert!(text.contains("directory") && text.contains("tar"), "{text}");
}

#[test]
fn an_identity_that_cannot_be_right_is_refused_before_anything_is_changed() {
    let agent = Agent::start();
    let identity = Identity {
        clone_id: 1,
        generation: Generation([1; 16]),
        // Not this host's, should it ever be taken on.
        hostname: String::new(),
        machine_id: "0".repeat(32),
        entropy: Bytes(vec![0; 32]),
        wall_clock: 0,
        cid: 3,
    };
    let refused = agent.client().identify(&identity, ample()).unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("hostname"), "{text}");
}
