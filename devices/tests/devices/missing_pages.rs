//! Devices on guest memory that comes page by page: an access waits for its page, and where that
//! can never come, nothing that was read instead of it leaves the machine.
#![allow(unsafe_code)] // userfaultfd on a page of the test's own guest memory.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use forkvm_devices::virtio::{Rng, VirtioDevice};
use forkvm_devices::{Brake, Device, GuestMemory};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::driver::{AVAIL, DATA, DESC, Descriptor, Driver, USED, VERSION_1};
use crate::driver::{readable, reg, status, writable};
use crate::virtio_blk::{
    BUFFER, DISCARD, FLUSH, HEADER, IN, OUT, STATUS, WRITE_ZEROES, driver, writable_disk,
};
use crate::virtio_vsock::Host;
use crate::vsock_guest::{self, RECEIVE_AT, TRANSMIT_AT, op};

const PAGE: u64 = 4096;

/// What becomes of a page that a device waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It comes, late.
    Comes,
    /// It never comes: its machine is condemned, and then the page reads as zero.
    Never,
}

/// Takes the page at `page` out of the driver's memory until somebody touches it; then `fate`
/// befalls it. The thread ends with a panic when nobody does within ten seconds.
fn take_away<D: VirtioDevice>(driver: &Driver<D>, page: u64, fate: Fate) -> JoinHandle<()> {
    take_away_of(&driver.memory, &driver.brake, page, fate)
}

/// The same, of a machine without that driver.
fn take_away_of(memory: &GuestMemory, brake: &Brake, page: u64, fate: Fate) -> JoinHandle<()> {
    let mut content = vec![0; PAGE as usize];
    if fate == Fate::Comes {
        memory.read_slice(&mut content, GuestAddress(page)).unwrap();
    }
    let (faults, host) = without_page(memory, page);
    let brake = brake.clone();
    thread::spawn(move || {
        faults.wait();
        if fate == Fate::Never {
            brake.condemn();
        }
        faults.answer(host, &content);
    })
}

/// Takes the page at `page` away, and says who hears of it and where it was.
fn without_page(memory: &GuestMemory, page: u64) -> (Userfault, u64) {
    let host = memory.get_host_address(GuestAddress(page)).unwrap() as u64;
    // SAFETY: the page is the guest's, and read by volatile accesses only.
    let done = unsafe { libc::madvise(host as *mut _, PAGE as usize, libc::MADV_DONTNEED) };
    assert_eq!(done, 0);
    (Userfault::on(host), host)
}

/// A userfaultfd(2) for one page, of faults in user mode: such a one needs no privilege.
struct Userfault(OwnedFd);

