//! How many clones the host has room for.
//!
//! Checked before a fork, so that a fork that cannot succeed does not begin: memory (a floor per
//! clone plus what it is expected to write, against MemAvailable and the cgroup's limit) and file
//! descriptors (RLIMIT_NOFILE, which is raised to the hard limit when needed).
#![allow(unsafe_code)] // getrlimit and setrlimit.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use forkvm_vmm::VmConfig;
use thiserror::Error;

/// What one idle clone costs the host: KVM's structures, page tables, stacks of its threads.
const FLOOR_KIB: u64 = 2 * 1024;
/// And what each of its vCPUs adds.
const VCPU_KIB: u64 = 256;
/// What KVM keeps per MiB of guest RAM, present or not (memory slot, reverse maps), in bytes.
const SLOT_BYTES_PER_MIB: u64 = 2560;
/// Left free for everybody else, in KiB.
const RESERVE_KIB: u64 = 64 * 1024;
/// Descriptors left free for the rest of the process.
const RESERVE_FDS: u64 = 32;
/// Most clones of one request: their ids have room in everything that carries them.
pub const MAX_CLONES: u32 = 10_000;

/// What runs out first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Host memory.
    Memory,
    /// File descriptors.
    Descriptors,
    /// [`MAX_CLONES`].
    Clones,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Limit::Memory => "host memory (MemAvailable, or the cgroup's limit)",
            Limit::Descriptors => "file descriptors (`ulimit -Hn`)",
            Limit::Clones => "the most clones of one request",
        })
    }
}

/// How many clones can be had, and what would run out with one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Room {
    clones: u32,
    limit: Limit,
}

/// How many of `asked` clones may be made; see [`room`]. All of them, unless `accept_fewer`.
pub(crate) fn grant(
    config: &VmConfig,
    asked: u32,
    accept_fewer: bool,
    expected_write_mib: u64,
    copy_kib: u64,
) -> Result<u32, LimitError> {
    if asked == 0 {
        return Err(LimitError::NoClones);
    }
    let room = room(config, expected_write_mib, copy_kib).map_err(LimitError::Unknown)?;
    let granted = asked.min(room.clones);
    if granted == 0 || (granted < asked && !accept_fewer) {
        return Err(LimitError::TooMany {
            asked,
            room: granted,
            limit: room.limit,
        });
    }
    Ok(granted)
}

/// Why no clones may be made.
#[derive(Debug, Error)]
pub enum LimitError {
    /// Zero clones.
    #[error("a fork makes 1 clone or more, and 0 were asked for")]
    NoClones,
    /// The host has no room for them.
    #[error(
        "{asked} clones were asked for and the host has room for {room}: what runs out is {limit}; \
         ask for fewer, or lower what each is expected to write"
    )]
    TooMany {
        /// Clones asked for.
        asked: u32,
        /// Clones that would do.
        room: u32,
        /// What runs out.
        limit: Limit,
    },
    /// The host's limits could not be read.
    #[error("reading the host's limits failed")]
    Unknown(#[source] io::Error),
}

/// The room for clones of a machine like `config`, each of which is expected to write
/// `expected_write_mib`; `copy_kib` is what the fork itself will copy.
fn room(config: &VmConfig, expected_write_mib: u64, copy_kib: u64) -> io::Result<Room> {
    let vcpus = u64::from(config.vcpus);
    let per_clone_kib = FLOOR_KIB
        + VCPU_KIB * vcpus
        + config.memory_mib * SLOT_BYTES_PER_MIB / 1024
        + expected_write_mib * 1024;
    let free_kib = available_kib()?.saturating_sub(RESERVE_KIB + copy_kib);
    // The VM, its vCPUs, and the data of each disk that it may write to.
    let writable = config.disks.iter().filter(|disk| !disk.read_only).count() as u64;
    let per_clone_fds = 1 + vcpus + writable;
    let free_fds = raise_nofile()?.saturating_sub(open_fds()? + RESERVE_FDS);
    let bounds = [
        (free_kib / per_clone_kib, Limit::Memory),
        (free_fds / per_clone_fds, Limit::Descriptors),
        (u64::from(MAX_CLONES), Limit::Clones),
    ];
    let (clones, limit) = bounds
        .into_iter()
        .min_by_key(|(clones, _)| *clones)
        .expect("three");
    Ok(Room {
        clones: clones as u32,
        limit,
    })
}

/// Memory that this process can still get, in KiB: the least of MemAvailable and what the memory
/// cgroups (version 2) above it leave.
pub fn available_kib() -> io::Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let available = meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))?;
    Ok(cgroup_room_kib()?.map_or(available, |room: u64| room.min(available)))
}

/// What the memory cgroups of this process leave, in KiB: the limit less what is used, of which the
/// page cache does not count, since it makes way. `None` without a limit.
fn cgroup_room_kib() -> io::Result<Option<u64>> {
    let cgroups = fs::read_to_string("/proc/self/cgroup")?;
    let rooms = cgroups.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let files = match controllers {
            "" => &VERSION_2,
            "memory" => &VERSION_1,
            _ => return None,
        };
        files.room_kib(path.trim_start_matches('/'))
    });
    Ok(rooms.min())
}

/// Where a version of cgroups says what is used and allowed.
struct CgroupFiles {
    root: &'static str,
    limit: &'static str,
    used: &'static str,
    /// Lines of `memory.stat` that count what makes way.
    reclaimable: &'static [&'static str],
}

const VERSION_2: CgroupFiles = CgroupFiles {
    root: "/sys/fs/cgroup",
    limit: "memory.max",
    used: "memory.current",
    reclaimable: &["inactive_file ", "active_file ", "slab_reclaimable "],
};

const VERSION_1: CgroupFiles = CgroupFiles {
    root: "/sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    reclaimable: &["total_inactive_file ", "total_active_file "],
};

impl CgroupFiles {
    /// The least room of the group `path` and of those above it.
    fn room_kib(&self, path: &str) -> Option<u64> {
        let root = Path::new(self.root);
        let number =
            |file: &Path| -> Option<u64> { fs::read_to_string(file).ok()?.trim().parse().ok() };
        let above = root.join(path);
        let groups = above
            .ancestors()
            .take_while(|group| group.starts_with(root));
        let rooms = groups.filter_map(|group| {
            // "max", and a group without the memory controller, set no limit.
            let limit = number(&group.join(self.limit))?;
            let used = number(&group.join(self.used))?;
            let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            let counts = self.reclaimable.iter().filter_map(|name| {
                stat.lines()
                    .find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
            });
            Some(limit.saturating_sub(used.saturating_sub(counts.sum())) / 1024)
        });
        rooms.min()
    }
}

fn open_fds() -> io::Result<u64> {
    Ok(fs::read_dir("/proc/self/fd")?.count() as u64)
}

/// Raises the soft limit of open files to the hard one; returns it.
pub fn raise_nofile() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel fills exactly one rlimit.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: the kernel reads exactly one rlimit.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_bounds_the_clones_that_write_much() {
        let config = VmConfig::new(512, 1);
        let room = room(&config, 1 << 40, 0).unwrap();
        assert_eq!(
            room,
            Room {
                clones: 0,
                limit: Limit::Memory
            }
        );
    }

    #[test]
    fn what_the_fork_copies_is_not_left_for_clones() {
        let config = VmConfig::new(512, 1);
        assert_eq!(room(&config, 0, u64::MAX / 4).unwrap().clones, 0);
    }
}
