//! The steps of an identity in a Linux machine.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use forkvm_agent_protocol::Generation;
use rustix::time::{ClockId, Timespec, clock_settime};

use super::hooks::{HookError, Hooks};
use super::{Role, System, machine_id, random};
use crate::vsock;

/// How long one hook may take.
const HOOK_LIMIT: Duration = Duration::from_secs(10);

/// How long the driver may take to hear of a fork, where the kernel is interpreted and busy.
const ADDRESS_LIMIT: Duration = Duration::from_secs(20);

/// Between two looks.
const ADDRESS_PAUSE: Duration = Duration::from_millis(5);

const CLOCK_SOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

/// The machine that this process runs in.
pub struct LinuxSystem {
    root: PathBuf,
    hooks: Hooks,
}

impl LinuxSystem {
    /// `root` is where `etc` and `run` are, `hooks` the directory of hooks.
    pub fn new(root: PathBuf, hooks: PathBuf) -> LinuxSystem {
        LinuxSystem {
            root,
            hooks: Hooks::new(hooks, HOOK_LIMIT),
        }
    }
}

impl System for LinuxSystem {
    fn wait_for_address(&self, cid: u64) -> io::Result<()> {
        let deadline = Instant::now() + ADDRESS_LIMIT;
        loop {
            match vsock::address()? {
                None => return Ok(()),
                Some(known) if cid == 0 || known == cid => return Ok(()),
                Some(_) if Instant::now() < deadline => thread::sleep(ADDRESS_PAUSE),
                Some(known) => {
                    let text = format!("the driver says {known}, the host {cid}");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
            }
        }
    }

    fn set_hostname(&self, name: &str) -> io::Result<()> {
        Ok(rustix::system::sethostname(name.as_bytes())?)
    }

    fn set_machine_id(&self, id: &str) -> io::Result<()> {
        machine_id::set(&self.root, id)
    }

    fn reseed(&self, entropy: &[u8]) -> io::Result<()> {
        random::reseed(entropy)
    }

    fn set_wall_clock(&self, nanoseconds: u64) -> io::Result<()> {
        let time = Timespec {
            tv_sec: (nanoseconds / 1_000_000_000) as i64,
            tv_nsec: (nanoseconds % 1_000_000_000) as i64,
        };
        Ok(clock_settime(ClockId::Realtime, time)?)
    }

    fn run_hooks(&self, role: Role, generation: Generation) -> Result<Vec<String>, HookError> {
        self.hooks.run(role, generation)
    }

    fn clock_source(&self) -> String {
        clock_source()
    }
}

/// What the kernel tells time by; empty where it does not say.
pub fn clock_source() -> String {
    fs::read_to_string(CLOCK_SOURCE)
        .unwrap_or_default()
        .trim()
        .to_owned()
}
