//! The VMs of a family by their names: those that run, and how those ended that did.
//!
//! The session puts VMs in as they start. How they ended is kept, as a shell keeps the status of a process:
//! whoever waits for one may come late.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use forkvm::End;
use forkvm::engine::Member;

use super::bell::Bell;
use super::protocol::{Ending, Failure, Kind};

/// Ends that are kept: the last ones.
const ENDS: usize = 4096;

/// See the module's text.
#[derive(Default)]
pub(crate) struct Registry(Mutex<Vms>);

#[derive(Default)]
struct Vms {
    running: BTreeMap<String, Running>,
    ended: HashMap<String, Ending>,
    /// Names in `ended`, the oldest first.
    oldest: VecDeque<String>,
    /// Where VMs were saved to, or are being saved to, by name.
    saved: HashMap<String, PathBuf>,
}

/// A VM that runs.
#[derive(Clone)]
pub(super) struct Running {
    pub(super) member: Arc<Member>,
    pub(super) since: SystemTime,
    /// Rung at its end.
    bells: Vec<Weak<Bell>>,
}

/// A VM as it is found.
pub(super) enum Found {
    Running(Arc<Member>),
    Ended(Ending),
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Vms> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `member` runs.
    pub(crate) fn add(self: &Arc<Self>, member: &Arc<Member>) {
        let running = Running {
            member: member.clone(),
            since: SystemTime::now(),
            bells: Vec::new(),
        };
        let name = member.name().to_owned();
        self.lock().running.insert(name.clone(), running);
        let registry = Arc::downgrade(self);
        member.when_ended(move |end| {
            if let Some(registry) = registry.upgrade() {
                registry.ended(&name, end);
            }
        });
    }

    fn ended(&self, name: &str, end: &End) {
        let gone = {
            let mut vms = self.lock();
            vms.ended.insert(name.to_owned(), Ending::of(end));
            if *end != End::Saved {
                vms.saved.remove(name);
            }
            vms.oldest.push_back(name.to_owned());
            if vms.oldest.len() > ENDS
                && let Some(oldest) = vms.oldest.pop_front()
            {
                vms.ended.remove(&oldest);
            }
            vms.running.remove(name)
        };
        // Not under the lock: the last handle of a VM may go with it.
        let bells = gone.into_iter().flat_map(|running| running.bells);
        bells
            .filter_map(|bell| bell.upgrade())
            .for_each(|bell| bell.ring());
    }

    /// Those that run, in the order of their names.
    pub(super) fn running(&self) -> Vec<Running> {
        self.lock().running.values().cloned().collect()
    }

    /// The VM `name`, since when it runs.
    pub(super) fn get(&self, name: &str) -> Result<Running, Failure> {
        let vms = self.lock();
        if let Some(running) = vms.running.get(name) {
            return Ok(running.clone());
        }
        Err(match vms.ended.get(name) {
            Some(ending) => Failure::ended(name, &ending.end),
            None => unknown(name),
        })
    }

    /// The VM `name`, or how it ended; `bell` rings at its end.
    pub(super) fn watch(&self, name: &str, bell: &Arc<Bell>) -> Result<Found, Failure> {
        let mut vms = self.lock();
        if let Some(running) = vms.running.get_mut(name) {
            // Of clients that hung up.
            running.bells.retain(|bell| bell.strong_count() > 0);
            running.bells.push(Arc::downgrade(bell));
            return Ok(Found::Running(running.member.clone()));
        }
        let ending = vms.ended.get(name).cloned();
        ending.map(Found::Ended).ok_or_else(|| unknown(name))
    }

    /// How the VM `name` ended, if it has.
    pub(super) fn ending(&self, name: &str) -> Option<Ending> {
        self.lock().ended.get(name).cloned()
    }

    /// The VM `name` is going to be saved to `dir`: known before it ends by that. Not so if it is being saved already.
    pub(super) fn saving(&self, name: &str, dir: PathBuf) -> Result<(), Failure> {
        match self.lock().saved.entry(name.to_owned()) {
            Entry::Vacant(entry) => {
                entry.insert(dir);
                Ok(())
            }
            Entry::Occupied(entry) => {
                let text = format!("{name} is being saved to {} already", entry.get().display());
                Err(Failure::new(Kind::State, text))
            }
        }
    }

    /// It was not.
    pub(super) fn not_saved(&self, name: &str) {
        self.lock().saved.remove(name);
    }

    /// Where the VM `name` was saved to by a client's word.
    pub(crate) fn saved_to(&self, name: &str) -> Option<PathBuf> {
        self.lock().saved.get(name).cloned()
    }
}

impl Ending {
    pub(super) fn of(end: &End) -> Ending {
        Ending {
            end: end.to_string(),
            status: end.status(),
            exit_code: exit_code(end),
        }
    }
}

fn unknown(name: &str) -> Failure {
    let text = format!("there is no VM {name}; `forkvm ps` lists those that run");
    Failure::new(Kind::NoSuchVm, text)
}

/// What `run` ends with for such an end: the status of the VM; 1 if it failed.
pub(crate) fn exit_code(end: &End) -> u8 {
    match end {
        End::TripleFault { .. } | End::Failed(_) => 1,
        // A status that has no room is not taken for another one, 0 least of all.
        end => u8::try_from(end.status()).unwrap_or(u8::MAX),
    }
}
