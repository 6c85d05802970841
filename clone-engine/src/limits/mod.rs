//! How many clones the host has room for.
//!
//! Checked before a fork, so that a fork that cannot succeed does not begin: `memory`, file
//! `descriptors`, `threads`, `mappings` and the count. Each module says how much of one thing is left,
//! cheaply, since a fork waits for the answer; here it is divided by what a clone takes. What runs out
//! first is named, with what to do about it.

mod cgroups;
mod descriptors;
pub(crate) mod host;
pub(crate) mod mappings;
mod memory;
mod reading;
mod threads;

use std::fmt;
use std::io;

use forkvm_vmm::{MachineState, VmConfig};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::accounting::idle;
use reading::Amounts;

pub use descriptors::raise_nofile;
pub use memory::available_kib;

/// Most clones of one request: their ids have room in everything that carries them.
pub const MAX_CLONES: u32 = 10_000;

/// What runs out first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Limit {
    /// Memory of the host.
    Memory,
    /// Memory that a cgroup of this process allows.
    MemoryOfCgroup,
    /// File descriptors.
    Descriptors,
    /// Threads that this process's user may have.
    ThreadsOfUser,
    /// Threads that a cgroup of this process allows.
    ThreadsOfCgroup,
    /// Threads of the whole host.
    ThreadsOfHost,
    /// Mappings of this process.
    Mappings,
    /// [`MAX_CLONES`].
    Clones,
}

impl Limit {
    /// Whether it is memory that runs out, which guests are told apart (-ENOMEM).
    pub fn is_memory(self) -> bool {
        matches!(self, Limit::Memory | Limit::MemoryOfCgroup)
    }

    /// What to do about it.
    pub fn mend(self) -> &'static str {
        match self {
            Limit::Memory => "end other programs, or lower what each clone is expected to write",
            Limit::MemoryOfCgroup => {
                "raise memory.max (MemoryMax= of the service), or lower what each clone is expected \
                 to write"
            }
            Limit::Descriptors => "raise `ulimit -Hn` (LimitNOFILE= of the service)",
            Limit::ThreadsOfUser => "raise `ulimit -u` (LimitNPROC= of the service)",
            Limit::ThreadsOfCgroup => "raise pids.max (TasksMax= of the service)",
            Limit::ThreadsOfHost => "raise both by `sudo sysctl -w`",
            Limit::Mappings => "`sudo sysctl -w vm.max_map_count=1048576`",
            Limit::Clones => "make the others by further requests",
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Limit::Memory => "host memory (MemAvailable)",
            Limit::MemoryOfCgroup => "memory of the cgroup (memory.max)",
            Limit::Descriptors => "file descriptors (`ulimit -n`)",
            Limit::ThreadsOfUser => "threads of this user (`ulimit -u`)",
            Limit::ThreadsOfCgroup => "threads of the cgroup (pids.max)",
            Limit::ThreadsOfHost => "threads of the host (kernel.threads-max, kernel.pid_max)",
            Limit::Mappings => "mappings of this process (vm.max_map_count)",
            Limit::Clones => "the most clones of one request",
        })
    }
}

/// What clones will take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need<'a> {
    /// What each is.
    pub(crate) config: &'a VmConfig,
    /// What each is expected to write.
    pub(crate) expected_write_mib: u64,
    /// Mappings that its memory consists of.
    pub(crate) pieces: u64,
    /// What the fork itself will copy, once.
    pub(crate) copy_kib: u64,
    /// Shells that wait for them, which have what a VM takes by itself.
    pub(crate) shells: u32,
    /// Whether they live in other processes: what bounds this one alone is not theirs then.
    pub(crate) apart: bool,
}

/// How many clones can be had, and what would run out with one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    clones: u32,
    limit: Limit,
}

/// How many of `asked` clones may be made; see [`room`]. All of them, unless `accept_fewer`.
pub(crate) fn grant(need: &Need<'_>, asked: u32, accept_fewer: bool) -> Result<u32, LimitError> {
    if asked == 0 {
        return Err(LimitError::NoClones);
    }
    let room = room(need, asked).map_err(|error| LimitError::Unknown(error.to_string()))?;
    let granted = asked.min(room.clones);
    if granted == 0 || (granted < asked && !accept_fewer) {
        return Err(LimitError::TooMany {
            asked,
            room: granted,
            limit: room.limit,
        });
    }
    let (clones, shells) = (u64::from(granted), u64::from(need.shells));
    mappings::promise(need.mappings().times(clones, shells));
    reading::promise(need.amounts(clones, shells));
    Ok(granted)
}

