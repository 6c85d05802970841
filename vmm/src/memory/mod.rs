//! Guest RAM: where it lies for the guest, and which file it is mapped from.
//!
//! RAM is one memfd (or image file) and a list of regions in it. This module is the one place where
//! mmap flags are chosen ([`Ram::map`], [`Ram::remap`]). It does not know who else maps the
//! file, nor why: that is the clone engine's business.
#![allow(unsafe_code)] // mmap over a live range, memfd_create, seals: calls into the kernel.

mod addresses;
mod own_pages;
mod populated;
mod residency;
mod source;

use std::ffi::CStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use forkvm_abi::{HIGH_RAM_START, LOW_RAM_END};
use forkvm_devices::GuestMemory;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use addresses::Addresses;
pub use populated::data_extents;
pub use residency::Residency;
pub use source::RamSource;

/// Bytes of a page, the unit in which RAM is populated, copied and freed.
pub const PAGE: u64 = 4096;

/// RAM that a guest cannot do without, in MiB.
pub const MIN_MIB: u64 = 16;

/// Most RAM of a machine, in MiB: 1 TiB.
pub const MAX_MIB: u64 = 1 << 20;

/// One contiguous piece of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRegion {
    /// Guest-physical address of its first byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Where it begins in the file that backs the machine's RAM.
    pub offset: u64,
    /// Size of the host pages behind it, in bytes.
    pub page_size: u64,
}

/// Where RAM lies: one region below 3 GiB and, for what did not fit, one from 4 GiB on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLayout {
    regions: Vec<RamRegion>,
}

impl MemoryLayout {
    /// The layout of a machine with `mib` MiB of RAM, [`MIN_MIB`] to [`MAX_MIB`].
    pub fn new(mib: u64) -> Result<MemoryLayout, MemoryError> {
        if !(MIN_MIB..=MAX_MIB).contains(&mib) {
            return Err(MemoryError::Size { mib });
        }
        let total = mib << 20;
        let low = total.min(LOW_RAM_END);
        let mut regions = vec![RamRegion {
            start: 0,
            len: low,
            offset: 0,
            page_size: PAGE,
        }];
        if total > low {
            let len = total - low;
            regions.push(RamRegion {
                start: HIGH_RAM_START,
                len,
                offset: low,
                page_size: PAGE,
            });
        }
        Ok(MemoryLayout { regions })
    }

    /// The regions, by rising address and rising file offset.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Bytes of RAM, which is also the length of the file behind it.
    pub fn len(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// Where the byte at a guest-physical address stands in the file; `None` where there is no RAM.
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        let region = self
            .regions
            .iter()
            .find(|region| (region.start..region.start + region.len).contains(&address))?;
        Some(region.offset + (address - region.start))
    }

    /// Whether there is no RAM at all; never so for a layout made by [`MemoryLayout::new`].
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }
}

/// How a machine's RAM hangs on what backs it.
#[derive(Clone, Debug)]
pub enum Backing {
    /// Nothing yet: addresses alone. An access is a crash.
    Reserved,
    /// Mapped shared: the machine's writes go to the file, which is its alone.
    Shared(Arc<File>),
    /// Mapped privately: the machine's writes are copied, the files below never change by them.
    Private(Arc<dyn Base>),
}

impl Backing {
    /// The machine's own file, if it maps one shared.
    pub fn shared(&self) -> Option<&Arc<File>> {
        match self {
            Backing::Shared(file) => Some(file),
            Backing::Reserved | Backing::Private(_) => None,
        }
    }

    /// The files behind it, as [`Base::pieces`].
    fn pieces(&self, len: u64) -> Vec<Piece> {
        match self {
            Backing::Reserved => Vec::new(),
            Backing::Shared(file) => whole(file.clone(), len),
            Backing::Private(base) => base.pieces(len),
        }
    }

    fn mmap_flags(&self) -> i32 {
        // Nothing is reserved: hundreds of clones map the same RAM and write little of it.
        libc::MAP_NORESERVE
            | match self {
                Backing::Shared(_) => libc::MAP_SHARED,
                Backing::Reserved | Backing::Private(_) => libc::MAP_PRIVATE,
            }
    }
}

