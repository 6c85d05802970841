//! What the kernel accounts of this process and of the whole host.

use std::io;

use crate::limits::host;

use super::AccountingError;

/// What this process takes, in KiB: all its VMs and the VMM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessUse {
    /// `Anonymous` of /proc/self/smaps_rollup: what VMs have written since their forks, heap, stacks.
    /// Not the pages of memory files. Its growth, divided by the clones, is the private memory of a
    /// clone. The kernel walks all page tables of the process for it.
    pub anonymous_kib: u64,
    /// `VmPTE` of /proc/self/status: page tables.
    pub page_tables_kib: u64,
}

impl ProcessUse {
    /// Of now.
    pub fn now() -> Result<ProcessUse, AccountingError> {
        ProcessUse::of_named("self")
    }

    /// Of another process, a worker, now.
    pub fn of(process: u32) -> Result<ProcessUse, AccountingError> {
        ProcessUse::of_named(&process.to_string())
    }

    fn of_named(process: &str) -> Result<ProcessUse, AccountingError> {
        let value = |file: &str, name: &str| {
            let file = format!("/proc/{process}/{file}");
            let text = host::read(&file)?;
            host::kib(&text, name).ok_or_else(|| lacks(&file, name))
        };
        let read = || {
            Ok(ProcessUse {
                anonymous_kib: value("smaps_rollup", "Anonymous")?,
                page_tables_kib: value("status", "VmPTE")?,
            })
        };
        read().map_err(AccountingError::Proc)
    }
}

/// What the kernel takes for itself, in KiB: of the whole host, so that its growth is that of a family
/// only where nothing else happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostKernelUse {
    /// `Slab` of /proc/meminfo: the kernel's small objects, those that it could free included.
    pub slab_kib: u64,
    /// `VmallocUsed`: what KVM keeps for RAM, and stacks of threads.
    pub vmalloc_kib: u64,
    /// `PageTables`: of processes.
    pub page_tables_kib: u64,
    /// `SecPageTables`: KVM's, for guests. 0 before Linux 6.1.
    pub guest_page_tables_kib: u64,
    /// `Percpu`.
    pub percpu_kib: u64,
}

impl HostKernelUse {
    /// Of now.
    pub fn now() -> Result<HostKernelUse, AccountingError> {
        const FILE: &str = "/proc/meminfo";
        let read = || {
            let text = host::read(FILE)?;
            let value = |name| host::kib(&text, name).ok_or_else(|| lacks(FILE, name));
            Ok(HostKernelUse {
                slab_kib: value("Slab")?,
                vmalloc_kib: value("VmallocUsed")?,
                page_tables_kib: value("PageTables")?,
                guest_page_tables_kib: host::kib(&text, "SecPageTables").unwrap_or(0),
                percpu_kib: value("Percpu")?,
            })
        };
        read().map_err(AccountingError::Proc)
    }

    /// All of it.
    pub fn total_kib(&self) -> u64 {
        self.slab_kib
            + self.vmalloc_kib
            + self.page_tables_kib
            + self.guest_page_tables_kib
            + self.percpu_kib
    }
}

fn lacks(file: &str, name: &str) -> io::Error {
    io::Error::other(format!("{file} has no {name}"))
}
