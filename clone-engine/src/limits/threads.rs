//! Threads that can still be started: by the user, in the control groups, on the host.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use super::{Limit, cgroups, host};

/// Threads left free for everybody else.
const RESERVE: u64 = 32;

/// How many more threads there can be, and what bounds them, if fewer than `wanted` can; otherwise no
/// less than `wanted`.
pub(super) fn left(wanted: u64) -> io::Result<(u64, Limit)> {
    let running = of_host()?;
    let most = host::number("/proc/sys/kernel/threads-max")?
        .min(host::number("/proc/sys/kernel/pid_max")?);
    let mut left = (most.saturating_sub(running), Limit::ThreadsOfHost);
    for group in cgroups::of("pids")? {
        // The root group has no limit, and no file that says so.
        if let (Some(most), Some(now)) = (group.number("pids.max"), group.number("pids.current")) {
            left = left.min((most.saturating_sub(now), Limit::ThreadsOfCgroup));
        }
    }
    left = left.min((of_user(running, wanted + RESERVE)?, Limit::ThreadsOfUser));
    Ok((left.0.saturating_sub(RESERVE), left.1))
}

/// Threads of all processes: the second number of `running/all` in /proc/loadavg.
fn of_host() -> io::Result<u64> {
    const FILE: &str = "/proc/loadavg";
    let text = host::read(FILE)?;
    let all = text.split(' ').nth(3).and_then(|field| {
        let (_, all) = field.split_once('/')?;
        all.parse().ok()
    });
    all.ok_or_else(|| io::Error::other(format!("{FILE} does not count threads: {text:?}")))
}

/// What RLIMIT_NPROC leaves to the user of this process, who has at most `running` threads.
fn of_user(running: u64, wanted: u64) -> io::Result<u64> {
    let most = super::resource_limit(libc::RLIMIT_NPROC)?.rlim_cur;
    if most == libc::RLIM_INFINITY || is_exempt()? {
        return Ok(u64::MAX);
    }
    // All threads of the host are more than the user's: where they leave room, nobody is counted.
    if most.saturating_sub(running) >= wanted {
        return Ok(most - running);
    }
    Ok(most.saturating_sub(of_user_by_process()?))
}

/// The kernel exempts root and who has one of two capabilities (fork(2), EAGAIN).
fn is_exempt() -> io::Result<bool> {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let status = host::read("/proc/self/status")?;
    let uid = host::field(&status, "Uid").and_then(|ids| ids.split('\t').next());
    let capabilities = host::field(&status, "CapEff")
        .and_then(|field| u64::from_str_radix(field, 16).ok())
        .unwrap_or(0);
    Ok(uid == Some("0") || capabilities & (CAP_SYS_ADMIN | CAP_SYS_RESOURCE) != 0)
}

/// Counts the threads of this process's user, process by process.
fn of_user_by_process() -> io::Result<u64> {
    let user = fs::metadata("/proc/self")?.uid();
    let mut threads = 0;
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        // Processes end while they are counted, and what is no process has no status.
        if fs::metadata(&path).is_ok_and(|process| process.uid() == user)
            && let Ok(status) = fs::read_to_string(path.join("status"))
            && let Some(count) = host::field(&status, "Threads")
        {
            threads += count.parse().unwrap_or(1);
        }
    }
    Ok(threads)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use super::*;

    #[test]
    fn threads_that_wait_are_counted_for_their_user_and_for_the_host() {
        let barrier = Barrier::new(101);
        thread::scope(|scope| {
            for _ in 0..100 {
                scope.spawn(|| barrier.wait());
            }
            let (user, host) = (of_user_by_process().unwrap(), of_host().unwrap());
            barrier.wait();
            // The two are not compared: between them others come and go by the hundred.
            assert!(
                user > 100 && host > 100,
                "{user} of the user, {host} of all"
            );
        });
    }
}
