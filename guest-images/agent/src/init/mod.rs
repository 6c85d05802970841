//! The agent as PID 1: makes a usable system, serves, runs what the kernel's command line says, and ends the machine.
//!
//! It never returns and never panics on purpose: a PID 1 that ends is a panic of the kernel. What fails on the way is told on the
//! console, and the rest goes on.

mod cmdline;
mod console;
mod end;
mod loopback;
mod mounts;

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::{fs, thread};

use forkvm_agent_protocol::Exit;
use rustix::system::{RebootCommand, reboot};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use crate::agent::{self, Agent, Last};
use crate::log;
use crate::options::Options;
use crate::reaper;
use cmdline::Words;

/// Where programs are looked for. busybox's shell finds its applets in any case.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What busybox's `reboot`, `halt` and `poweroff` send to PID 1, and the kernel for Ctrl-Alt-Del.
const END_SIGNALS: [i32; 4] = [SIGTERM, SIGUSR1, SIGUSR2, SIGINT];

/// The status of a command that cannot be run, as shells have it.
const NOT_RUN: u8 = 127;

/// PID 1.
pub fn main() -> ! {
    mounts::mount_all();
    if let Err(error) = loopback::bring_up() {
        log::line(&format!("there is no 127.0.0.1: {error}"));
    }
    let (power, asked) = channel();
    if let Err(error) = hear_signals(power.clone()) {
        log::line(&format!("signals will not be heard: {error}"));
    }
    // Else Ctrl-Alt-Del would end the machine at once.
    if let Err(error) = reboot(RebootCommand::CadOff) {
        log::line(&format!("Ctrl-Alt-Del will not be heard: {error}"));
    }
    let agent = match agent::start(&Options::default(), Some(power.clone())) {
        Ok(agent) => Some(agent),
        Err(error) => {
            log::line(&format!("nobody is served: {error}"));
            None
        }
    };
    let words = Words::parse(&fs::read("/proc/cmdline").unwrap_or_else(|error| {
        log::line(&format!("reading /proc/cmdline: {error}"));
        Vec::new()
    }));
    if let Some(job) = words.job {
        if let Err(error) = run_job(job, power.clone()) {
            log::line(&format!("running what forkvm.run= says: {error}"));
            end::machine(agent.as_deref(), Last::Exit(NOT_RUN));
        }
    } else if !words.quiet {
        console::start_shell();
    }
    wait_for_the_end(agent.as_deref(), &asked)
}

/// `power` lives on in `main`, so somebody can always ask.
fn wait_for_the_end(agent: Option<&Agent>, asked: &Receiver<Last>) -> ! {
    let last = asked.recv().unwrap_or(Last::PowerOff);
    end::machine(agent, last)
}

/// A virtual machine is off, halted or restarted in one way: it has ended.
fn hear_signals(power: Sender<Last>) -> std::io::Result<()> {
    let mut signals = Signals::new(END_SIGNALS)?;
    let hear = move || {
        for _ in signals.forever() {
            // Nobody listens once the machine ends.
            power.send(Last::PowerOff).unwrap_or_default();
        }
    };
    thread::Builder::new()
        .name("signals".into())
        .spawn(hear)
        .map(drop)
}

/// Runs a command on the console; the machine ends with it, and with its status.
fn run_job(job: String, power: Sender<Last>) -> std::io::Result<()> {
    let mut command = Command::new("sh");
    command.arg("-c").arg(&job).env("PATH", PATH);
    command.env("HOME", "/root").env("TERM", "linux");
    // Standard output and error are the console's already, where there is one.
    command.stdin(console::open().map_or_else(|_| Stdio::null(), Stdio::from));
    command.process_group(0);
    let child = reaper::spawn(&mut command)?.child;
    let wait = move || {
        let status = child.ended().wait(None).map_or(NOT_RUN, Exit::status);
        log::line(&format!("'{job}' ended with status {status}"));
        power.send(Last::Exit(status)).unwrap_or_default();
    };
    thread::Builder::new()
        .name("job".into())
        .spawn(wait)
        .map(drop)
}
