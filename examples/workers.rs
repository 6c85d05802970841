//! Forks a VM into clones that live in processes of their own: this program, started again as a worker.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use std::{env, io};

use forkvm::{
    BootSpec, CloneSpec, ConsoleDevice, End, FamilyConfig, Process, ProcessConfig, Vm,
    WorkerProgram, guest, worker,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if env::args().nth(1).as_deref() == Some("worker") {
        // Started by the call of `Process::start` below, which is at the other end of standard input.
        match worker::serve(io::stdin().as_fd().try_clone_to_owned()?)? {}
    }
    let program = WorkerProgram {
        path: env::current_exe()?,
        args: vec!["worker".into()],
    };
    let config = FamilyConfig {
        spawner: Arc::new(Process::start(ProcessConfig::new(program))?),
        ..FamilyConfig::default()
    };
    let spec = BootSpec {
        name: "parent".into(),
        memory_mib: 512,
        vcpus: 2,
        disks: Vec::new(),
        payload: guest::bare(),
        cmdline: "job=touch mib=64".into(), // writes 64 MiB, then waits to be forked
        console: ConsoleDevice::Serial,
    };
    let parent = Vm::boot_with(spec, config)?;
    parent.wait_ready(Duration::from_secs(60))?;
    for clone in parent.fork(CloneSpec::new(4))? {
        let end = clone.join().end; // each clone checks what it inherited
        let process = clone.member().process().expect("it lives in a worker");
        println!("clone {}, of process {process}, {end}", clone.id());
        assert_eq!(end, End::Exited(0));
    }
    Ok(())
}