impl Userfault {
    fn on(host: u64) -> Userfault {
        const USER_MODE_ONLY: libc::c_int = 1;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        assert!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
        // SAFETY: a fresh descriptor that nobody else owns.
        let faults = Userfault(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        faults.call(0xc018_aa3f, &mut [0xaa, 0, 0]); // UFFDIO_API
        faults.call(0xc020_aa00, &mut [host, PAGE, 1, 0]); // UFFDIO_REGISTER, for missing pages
        faults
    }

    fn call(&self, request: libc::c_ulong, argument: &mut [u64]) {
        // SAFETY: the arguments are as long as the request says in its bits 16 to 29.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument.as_mut_ptr()) };
        assert_eq!(done, 0, "{request:#x}: {}", io::Error::last_os_error());
    }

    fn wait(&self) {
        let mut ready = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, which outlives the call.
        let count = unsafe { libc::poll(&mut ready, 1, 10_000) };
        assert_eq!(count, 1, "the device never touched the page");
        let mut message = [0u8; 32];
        // SAFETY: as many bytes as the buffer has.
        let len = unsafe { libc::read(ready.fd, message.as_mut_ptr().cast(), message.len()) };
        assert_eq!(len, 32, "{}", io::Error::last_os_error());
    }

    /// UFFDIO_COPY, which also wakes who waits.
    fn answer(&self, host: u64, content: &[u8]) {
        let from = content.as_ptr() as u64;
        self.call(0xc028_aa03, &mut [host, from, PAGE, 0, 0]);
    }
}

/// Has a request served while the page at `page` is away, and returns whether it came back.
fn request_without<D: VirtioDevice>(
    driver: &mut Driver<D>,
    page: u64,
    fate: Fate,
    request: &[Descriptor],
) -> bool {
    driver.offer_chain(request);
    let page_comes = take_away(driver, page, fate);
    let (used, edges) = (driver.used(), driver.line.edges());
    driver.notify();
    page_comes.join().unwrap();
    let came_back = driver.used() != used;
    assert_eq!(
        driver.line.edges() != edges,
        came_back,
        "an interrupt for what came back, and for nothing else"
    );
    assert_eq!(driver.get(reg::STATUS) & status::NEEDS_RESET, 0);
    came_back
}

/// Of the first sectors of the disk: the first byte of each.
fn first_bytes(driver: &Driver<forkvm_devices::virtio::Blk>, sectors: usize) -> Vec<u8> {
    let mut data = vec![0; sectors * 512];
    driver.device.model().layer().read_at(0, &mut data).unwrap();
    data.into_iter().step_by(512).collect()
}

/// A disk whose first 16 sectors are full of sevens.
fn disk_of_sevens() -> Driver<forkvm_devices::virtio::Blk> {
    let disk = writable_disk();
    disk.write_at(0, &[7; 16 * 512]).unwrap();
    driver(disk)
}

#[test]
fn a_payload_that_can_never_come_leaves_the_disk_as_it_is() {
    for (fate, on_disk) in [(Fate::Comes, 9), (Fate::Never, 7)] {
        let mut driver = disk_of_sevens();
        driver.put_header(OUT, 0);
        driver.put(BUFFER, &[9; 0x2000]);
        // The first page of the payload is there, the second is not.
        let request = [
            readable(HEADER, 16),
            readable(BUFFER, 0x2000),
            writable(STATUS, 1),
        ];
        let came_back = request_without(&mut driver, BUFFER + PAGE, fate, &request);
        assert_eq!(came_back, fate == Fate::Comes);
        assert_eq!(first_bytes(&driver, 16), [on_disk; 16], "{fate:?}");
    }
}

#[test]
fn what_was_written_before_the_page_that_never_comes_is_the_guests_own() {
    // Longer than the buffer between guest and disk, so that a part is written before.
    let mut driver = driver(writable_disk());
    driver.put_header(OUT, 0);
    driver.put(BUFFER, &[9; 0x4_0000]);
    let request = [
        readable(HEADER, 16),
        readable(BUFFER, 0x4_0000),
        writable(STATUS, 1),
    ];
    let missing = BUFFER + 0x3_f000;
    assert!(!request_without(
        &mut driver,
        missing,
        Fate::Never,
        &request
    ));
    let on_disk = first_bytes(&driver, 512);
    assert_eq!(on_disk[..256], [9; 256]);
    assert_eq!(on_disk[256..], [0; 256]);
}

#[test]
fn a_read_into_a_page_that_can_never_come_ends_there() {
    let mut driver = disk_of_sevens();
    driver.put_header(IN, 0);
    driver.put(BUFFER, &[9; 0x4_0000]);
    let request = [
        readable(HEADER, 16),
        writable(BUFFER, 0x4_0000),
        writable(STATUS, 1),
    ];
    assert!(!request_without(&mut driver, BUFFER, Fate::Never, &request));
    let second_half = driver.bytes(BUFFER + 0x2_0000, 0x2_0000);
    assert!(second_half.iter().all(|&byte| byte == 9));
}

#[test]
fn ranges_that_can_never_come_discard_and_zero_nothing() {
    for kind in [DISCARD, WRITE_ZEROES] {
        for (fate, on_disk) in [(Fate::Comes, 0), (Fate::Never, 7)] {
            let mut driver = disk_of_sevens();
            driver.put_header(kind, 0);
            // Two ranges of 8 sectors: the first on a page that is there, the second is not.
            let first = BUFFER + PAGE - 16;
            for (at, sector) in [(first, 0u64), (first + 16, 8)] {
                driver.put(at, &sector.to_le_bytes());
                driver.put(at + 8, &8u32.to_le_bytes());
                driver.put(at + 12, &[0; 4]);
            }
            let request = [
                readable(HEADER, 16),
                readable(first, 32),
                writable(STATUS, 1),
            ];
            let came_back = request_without(&mut driver, BUFFER + PAGE, fate, &request);
            assert_eq!(came_back, fate == Fate::Comes);
            assert_eq!(first_bytes(&driver, 16), [on_disk; 16], "{kind} {fate:?}");
        }
    }
}

#[test]
fn a_header_that_can_never_come_is_no_request() {
    for kind in [OUT, FLUSH] {
        let mut driver = disk_of_sevens();
        driver.put_header(kind, 3);
        let request = [
            readable(HEADER, 16),
            readable(BUFFER, 512),
            writable(STATUS, 1),
        ];
        // As zeros it would be a read of sector 0, refused for its shape: with an answer.
        assert!(!request_without(&mut driver, HEADER, Fate::Never, &request));
        assert_eq!(driver.device.model().counters(), Default::default());
        assert_eq!(first_bytes(&driver, 16), [7; 16]);
    }
}

#[test]
fn a_queue_that_can_never_come_is_neither_followed_nor_broken() {
    for page in [DESC, AVAIL, USED] {
        let mut driver = disk_of_sevens();
        // With one request done, an avail index of zero would be one of a broken queue.
        driver.put(BUFFER, &[7; 512]);
        assert_eq!(driver.blk(OUT, 0, &[readable(BUFFER, 512)]), 0);
        driver.put_header(OUT, 1);
        driver.put(BUFFER, &[9; 512]);
        let request = [
            readable(HEADER, 16),
            readable(BUFFER, 512),
            writable(STATUS, 1),
        ];
        driver.offer_chain(&request);
        let page_comes = take_away(&driver, page, Fate::Never);
        let edges = driver.line.edges();
        driver.notify();
        page_comes.join().unwrap();
        assert_eq!(driver.line.edges(), edges, "{page:#x}");
        assert_eq!(
            driver.get(reg::STATUS) & status::NEEDS_RESET,
            0,
            "{page:#x}"
        );
        let counters = driver.device.model().counters();
        assert_eq!(counters.failed_requests, 0, "{page:#x}: none was begun");
        // The used ring is only written, after a request that the guest made.
        let on_disk = if page == USED { 9 } else { 7 };
        assert_eq!(first_bytes(&driver, 2), [7, on_disk], "{page:#x}");
    }
}

#[test]
fn a_buffer_for_random_bytes_may_come_late_or_never() {
    for fate in [Fate::Comes, Fate::Never] {
        let mut driver = Driver::running(Rng, VERSION_1);
        let request = [writable(DATA, 3 * PAGE as u32)];
        let came_back = request_without(&mut driver, DATA, fate, &request);
        assert_eq!(came_back, fate == Fate::Comes);
        let last = driver.bytes(DATA + 2 * PAGE, PAGE as usize);
        let is_filled = last.iter().any(|&byte| byte != 0);
        assert_eq!(is_filled, fate == Fate::Comes);
    }
}

#[test]
fn a_packet_of_a_guest_that_can_never_come_reaches_no_program() {
    for fate in [Fate::Comes, Fate::Never] {
        for page in [TRANSMIT_AT, TRANSMIT_AT + PAGE] {
            let mut host = Host::new(4096);
            let (mut program, port) = host.connected(52);
            let header = vsock_guest::Header {
                len: 6000,
                ..vsock_guest::Header::new(op::RW, 52, port)
            };
            // The device's thread, which may have something left to do, is not to find the packet yet.
            host.guest.brake.pull();
            host.guest.post(&header, &[9; 6000]);
            let (memory, brake) = (&host.guest.memory, &host.guest.brake);
            brake.until_still(Duration::from_secs(20)).unwrap();
            let page_comes = take_away_of(memory, brake, page, fate);
            host.guest.brake.release();
            host.guest.notify_transmit();
            page_comes.join().unwrap();
            assert_eq!(host.guest.sent(), fate == Fate::Comes);
            drop(host);
            let mut heard = Vec::new();
            program.read_to_end(&mut heard).unwrap();
            let expected = if fate == Fate::Comes { 6000 } else { 0 };
            assert_eq!(heard, vec![9; expected], "{fate:?} {page:#x}");
        }
    }
}

#[test]
fn a_pause_does_not_begin_while_a_devices_thread_waits_for_a_page() {
    let mut host = Host::new(4096);
    let (mut program, _) = host.connected(52);
    // The guest's second buffer: the first one had the request.
    let (faults, page) = without_page(&host.guest.memory, RECEIVE_AT + 0x2000);
    program.write_all(b"for a page").unwrap();
    faults.wait();
    let brake = host.guest.brake.clone();
    brake.pull();
    assert!(brake.until_still(Duration::from_millis(30)).is_err());
    faults.answer(page, &[0; PAGE as usize]);
    brake.until_still(Duration::from_secs(20)).unwrap();
    brake.release();
    assert_eq!(host.guest.await_op(op::RW).1, b"for a page");
}

#[test]
fn a_condemned_machines_devices_do_nothing_any_more() {
    let mut driver = disk_of_sevens();
    driver.put(BUFFER, &[7; 512]);
    assert_eq!(driver.blk(OUT, 0, &[readable(BUFFER, 512)]), 0);
    driver.put_header(OUT, 0);
    driver.put(BUFFER, &[9; 512]);
    driver.offer_chain(&[
        readable(HEADER, 16),
        readable(BUFFER, 512),
        writable(STATUS, 1),
    ]);
    driver.brake.condemn();
    let edges = driver.line.edges();
    assert_ne!(
        driver.get(reg::INTERRUPT_STATUS),
        0,
        "one is not acknowledged"
    );
    driver.notify();
    driver.device.activate().unwrap();
    assert_eq!((driver.used(), driver.line.edges()), (1, edges));
    assert_eq!(first_bytes(&driver, 16), [7; 16]);
}

#[test]
fn a_condemned_machine_stays_braked() {
    let brake = Brake::default();
    brake.vouch().unwrap();
    brake.leave_over();
    brake.clone().condemn();
    brake.release();
    assert!(brake.condemned() && brake.pulled());
    assert!(brake.vouch().is_err());
    assert!(!brake.take_left_over(), "nobody is to serve what is left");
    assert!(
        brake.leave_over(),
        "who leaves requests over still is to stop"
    );
}
