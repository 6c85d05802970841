//! `hello`: says what machine this is.

use forkvm_abi::slot;

use crate::args::Args;
use crate::jobs::OK;
use crate::machine::Machine;
use crate::virtio_blk::Disk;
use crate::{println, smp};

/// Prints the number of vCPUs, the RAM and the disks.
pub fn run(machine: &Machine, _args: Args<'_>) -> u32 {
    println!(
        "hello from {} vCPUs and {} MiB",
        smp::count(),
        machine.ram_mib()
    );
    for (index, disk) in (0..slot::DISKS).filter_map(|index| Some((index, Disk::open(index)?))) {
        let id = disk.id().unwrap_or_default();
        let name = id.split(|&byte| byte == 0).next().unwrap_or_default();
        println!(
            "disk {index}: {} of {} bytes",
            name.escape_ascii(),
            disk.bytes()
        );
    }
    OK
}
