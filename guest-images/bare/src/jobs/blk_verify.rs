//! `blk-verify disk=0 mib=4 seed=1 n=1`: disk content over a fork with I/O in flight.
//!
//! Writes versioned sectors to the first `mib` MiB of the disk without pause, forks from inside
//! while a request stands in the queue that the device has not been told of, goes on writing other
//! versions in parent and clones, and verifies at the end that every sector holds what this VM
//! wrote last. Half of the requests are waited for by interrupt, half by polling. The clones exit 0,
//! the parent with the joined status.

use alloc::vec;
use alloc::vec::Vec;

use crate::args::Args;
use crate::jobs::{OK, USAGE, WRONG};
use crate::machine::Machine;
use crate::println;
use crate::random::{Random, mix};
use crate::virtio_blk::{Disk, DiskError, SECTOR, Wait};

/// Most sectors of one request.
const MOST: u64 = 64;

/// Writes, forks, writes, verifies.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let index = args.number("disk", 0) as u32;
    let Some(disk) = Disk::open(index).filter(|disk| !disk.read_only()) else {
        println!("blk-verify needs a writable disk {index}");
        return USAGE;
    };
    disk.enable_interrupt();
    let sectors = (args.number("mib", 4) << 20).min(disk.bytes()) / SECTOR as u64;
    let seed = args.number("seed", 1);
    match verify(machine, &disk, sectors, seed, args.number("n", 1) as u32) {
        Ok(status) => status,
        Err(error) => {
            println!("wrong: blk-verify: the disk failed: {error:?}");
            WRONG
        }
    }
}

fn verify(
    machine: &Machine,
    disk: &Disk,
    sectors: u64,
    seed: u64,
    clones: u32,
) -> Result<u32, DiskError> {
    let mut work = Work { disk, versions: vec![0; sectors as usize], random: Random::new(seed) };
    for at in (0..sectors).step_by(MOST as usize) {
        work.write(at, MOST.min(sectors - at), seed, || {})?;
    }
    let rounds = sectors / 8;
    for _ in 0..rounds {
        work.write_somewhere(seed, || {})?;
    }

    let mut forked = None;
    work.write_somewhere(seed, || forked = Some(machine.fork(0, clones)))?;
    let Some(forked) = forked else { return Ok(WRONG) };

    // From here on every VM of the family writes something else.
    let own = mix(seed ^ u64::from(forked.id) << 32);
    let before = work.check(seed, None)?;
    let mine = work.versions.clone();
    work.random = Random::new(own);
    for _ in 0..rounds {
        work.write_somewhere(own, || {})?;
    }
    disk.flush()?;
    let after = work.check(seed, Some((own, &mine)))?;
    if let Some(sector) = before.or(after) {
        println!("wrong: blk-verify: clone {} sector {sector} is not what it wrote", forked.id);
        return Ok(WRONG);
    }
    println!("blk-verify ok clone={} sectors={sectors}", forked.id);
    Ok(if forked.id == 0 { machine.join(0, forked) } else { OK })
}

/// The disk and what every sector of it should hold.
struct Work<'a> {
    disk: &'a Disk,
    /// Times that each sector was written.
    versions: Vec<u64>,
    random: Random,
}

impl Work<'_> {
    fn write_somewhere(&mut self, seed: u64, between: impl FnOnce()) -> Result<(), DiskError> {
        let sectors = self.versions.len() as u64;
        let at = self.random.below(sectors);
        let count = 1 + self.random.below(MOST.min(sectors - at));
        self.write(at, count, seed, between)
    }

    /// Writes `count` sectors; runs `between` with the request queued and the device not yet told.
    fn write(
        &mut self,
        at: u64,
        count: u64,
        seed: u64,
        between: impl FnOnce(),
    ) -> Result<(), DiskError> {
        let mut data = vec![0; count as usize * SECTOR];
        for (content, sector) in data.chunks_exact_mut(SECTOR).zip(at..) {
            self.versions[sector as usize] += 1;
            fill(content, seed, sector, self.versions[sector as usize]);
        }
        let wait = if self.random.below(2) == 0 { Wait::Poll } else { Wait::Interrupt };
        let posted = self.disk.post_write(at, &data, wait)?;
        between();
        posted.finish()
    }

    /// The first sector that does not hold its version. Sectors whose version is still that of
    /// `own`'s list were written with `seed`, others with `own`.
    fn check(&self, seed: u64, own: Option<(u64, &[u64])>) -> Result<Option<u64>, DiskError> {
        let mut found = vec![0; MOST as usize * SECTOR];
        let mut expected = [0; SECTOR];
        let sectors = self.versions.len() as u64;
        for at in (0..sectors).step_by(MOST as usize) {
            let found = &mut found[..MOST.min(sectors - at) as usize * SECTOR];
            self.disk.read(at, found)?;
            for (content, sector) in found.chunks_exact(SECTOR).zip(at..) {
                let version = self.versions[sector as usize];
                let by = match own {
                    Some((own, before)) if before[sector as usize] != version => own,
                    _ => seed,
                };
                fill(&mut expected, by, sector, version);
                if content != expected {
                    return Ok(Some(sector));
                }
            }
        }
        Ok(None)
    }
}

/// What version `version` of a sector is.
fn fill(content: &mut [u8], seed: u64, sector: u64, version: u64) {
    let base = mix(seed ^ sector << 20 ^ version);
    for (word, index) in content.chunks_exact_mut(8).zip(0..) {
        word.copy_from_slice(&mix(base + index).to_le_bytes());
    }
}
