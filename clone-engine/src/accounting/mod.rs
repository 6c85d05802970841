//! What VMs take of the host's memory: one VM, a family, the process.
//!
//! Every page that a VM has written since its fork is its own (`private_kib`). Every other page is in
//! a memory file: an image, which all clones of a fork share, or the RAM of a VM that maps it shared;
//! the family counts each file once (`files_kib`). So `Σ private_kib + files_kib` is what guest memory
//! takes, with nothing counted twice, and `shared_kib`, what a VM maps of those files, is never to be
//! added to it. Beside guest memory a VM has page tables, of the process that it lives in, and what the kernel keeps of
//! it ([`KernelUse`]). What the VMM itself needs (heap, stacks) is known of the process only
//! ([`ProcessUse`]).
//!
//! VMs run on while they are counted. The command line, the demo and benchmarks report from here;
//! [`crate::limits`] takes from `idle` what a clone will take.

pub(crate) mod idle;
mod process;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use forkvm_vmm::memory::PAGE;
use forkvm_vmm::{KvmStats, MemoryError, StatsError, Vm};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::family::Family;
use crate::member::MemberError;

pub use process::{HostKernelUse, ProcessUse};

/// What one VM takes, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryUse {
    /// Guest pages that are its alone, present or swapped out: what it has written since its fork. Goes
    /// with it. 0 for a VM that maps its memory shared: that is in `files_kib` of its family.
    pub private_kib: u64,
    /// Guest pages of memory files that it maps just now, because it touched them or the kernel mapped
    /// them together with a neighbour. They stay when it goes; siblings map the same ones.
    pub shared_kib: u64,
    /// Page tables for the two, of the process that it lives in.
    pub page_tables_kib: u64,
    /// What the kernel keeps of it.
    pub kernel: KernelUse,
}

/// What the kernel keeps of one VM, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelUse {
    /// KVM's own page tables for the guest, by KVM's count of them (KVM_GET_STATS_FD): shadow pages,
    /// or the nested tables that its mapped pages need at least. `None` where KVM does not count.
    pub paging_kib: Option<u64>,
    /// What KVM keeps for RAM, populated or not (reverse maps, write tracking): computed from its size.
    /// 0 with two-dimensional paging, where KVM makes it on demand.
    pub slots_kib: u64,
    /// Structures of the VM and its vCPUs, stacks of their threads: computed from what was measured
    /// per VM and per vCPU.
    pub objects_kib: u64,
}

impl KernelUse {
    /// All of it, without what is not known.
    pub fn total_kib(&self) -> u64 {
        self.paging_kib.unwrap_or(0) + self.slots_kib + self.objects_kib
    }
}

/// What a family takes, in KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FamilyUse {
    /// The VMs that were running, each by its name.
    pub members: BTreeMap<String, MemoryUse>,
    /// What all of its memory files hold, each counted once: images, also those that only fork points
    /// hold, and the RAM of VMs that map it shared.
    pub files_kib: u64,
}

impl FamilyUse {
    /// Guest memory, each page once.
    pub fn guest_kib(&self) -> u64 {
        let private = self.members.values().map(|taken| taken.private_kib);
        private.sum::<u64>() + self.files_kib
    }

    /// Everything: guest memory, page tables, and what the kernel keeps.
    pub fn total_kib(&self) -> u64 {
        let beside = |taken: &MemoryUse| taken.page_tables_kib + taken.kernel.total_kib();
        self.guest_kib() + self.members.values().map(beside).sum::<u64>()
    }
}

impl Family {
    /// What it takes. VMs that end meanwhile are left out; the others are counted one after the other.
    pub fn memory_use(&self) -> Result<FamilyUse, MemberError> {
        let mut taken = FamilyUse::default();
        let images = self.images();
        let mut files: Vec<Arc<File>> = images.iter().map(|image| image.file().clone()).collect();
        for member in self.running() {
            match member.count_memory() {
                Ok(count) => {
                    taken.members.insert(member.name().to_owned(), count.taken);
                    files.extend(count.own_file);
                }
                Err(MemberError::Ended { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        taken.files_kib = held_kib(&files).map_err(AccountingError::File)?;
        Ok(taken)
    }
}

/// What memory files hold together; one that is there several times counts once.
fn held_kib(files: &[Arc<File>]) -> io::Result<u64> {
    let mut blocks = BTreeMap::new();
    for file in files {
        let metadata = file.metadata()?;
        blocks.insert((metadata.dev(), metadata.ino()), metadata.blocks());
    }
    // Of 512 bytes (stat(2)).
    Ok(blocks.values().sum::<u64>() / 2)
}

/// The count of one VM, made where the VM is.
pub(crate) struct VmCount {
    pub(crate) taken: MemoryUse,
    /// The memory file that is this VM's alone, if it maps one shared.
    own_file: Option<Arc<File>>,
}

impl VmCount {
    /// Of a clone that lives in another process, where it was counted. It maps nothing shared.
    pub(crate) fn elsewhere(taken: MemoryUse) -> VmCount {
        VmCount {
            taken,
            own_file: None,
        }
    }

    /// Of a VM that runs.
    pub(crate) fn of(vm: &Vm) -> Result<VmCount, AccountingError> {
        let residency = vm.ram().residency()?;
        let paging = vm.kvm_stats().and_then(|stats| paging_pages(&stats));
        let paging_kib = match paging {
            Ok(pages) => Some(pages * PAGE / 1024),
            Err(error @ (StatsError::Missing | StatsError::Unknown { .. })) => {
                tracing::debug!(%error, "KVM's page tables are not counted");
                None
            }
            Err(error) => return Err(error.into()),
        };
        let taken = MemoryUse {
            private_kib: residency.own / 1024,
            shared_kib: residency.shown / 1024,
            page_tables_kib: residency.page_tables / 1024,
            kernel: KernelUse {
                paging_kib,
                slots_kib: idle::slots_kib(vm.config()),
                objects_kib: idle::objects_kib(vm.config()),
            },
        };
        Ok(VmCount {
            taken,
            own_file: vm.ram().backing().shared().cloned(),
        })
    }
}

/// Pages of KVM's page tables for a guest. Shadow pages are those that were made and not zapped since;
/// tables of two-dimensional paging are not among them, but what they map is known.
fn paging_pages(stats: &KvmStats) -> Result<u64, StatsError> {
    let shadows = stats
        .get("mmu_cache_miss")?
        .saturating_sub(stats.get("mmu_shadow_zapped")?);
    let entries_of_a_table = PAGE / 8;
    let mut tables = 0;
    let mut mapped = 0;
    for level in ["pages_4k", "pages_2m", "pages_1g"] {
        mapped = (mapped + stats.get(level)?).div_ceil(entries_of_a_table);
        tables += mapped;
    }
    Ok(shadows.max(tables))
}

/// Why it is not known what a VM takes.
#[derive(Debug, Error)]
pub enum AccountingError {
    /// Its memory could not be counted.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It was tried in the process where the VM lives.
    #[error("process {process} could not count it: {why}")]
    Elsewhere {
        /// The process.
        process: u32,
        /// What went wrong there.
        why: String,
    },
    /// KVM does not tell.
    #[error(transparent)]
    Kvm(#[from] StatsError),
    /// A memory file could not be asked for its size.
    #[error("asking a memory file what it holds failed")]
    File(#[source] io::Error),
    /// A file of /proc could not be read, or says something else.
    #[error("reading what the kernel accounts failed")]
    Proc(#[source] io::Error),
}
