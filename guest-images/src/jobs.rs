//! The jobs of the freestanding guest, for people who choose one. `bare/src/jobs/` has the code.

/// A job of [`BARE`](crate::BARE).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// What `job=` takes.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// The arguments that it takes besides, with their defaults, as on the command line.
    pub arguments: &'static str,
}

/// Every job of [`BARE`](crate::BARE), in the order of their names.
pub const JOBS: &[Job] = &[
    Job {
        name: "blk-verify",
        about: "forks with disk I/O in flight and verifies every sector",
        arguments: "disk=0 mib=4 seed=1 n=1",
    },
    Job {
        name: "counter",
        about: "each vCPU counts while the first forks; no count may be lost or repeated",
        arguments: "n=1",
    },
    Job {
        name: "discard",
        about: "gives pages back to the host, and checks what all pages hold at each fork of it",
        arguments: "mib=16 count=64",
    },
    Job {
        name: "fork",
        about: "forks into n clones; clone i exits with status i",
        arguments: "n=1 mib=0 tries=1",
    },
    Job {
        name: "hello",
        about: "prints vCPUs, RAM and disks",
        arguments: "",
    },
    Job {
        name: "map-reads",
        about: "indexes the references on disk 0, forks, maps the reads on disk 1 to disk 2",
        arguments: "clones=0 forked_by=guest depth=1",
    },
    Job {
        name: "obey",
        about: "reads, writes and gives back pages as the lines on its console say",
        arguments: "pages=4096",
    },
    Job {
        name: "oracle",
        about: "keeps memory, registers and disk busy and verifies them at each fork of the host's",
        arguments: "mib=8 writers=0 disk=0 irq=0 go-on=0",
    },
    Job {
        name: "reach",
        about: "fills memory; each clone reads a part of it at once: what a page fault takes",
        arguments: "mib=64 touch=256 order=linear write=0 hot=0 exit=0",
    },
    Job {
        name: "registers",
        about: "forks with known values in every register class and compares them",
        arguments: "n=1 seed=1 stay=0",
    },
    Job {
        name: "ring",
        about: "all vCPUs ask for a fork at once; prints what each was answered",
        arguments: "",
    },
    Job {
        name: "rubbish",
        about: "writes and reads at random where devices are and are not",
        arguments: "seed=1 rounds=2000",
    },
    Job {
        name: "save",
        about: "asks the host to save the machine, and says which of the two it is afterwards",
        arguments: "mib=4",
    },
    Job {
        name: "spin",
        about: "keeps every vCPU busy for ever",
        arguments: "",
    },
    Job {
        name: "sweep",
        about: "each vCPU rewrites its pages in order for ever, and finds torn ones after a fork",
        arguments: "pages=256 still=64 clone_exit=0",
    },
    Job {
        name: "touch",
        about: "writes memory by a pattern and verifies it after a fork of the host's",
        arguments: "mib=16 pattern=seq seed=1 idle=0",
    },
    Job {
        name: "tree",
        about: "a fork of a fork, so many deep; exits with the depth",
        arguments: "depth=3 mib=1 stay=0",
    },
    Job {
        name: "triple-fault",
        about: "forks into n clones, the first of which triple-faults",
        arguments: "n=2",
    },
    Job {
        name: "window",
        about: "changes its page tables in each clone, and finds them as before after a rewind",
        arguments: "mib=1 shown=512 seed=1",
    },
    Job {
        name: "work",
        about: "waits warm; its clones read, compute and write as much as is said: what is measured",
        arguments: "mib=64 every=1 read=0 write=0 order=linear rounds=0 dirty=0 tell=0",
    },
];
