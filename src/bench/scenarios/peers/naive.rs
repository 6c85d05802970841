//! Clones as one would write them with the crates of this project and no engine: the VM is saved
//! once, and each clone is a fresh VM that is given the saved state and, out of a file, its memory.
//!
//! The state is in this process, decoded, as a fork point's is. The file is in the directory for
//! temporary files, without a name, and in the host's page cache. Nothing is built ahead.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use forkvm_abi::doorbell::report;
use forkvm_devices::doorbell::Announcement;
use forkvm_vmm::memory::data_extents;
use forkvm_vmm::{
    Backing, EventSink, Kvm, MachineState, MemoryLayout, Peripherals, Ram, Shell, VmConfig,
    VmError, VmEvent,
};
use vm_memory::{Bytes, GuestAddress};

use crate::bench::measure::{BenchError, call};
use crate::bench::subject::SubjectSpec;
use crate::guest;

use super::Peer;

/// Far beyond what anything here takes on a slow host.
const DEADLINE: Duration = Duration::from_secs(60);

/// How a clone gets its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// What was populated is read from the file into fresh RAM.
    Read,
    /// The file is mapped privately.
    MapPrivate,
}

/// See the module's text.
pub(super) struct Naive {
    way: Way,
    saved: Option<Saved>,
}

/// A VM that was saved.
struct Saved {
    kvm: Arc<Kvm>,
    state: MachineState,
    memory: Arc<File>,
    /// Where the file holds data.
    populated: Vec<Range<u64>>,
}

impl Naive {
    pub(super) fn by(way: Way) -> Naive {
        Naive { way, saved: None }
    }
}

impl Peer for Naive {
    fn name(&self) -> &'static str {
        match self.way {
            Way::Read => "naive/read",
            Way::MapPrivate => "naive/map-private",
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        self.saved = Some(Saved::boot_and_save()?);
        Ok(())
    }

    fn start(&mut self) -> Result<Duration, BenchError> {
        let Some(saved) = &self.saved else {
            return Ok(Duration::ZERO);
        };
        let (events, reports) = listen();
        let asked = Instant::now();
        let ram = match self.way {
            Way::Read => saved.read()?,
            Way::MapPrivate => {
                let base = Arc::new(saved.memory.clone());
                Ram::map(saved.state.layout().clone(), Backing::Private(base))?
            }
        };
        let shell = Shell::build(&saved.kvm, saved.state.config().vcpus, ram)?;
        let ready = shell.restore(&saved.state, peripherals(), events)?;
        let forked = Announcement {
            fork_count: 1,
            clone_id: 1,
            depth: 1,
            ..Announcement::default()
        };
        ready.doorbell().announce(&forked).map_err(VmError::from)?;
        let vm = ready.start();
        let acted = wait(&reports, report::ACTION)?;
        wait(&reports, report::ANSWER)?;
        drop(vm);
        Ok(acted.saturating_duration_since(asked))
    }
}

impl Saved {
    /// Boots the VM that is measured everywhere and saves it, as it stands halted.
    fn boot_and_save() -> Result<Saved, BenchError> {
        let spec = SubjectSpec::USUAL;
        let kvm = Arc::new(Kvm::open()?);
        let (events, reports) = listen();
        let ram = Ram::new(MemoryLayout::new(spec.memory_mib)?)?;
        let shell = Shell::build(&kvm, spec.vcpus, ram)?;
        let config = VmConfig::new(spec.memory_mib, spec.vcpus);
        let ready = shell.boot(
            config,
            peripherals(),
            events,
            &guest::bare(),
            &spec.cmdline(),
        )?;
        let mut vm = ready.start();
        wait(&reports, report::READY)?;
        let paused = vm.pause(DEADLINE)?;
        let state = paused.save()?;
        let failed = call("saving memory to a temporary file");
        let memory = tempfile::tempfile().map_err(&failed)?;
        memory.set_len(state.layout().len()).map_err(&failed)?;
        paused.ram().copy_populated(&memory)?;
        Ok(Saved {
            kvm,
            state,
            populated: data_extents(&memory)?,
            memory: Arc::new(memory),
        })
    }

    /// RAM into which all that was populated has been read.
    fn read(&self) -> Result<Ram, BenchError> {
        let failed = call("reading memory from a temporary file");
        let ram = Ram::new(self.state.layout().clone())?;
        let mut file = self.memory.as_ref();
        for region in self.state.layout().regions() {
            let end = region.offset + region.len;
            for data in &self.populated {
                let (from, until) = (data.start.max(region.offset), data.end.min(end));
                if from < until {
                    let at = GuestAddress(region.start + (from - region.offset));
                    file.seek(SeekFrom::Start(from)).map_err(&failed)?;
                    ram.guest()
                        .read_exact_volatile_from(at, &mut file, (until - from) as usize)
                        .map_err(|error| failed(io::Error::other(error)))?;
                }
            }
        }
        Ok(ram)
    }
}

fn peripherals() -> Peripherals {
    Peripherals {
        vsock: None,
        console: Box::new(io::sink()),
        disks: Vec::new(),
    }
}

/// What hears a VM, and where its reports can be waited for.
fn listen() -> (EventSink, Receiver<(u32, Instant)>) {
    let (tell, reports): (Sender<(u32, Instant)>, _) = channel();
    let events = move |event| {
        if let VmEvent::Report { value, at } = event
            && tell.send((value, at)).is_err()
        {
            tracing::trace!("nobody waits for the machine any more");
        }
    };
    (Arc::new(events), reports)
}

/// When `due` was reported.
fn wait(reports: &Receiver<(u32, Instant)>, due: u32) -> Result<Instant, BenchError> {
    let silent = call("a machine that was restored by hand");
    loop {
        let told = reports.recv_timeout(DEADLINE);
        let (value, at) = told.map_err(|error| silent(io::Error::other(error)))?;
        if value == due {
            return Ok(at);
        }
    }
}
