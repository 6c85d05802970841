//! The calls on memory, and the start of a thread.
#![allow(unsafe_code)] // mmap, madvise and UFFDIO_COPY take addresses.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::slice;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Instant;

use forkvm_vmm::memory::{self, PAGE};
use userfaultfd::{RegisterMode, Uffd, UffdBuilder};

use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit, call};

const MIB: usize = 1 << 20;
/// A clone's RAM.
const RAM: usize = 512 * MIB;
/// What an image holds.
const POPULATED: usize = 64 * MIB;
/// What is protected and given back.
const PART: usize = MIB;
/// What a fault brings.
const CHUNK: usize = 64 << 10;
/// Of a hole, what a fault makes zeros of.
const ZEROED: usize = 2 * MIB;

/// Address space of this process; unmapped when it is dropped.
struct Mapping {
    address: *mut u8,
    len: usize,
}

impl Mapping {
    /// `len` bytes of `file`, or nothing accessible, somewhere or over `at`.
    fn new(len: usize, file: Option<&File>, flags: i32) -> io::Result<Mapping> {
        let address = map(ptr::null_mut(), len, file, flags)?;
        Ok(Mapping { address, len })
    }

    fn bytes(&mut self, range: std::ops::Range<usize>) -> &mut [u8] {
        assert!(range.end <= self.len);
        // SAFETY: within the mapping, which is this value's alone. Callers map it readable and writable.
        unsafe { slice::from_raw_parts_mut(self.address.add(range.start), range.len()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's alone.
        if unsafe { libc::munmap(self.address.cast(), self.len) } != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), "a mapping stays");
        }
    }
}