/// Whether this process, a worker, can take one clone more: what bounds it alone. All else is asked for all
/// clones of a fork, where it begins.
pub(crate) fn check_own(need: &Need<'_>) -> Result<(), LimitError> {
    let shells = u64::from(need.shells);
    let mappings = need.mappings().times(1, shells);
    let left = || -> io::Result<_> {
        let descriptors = (need.descriptors(), descriptors::left()?, Limit::Descriptors);
        let mappings = (need.mappings(), mappings::left(mappings)?, Limit::Mappings);
        Ok([descriptors, mappings])
    };
    let left = left().map_err(|error| LimitError::Unknown(error.to_string()))?;
    for (each, left, limit) in left {
        if each.within(left, shells) == 0 {
            return Err(LimitError::Full { limit });
        }
    }
    mappings::promise(mappings);
    Ok(())
}

/// Why no clones may be made.
#[derive(Debug, Error, Serialize, Deserialize)]
pub enum LimitError {
    /// Zero clones.
    #[error("a fork makes 1 clone or more, and 0 were asked for")]
    NoClones,
    /// The host has no room for them.
    #[error(
        "{asked} clones were asked for and the host has room for {room}: what runs out is {limit}; \
         ask for fewer, or {}",
        .limit.mend()
    )]
    TooMany {
        /// Clones asked for.
        asked: u32,
        /// Clones that would do.
        room: u32,
        /// What runs out.
        limit: Limit,
    },
    /// A worker has no room for one more.
    #[error(
        "this worker has no room for one more clone: what runs out is {limit}; let each worker have fewer, or \
         {}",
        .limit.mend()
    )]
    Full {
        /// What runs out.
        limit: Limit,
    },
    /// The host's limits could not be read.
    #[error("reading the host's limits failed: {0}")]
    Unknown(String),
}

/// What one clone takes of one thing: its VM by itself, which a shell has already, and beyond that.
#[derive(Clone, Copy)]
struct Each {
    shell: u64,
    clone: u64,
}

impl Each {
    const NOTHING: Each = Each { shell: 0, clone: 0 };

    /// What `clones` take, `shells` of which have their shell.
    fn times(self, clones: u64, shells: u64) -> u64 {
        clones.saturating_sub(shells) * self.shell + clones * self.clone
    }

    /// How many clones there are in `left`, where `shells` have their shell.
    fn within(self, left: u64, shells: u64) -> u64 {
        match left.checked_sub(shells * self.clone) {
            Some(left) => {
                shells
                    + left
                        .checked_div(self.shell + self.clone)
                        .unwrap_or(u64::MAX - shells)
            }
            None => left / self.clone,
        }
    }
}

/// Of a socket device: the listener, its duplicate in the VM object, the set and the event of its thread.
const VSOCK_DESCRIPTORS: u64 = 4;

/// Two stacks with a guard each.
const MAPPINGS_OF_A_THREAD: u64 = 4;

