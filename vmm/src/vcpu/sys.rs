//! KVM calls of a vCPU that kvm-ioctls has no safe wrapper for.
#![allow(unsafe_code)] // ioctl(2) with structures of the kernel's size.

use std::io;
use std::mem::size_of;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Xsave, kvm_device_attr, kvm_sregs2, kvm_xsave,
    kvm_xsave2,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::fam::FamStruct;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

const KVMIO: u32 = 0xae;
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// KVM_GET_SREGS2 (KVM API 4.131).
pub(super) fn get_sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel fills exactly one kvm_sregs2.
    check(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// KVM_SET_SREGS2 (KVM API 4.132).
pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the kernel reads exactly one kvm_sregs2.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}

/// An empty XSAVE area as large as KVM_CAP_XSAVE2 says (`size` bytes, at least 4096).
pub(super) fn xsave_area(size: usize) -> io::Result<Xsave> {
    let extra = size.saturating_sub(size_of::<kvm_xsave>());
    let entries = extra.div_ceil(size_of::<<kvm_xsave2 as FamStruct>::Entry>());
    Xsave::new(entries).map_err(|error| io::Error::other(format!("{error:?}")))
}

/// KVM_GET_XSAVE2 (KVM API 4.134), or KVM_GET_XSAVE where the area is of the old size.
pub(crate) fn get_xsave(vcpu: &VcpuFd, size: usize) -> io::Result<Vec<u8>> {
    if size <= size_of::<kvm_xsave>() {
        let area = vcpu.get_xsave()?;
        return Ok(area
            .region
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect());
    }
    let mut area = xsave_area(size)?;
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 of this VM reports.
    unsafe { vcpu.get_xsave2(&mut area) }?;
    let mut bytes: Vec<u8> = area
        .as_fam_struct_ref()
        .xsave
        .region
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    bytes.extend(area.as_slice().iter().flat_map(|word| word.to_ne_bytes()));
    Ok(bytes)
}

/// KVM_SET_XSAVE. `bytes` may be shorter than the area; the rest is zero, which the area's header
/// marks as initial state. Longer is `InvalidInput`.
pub(crate) fn set_xsave(vcpu: &VcpuFd, size: usize, bytes: &[u8]) -> io::Result<()> {
    let mut area = xsave_area(size)?;
    let room = size_of::<kvm_xsave>() + size_of_val(area.as_slice());
    if bytes.len() > room {
        let text = format!(
            "{} bytes of XSAVE state, this host has room for {room}",
            bytes.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut words = bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_ne_bytes(word)
    });
    // SAFETY: only words of the area are written; its length field is left alone.
    let region = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    for (to, word) in region.iter_mut().zip(words.by_ref()) {
        *to = word;
    }
    for (to, word) in area.as_mut_slice().iter_mut().zip(words) {
        *to = word;
    }
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 of this VM reports.
    unsafe { vcpu.set_xsave2(&area) }?;
    Ok(())
}

fn tsc_offset_attr(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
        flags: 0,
    }
}

/// The offset of the guest's TSC from the host's (KVM API, vcpu device attribute KVM_VCPU_TSC_CTRL);
/// `None` where this KVM does not have the attribute.
pub(super) fn get_tsc_offset(vcpu: &VcpuFd) -> io::Result<Option<u64>> {
    let mut value = 0;
    let mut attr = tsc_offset_attr(&mut value);
    // SAFETY: `attr.addr` points to a u64, which is what this attribute is.
    match check(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_DEVICE_ATTR(), &mut attr) }) {
        Ok(()) => Ok(Some(value)),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENXIO | libc::EINVAL | libc::ENOTTY)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Sets what [`get_tsc_offset`] read.
pub(super) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> io::Result<()> {
    let attr = tsc_offset_attr(&mut offset);
    // SAFETY: `attr.addr` points to a u64, which is what this attribute is.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) })
}
