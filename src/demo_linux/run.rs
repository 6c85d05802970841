//! The demo itself: makes a template, forks its machine, and has each clone align its share.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use forkvm_clone_engine::saved::SaveTo;
use forkvm_clone_engine::{
    BootSpec, CloneSpec, ConsoleDevice, Consoles, DiskSource, DiskSpec, Family, FamilyConfig,
    VsockSpec,
};
use forkvm_devices::block::{Access, RawFile, RawFileError};
use forkvm_vmm::boot::Payload;
use forkvm_vmm::{Kvm, KvmError};
use tempfile::TempDir;
use thiserror::Error;

use super::input::{PROGRAM, arguments};
use crate::Error;
use crate::agent::AgentError;
use crate::agent::protocol::{Exec, Exit};
use crate::demo::observer::{DemoObserver, Fork};
use crate::linux::{BOOT, LinuxError, LinuxVm, MakeError, Step, TemplateSpec, make_template};
use crate::templates::{Template, TemplateError, Templates};

/// Name of the template, and of its machine.
const NAME: &str = "demo";

/// Mounts the disk, and starts the program once: clones have both in memory then. Its help ends with 1.
const WARM_UP: &str =
    "mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && { chroot /mnt PROGRAM -help; [ $? = 1 ]; }";

/// What the program says goes to the standard error. One process from the shell to the program: where ring 0 is interpreted
/// each costs a second.
const ALIGN: &str = "exec chroot /mnt PROGRAM -align ARGUMENTS >&2";

/// What the program writes: the guide tree and the alignment.
const WRITTEN: [&str; 2] = ["/out/dnd", "/out/aln"];

/// What to run.
pub struct RunSpec {
    /// The kernel that is booted.
    pub payload: Payload,
    /// Its command line.
    pub cmdline: String,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// Clones.
    pub clones: u32,
    /// How the machine is forked.
    pub family: FamilyConfig,
    /// The ext4 disk.
    pub disk: PathBuf,
    /// Where the template is made; one of an earlier run goes.
    pub templates: Templates,
    /// Where the consoles go.
    pub consoles: Arc<dyn Consoles>,
}

/// Who watches a run.
pub trait Watch {
    /// What is under way now, for people.
    fn at(&mut self, what: &'static str);

    /// A family has begun; whoever wants the run to end early ends it.
    fn begun(&mut self, family: &Arc<Family>);
}

/// What a clone did.
pub struct Worked {
    /// The clone, which still runs.
    pub vm: LinuxVm,
    /// The guide tree and the alignment of its share.
    pub answer: Vec<u8>,
    /// From the start of the program until its output was whole.
    pub took: Duration,
}

/// What came of it.
pub struct Run {
    /// The template.
    pub template: Template,
    /// The fork.
    pub fork: Fork,
    /// The clones, in the order of their shares.
    pub clones: Vec<Worked>,
    family: Arc<Family>,
    _sockets: TempDir,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.family.end();
    }
}

/// Runs the demo.
///
/// # Errors
/// What failed; nothing runs on.
pub fn run(spec: &RunSpec, watch: &mut dyn Watch) -> Result<Run, RunError> {
    let sockets = tempfile::tempdir().map_err(RunError::Sockets)?;
    let kvm = Arc::new(Kvm::open()?);
    let template = template(spec, &kvm, sockets.path(), watch)?;
    let observer = Arc::new(DemoObserver::before_boot(1, &spec.family.spawner));
    let config = FamilyConfig {
        consoles: spec.consoles.clone(),
        observer: observer.clone(),
        vsock: vsock(sockets.path()),
        ..spec.family.clone()
    };
    let forks = config.guest_forks.clone();
    let family = Family::new(kvm, config);
    watch.begun(&family);
    watch.at("clones at work");
    let worked = work(&family, &template, &forks, spec);
    let fork = observer.take_forks().pop();
    match (worked, fork) {
        (Ok(clones), Some(fork)) => Ok(Run {
            template,
            fork,
            clones,
            family,
            _sockets: sockets,
        }),
        (worked, _) => {
            family.end();
            Err(worked.err().unwrap_or(RunError::NotForked))
        }
    }
}

fn vsock(sockets: &Path) -> Option<VsockSpec> {
    Some(VsockSpec {
        path: sockets.join("vsock"),
    })
}

