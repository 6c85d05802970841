//! Boot of an ELF payload or a Linux bzImage by the 64-bit Linux boot protocol.
//!
//! The payload is loaded by linux-loader; this module adds what the protocol asks for around it
//! (Documentation/arch/x86/boot.rst, "64-bit boot protocol"): the zero page with memory map and
//! command line, an identity map of the first GiB, flat segments, and the first vCPU in long mode
//! at the entry with RSI at the zero page. A PVH note in an ELF file is for other VMMs. A kernel finds
//! its CPUs and interrupt lines in an MP table and its virtio devices on the command line; there is no
//! ACPI.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek};
use std::path::{Path, PathBuf};

use forkvm_abi::slot;
use forkvm_devices::GuestMemory;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{self, KernelLoader, KernelLoaderResult};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use crate::memory::MemoryLayout;
use crate::software_kvm;
use crate::vcpu::{StateError, reading, writing};

mod mp_table;
#[cfg(test)]
mod tests;

// Low memory, as the boot protocol leaves it to the loader.
const GDT: u64 = 0x500;
const IDT: u64 = 0x520;
const ZERO_PAGE: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORY: u64 = 0xb000;
const CMDLINE: u64 = 0x2_0000;
/// Longest command line, its NUL included.
const CMDLINE_MAX: usize = 4096;
/// End of conventional memory; above it are firmware tables on a PC.
const CONVENTIONAL_END: u64 = mp_table::ADDRESS;
/// Payloads are loaded from here on.
const HIGH_MEMORY: u64 = 0x10_0000;
/// The 64-bit entry of a bzImage, from where its protected-mode part is loaded.
const BZIMAGE_ENTRY64: u64 = 0x200;

// Of an ELF header (elf(5)): where its magic number, class and machine end, and what they are of an x86-64 executable.
const ELF_MAGIC: &[u8] = b"\x7fELF";
const ELF_MACHINE_END: usize = 20;
const ELFCLASS64: u8 = 2;
const EM_X86_64: u16 = 62;

/// What a machine boots.
#[derive(Clone, Debug)]
pub enum Payload {
    /// An ELF executable in memory, such as the embedded guest.
    Bytes(&'static [u8]),
    /// An ELF executable or a bzImage, with an initial RAM disk for Linux.
    Kernel {
        /// vmlinux or bzImage.
        kernel: PathBuf,
        /// initramfs or initrd.
        initrd: Option<PathBuf>,
    },
}

/// Where the first vCPU enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry(u64);

/// The machine that a payload is to find.
pub(crate) struct Surroundings<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) layout: &'a MemoryLayout,
    pub(crate) vcpus: u32,
    /// Slots with a virtio device.
    pub(crate) slots: &'a [u32],
    /// KVM lacks a part of ring 0.
    pub(crate) software_kvm: bool,
}

