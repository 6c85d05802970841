//! The host's KVM: opened once, asked once what it can do, shared by every VM of the process.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::software_kvm::Promises;
use crate::vcpu::MsrCatalogue;
use crate::vm::{self, VmError};

/// Where KVM is.
pub const KVM_PATH: &str = "/dev/kvm";

/// An open `/dev/kvm` and what it said about itself.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
    supported_cpuid: CpuId,
    flavour: KvmFlavour,
    tsc_deadline: bool,
    /// Filled by the first vCPU: which MSRs can be read depends on the CPUID that a vCPU has.
    msrs: OnceLock<MsrCatalogue>,
    sees_rewritten_tables: OnceLock<bool>,
    promises: OnceLock<Promises>,
}

impl Kvm {
    /// Opens `/dev/kvm` and checks that it has what forkvm needs.
    pub fn open() -> Result<Kvm, KvmError> {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(KVM_PATH)
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => KvmError::Absent,
                io::ErrorKind::PermissionDenied => KvmError::Denied,
                _ => KvmError::Open(source),
            })?;
        let fd = own_kvm(file);
        let version = fd.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::Version(version));
        }
        for (cap, name) in REQUIRED {
            if !fd.check_extension(*cap) {
                return Err(KvmError::Lacks(name));
            }
        }
        let supported_cpuid = fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| KvmError::Cpuid(error.into()))?;
        let tsc_deadline = fd.check_extension(Cap::TscDeadlineTimer);
        let flavour = KvmFlavour::detect();
        Ok(Kvm {
            fd,
            supported_cpuid,
            flavour,
            tsc_deadline,
            msrs: OnceLock::new(),
            sees_rewritten_tables: OnceLock::new(),
            promises: OnceLock::new(),
        })
    }

    /// What KVM stands on here.
    pub fn flavour(&self) -> KvmFlavour {
        self.flavour
    }

    /// Whether a vCPU goes by page tables that were changed in its memory behind its back, once its TLB
    /// was flushed: so with two-dimensional paging, not with a shadow MMU. Found out with a VM of its
    /// own the first time, which takes some milliseconds.
    pub fn sees_rewritten_tables(self: &Arc<Self>) -> Result<bool, VmError> {
        ask_once(&self.sees_rewritten_tables, || {
            vm::sees_rewritten_tables(self)
        })
    }

    /// What a guest's ring 0 can rely on here. Found out with VMs of its own the first time, as above.
    pub fn promises(self: &Arc<Self>) -> Result<Promises, VmError> {
        ask_once(&self.promises, || Promises::ask(self))
    }

    pub(crate) fn fd(&self) -> &kvm_ioctls::Kvm {
        &self.fd
    }

    /// Features that KVM can give to a vCPU (KVM_GET_SUPPORTED_CPUID).
    pub(crate) fn supported_cpuid(&self) -> &CpuId {
        &self.supported_cpuid
    }

    /// Whether the in-kernel LAPIC has a TSC-deadline timer; KVM's CPUID table does not say so.
    pub(crate) fn tsc_deadline(&self) -> bool {
        self.tsc_deadline
    }

    pub(crate) fn msrs(&self) -> &OnceLock<MsrCatalogue> {
        &self.msrs
    }
}

/// The answer that is known, or that `ask` finds; an error leaves it to be asked again.
fn ask_once<T: Copy>(
    answer: &OnceLock<T>,
    ask: impl FnOnce() -> Result<T, VmError>,
) -> Result<T, VmError> {
    if let Some(known) = answer.get() {
        return Ok(*known);
    }
    let found = ask()?;
    Ok(*answer.get_or_init(|| found))
}

/// What the machine and its state cannot do without.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

#[allow(unsafe_code)] // kvm-ioctls takes over a descriptor only through an unsafe constructor.
fn own_kvm(file: fs::File) -> kvm_ioctls::Kvm {
    let fd = OwnedFd::from(file).into_raw_fd();
    // SAFETY: `fd` was just given up by its only owner and is an open /dev/kvm.
    unsafe { kvm_ioctls::Kvm::from_raw_fd(fd) }
}

/// What a KVM stands on: the first thing to know about a figure measured on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvmFlavour {
    /// kvm-pvm: software KVM, guest ring 0 interpreted.
    Pvm,
    /// Intel VMX.
    Vmx,
    /// AMD SVM.
    Svm,
    /// None of the known modules is loaded; KVM may be built into the kernel.
    Unknown,
}

impl KvmFlavour {
    /// Tells by the loaded kernel module. pvm comes first: it sits where the CPU has neither other.
    pub fn detect() -> KvmFlavour {
        let loaded = |module: &str| fs::exists(format!("/sys/module/{module}")).unwrap_or(false);
        match () {
            () if loaded("kvm_pvm") => KvmFlavour::Pvm,
            () if loaded("kvm_intel") => KvmFlavour::Vmx,
            () if loaded("kvm_amd") => KvmFlavour::Svm,
            () => KvmFlavour::Unknown,
        }
    }

    /// The word that outputs use.
    pub fn as_str(self) -> &'static str {
        match self {
            KvmFlavour::Pvm => "pvm",
            KvmFlavour::Vmx => "vmx",
            KvmFlavour::Svm => "svm",
            KvmFlavour::Unknown => "unknown",
        }
    }
}

impl std::fmt::Display for KvmFlavour {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why KVM cannot be used.
#[derive(Debug, Error)]
pub enum KvmError {
    /// No `/dev/kvm`.
    #[error(
        "/dev/kvm does not exist: load kvm_intel or kvm_amd, or enable virtualisation in the \
         firmware or in the hypervisor that this host runs under"
    )]
    Absent,
    /// No permission.
    #[error(
        "/dev/kvm may not be opened by this user: join its group (`sudo usermod -aG kvm $USER`, \
         then log in again) or run as root"
    )]
    Denied,
    /// Opening failed otherwise.
    #[error("opening /dev/kvm failed")]
    Open(#[source] io::Error),
    /// Not the one stable API version.
    #[error("/dev/kvm speaks API version {0}, not 12: this is not a KVM that forkvm knows")]
    Version(i32),
    /// A capability is not there.
    #[error("this KVM lacks {0}: a newer host kernel is needed")]
    Lacks(&'static str),
    /// The CPUID table cannot be read.
    #[error("KVM_GET_SUPPORTED_CPUID failed")]
    Cpuid(#[source] io::Error),
}