fn template(
    spec: &RunSpec,
    kvm: &Arc<Kvm>,
    sockets: &Path,
    watch: &mut dyn Watch,
) -> Result<Template, RunError> {
    match spec.templates.remove(NAME) {
        Ok(()) | Err(TemplateError::Unknown { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let draft = spec.templates.begin(NAME)?;
    let disk = RawFile::open(&spec.disk, Access::ReadOnly)?;
    let boot = BootSpec {
        name: NAME.into(),
        memory_mib: spec.memory_mib,
        vcpus: spec.vcpus,
        disks: vec![DiskSpec {
            name: "data".into(),
            source: DiskSource::volatile(Arc::new(disk)),
        }],
        payload: spec.payload.clone(),
        cmdline: spec.cmdline.clone(),
        console: ConsoleDevice::Serial,
    };
    let script = WARM_UP.replace("PROGRAM", PROGRAM);
    let template = TemplateSpec {
        boot,
        disks: vec![spec.disk.clone()],
        patience: BOOT,
        warmed_by: ["sh", "-c", &script].map(Into::into).to_vec(),
    };
    let family = Family::new(
        kvm.clone(),
        FamilyConfig {
            consoles: spec.consoles.clone(),
            saver: Some(Arc::new(SaveTo::exactly(draft.machine()))),
            vsock: vsock(sockets),
            ..FamilyConfig::default()
        },
    );
    watch.begun(&family);
    let mut warm_up = |vm: &LinuxVm| Ok(run_script(vm, &script)?);
    let mut at = |step: Step| watch.at(step.as_str());
    let made = make_template(&family, draft, template, &mut warm_up, &mut at);
    family.end();
    Ok(made?)
}

fn work(
    family: &Arc<Family>,
    template: &Template,
    forks: &CloneSpec,
    spec: &RunSpec,
) -> Result<Vec<Worked>, RunError> {
    let mode = forks.memory_mode;
    let machine = template.machine()?;
    let vm = LinuxVm::restore(family.clone(), machine, None, mode, &mut |_| {})?;
    let clones = vm.fork(CloneSpec {
        count: spec.clones,
        ..forks.clone()
    })?;
    thread::scope(|scope| {
        let start = |vm| {
            thread::Builder::new()
                .name("align".into())
                .spawn_scoped(scope, move || align(vm))
                .map_err(RunError::Thread)
        };
        let threads: Vec<_> = clones.into_iter().map(start).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| match thread.join() {
            Ok(worked) => worked,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        // All of them are waited for, whatever came of the first.
        let worked = threads.into_iter().map(|thread| thread.and_then(join));
        let worked: Vec<Result<Worked, RunError>> = worked.collect();
        worked.into_iter().collect()
    })
}

fn align(vm: LinuxVm) -> Result<Worked, RunError> {
    let number = vm.identity().clone_id;
    let from = format!("/in/{number}.fa");
    let [tree, alignment] = WRITTEN;
    let arguments = arguments(from.as_ref(), alignment.as_ref(), tree.as_ref());
    let script = ALIGN
        .replace("PROGRAM", PROGRAM)
        .replace("ARGUMENTS", &arguments.join(" "));
    let start = Instant::now();
    run_script(&vm, &script)?;
    let mut answer = Vec::new();
    for path in WRITTEN {
        vm.agent()
            .get(Path::new(&format!("/mnt{path}")), &mut answer)?;
    }
    let took = start.elapsed();
    Ok(Worked { vm, answer, took })
}

/// Runs a script of the guest's shell, which must end well.
fn run_script(vm: &LinuxVm, script: &str) -> Result<(), RunError> {
    let exec = Exec {
        argv: ["sh", "-c", script].map(Into::into).to_vec(),
        ..Exec::default()
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let running = vm.agent().exec(&exec)?;
    match running.pump(None, &mut out, &mut err)? {
        Exit::Code(0) => Ok(()),
        exit => Err(RunError::Script {
            vm: vm.identity().name,
            status: exit.status(),
            said: String::from_utf8_lossy(&err).trim().to_owned(),
        }),
    }
}

/// Why the demo failed.
#[derive(Debug, Error)]
pub enum RunError {
    /// KVM cannot be used.
    #[error("opening KVM")]
    Kvm(#[from] KvmError),
    /// No directory for sockets.
    #[error("making a directory for sockets")]
    Sockets(#[source] std::io::Error),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] RawFileError),
    /// The template could not be made.
    #[error("making the template")]
    Make(#[from] MakeError),
    /// It could not be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A machine.
    #[error(transparent)]
    Linux(#[from] LinuxError),
    /// A machine's end of the library.
    #[error(transparent)]
    Vm(#[from] Error),
    /// A machine's agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// What was run in a machine.
    #[error("the program ended with {status} in {vm}: {said}")]
    Script {
        /// The machine.
        vm: String,
        /// Its status.
        status: u8,
        /// Its standard error.
        said: String,
    },
    /// No thread to wait for a clone.
    #[error("starting a thread")]
    Thread(#[source] std::io::Error),
    /// Nobody heard of the fork.
    #[error("the fork left no trace")]
    NotForked,
}