/// What lies under a private mapping: one file, or several of which each holds a part.
pub trait Base: fmt::Debug + Send + Sync {
    /// Which file is mapped where: rising, without a gap, from 0 to `len`, which is the RAM's.
    fn pieces(&self, len: u64) -> Vec<Piece>;

    /// The pages below the mapping that are not zero, as ranges of file offsets, rising and apart;
    /// it may count pages that are. Those that are still to come count as well.
    fn populated(&self) -> Result<Vec<Range<u64>>, MemoryError>;
}

/// A part of RAM and the file that it is mapped from, at the same offset.
#[derive(Clone, Debug)]
pub struct Piece {
    /// File offsets, multiples of [`PAGE`].
    pub range: Range<u64>,
    /// The file, as long as the whole RAM.
    pub file: Arc<File>,
}

fn whole(file: Arc<File>, len: u64) -> Vec<Piece> {
    vec![Piece {
        range: 0..len,
        file,
    }]
}

/// A file that holds all of it.
impl Base for Arc<File> {
    fn pieces(&self, len: u64) -> Vec<Piece> {
        whole(self.clone(), len)
    }

    fn populated(&self) -> Result<Vec<Range<u64>>, MemoryError> {
        data_extents(self)
    }
}

/// The RAM of one machine, mapped into this process.
pub struct Ram {
    layout: MemoryLayout,
    guest: GuestMemory,
    backing: Backing,
    when_closed: Option<WhenClosed>,
    closed: bool,
    // After `guest`, which points there.
    addresses: Held,
}

/// Addresses of a [`Ram`], held. What is mapped there goes with the last holder.
#[derive(Clone, Debug)]
pub struct Held(Arc<Vec<Addresses>>);

type WhenClosed = Box<dyn FnOnce() + Send + Sync>;

impl fmt::Debug for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ram")
            .field("layout", &self.layout)
            .field("backing", &self.backing)
            .finish_non_exhaustive()
    }
}

impl Ram {
    /// Fresh, zeroed RAM in a memfd of its own, mapped shared.
    pub fn new(layout: MemoryLayout) -> Result<Ram, MemoryError> {
        let file = Arc::new(memfd(c"forkvm-ram", layout.len())?);
        Ram::map(layout, Backing::Shared(file))
    }

    /// Maps the files of `backing`, which must be as long as the layout says.
    pub fn map(layout: MemoryLayout, backing: Backing) -> Result<Ram, MemoryError> {
        let mut ram = Ram::reserve(layout)?;
        ram.remap(backing)?;
        Ok(ram)
    }

    /// Addresses for RAM, with nothing behind them until [`Ram::remap`]. KVM takes them for its memory
    /// slots all the same, so that a VM can be built before it is known what it will hold.
    pub fn reserve(layout: MemoryLayout) -> Result<Ram, MemoryError> {
        let mut regions = Vec::with_capacity(layout.regions().len());
        let mut addresses = Vec::with_capacity(layout.regions().len());
        for region in layout.regions() {
            let held = Addresses::take(region.len)?;
            // SAFETY: the range belongs to `held`, which lives as long as anybody may touch the
            // region; that nothing is mapped there yet is why `backing` says so.
            let mapping = unsafe {
                MmapRegion::build_raw(
                    held.start(),
                    region.len as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_NORESERVE,
                )
            };
            let mapping = mapping.map_err(|error| MemoryError::Regions {
                what: error.to_string(),
            })?;
            let mapped = GuestRegionMmap::new(mapping, GuestAddress(region.start)).ok_or(
                MemoryError::Wraps {
                    start: region.start,
                },
            )?;
            regions.push(mapped);
            addresses.push(held);
        }
        let guest = GuestMemory::from_regions(regions).map_err(|error| MemoryError::Regions {
            what: error.to_string(),
        })?;
        Ok(Ram {
            layout,
            guest,
            backing: Backing::Reserved,
            when_closed: None,
            closed: false,
            addresses: Held(Arc::new(addresses)),
        })
    }

    /// Keeps the addresses of this RAM from being dealt out to others, for whoever may still name them
    /// when the machine is gone.
    pub fn hold_addresses(&self) -> Held {
        self.addresses.clone()
    }