/// Loads `payload` and everything around it.
pub(crate) fn load(
    around: &Surroundings<'_>,
    payload: &Payload,
    cmdline: &str,
) -> Result<Entry, BootError> {
    let Surroundings { memory, layout, .. } = *around;
    let (loaded, initrd, name) = match payload {
        Payload::Bytes(bytes) => {
            let name = PathBuf::from("(embedded guest)");
            (
                load_image(memory, &mut Cursor::new(*bytes), &name)?,
                None,
                name,
            )
        }
        Payload::Kernel { kernel, initrd } => {
            let loaded = load_image(memory, &mut open(kernel)?, kernel)?;
            (loaded, initrd.as_deref(), kernel.clone())
        }
    };
    let mut params = boot_params {
        hdr: loaded.setup_header.unwrap_or_default(),
        ..Default::default()
    };
    let header = &mut params.hdr;
    header.type_of_loader = 0xff; // "undefined": no registered loader id
    header.boot_flag = 0xaa55;
    header.header = 0x5372_6448; // "HdrS"
    header.kernel_alignment = header.kernel_alignment.max(0x0100_0000);
    if let Some(initrd) = initrd {
        load_initrd(memory, layout, initrd, loaded.kernel_end, header)?;
    }
    let mut cmdline = cmdline.to_owned();
    if let Payload::Kernel { .. } = payload {
        mp_table::write(memory, around.vcpus)?;
        // What stands behind a lone `--` is for init.
        let end = cmdline.find(" -- ").unwrap_or(cmdline.len());
        cmdline.insert_str(end, &kernel_options(around));
    }
    load_cmdline(memory, &cmdline, header)?;
    e820(around, &mut params);
    write_tables(memory)?;
    let params = BootParams::new(&params, GuestAddress(ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, memory).map_err(|error| BootError::Write {
        what: "zero page",
        why: error.to_string(),
    })?;
    let bzimage = loaded.setup_header.is_some();
    let start = loaded.kernel_load.0;
    tracing::debug!(payload = %name.display(), bzimage, start = format_args!("{start:#x}"), "loaded");
    Ok(Entry(if bzimage {
        start + BZIMAGE_ENTRY64
    } else {
        start
    }))
}

fn open(path: &Path) -> Result<File, BootError> {
    File::open(path).map_err(|source| BootError::Open {
        path: path.to_owned(),
        source,
    })
}

fn load_image<F: Read + ReadVolatile + Seek>(
    memory: &GuestMemory,
    image: &mut F,
    path: &Path,
) -> Result<KernelLoaderResult, BootError> {
    let refused = |error: loader::Error| BootError::Payload {
        path: path.to_owned(),
        why: error.to_string(),
    };
    let read = |source| BootError::Open {
        path: path.to_owned(),
        source,
    };
    let mut start = Vec::new();
    image.rewind().map_err(read)?;
    let mut first = image.by_ref().take(ELF_MACHINE_END as u64);
    first.read_to_end(&mut start).map_err(read)?;
    let high = Some(GuestAddress(HIGH_MEMORY));
    if !start.starts_with(ELF_MAGIC) {
        return loader::bzimage::BzImage::load(memory, None, image, high).map_err(refused);
    }
    // Which linux-loader does not ask.
    check_architecture(&start).map_err(|why| BootError::Payload {
        path: path.to_owned(),
        why,
    })?;
    loader::elf::Elf::load(memory, None, image, high).map_err(refused)
}

/// Whether an ELF file that begins like this is for x86-64; why not.
fn check_architecture(start: &[u8]) -> Result<(), String> {
    let Some(machine) = start.get(ELF_MACHINE_END - 2..ELF_MACHINE_END) else {
        return Err("its ELF header is cut off".into());
    };
    let machine = u16::from_le_bytes([machine[0], machine[1]]);
    match (start[ELF_MAGIC.len()], machine) {
        (ELFCLASS64, EM_X86_64) => Ok(()),
        (ELFCLASS64, machine) => Err(format!("it is for another machine (e_machine {machine})")),
        (class, _) => Err(format!("it is no ELF file of 64 bits (class {class})")),
    }
}

fn load_initrd(
    memory: &GuestMemory,
    layout: &MemoryLayout,
    path: &Path,
    kernel_end: u64,
    header: &mut setup_header,
) -> Result<(), BootError> {
    let mut file = open(path)?;
    let len = file
        .metadata()
        .map_err(|source| BootError::Open {
            path: path.to_owned(),
            source,
        })?
        .len();
    // At the end of low RAM, where the kernel does not unpack itself over it, page-aligned.
    let low_end = layout.regions()[0].len;
    let limit = match header.initrd_addr_max {
        0 => low_end,
        max => low_end.min(u64::from(max) + 1),
    };
    // Low memory is the boot protocol's.
    let first = kernel_end.max(HIGH_MEMORY);
    let start = limit
        .checked_sub(len)
        .map(|start| start & !0xfff)
        .filter(|&at| at >= first);
    let Some(start) = start else {
        return Err(BootError::InitrdSize {
            path: path.to_owned(),
            len,
            room: limit.saturating_sub(first),
        });
    };
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, len as usize)
        .map_err(|error| BootError::Write {
            what: "initrd",
            why: error.to_string(),
        })?;
    header.ramdisk_image = start as u32;
    header.ramdisk_size = len as u32;
    Ok(())
}

fn load_cmdline(
    memory: &GuestMemory,
    text: &str,
    header: &mut setup_header,
) -> Result<(), BootError> {
    let refused = |why: String| BootError::Cmdline { why };
    let mut cmdline = Cmdline::new(CMDLINE_MAX).map_err(|error| refused(error.to_string()))?;
    if !text.is_empty() {
        cmdline
            .insert_str(text)
            .map_err(|error| refused(error.to_string()))?;
    }
    loader::load_cmdline(memory, GuestAddress(CMDLINE), &cmdline)
        .map_err(|error| refused(error.to_string()))?;
    header.cmd_line_ptr = CMDLINE as u32;
    header.cmdline_size = text.len() as u32 + 1;
    Ok(())
}

/// What a kernel cannot find out by itself, to be added to its command line.
fn kernel_options(around: &Surroundings<'_>) -> String {
    let mut options = String::new();
    for &index in around.slots {
        let (size, base, gsi) = (slot::MMIO_STRIDE, slot::base(index), slot::gsi(index));
        options += &format!(" virtio_mmio.device={size}@{base:#x}:{gsi}");
    }
    if around.software_kvm {
        options += software_kvm::KERNEL_OPTIONS;
    }
    options
}