/// mmap(2) of the start of `file`, or of nothing that can be accessed.
fn map(at: *mut u8, len: usize, file: Option<&File>, flags: i32) -> io::Result<*mut u8> {
    let (protection, fd, more) = match file {
        Some(file) => (
            libc::PROT_READ | libc::PROT_WRITE,
            file.as_raw_fd(),
            libc::MAP_NORESERVE,
        ),
        None => (
            libc::PROT_NONE,
            -1,
            libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        ),
    };
    // SAFETY: without MAP_FIXED the kernel chooses a free place; with it the callers name a range of a
    // `Mapping` that they hold.
    let address = unsafe { libc::mmap(at.cast(), len, protection, flags | more, fd, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(address.cast())
}

/// A memfd as long as a clone's RAM, with the start of it populated.
fn image() -> Result<File, BenchError> {
    let file = memory::memfd(c"forkvm-bench", RAM as u64)?;
    let mut window =
        Mapping::new(POPULATED, Some(&file), libc::MAP_SHARED).map_err(call("mmap"))?;
    window.bytes(0..POPULATED).fill(0x5a);
    Ok(file)
}

/// A clone's mapping of its image, and pages that it gives back.
pub(super) struct Mappings {
    measured: u32,
    image: Option<File>,
}

impl Mappings {
    pub(super) fn new(measured: u32) -> Mappings {
        Mappings {
            measured,
            image: None,
        }
    }
}

impl Experiment for Mappings {
    fn name(&self) -> String {
        "mmap-fixed-private/512-MiB".into()
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 3,
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        self.image = Some(image()?);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let mut reserved = Mapping::new(RAM, None, libc::MAP_PRIVATE).map_err(call("mmap"))?;
        let start = Instant::now();
        let fixed = libc::MAP_PRIVATE | libc::MAP_FIXED;
        let mapped = map(reserved.address, RAM, self.image.as_ref(), fixed);
        let took = start.elapsed();
        mapped.map_err(call("mmap of a reserved range"))?;
        samples.time("mmap-fixed-private/512-MiB", Unit::Us, took);

        // Each page becomes this mapping's own.
        reserved
            .bytes(0..PART)
            .iter_mut()
            .step_by(PAGE as usize)
            .for_each(|byte| *byte = 1);
        let start = Instant::now();
        // SAFETY: the range is of `reserved`, and nothing borrows it.
        let done = unsafe { libc::madvise(reserved.address.cast(), PART, libc::MADV_DONTNEED) };
        let took = start.elapsed();
        if done != 0 {
            return Err(call("madvise")(io::Error::last_os_error()));
        }
        samples.time("madvise-dontneed/256-pages", Unit::Us, took);

        let start = Instant::now();
        drop(reserved);
        samples.time("munmap/512-MiB", Unit::Us, start.elapsed());
        Ok(())
    }
}

/// The calls on a userfaultfd.
pub(super) struct Watched {
    measured: u32,
    host: Option<(Uffd, File)>,
}

impl Watched {
    pub(super) fn new(measured: u32) -> Watched {
        Watched {
            measured,
            host: None,
        }
    }
}

fn refused(name: &'static str) -> impl Fn(userfaultfd::Error) -> BenchError {
    move |error| BenchError::Call {
        call: name,
        source: io::Error::other(error.to_string()),
    }
}

impl Experiment for Watched {
    fn name(&self) -> String {
        "uffd-copy/64-KiB".into()
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 3,
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        // What is measured is what lazy memory needs.
        forkvm_clone_engine::check_userfaultfd()?;
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .user_mode_only(false)
            .create()
            .map_err(refused("userfaultfd"))?;
        self.host = Some((uffd, image()?));
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let Some((uffd, file)) = &self.host else {
            return Ok(());
        };
        let clone = Mapping::new(RAM, Some(file), libc::MAP_PRIVATE).map_err(call("mmap"))?;
        let both = RegisterMode::MISSING | RegisterMode::WRITE_PROTECT;
        let start = Instant::now();
        let registered = uffd.register_with_mode(clone.address.cast(), RAM, both);
        let took = start.elapsed();
        registered.map_err(refused("UFFDIO_REGISTER"))?;
        samples.time("uffd-register/512-MiB", Unit::Us, took);
        // Behind what the image holds is a hole.
        let hole = clone.address.wrapping_add(POPULATED);
        let start = Instant::now();
        // SAFETY: the range is of `clone`, which nothing borrows.
        let zeroed = unsafe { uffd.zeropage(hole.cast(), ZEROED, false) };
        let took = start.elapsed();
        zeroed.map_err(refused("UFFDIO_ZEROPAGE"))?;
        samples.time("uffd-zeropage/2-MiB", Unit::Us, took);
        let start = Instant::now();
        let woken = uffd.wake(clone.address.cast(), CHUNK);
        let took = start.elapsed();
        woken.map_err(refused("UFFDIO_WAKE"))?;
        samples.time("uffd-wake/64-KiB", Unit::Us, took);
        let start = Instant::now();
        let unregistered = uffd.unregister(clone.address.cast(), RAM);
        let took = start.elapsed();
        unregistered.map_err(refused("UFFDIO_UNREGISTER"))?;
        samples.time("uffd-unregister/512-MiB", Unit::Us, took);
        drop(clone);

        // A window on an image of which nothing has come yet, as the engine has one.
        let start = Instant::now();
        let empty = memory::memfd(c"forkvm-bench", RAM as u64)?;
        samples.time("memfd-create-size-seal/512-MiB", Unit::Us, start.elapsed());
        let mut window = Mapping::new(RAM, Some(&empty), libc::MAP_SHARED).map_err(call("mmap"))?;
        uffd.register_with_mode(window.address.cast(), RAM, both)
            .map_err(refused("UFFDIO_REGISTER"))?;
        let from = vec![0x5au8; CHUNK];
        for chunk in 0..PART / CHUNK {
            let to = window.address.wrapping_add(chunk * CHUNK);
            let start = Instant::now();
            // SAFETY: `from` has the length; the destination is of `window`, which nothing borrows.
            let copied = unsafe { uffd.copy(from.as_ptr().cast(), to.cast(), CHUNK, false) };
            let took = start.elapsed();
            copied.map_err(refused("UFFDIO_COPY"))?;
            if chunk == PART / CHUNK / 2 {
                samples.time("uffd-copy/64-KiB", Unit::Us, took);
            }
        }
        // Mapped, as a parent's pages are that it has written.
        window
            .bytes(0..PART)
            .iter_mut()
            .step_by(PAGE as usize)
            .for_each(|byte| *byte = 1);
        let start = Instant::now();
        let protected = uffd.write_protect(window.address.cast(), PART);
        let took = start.elapsed();
        protected.map_err(refused("UFFDIO_WRITEPROTECT"))?;
        samples.time("uffd-write-protect/256-pages", Unit::Us, took);
        Ok(())
    }
}

/// From the call until the thread's first instruction.
pub(super) struct ThreadSpawn {
    measured: u32,
}

impl ThreadSpawn {
    pub(super) fn new(measured: u32) -> ThreadSpawn {
        ThreadSpawn { measured }
    }
}

impl Experiment for ThreadSpawn {
    fn name(&self) -> String {
        "thread-spawn".into()
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 3,
            measured: self.measured,
        }
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let (tell, told) = channel();
        let start = Instant::now();
        let thread = thread::Builder::new().spawn(move || tell.send(Instant::now()));
        let thread = thread.map_err(call("starting a thread"))?;
        let began = told
            .recv()
            .map_err(|error| call("a thread's start")(io::Error::other(error)))?;
        samples.time(
            "thread-spawn",
            Unit::Us,
            began.saturating_duration_since(start),
        );
        if !matches!(thread.join(), Ok(Ok(()))) {
            return Err(call("a thread's end")(io::Error::other("it panicked")));
        }
        Ok(())
    }
}
