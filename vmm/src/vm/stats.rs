//! What KVM counts of a VM: the binary statistics of KVM_GET_STATS_FD (KVM API 4.133).
//!
//! The file that KVM gives describes itself: a header, a descriptor with a name for each statistic,
//! and the values. So nothing here depends on which statistics a kernel has; who asks for one by name
//! is told when it is not there. Counts of the whole VM only: no vCPU is asked, and none is stopped.
#![allow(unsafe_code)] // An ioctl that returns a descriptor.

use std::fs::File;
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_bindings::{KVM_CAP_BINARY_STATS_FD, kvm_stats_desc, kvm_stats_header};
use kvm_ioctls::VmFd;
use thiserror::Error;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_GET_STATS_FD, 0xae, 0xce);

/// Far more than any kernel has: a description beyond it is not believed.
const MOST_BYTES: usize = 1 << 20;

/// The statistics of one VM at one instant: those that are a single number. Times are in the unit
/// that KVM gives them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmStats {
    values: Vec<(String, u64)>,
}

impl KvmStats {
    /// Reads them. The descriptor is closed again: an open one keeps the VM alive.
    pub(super) fn read(vm: &VmFd) -> Result<KvmStats, StatsError> {
        if vm.check_extension_raw(KVM_CAP_BINARY_STATS_FD.into()) <= 0 {
            return Err(StatsError::Missing);
        }
        // SAFETY: the call takes no argument and touches no memory of this process.
        let fd = unsafe { ioctl(vm, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(StatsError::Call(io::Error::last_os_error()));
        }
        // SAFETY: `fd` is a fresh descriptor that nobody else owns.
        KvmStats::parse(&unsafe { File::from_raw_fd(fd) })
    }

    /// The value of `name`, such as `pages_4k`; an error that names it where this KVM has none.
    pub fn get(&self, name: &'static str) -> Result<u64, StatsError> {
        let found = self.values.iter().find(|(known, _)| known == name);
        found
            .map(|(_, value)| *value)
            .ok_or(StatsError::Unknown { name })
    }

    /// All of them, in KVM's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.values
            .iter()
            .map(|(name, value)| (name.as_str(), *value))
    }

    fn parse(file: &File) -> Result<KvmStats, StatsError> {
        let header = bytes(file, 0, size_of::<kvm_stats_header>())?;
        let field = |offset: usize| number(&header[offset..]);
        let name_size = field(offset_of!(kvm_stats_header, name_size));
        let count = field(offset_of!(kvm_stats_header, num_desc));
        let data = field(offset_of!(kvm_stats_header, data_offset));
        let each = size_of::<kvm_stats_desc>() + name_size;
        let table = bytes(
            file,
            field(offset_of!(kvm_stats_header, desc_offset)),
            each.saturating_mul(count),
        )?;
        let mut values = Vec::with_capacity(count);
        for descriptor in table.chunks_exact(each) {
            let at = offset_of!(kvm_stats_desc, size);
            if u16::from_ne_bytes([descriptor[at], descriptor[at + 1]]) != 1 {
                // A histogram.
                continue;
            }
            let name = descriptor[size_of::<kvm_stats_desc>()..].split(|byte| *byte == 0);
            let name = String::from_utf8_lossy(name.into_iter().next().unwrap_or_default());
            let offset = number(&descriptor[offset_of!(kvm_stats_desc, offset)..]);
            let value = bytes(file, data.saturating_add(offset), size_of::<u64>())?;
            let value = u64::from_ne_bytes(value.try_into().expect("8 bytes were read"));
            values.push((name.into_owned(), value));
        }
        Ok(KvmStats { values })
    }
}

/// The u32 at the start of `bytes`.
fn number(bytes: &[u8]) -> usize {
    u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize
}

fn bytes(file: &File, at: usize, count: usize) -> Result<Vec<u8>, StatsError> {
    if count > MOST_BYTES {
        let text = format!("a description of {count} bytes");
        return Err(StatsError::Read(io::Error::other(text)));
    }
    let mut bytes = vec![0; count];
    file.read_exact_at(&mut bytes, at as u64)
        .map_err(StatsError::Read)?;
    Ok(bytes)
}

/// Why a VM's statistics are not known.
#[derive(Debug, Error)]
pub enum StatsError {
    /// A kernel before 5.14.
    #[error("this KVM has no KVM_GET_STATS_FD: Linux 5.14 and later has")]
    Missing,
    /// The descriptor was refused.
    #[error("KVM_GET_STATS_FD failed (EMFILE: too few file descriptors, raise `ulimit -n`)")]
    Call(#[source] io::Error),
    /// What it describes could not be read.
    #[error("reading the statistics of a VM failed")]
    Read(#[source] io::Error),
    /// Another kernel counts other things.
    #[error("this KVM does not count {name}")]
    Unknown {
        /// The statistic.
        name: &'static str,
    },
}