    /// Maps `pieces` to the ranges.
    fn map_pieces(&self, pieces: &[Piece], flags: i32) -> Result<(), MemoryError> {
        for ((region, address), held) in self.host_ranges().zip(self.addresses.0.iter()) {
            let onto = match held.is_mapped() {
                true => libc::MAP_FIXED,
                // Whatever is mapped there is somebody else's.
                false => libc::MAP_FIXED_NOREPLACE,
            };
            let end = region.offset + region.len;
            for piece in pieces {
                let part = piece.range.start.max(region.offset)..piece.range.end.min(end);
                if part.is_empty() {
                    continue;
                }
                let done = part.start - region.offset;
                let at = address.wrapping_add(done as usize);
                let mapped = map_over(at, &part, onto | flags, &piece.file);
                if mapped.is_err() && !held.is_mapped() && done > 0 {
                    held.unmap_first(done).map_err(MemoryError::Unmap)?;
                }
                match mapped {
                    Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                        held.note_taken();
                        return Err(MemoryError::Taken {
                            start: address as u64,
                            len: region.len,
                        });
                    }
                    Err(error) => return Err(map_error(part.end - part.start, &error)),
                    Ok(()) => {}
                }
            }
            held.note_mapped();
        }
        Ok(())
    }

    /// Where it lies.
    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// The mapping, as devices use it.
    pub fn guest(&self) -> &GuestMemory {
        &self.guest
    }

    /// How it hangs on its file.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Maps `backing` in place: KVM and devices keep their addresses. Its files
    /// must be as long as the layout says, and the machine paused or not yet running. What was written
    /// to a private mapping is gone afterwards.
    ///
    /// An error leaves some of it mapped in the new way and some in the old one; call it again
    /// with the former backing to go back. If that fails too, what the RAM holds is unknown.
    pub fn remap(&mut self, backing: Backing) -> Result<(), MemoryError> {
        let pieces = backing.pieces(self.layout.len());
        for piece in &pieces {
            let found = piece.file.metadata().map_err(MemoryError::Stat)?.len();
            if found != self.layout.len() {
                return Err(MemoryError::Length {
                    found,
                    needed: self.layout.len(),
                });
            }
        }
        self.map_pieces(&pieces, backing.mmap_flags())?;
        if let Backing::Private(_) = backing {
            for (region, address) in self.host_ranges() {
                no_huge_pages(address, region.len);
            }
        }
        self.backing = backing;
        Ok(())
    }

    /// Takes the content away and leaves the ranges inaccessible: the last act of a machine whose
    /// threads have ended, before anything that watches the ranges (a userfaultfd) goes. From then on
    /// a stray access is a crash rather than a page that comes to be in a file that others map. Once.
    pub(crate) fn close(&mut self) -> Result<(), MemoryError> {
        if std::mem::replace(&mut self.closed, true) {
            return Ok(());
        }
        let closed = self.make_inaccessible();
        if let Some(then) = self.when_closed.take() {
            then();
        }
        closed
    }

    /// Has `then` called once the ranges are inaccessible and before the machine's KVM objects go: to
    /// let out whoever still waits for a page. That may be KVM itself, in a thread of the kernel
    /// which the end of the VM waits for.
    pub fn when_closed(&mut self, then: impl FnOnce() + Send + Sync + 'static) {
        self.when_closed = Some(Box::new(then));
    }

    fn make_inaccessible(&self) -> Result<(), MemoryError> {
        for ((region, address), held) in self.host_ranges().zip(self.addresses.0.iter()) {
            if !held.is_mapped() {
                continue;
            }
            // SAFETY: the range is exactly what `self` has mapped there, so nothing else is replaced. No
            // thread of the machine is left that could touch it.
            let got = unsafe {
                libc::mmap(
                    address.cast(),
                    region.len as usize,
                    libc::PROT_NONE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                    -1,
                    0,
                )
            };
            if got == libc::MAP_FAILED {
                return Err(map_error(region.len, &io::Error::last_os_error()));
            }
        }
        Ok(())
    }

    /// Drops the content of `part`, file offsets within one region. What is read there next is what
    /// the backing has; of a shared one, which is the machine's alone, the pages go as well, and it
    /// is zero.
    pub fn drop_pages(&self, part: &Range<u64>) -> Result<(), MemoryError> {
        let advice = match self.backing {
            Backing::Shared(_) => libc::MADV_REMOVE,
            Backing::Reserved | Backing::Private(_) => libc::MADV_DONTNEED,
        };
        let address = self.host_address_of(part.start);
        // SAFETY: the range lies in a mapping that `self.guest` owns; all users reach it by volatile
        // access and expect its content to change.
        let dropped =
            unsafe { libc::madvise(address.cast(), (part.end - part.start) as usize, advice) };
        if dropped != 0 {
            return Err(MemoryError::Drop(io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Where the page at a file offset is mapped.
    fn host_address_of(&self, offset: u64) -> *mut u8 {
        self.host_ranges()
            .find(|(region, _)| (region.offset..region.offset + region.len).contains(&offset))
            .map(|(region, address)| address.wrapping_add((offset - region.offset) as usize))
            .expect("an offset within the RAM")
    }

    /// Host addresses of the regions, in the order of the layout.
    pub fn host_ranges(&self) -> impl Iterator<Item = (RamRegion, *mut u8)> + '_ {
        self.layout
            .regions
            .iter()
            .copied()
            .zip(self.guest.iter().map(host_address))
    }
}

fn host_address(region: &GuestRegionMmap<()>) -> *mut u8 {
    region
        .get_host_address(vm_memory::MemoryRegionAddress(0))
        .expect("a region is not empty")
}

/// Maps a part of `file` at `address`; `flags` say whether over what is there.
fn map_over(address: *mut u8, part: &Range<u64>, flags: i32, file: &File) -> io::Result<()> {
    let len = part.end - part.start;
    // SAFETY: what is replaced, if `flags` say so, is what the caller's `Ram` has mapped there; all users
    // reach it by volatile access and expect its content to change.
    let got = unsafe {
        libc::mmap(
            address.cast(),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            file.as_raw_fd(),
            part.start as libc::off_t,
        )
    };
    if got == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn map_error(len: u64, error: &io::Error) -> MemoryError {
    let what = error.to_string();
    MemoryError::Map { len, what }
}

/// Keeps khugepaged away from a file that is still filling: it would make huge pages of it, and holes
/// between its pages would be zero pages from then on.
fn no_huge_pages(address: *mut u8, len: u64) {
    // SAFETY: the advice changes no content, and concerns a mapping of the caller's.
    let refused =
        unsafe { libc::madvise(address.cast(), len as usize, libc::MADV_NOHUGEPAGE) } != 0;
    if refused {
        // A kernel without huge pages.
        let error = io::Error::last_os_error();
        tracing::trace!(%error, "no advice on huge pages");
    }
}

/// A shared mapping of a whole memfd that no access goes through (PROT_NONE): a place for the kernel
/// to put pages into the file (UFFDIO_COPY).
#[derive(Debug)]
pub struct Window {
    address: *mut u8,
    len: usize,
}

// SAFETY: the value is an address range; it hands out no reference to what lies there.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// Of `file`, which has `len` bytes.
    pub fn new(file: &File, len: u64) -> Result<Window, MemoryError> {
        // SAFETY: a fresh range is chosen by the kernel.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_NONE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(map_error(len, &io::Error::last_os_error()));
        }
        no_huge_pages(address.cast(), len);
        Ok(Window {
            address: address.cast(),
            len: len as usize,
        })
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address as u64
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the range is the one that `new` mapped, and nobody has a reference into it.
        if unsafe { libc::munmap(self.address.cast(), self.len) } != 0 {
            let error = io::Error::last_os_error();
            tracing::error!(%error, "a window on a memory image could not be unmapped");
        }
    }
}

/// A memfd of `len` zero bytes that can neither shrink nor grow: a mapping of it never faults for
/// want of a file behind it.
pub fn memfd(name: &CStr, len: u64) -> Result<File, MemoryError> {
    // SAFETY: `name` is a C string; the call has no other precondition.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(MemoryError::Memfd(io::Error::last_os_error()));
    }
    // SAFETY: `fd` is a fresh descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).map_err(MemoryError::Memfd)?;
    seal(&file, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)?;
    Ok(file)
}