impl<'a> Need<'a> {
    /// Of shells for machines of the shape of `state`, which nobody runs in yet, in this process or `apart`.
    pub(crate) fn of_shells(state: &'a MachineState, apart: bool) -> Need<'a> {
        Need {
            config: state.config(),
            expected_write_mib: 0,
            pieces: 0,
            copy_kib: 0,
            shells: 0,
            apart,
        }
    }

    fn kib(&self) -> Each {
        Each {
            shell: idle::kib(self.config),
            clone: self.expected_write_mib * 1024,
        }
    }

    /// The VM and its vCPUs; the data of each disk that it may write to.
    fn descriptors(&self) -> Each {
        let writable = self.config.disks.iter().filter(|disk| !disk.read_only);
        let shell = 1 + u64::from(self.config.vcpus);
        Each {
            shell: if self.apart { 0 } else { shell },
            // Those of disks also of a clone that lives in another process, once it has ended.
            clone: writable.count() as u64 + self.of_vsock(VSOCK_DESCRIPTORS, 1),
        }
    }

    /// `here` of a VM with a socket device in this process, `apart` of one in another; 0 without one.
    fn of_vsock(&self, here: u64, apart: u64) -> u64 {
        match (self.config.vsock, self.apart) {
            (true, true) => apart,
            (true, false) => here,
            (false, _) => 0,
        }
    }

    /// What `clones` take of what is asked of the host, and what the fork itself copies; `shells` of
    /// them have their shell.
    fn amounts(&self, clones: u64, shells: u64) -> Amounts {
        Amounts {
            kib: self
                .copy_kib
                .saturating_add(self.kib().times(clones, shells)),
            descriptors: self.descriptors().times(clones, shells),
            threads: self.threads().times(clones, shells),
        }
    }

    /// One for each vCPU, one that serves the VM, and one of KVM's own; one for its sockets.
    fn threads(&self) -> Each {
        Each {
            shell: 2 + u64::from(self.config.vcpus),
            clone: u64::from(self.config.vsock),
        }
    }

    /// The stack and the signal stack of each thread with a guard each, what each vCPU shares with
    /// KVM, as counted in a process with hundreds of them; its memory.
    fn mappings(&self) -> Each {
        if self.apart {
            return Each::NOTHING;
        }
        Each {
            shell: 4 + 5 * u64::from(self.config.vcpus),
            clone: self.pieces + self.of_vsock(MAPPINGS_OF_A_THREAD, 0),
        }
    }
}

/// The room for clones that need `need` each, of which `asked` are wanted: exact where it is less.
fn room(need: &Need<'_>, asked: u32) -> io::Result<Room> {
    let (asked, shells) = (u64::from(asked.min(MAX_CLONES)), u64::from(need.shells));
    let left = reading::left(need.amounts(asked, shells))?;
    let mappings = mappings::left(need.mappings().times(asked, shells))?;
    let Amounts {
        kib,
        descriptors,
        threads,
    } = left.amounts;
    let kib = kib.saturating_sub(need.copy_kib);
    let bounds = [
        (need.kib(), kib, left.memory),
        (need.descriptors(), descriptors, Limit::Descriptors),
        (need.threads(), threads, left.threads),
        (need.mappings(), mappings, Limit::Mappings),
    ];
    let bounds = bounds.map(|(each, left, limit)| (each.within(left, shells), limit));
    let bounds = bounds
        .into_iter()
        .chain([(u64::from(MAX_CLONES), Limit::Clones)]);
    let (clones, limit) = bounds
        .min_by_key(|(clones, _)| *clones)
        .expect("there are bounds");
    Ok(Room {
        clones: clones as u32,
        limit,
    })
}

/// What setrlimit(2) calls `resource`.
#[allow(unsafe_code)] // getrlimit(2) fills a structure.
fn resource_limit(resource: libc::__rlimit_resource_t) -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel fills exactly one rlimit.
    if unsafe { libc::getrlimit(resource, &mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(config: &VmConfig) -> Need<'_> {
        Need {
            config,
            expected_write_mib: 0,
            pieces: 1,
            copy_kib: 0,
            shells: 0,
            apart: false,
        }
    }

    #[test]
    fn memory_bounds_the_clones_that_write_much() {
        let config = VmConfig::new(512, 1);
        let need = Need {
            expected_write_mib: 1 << 40,
            ..need(&config)
        };
        let room = room(&need, 1).unwrap();
        assert_eq!(room.clones, 0);
        assert!(room.limit.is_memory(), "{room:?}");
    }

    #[test]
    fn what_the_fork_copies_is_not_left_for_clones() {
        let config = VmConfig::new(512, 1);
        let need = Need {
            copy_kib: u64::MAX / 4,
            ..need(&config)
        };
        assert_eq!(room(&need, 1).unwrap().clones, 0);
    }

    #[test]
    fn more_clones_than_a_request_may_have_are_refused_as_that() {
        // Of a kind that needs next to nothing, so that nothing else runs out before.
        let config = VmConfig::new(16, 1);
        let error = grant(&need(&config), u32::MAX, false).unwrap_err();
        assert!(
            matches!(
                error,
                LimitError::TooMany {
                    room: ..=MAX_CLONES,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn each_limit_says_what_to_do() {
        for limit in [
            Limit::Memory,
            Limit::MemoryOfCgroup,
            Limit::Descriptors,
            Limit::ThreadsOfUser,
            Limit::ThreadsOfCgroup,
            Limit::ThreadsOfHost,
            Limit::Mappings,
            Limit::Clones,
        ] {
            let error = LimitError::TooMany {
                asked: 7,
                room: 3,
                limit,
            };
            let text = error.to_string();
            assert!(
                text.contains(&limit.to_string()) && text.ends_with(limit.mend()),
                "{text}"
            );
        }
    }

    #[test]
    fn a_worker_is_full_when_what_bounds_it_alone_runs_out() {
        let config = VmConfig::new(16, 1);
        // Of memory that nobody has: the engine asks for that.
        let idle = Need {
            expected_write_mib: 1 << 40,
            ..need(&config)
        };
        check_own(&idle).unwrap();
        let in_pieces = Need {
            pieces: 1 << 40,
            ..need(&config)
        };
        let error = check_own(&in_pieces).unwrap_err().to_string();
        assert!(error.ends_with(Limit::Mappings.mend()), "{error}");
    }

    #[test]
    fn a_shell_that_waits_has_paid_for_its_vm() {
        let each = Each { shell: 3, clone: 2 };
        assert_eq!(each.within(10, 0), 2);
        assert_eq!(each.within(10, 1), 2);
        assert_eq!((each.within(10, 4), each.within(13, 4)), (4, 5));
        assert_eq!(each.within(5, 4), 2, "not even all that have a shell");
        assert_eq!(each.times(3, 2), 3 + 3 * 2);
        let free = Each { shell: 1, clone: 0 };
        assert_eq!((free.within(0, 7), free.within(2, 7)), (7, 9));
    }

    #[test]
    fn clones_that_live_apart_take_nothing_that_bounds_this_process_alone() {
        let config = VmConfig::new(64, 16);
        let need = Need {
            apart: true,
            ..need(&config)
        };
        assert_eq!(need.descriptors().within(0, 0), u64::MAX);
        assert_eq!(need.mappings().times(1000, 0), 0);
        assert!(
            need.threads().times(1000, 0) > 1000,
            "threads are the user's"
        );
    }
}
