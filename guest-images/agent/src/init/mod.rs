//! The agent as PID 1: makes a usable system, serves, runs what the kernel's command line says, and ends the machine.
//!
//! It never returns and never panics on purpose: a PID 1 that ends is a panic of the kernel. What fails on the way is told on the
//! console, and the rest goes on.

mod cmdline;
mod console;
mod end;
mod mounts;

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::{fs, thread};

use forkvm_agent_protocol::Exit;
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;

use crate::agent::{self, Agent, Last};
use crate::log;
use crate::options::Options;
use crate::reaper;
use cmdline::Words;

/// Where programs are looked for. busybox's shell finds its applets in any case.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// PID 1.
pub fn main() -> ! {
    mounts::mount_all();
    let (power, asked) = channel();
    if let Err(error) = hear_sigterm(power.clone()) {
        log::line(&format!("SIGTERM will not be heard: {error}"));
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
            end::machine(agent.as_deref(), Last::PowerOff);
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

fn hear_sigterm(power: Sender<Last>) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGTERM])?;
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

/// Runs a command on the console; the machine ends with it.
fn run_job(job: String, power: Sender<Last>) -> std::io::Result<()> {
    let mut command = Command::new("sh");
    command.arg("-c").arg(&job).env("PATH", PATH);
    command.env("HOME", "/root").env("TERM", "linux");
    // Standard output and error are the console's already, where there is one.
    command.stdin(console::open().map_or_else(|_| Stdio::null(), Stdio::from));
    command.process_group(0);
    let child = reaper::spawn(&mut command)?.child;
    let wait = move || {
        let exit = child.ended().wait(None).map_or(0, Exit::status);
        log::line(&format!("'{job}' ended with status {exit}"));
        power.send(Last::PowerOff).unwrap_or_default();
    };
    thread::Builder::new()
        .name("job".into())
        .spawn(wait)
        .map(drop)
}
