//! What all sessions of the agent share, and the start of it as a service.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use forkvm_agent_protocol::feature;

use crate::doorbell::{self, Absent, Doorbell};
use crate::identity::{Identities, LinuxSystem};
use crate::listen::{self, ListenError};
use crate::log;
use crate::options::Options;
use crate::reaper;

/// How the machine shall end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// Like a machine that is switched off.
    PowerOff,
    /// With an exit status, where the host hears of it.
    Exit(u8),
}

impl Last {
    /// What the host is told: a machine that was switched off ended well.
    pub(crate) fn status(self) -> u8 {
        match self {
            Last::PowerOff => 0,
            Last::Exit(status) => status,
        }
    }
}

/// The agent.
pub struct Agent {
    doorbell: Box<dyn Doorbell>,
    identities: Identities,
    /// Whoever ends the machine, if it is this process.
    power: Option<Mutex<Sender<Last>>>,
}

impl Agent {
    /// An agent that forks through `doorbell`. `power` hears of a machine that shall end.
    pub fn new(
        doorbell: Box<dyn Doorbell>,
        identities: Identities,
        power: Option<Sender<Last>>,
    ) -> Agent {
        Agent {
            doorbell,
            identities,
            power: power.map(Mutex::new),
        }
    }

    pub(crate) fn doorbell(&self) -> &dyn Doorbell {
        &*self.doorbell
    }

    pub(crate) fn identities(&self) -> &Identities {
        &self.identities
    }

    /// What the agent's greeting offers.
    pub(crate) fn features(&self) -> u64 {
        if self.doorbell.who().is_some() {
            feature::FORK
        } else {
            0
        }
    }

    /// Whether this process is the one that ends the machine.
    pub(crate) fn is_init(&self) -> bool {
        self.power.is_some()
    }

    /// Has the machine ended; whether there is somebody who does it.
    pub(crate) fn end_machine(&self, last: Last) -> bool {
        self.power.as_ref().is_some_and(|power| {
            let power = power.lock().unwrap_or_else(PoisonError::into_inner);
            power.send(last).is_ok()
        })
    }
}

/// Starts to listen, and tells the host that it does. `power` is as in [`Agent::new`].
///
/// # Errors
/// There is nothing to listen on.
pub fn start(options: &Options, power: Option<Sender<Last>>) -> Result<Arc<Agent>, ListenError> {
    reaper::start().map_err(ListenError::Thread)?;
    let doorbell = find_doorbell(options.doorbell);
    let system = LinuxSystem::new(PathBuf::from("/"), options.hooks.clone());
    let agent = Arc::new(Agent::new(
        doorbell,
        Identities::new(Box::new(system)),
        power,
    ));
    listen::start(&agent, options)?;
    agent.doorbell.report_ready();
    Ok(agent)
}

/// The agent as a service, for ever.
///
/// # Errors
/// As [`start`].
pub fn serve(options: &Options) -> Result<Infallible, ListenError> {
    let _agent = start(options, None)?;
    loop {
        thread::park();
    }
}

fn find_doorbell(wanted: bool) -> Box<dyn Doorbell> {
    if !wanted {
        return Box::new(Absent::new("the agent was told not to look for it"));
    }
    match doorbell::connect() {
        Ok(doorbell) => Box::new(doorbell),
        Err(error) => {
            log::line(&format!("no forks from inside: {error}"));
            Box::new(Absent::new(&error.to_string()))
        }
    }
}