/// Attempts at a seal that is refused at once, because the file is mapped.
const SEAL_ATTEMPTS: u32 = 8;

/// Between two of them: whoever is just unmapping it may wait for a core.
const SEAL_PAUSE: Duration = Duration::from_millis(1);

/// A refusal that comes later than this is one for pages that somebody holds on to.
const AT_ONCE: Duration = Duration::from_millis(10);

/// How long pages may be held on to. The kernel's compaction of memory has some of them at any time while it
/// runs.
const SEAL_PATIENCE: Duration = Duration::from_secs(5);

/// Adds seals (`F_SEAL_*`, fcntl(2)) to a memfd.
///
/// F_SEAL_WRITE is refused (EBUSY) while the file is mapped shared and writable, and also while
/// somebody holds on to one of its pages for a moment, which the kernel itself does; it waits some
/// 0.1 s for such pages and is then asked again.
pub fn seal(file: &File, seals: libc::c_int) -> Result<(), MemoryError> {
    let (began, mut attempts) = (Instant::now(), 0);
    loop {
        let asked = Instant::now();
        // SAFETY: the descriptor is open; the call touches no memory.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        attempts += 1;
        let at_once = asked.elapsed() < AT_ONCE;
        let given_up = match at_once {
            true => attempts >= SEAL_ATTEMPTS,
            false => began.elapsed() >= SEAL_PATIENCE,
        };
        if error.kind() != io::ErrorKind::ResourceBusy || given_up {
            return Err(MemoryError::Seal(error));
        }
        tracing::debug!(attempts, "a seal is refused for now");
        if at_once {
            thread::sleep(SEAL_PAUSE);
        }
    }
}

