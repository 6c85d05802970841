//! What each request does, and what it is answered.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, UNIX_EPOCH};

use forkvm::CloneSpec;
use forkvm::engine::Member;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::bell::Bell;
use super::protocol::{Ending, Failure, Request};
use super::registry::{Found, Running};
use super::server::Machine;

/// Reports that `info` tells: the last ones of those that are kept.
const REPORTS: usize = 16;

/// Does what is asked, and says what came of it.
pub(super) fn answer(machine: &Machine, request: Request) -> Result<Value, Failure> {
    match request {
        Request::Ps {} => Ok(ps(machine)),
        Request::Info { vm } => info(machine, &machine.vms.get(&vm)?),
        Request::Pause { vm } => {
            let member = machine.vms.get(&vm)?.member;
            member.pause()?;
            Ok(json!({ "vm": vm, "state": state(&member) }))
        }
        Request::Resume { vm } => {
            let member = machine.vms.get(&vm)?.member;
            member.resume()?;
            Ok(json!({ "vm": vm, "state": state(&member) }))
        }
        Request::Save { vm, dir } => save(machine, &vm, dir),
        Request::Fork {
            vm,
            count,
            memory_mode,
            freeze,
        } => {
            let member = machine.vms.get(&vm)?.member;
            let usual = &machine.family.config().guest_forks;
            let spec = CloneSpec {
                memory_mode: memory_mode.unwrap_or(usual.memory_mode),
                freeze: freeze.unwrap_or_default(),
                ..CloneSpec::new(count)
            };
            spec.freeze
                .check(spec.memory_mode)
                .map_err(|error| Failure::usage(error.to_string()))?;
            let clones = member.fork(spec)?.clones;
            let names: Vec<&str> = clones.iter().map(|clone| clone.name()).collect();
            Ok(json!({ "vm": vm, "clones": names }))
        }
        Request::Kill { vm } => {
            let member = machine.vms.get(&vm)?.member;
            member.kill();
            // Not from the registry, which may hear of it a moment later.
            Ok(tell(machine, &vm, &Ending::of(&member.wait().end)))
        }
        // These two need the connection as well.
        Request::Wait { .. } | Request::Console { .. } => {
            Err(Failure::usage("it cannot be asked here"))
        }
    }
}

/// Answers at the end of the VM `name`; `None` if the client hangs up before.
pub(super) fn wait(
    machine: &Machine,
    name: &str,
    client: &UnixStream,
) -> io::Result<Option<Result<Value, Failure>>> {
    let bell = Arc::new(Bell::new()?);
    let member = match machine.vms.watch(name, &bell) {
        Ok(Found::Running(member)) => member,
        Ok(Found::Ended(ending)) => return Ok(Some(Ok(tell(machine, name, &ending)))),
        Err(failure) => return Ok(Some(Err(failure))),
    };
    loop {
        // What more the client sends is read when this is answered; one that sends no more may still listen.
        let mut fds = [
            PollFd::new(client, PollFlags::empty()),
            PollFd::new(&*bell, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[1].revents().is_empty() {
            let ending = Ending::of(&member.wait().end);
            return Ok(Some(Ok(tell(machine, name, &ending))));
        }
        if !fds[0].revents().is_empty() {
            return Ok(None);
        }
    }
}

fn tell(machine: &Machine, name: &str, ending: &Ending) -> Value {
    json!({
        "vm": name,
        "end": ending.end,
        "status": ending.status,
        "exit_code": ending.exit_code,
        "saved_to": machine.vms.saved_to(name),
    })
}

fn save(machine: &Machine, name: &str, dir: PathBuf) -> Result<Value, Failure> {
    let member = machine.vms.get(name)?.member;
    if !dir.is_absolute() {
        let text = format!("{} is no absolute path", dir.display());
        return Err(Failure::usage(text));
    }
    // Before it ends by that: whoever hears of the end is told where.
    machine.vms.saving(name, dir.clone())?;
    if let Err(error) = member.save_to(dir.clone()) {
        machine.vms.not_saved(name);
        return Err(error.into());
    }
    member.wait();
    Ok(json!({ "vm": name, "saved_to": dir }))
}

fn state(member: &Member) -> &'static str {
    if member.is_paused() {
        "paused"
    } else {
        "running"
    }
}

fn ps(machine: &Machine) -> Value {
    let vms = machine.vms.running();
    let vms: Vec<Value> = vms.iter().map(|vm| summary(machine, vm)).collect();
    json!({ "vms": vms })
}

fn summary(machine: &Machine, vm: &Running) -> Value {
    let member = &vm.member;
    let (config, identity) = (member.config(), member.identity());
    let since = vm.since.duration_since(UNIX_EPOCH).unwrap_or_default();
    let spec = machine.family.config().vsock.as_ref();
    json!({
        "name": identity.name,
        "state": state(member),
        "vcpus": config.vcpus,
        "memory_mib": config.memory_mib,
        "depth": identity.depth,
        "pid": member.process().unwrap_or_else(std::process::id),
        "cid": identity.cid,
        "vsock": spec.map(|spec| spec.path_of(&identity)),
        "since_unix_ms": since.as_millis() as u64,
    })
}

fn info(machine: &Machine, vm: &Running) -> Result<Value, Failure> {
    let member = &vm.member;
    let identity = member.identity();
    let memory = member.memory_use()?;
    let disk = |disk: &forkvm::vmm::DiskConfig| json!({ "name": disk.name, "size_kib": disk.len / 1024, "read_only": disk.read_only });
    let disks: Vec<Value> = member.config().disks.iter().map(disk).collect();
    let reports = member.reports();
    let now = Instant::now();
    let last = reports.len().saturating_sub(REPORTS);
    let told: Vec<Value> = reports[last..]
        .iter()
        .map(|(value, at)| json!({ "value": value, "ago_ms": now.duration_since(*at).as_millis() as u64 }))
        .collect();
    let generation = identity.generation.iter();
    let generation: String = generation.map(|byte| format!("{byte:02x}")).collect();
    let mut info = summary(machine, vm);
    let more = json!({
        "clone_id": identity.clone_id,
        "fork_count": identity.fork_count,
        "generation": generation,
        "memory": memory,
        "disks": disks,
        "reports": { "count": reports.len(), "last": told },
        "fallback": member.fallback_counts()?,
    });
    if let (Value::Object(info), Value::Object(more)) = (&mut info, more) {
        info.extend(more);
    }
    Ok(info)
}