/// The memory map: conventional memory, then everything from 1 MiB on. What is left out is reserved.
fn e820(around: &Surroundings<'_>, params: &mut boot_params) {
    const RAM: u32 = 1;
    let low_end = match around.software_kvm {
        true => software_kvm::RESERVED.start,
        false => CONVENTIONAL_END,
    };
    let low = (0, low_end);
    let rest = around.layout.regions().iter().map(|region| {
        let start = region.start.max(HIGH_MEMORY);
        (start, region.start + region.len - start)
    });
    let mut count = 0;
    for ((addr, size), entry) in std::iter::once(low).chain(rest).zip(&mut params.e820_table) {
        *entry = boot_e820_entry {
            addr,
            size,
            r#type: RAM,
        };
        count += 1;
    }
    params.e820_entries = count;
}

/// Puts a vCPU into long mode at the entry.
pub(crate) fn enter(vcpu: &VcpuFd, entry: Entry) -> Result<(), StateError> {
    let mut sregs = vcpu.get_sregs().map_err(reading("SREGS"))?;
    let code = segment(2, 0xb, |segment| segment.l = 1);
    let data = segment(3, 0x3, |segment| segment.db = 1);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0xffff,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.gdt = kvm_dtable {
        base: GDT,
        limit: 8 * 4 - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable {
        base: IDT,
        limit: 7,
        ..Default::default()
    };
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 = (sregs.cr0 & !CR0_CACHES_OFF) | CR0_PE | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(writing("SREGS"))?;
    let regs = kvm_regs {
        rip: entry.0,
        rsp: STACK,
        rbp: STACK,
        rsi: ZERO_PAGE,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(writing("REGS"))
}

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
/// CD and NW, which a CPU comes out of reset with.
const CR0_CACHES_OFF: u64 = 1 << 30 | 1 << 29;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// A flat 4 GiB segment of ring 0 at GDT entry `index`.
fn segment(index: u16, type_: u8, adjust: impl FnOnce(&mut kvm_segment)) -> kvm_segment {
    let mut segment = kvm_segment {
        limit: 0xffff_ffff,
        selector: index * 8,
        type_,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    adjust(&mut segment);
    segment
}

/// Writes the tables that [`enter`] points to: descriptors that match its segments, and an identity
/// map of the first GiB in 2 MiB pages.
fn write_tables(memory: &GuestMemory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const CODE64: u64 = 0x00af_9b00_0000_ffff;
    const DATA: u64 = 0x00cf_9300_0000_ffff;
    let write = |value: u64, at: u64| {
        memory
            .write_obj(value, GuestAddress(at))
            .map_err(|error| BootError::Write {
                what: "boot tables",
                why: error.to_string(),
            })
    };
    for (index, descriptor) in [0, 0, CODE64, DATA].into_iter().enumerate() {
        write(descriptor, GDT + 8 * index as u64)?;
    }
    write(0, IDT)?;
    write(PDPT | PRESENT_WRITABLE, PML4)?;
    write(PAGE_DIRECTORY | PRESENT_WRITABLE, PDPT)?;
    (0..512u64).try_for_each(|index| {
        write(
            index << 21 | LARGE | PRESENT_WRITABLE,
            PAGE_DIRECTORY + 8 * index,
        )
    })
}

/// Why a payload cannot be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("reading {} failed", .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Neither an ELF executable nor a bzImage, or one that does not fit.
    #[error(
        "{} cannot be booted: {why}; it must be an x86-64 ELF executable or a bzImage that fits \
         into the machine's RAM", .path.display()
    )]
    Payload {
        /// The file.
        path: PathBuf,
        /// What it is instead, or what linux-loader said.
        why: String,
    },
    /// The initrd does not fit.
    #[error(
        "the initrd {} has {len} bytes and {room} are left for it: give the machine more memory",
        .path.display()
    )]
    InitrdSize {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        len: u64,
        /// Bytes between kernel and end of low RAM.
        room: u64,
    },
    /// The command line cannot be used.
    #[error("the kernel command line cannot be used (at most {CMDLINE_MAX} bytes of ASCII): {why}")]
    Cmdline {
        /// What is wrong.
        why: String,
    },
    /// Guest memory could not be written.
    #[error("writing the {what} to guest memory failed: {why}")]
    Write {
        /// What was written.
        what: &'static str,
        /// What vm-memory said.
        why: String,
    },
}
