//! Bytes between a program's descriptors and its client.
//!
//! All descriptors are non-blocking, and whoever waits at one waits for the program's end as well: a descendant that keeps
//! a pipe open holds up nothing. What the program itself wrote before its end is read to the last byte.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;

use forkvm_agent_protocol::{AgentFrame, CHUNK};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, ioctl_fionbio, ioctl_fionread};
use rustix::termios::isatty;

use super::client::Input;
use crate::outbox::Outbox;
use crate::reaper::{Child, Ended};

/// What a terminal's user types to end its input (VEOF, as terminals begin).
const END_OF_INPUT: &[u8] = b"\x04";

/// More than a terminal holds: 4 KiB that can be read, and 8 KiB or a little more that are on their way there.
const TERMINAL_HOLDS: u64 = 64 << 10;

/// Makes a descriptor non-blocking. It is the agent's own end of a pipe or terminal; the program's is another.
pub(super) fn prepare(fd: &OwnedFd) -> io::Result<()> {
    Ok(ioctl_fionbio(fd, true)?)
}

/// Waits until `fd` can be used or the program has ended; whether it had ended before.
fn wait(fd: BorrowedFd<'_>, flags: PollFlags, ended: &Ended) -> bool {
    let had_ended = ended.has();
    if !had_ended {
        let mut fds = [
            PollFd::from_borrowed_fd(fd, flags),
            PollFd::new(ended, PollFlags::IN),
        ];
        // Interrupted, or without memory: then the descriptor is tried once more, no harm.
        poll(&mut fds, None).unwrap_or_default();
    }
    had_ended
}

/// Copies what the program writes to its client, until all its writers are gone, or it has ended and what was there then is
/// told: what others write from then on has no end that could be waited for. What no client hears is read all the same: a
/// program whose client is gone must not stand still.
pub(super) fn output(
    source: &OwnedFd,
    child: &Child,
    outbox: &Outbox,
    wrap: fn(&[u8]) -> AgentFrame,
) {
    let mut buffer = vec![0; CHUNK];
    // Known once the program has ended.
    let mut left = None;
    while left != Some(0) {
        if wait(source.as_fd(), PollFlags::IN, child.ended()) && left.is_none() {
            left = Some(unread(source));
            continue;
        }
        let most = left.map_or(CHUNK, |left| CHUNK.min(left as usize));
        match rustix::io::read(source, &mut buffer[..most]) {
            // EIO: the last program has closed the terminal.
            Ok(0) | Err(Errno::IO) => return,
            Ok(count) => {
                left = left.map(|left| left - count as u64);
                outbox.send_if_heard(&wrap(&buffer[..count]));
            }
            Err(Errno::AGAIN) if left.is_some() => return,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => {
                crate::log::line(&format!("reading a program's output: {error}"));
                return;
            }
        }
    }
}

/// Bytes that were written and not read. The kernel does not count all of a terminal's.
fn unread(source: &OwnedFd) -> u64 {
    if isatty(source) {
        return TERMINAL_HOLDS;
    }
    ioctl_fionread(source).unwrap_or_else(|error| {
        crate::log::line(&format!("measuring a program's output: {error}"));
        0
    })
}

/// Feeds the program's input, and tells the client of the room that this makes.
pub(super) fn input(
    sink: OwnedFd,
    terminal: bool,
    child: &Child,
    from_client: &Receiver<Input>,
    room: &AtomicUsize,
    outbox: &Outbox,
) {
    let mut open = true;
    // The channel ends with the client.
    while let Ok(one) = from_client.recv() {
        match one {
            Input::Bytes(bytes) => {
                open = open && feed(&sink, &bytes, child.ended());
                // Also for bytes that the program no longer wants: the client would wait for ever.
                room.fetch_add(bytes.len(), Ordering::AcqRel);
                outbox.send_if_heard(&AgentFrame::StdinRoom(bytes.len() as u32));
            }
            Input::End if terminal => open = open && feed(&sink, END_OF_INPUT, child.ended()),
            Input::End => break,
        }
    }
}

/// Writes all of `bytes`; whether the program takes more.
fn feed(sink: &OwnedFd, mut bytes: &[u8], ended: &Ended) -> bool {
    while !bytes.is_empty() {
        if wait(sink.as_fd(), PollFlags::OUT, ended) {
            return false;
        }
        match rustix::io::write(sink, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::AGAIN | Errno::INTR) => {}
            // EPIPE: it has closed its input. EIO: its terminal.
            Err(_) => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::os::unix::process::CommandExt;
    use std::process::Command;
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::reaper;

    /// What the client of a program hears that has ended, and whose output comes from `source`.
    fn told_of(source: OwnedFd) -> Vec<u8> {
        reaper::start().unwrap();
        let child = reaper::spawn(Command::new("true").process_group(0))
            .unwrap()
            .child;
        child.ended().wait(None);
        prepare(&source).unwrap();
        let (client, stream) = UnixStream::pair().unwrap();
        let (done, is_done) = channel();
        thread::spawn(move || {
            let outbox = Outbox::new(Arc::new(File::from(OwnedFd::from(stream))));
            output(&source, &child, &outbox, |bytes| {
                AgentFrame::Stdout(bytes.into())
            });
            outbox.close();
            done.send(()).unwrap();
        });
        let mut heard = Vec::new();
        let most = 8 << 20;
        (&client).take(most).read_to_end(&mut heard).unwrap();
        is_done.recv_timeout(Duration::from_secs(60)).unwrap();
        let mut frames = &heard[..];
        let mut told = Vec::new();
        while let Some(frame) = forkvm_agent_protocol::frame::read(&mut frames).unwrap() {
            match frame {
                AgentFrame::Stdout(bytes) => told.extend(bytes.0),
                other => panic!("{other:?}"),
            }
        }
        told
    }

    #[test]
    fn what_is_in_the_pipe_when_a_program_ends_is_told_though_others_hold_it_open() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(&[7; 40_000]).unwrap();
        assert_eq!(told_of(reader.into()), [7; 40_000]);
        drop(writer);
    }

    #[test]
    fn who_never_stops_writing_holds_no_session_of_a_program_that_has_ended() {
        // Never empty, as a pipe is that is filled faster than it is read.
        let source = File::open("/dev/zero").unwrap();
        assert!(told_of(source.into()).len() <= TERMINAL_HOLDS as usize);
    }
}