/// Why RAM could not be had.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A size out of range.
    #[error("{mib} MiB of RAM: a machine has {MIN_MIB} to {MAX_MIB} MiB")]
    Size {
        /// What was asked.
        mib: u64,
    },
    /// memfd_create or its sizing failed.
    #[error("creating a memfd for guest RAM failed")]
    Memfd(#[source] io::Error),
    /// A seal was refused.
    #[error("sealing a memfd failed (EBUSY: something still maps it writable)")]
    Seal(#[source] io::Error),
    /// The file could not be asked for its length.
    #[error("asking a memory file for its length failed")]
    Stat(#[source] io::Error),
    /// The file is not as long as the RAM.
    #[error("the memory file has {found} bytes, the machine's RAM {needed}")]
    Length {
        /// Bytes of the file.
        found: u64,
        /// Bytes of RAM.
        needed: u64,
    },
    /// mmap failed.
    #[error(
        "mapping {len} bytes of guest RAM failed: {what}; see `ulimit -v` and vm.max_map_count"
    )]
    Map {
        /// Bytes asked for.
        len: u64,
        /// What mmap said.
        what: String,
    },
    /// Somebody else has mapped something where the RAM was to lie. Another range will be taken next.
    #[error(
        "another part of this process has mapped memory between {start:#x} and {len} bytes behind it, where \
         guest RAM was to lie; it was left alone: try again"
    )]
    Taken {
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// munmap failed.
    #[error("unmapping a part of guest RAM failed")]
    Unmap(#[source] io::Error),
    /// No addresses of this process are left.
    #[error("this process has no {len} bytes of addresses left for guest RAM: end other VMs first")]
    Addresses {
        /// Bytes asked for.
        len: u64,
    },
    /// A region at the end of the address space.
    #[error("the RAM region at {start:#x} wraps around")]
    Wraps {
        /// Its first address.
        start: u64,
    },
    /// The regions do not form a guest's memory.
    #[error("the RAM regions do not fit together: {what}")]
    Regions {
        /// What vm-memory said.
        what: String,
    },
    /// The populated pages could not be found.
    #[error("finding the populated pages of guest RAM failed: {what}")]
    Populated {
        /// Which call.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// Pages could not be given back.
    #[error("dropping pages of guest RAM failed")]
    Drop(#[source] io::Error),
    /// A copy failed.
    #[error("copying guest RAM failed")]
    Copy(#[source] io::Error),
}

#[cfg(test)]
mod tests;
