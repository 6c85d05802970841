//! The freestanding guest of forkvm: a small operating system for one job.
//!
//! `boot` brings every vCPU to ring 3; [`start`] sets up memory, devices and the other vCPUs and
//! runs the job that the command line names (`job=NAME key=value…`). The job's status ends the
//! machine. See README.md for how it boots and where a job is added.

#![no_std]
#![no_main]

extern crate alloc;

mod args;
mod barrier;
mod boot;
mod boot_info;
mod compiler_memory;
mod descriptors;
mod doorbell;
mod fastq_share;
mod heap;
mod interrupts;
mod jobs;
mod listener;
mod machine;
mod pages;
mod paging;
mod panic;
mod port;
mod random;
mod records;
mod registers;
mod ring0;
mod scatter;
mod serial;
mod smp;
mod tar;
mod tsc;
mod versioned_disk;
mod versioned_pages;
mod virtio_blk;

use boot_info::BootProtocol;

/// Where the first vCPU enters ring 3: `info` is what the boot protocol left for the kernel.
#[unsafe(no_mangle)]
extern "C" fn start(info: u64, protocol: u64) -> ! {
    let protocol = if protocol == 0 {
        BootProtocol::Linux
    } else {
        BootProtocol::Pvh
    };
    descriptors::fill_idt();
    let boot = boot_info::read(info, protocol);
    heap::claim(&boot);
    interrupts::enable();
    let doorbell = doorbell::connect();
    smp::start(doorbell.as_ref().map_or(1, |doorbell| doorbell.vcpus()));
    let machine = machine::Machine::new(&boot, doorbell);
    machine::exit(jobs::run(&machine, boot.command_line()))
}
