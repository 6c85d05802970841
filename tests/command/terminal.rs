//! Raw terminals: keys go to the guest as they are pressed, Ctrl-] does not, and in the end all is as before.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use tempfile::tempdir;

use super::common::{LONG, need_kvm};
use super::harness::{Running, wait_until};
use super::named::Named;

/// A pair of a terminal and somebody who sits at it.
struct Terminal {
    keys: File,
    screen: Receiver<u8>,
    /// The other end, for programs.
    line: File,
    before: LocalModes,
}

impl Terminal {
    fn open() -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let path = Path::new(name.to_str().unwrap());
        let line = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let keys = File::from(master);
        let (sender, screen) = channel();
        let mut shown = keys.try_clone().unwrap();
        thread::spawn(move || {
            let mut byte = [0];
            while shown.read(&mut byte).is_ok_and(|len| len > 0) && sender.send(byte[0]).is_ok() {}
        });
        let before = tcgetattr(&line).unwrap().local_modes;
        assert!(before.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        Terminal {
            keys,
            screen,
            line,
            before,
        }
    }

    fn stdio(&self) -> Stdio {
        self.line.try_clone().unwrap().into()
    }

    fn local_modes(&self) -> LocalModes {
        tcgetattr(&self.line).unwrap().local_modes
    }

    fn wait_until_raw(&self) {
        let raw = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        wait_until("the terminal is raw", || {
            !self.local_modes().intersects(raw)
        });
    }

    fn press(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).unwrap();
    }

    /// Waits until the screen has shown these words.
    fn wait_until_shown(&self, words: &str) {
        let mut shown = Vec::new();
        while !String::from_utf8_lossy(&shown).contains(words) {
            let byte = self.screen.recv_timeout(LONG);
            shown.push(byte.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&shown))));
        }
    }

    #[track_caller]
    fn expect_as_before(&self) {
        assert_eq!(self.local_modes(), self.before);
    }
}

#[test]
fn a_console_on_a_terminal_passes_each_key_on_and_ctrl_bracket_leaves_the_machine_running() {
    need_kvm!();
    let web = Named::obedient("web");
    let mut terminal = Terminal::open();
    let mut console = Running::start_with(web.dir(), &["console", "web"], terminal.stdio());
    terminal.wait_until_raw();
    terminal.press(b"f\r");
    console.wait_until_said("ok 1");
    // Ctrl-C is a key like others, and what is behind the one that leaves is not typed any more.
    terminal.press(b"\x03\r\x1df\r");
    let left = console.wait();
    left.expect(0, "Ctrl-] leaves it");
    terminal.expect_as_before();
    assert!(!left.stdout().contains("ok 3"), "{}", left.stdout());
    assert_eq!(web.json(&["info", "web"])["state"], "running");
}

#[test]
fn a_signal_that_ends_a_console_puts_the_terminal_back() {
    need_kvm!();
    let web = Named::obedient("web");
    for signal in ["TERM", "INT", "HUP", "QUIT"] {
        let terminal = Terminal::open();
        let mut console = Running::start_with(web.dir(), &["console", "web"], terminal.stdio());
        terminal.wait_until_raw();
        let status = console.signal(signal).child().wait().unwrap();
        assert_eq!(status.code(), None, "{signal} ends it as it always does");
        terminal.expect_as_before();
    }
}

/// `forkvm run` of a kernel on a terminal.
fn run_on(terminal: &Terminal, dir: &Path) -> Child {
    std::fs::write(dir.join("kernel"), forkvm_guest_images::BARE).unwrap();
    let args = [
        "run",
        "--kernel",
        "kernel",
        "--cmdline",
        "job=obey pages=16",
    ];
    let child = Command::new(env!("CARGO_BIN_EXE_forkvm"))
        .args(args)
        .args(["--memory", "64"])
        .current_dir(dir)
        .stdin(terminal.stdio())
        .stdout(terminal.stdio())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    terminal.wait_until_raw();
    child
}

#[test]
fn run_with_a_kernel_on_a_terminal_is_raw_and_ctrl_bracket_ends_it_as_ctrl_c_does_elsewhere() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let mut terminal = Terminal::open();
    let mut run = run_on(&terminal, dir.path());
    // Until the guest hears: what comes before it has set up its console may be lost.
    let prompted = |terminal: &Terminal| {
        terminal
            .screen
            .recv_timeout(std::time::Duration::from_millis(100))
    };
    loop {
        terminal.press(b"f\r");
        if prompted(&terminal).is_ok() {
            break;
        }
    }
    terminal.wait_until_shown("ok 1");
    terminal.press(b"\x1d");
    assert_eq!(run.wait().unwrap().code(), Some(130));
    terminal.expect_as_before();
}

#[test]
fn run_puts_the_terminal_back_at_its_guests_end_and_by_signal() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let mut terminal = Terminal::open();
    let mut run = run_on(&terminal, dir.path());
    while run.try_wait().unwrap().is_none() {
        terminal.press(b"q 5\r");
        thread::yield_now();
    }
    assert_eq!(run.wait().unwrap().code(), Some(5));
    terminal.expect_as_before();

    for (signal, code) in [("TERM", Some(143)), ("QUIT", None)] {
        let terminal = Terminal::open();
        let mut run = run_on(&terminal, dir.path());
        let pid = run.id().to_string();
        let sent = Command::new("/bin/kill")
            .args(["-s", signal, &pid])
            .status();
        assert!(sent.unwrap().success());
        assert_eq!(run.wait().unwrap().code(), code, "{signal}");
        terminal.expect_as_before();
    }
}
