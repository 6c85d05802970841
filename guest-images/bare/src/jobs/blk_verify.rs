//! `blk-verify disk=0 mib=4 seed=1 n=1`: disk content over a fork with I/O in flight.
//!
//! Writes versioned sectors to the first `mib` MiB of the disk without pause, forks from inside
//! while a request stands in the queue that the device has not been told of, goes on writing other
//! content in parent and clones, and verifies that every sector holds what this VM wrote last. Half
//! of the requests are waited for by interrupt, half by polling. A clone exits 0, the parent with the
//! joined status.

use crate::args::Args;
use crate::jobs::{OK, USAGE, WRONG};
use crate::machine::Machine;
use crate::println;
use crate::versioned_disk::VersionedDisk;
use crate::virtio_blk::{Disk, DiskError, Wait};

/// Writes, forks, writes, verifies.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let index = args.number("disk", 0) as u32;
    let Some(disk) = Disk::open(index).filter(|disk| !disk.read_only()) else {
        println!("blk-verify needs a writable disk {index}");
        return USAGE;
    };
    disk.enable_interrupt();
    match verify(machine, args, &disk) {
        Ok(status) => status,
        Err(error) => {
            println!("wrong: blk-verify: the disk failed: {error}");
            WRONG
        }
    }
}

fn verify(machine: &Machine, args: Args<'_>, disk: &Disk) -> Result<u32, DiskError> {
    let (seed, clones) = (args.number("seed", 1), args.number("n", 1) as u32);
    let mut sectors = VersionedDisk::fill(disk, args.number("mib", 4) << 20, seed)?;
    let rounds = sectors.sectors() / 16;
    let write = |sectors: &mut VersionedDisk<'_>| -> Result<(), DiskError> {
        for _ in 0..rounds {
            sectors.write_somewhere(Wait::Poll, || {})?;
            sectors.write_somewhere(Wait::Interrupt, || {})?;
        }
        Ok(())
    };
    write(&mut sectors)?;

    let mut forked = None;
    sectors.write_somewhere(Wait::Interrupt, || forked = Some(machine.fork(0, clones)))?;
    let Some(forked) = forked else {
        return Ok(WRONG);
    };
    println!("blk-verify forked clone={}", forked.id);

    let inherited = sectors.check()?;
    // From here on every VM of the family writes something else.
    sectors.set_salt(seed + 1 + u64::from(forked.id));
    write(&mut sectors)?;
    disk.flush()?;
    if let Some(sector) = inherited.or(sectors.check()?) {
        println!(
            "wrong: blk-verify: clone {} sector {sector} is not what it wrote",
            forked.id
        );
        return Ok(WRONG);
    }
    println!(
        "blk-verify ok clone={} sectors={}",
        forked.id,
        sectors.sectors()
    );
    Ok(if forked.id == 0 {
        machine.join(0, forked)
    } else {
        OK
    })
}
