//! Memory that this process can still get: of the host, and within the limits of its control groups.

use std::io;

use super::cgroups::{self, Group, Version};
use super::{Limit, host};

/// Left free for everybody else, in KiB.
const RESERVE_KIB: u64 = 64 * 1024;

/// Memory that this process can still get, in KiB: the least of MemAvailable and what the memory
/// cgroups above it leave.
pub fn available_kib() -> io::Result<u64> {
    Ok(available()?.0)
}

/// What clones can have of it, in KiB, and what bounds it.
pub(super) fn left_kib() -> io::Result<(u64, Limit)> {
    let (available, limit) = available()?;
    Ok((available.saturating_sub(RESERVE_KIB), limit))
}

fn available() -> io::Result<(u64, Limit)> {
    let meminfo = host::read("/proc/meminfo")?;
    let of_host = host::kib(&meminfo, "MemAvailable")
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))?;
    let groups = cgroups::of("memory")?;
    let of_group = groups.iter().filter_map(|group| room_kib(group, of_host));
    Ok(match of_group.min() {
        Some(room) if room < of_host => (room, Limit::MemoryOfCgroup),
        _ => (of_host, Limit::Memory),
    })
}

/// What one group leaves, in KiB: its limit less what is used, of which the page cache does not count,
/// since it makes way. `None` without a limit, or when it leaves `enough` in any case.
fn room_kib(group: &Group, enough: u64) -> Option<u64> {
    let (limit, used, reclaimable): (_, _, &[&str]) = match group.version {
        Version::Two => (
            "memory.max",
            "memory.current",
            &["inactive_file ", "active_file ", "slab_reclaimable "],
        ),
        Version::One => (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            &["total_inactive_file ", "total_active_file "],
        ),
    };
    let (limit, used) = (group.number(limit)?, group.number(used)?);
    // The kernel gathers memory.stat from all CPUs when it is read: only where it matters.
    if limit.saturating_sub(used) / 1024 >= enough {
        return None;
    }
    let stat = group.text("memory.stat").unwrap_or_default();
    let counts = reclaimable.iter().filter_map(|name| {
        stat.lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
    });
    Some(limit.saturating_sub(used.saturating_sub(counts.sum())) / 1024)
}
