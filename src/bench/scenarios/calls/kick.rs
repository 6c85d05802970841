//! From a kick until all vCPUs stand at the pause barrier.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use forkvm_abi::doorbell::report;
use forkvm_vmm::{Kvm, MemoryLayout, Peripherals, Ram, Shell, Vm, VmConfig, VmEvent};

use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit, call};
use crate::guest;

const MEMORY_MIB: u64 = 64;
/// How long the vCPUs spin between two pauses.
const SPIN: Duration = Duration::from_millis(20);
const DEADLINE: Duration = Duration::from_secs(60);

/// A machine whose vCPUs all spin; it stands still between two repetitions.
pub(super) struct KickToBarrier {
    measured: u32,
    vcpus: u32,
    vm: Option<Vm>,
}

impl KickToBarrier {
    pub(super) fn new(measured: u32, vcpus: u32) -> KickToBarrier {
        KickToBarrier {
            measured,
            vcpus,
            vm: None,
        }
    }
}

impl Experiment for KickToBarrier {
    fn name(&self) -> String {
        format!("kick-to-barrier/{}-vcpus", self.vcpus)
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 2,
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let (tell, told) = channel();
        let events = move |event| {
            if let VmEvent::Report { value, .. } = event
                && value == report::READY
                && tell.send(()).is_err()
            {
                tracing::trace!("nobody waits for the machine any more");
            }
        };
        let ram = Ram::new(MemoryLayout::new(MEMORY_MIB)?)?;
        let peripherals = Peripherals {
            vsock: None,
            console: Box::new(io::sink()),
            disks: Vec::new(),
        };
        let config = VmConfig::new(MEMORY_MIB, self.vcpus);
        let shell = Shell::build(&Arc::new(Kvm::open()?), self.vcpus, ram)?;
        let (events, payload) = (Arc::new(events), guest::bare());
        let vm = shell.boot(config, peripherals, events, &payload, "job=spin")?;
        let mut vm = vm.start();
        let silent = |error| call("the machine's start")(io::Error::other(error));
        told.recv_timeout(DEADLINE).map_err(silent)?;
        vm.pause(DEADLINE)?.stay();
        self.vm = Some(vm);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let name = self.name();
        let Some(vm) = &mut self.vm else {
            return Ok(());
        };
        // It stands; dropped, it runs on.
        vm.pause(DEADLINE)?.resume();
        thread::sleep(SPIN);
        let start = Instant::now();
        let paused = vm.pause(DEADLINE)?;
        samples.time(&name, Unit::Us, start.elapsed());
        paused.stay();
        Ok(())
    }
}
