//! `map-reads clones=N forked_by=guest|host depth=1`: the main job, parallel read mapping.
//!
//! Disk 0 is a tar archive of FASTA files (the references), disk 1 one of FASTQ files (the reads),
//! disk 2 takes the records. The parent reads the references and builds the index once, reports
//! READY and forks; clone i of g maps share i of the reads, with the index that it inherited, on all
//! its vCPUs, and writes SAM lines in the order of the reads to its own disk 2. It reads no sector
//! of disk 0. The parent joins and ends with the clones' worst status. With `clones=0` the parent
//! maps everything itself. With `forked_by=host` the host forks, into `clones` clones, after READY,
//! and the parent ends when it sees that it was forked.
//!
//! With `depth=D` the machine that built the index is not the one that forks the workers: it forks
//! one clone, joins it and ends with its status, and so on, down to the machine D - 1 clones below,
//! which forks the workers as above. With `forked_by=host` each of these is forked by the host, and
//! ends when it sees that it was. None of them touches disk 2.
//!
//! Reports: [`INDEX`] when the index is begun, READY when it is there, ACTION by a clone as soon as
//! it runs, ANSWER after its first record.

use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use forkvm_abi::doorbell::report;
use forkvm_read_mapper::fastq::{FastqError, Records, record_start};
use forkvm_read_mapper::{Index, Mapper, References, sam};
use spin::Mutex;

use crate::args::Args;
use crate::fastq_share;
use crate::jobs::{OK, USAGE, WRONG};
use crate::machine::Machine;
use crate::records::RecordsWriter;
use crate::tar::{self, File};
use crate::virtio_blk::{Disk, DiskError, SECTOR};
use crate::{println, smp};

/// Report: the references are read, the index is begun.
const INDEX: u32 = report::USER + 1;

/// Disks of the job.
const REFERENCES: u32 = 0;
const READS: u32 = 1;
const OUTPUT: u32 = 2;

/// Bytes of reads that a vCPU takes at a time.
const PIECE: usize = 64 << 10;

/// Indexes, forks, maps.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let disks = [REFERENCES, READS, OUTPUT].map(Disk::open);
    let [Some(references), Some(reads), Some(output)] = &disks else {
        println!("map-reads needs disks {REFERENCES}, {READS} and {OUTPUT}");
        return USAGE;
    };
    let depth = args.number("depth", 1);
    if depth == 0 || depth > 1 && args.number("clones", 0) == 0 {
        println!("depth is 1 or more, and above 1 only with clones");
        return USAGE;
    }
    match map_reads(machine, args, references, reads, output) {
        Ok(status) => status,
        Err(problem) => {
            println!("wrong: map-reads: {problem}");
            WRONG
        }
    }
}

fn map_reads(
    machine: &Machine,
    args: Args<'_>,
    references: &Disk,
    reads: &Disk,
    output: &Disk,
) -> Result<u32, Problem> {
    let doorbell = machine.doorbell();
    let fasta = read_references(references)?;
    let files = tar::list(reads).map_err(|error| Problem::Archive(READS, error))?;
    doorbell.report(INDEX);
    let index = Index::build(References::from_fasta(&fasta).map_err(Problem::Fasta)?);
    drop(fasta);
    let (list, bases) = (index.references().list().len(), index.references().bases());
    println!(
        "references={list} bases={bases} index_mib={}",
        index.size().div_ceil(1 << 20)
    );
    // Before the fork, so that the clones find it brought up.
    let before = doorbell.fork_count();
    let by_host = forked_by_host(args);
    if by_host {
        doorbell.want_interrupt();
    }
    doorbell.report(report::READY);

    let clones = args.number("clones", 0) as u32;
    let share = |index_of_share: u64, shares: u64| -> Result<u32, Problem> {
        let answered = AtomicBool::new(false);
        let first = || {
            if !answered.swap(true, Ordering::Relaxed) {
                doorbell.report(report::ANSWER);
            }
        };
        let mut writer = RecordsWriter::new(output);
        for (file, range) in fastq_share::parts(&files, index_of_share, shares) {
            let text =
                fastq_share::read(reads, file, range).map_err(|e| Problem::Disk(READS, e))?;
            map_text(&index, &text, &first, |lines, records| {
                writer
                    .append(lines, records)
                    .map_err(|error| Problem::Disk(OUTPUT, error))
            })
            .map_err(|problem| problem.in_file(file))?;
        }
        let records = writer
            .finish()
            .map_err(|error| Problem::Disk(OUTPUT, error))?;
        println!("mapped share {index_of_share} of {shares}: records={records}");
        Ok(OK)
    };
    if clones == 0 {
        return share(0, 1);
    }
    let depth = args.number("depth", 1) as u32;
    if by_host {
        for fork in 0..depth {
            doorbell.wait_for_fork(before + fork);
            doorbell.report_action_of_clone();
            if doorbell.clone_id() == 0 {
                return Ok(OK);
            }
        }
        return share(u64::from(doorbell.clone_id() - 1), u64::from(clones));
    }
    for _ in 1..depth {
        let forked = machine.fork(0, 1);
        if forked.id == 0 {
            return Ok(machine.join(0, forked));
        }
    }
    let forked = machine.fork(0, clones);
    match forked.id {
        0 => {
            println!("granted={} asked={clones}", forked.granted);
            Ok(machine.join(0, forked))
        }
        id => share(u64::from(id - 1), u64::from(forked.granted)),
    }
}

fn forked_by_host(args: Args<'_>) -> bool {
    args.text("forked_by") == Some("host")
}

/// All files of the archive on `disk`, one after the other.
fn read_references(disk: &Disk) -> Result<Vec<u8>, Problem> {
    let files = tar::list(disk).map_err(|error| Problem::Archive(REFERENCES, error))?;
    let padded = |file: &File| (file.len as usize).next_multiple_of(SECTOR);
    // Room for the largest padding, so that nothing moves while the files are read.
    let mut fasta = Vec::with_capacity(files.iter().map(padded).sum::<usize>() + files.len());
    for file in &files {
        let start = fasta.len();
        fasta.resize(start + padded(file), 0);
        disk.read(file.sector, &mut fasta[start..])
            .map_err(|e| Problem::Disk(REFERENCES, e))?;
        fasta.truncate(start + file.len as usize);
        if fasta.last().is_some_and(|&byte| byte != b'\n') {
            fasta.push(b'\n');
        }
    }
    Ok(fasta)
}

/// Maps the records of `text` on all vCPUs and hands their SAM lines to `append`, in order.
fn map_text(
    index: &Index,
    text: &[u8],
    first: &(dyn Fn() + Sync),
    mut append: impl FnMut(&[u8], u64) -> Result<(), Problem>,
) -> Result<(), Problem> {
    let pieces = text.len().div_ceil(PIECE);
    let mapped: Vec<Mutex<Vec<u8>>> = (0..pieces).map(|_| Mutex::new(Vec::new())).collect();
    let (next, records) = (AtomicUsize::new(0), AtomicU64::new(0));
    let failed: Mutex<Option<FastqError>> = Mutex::new(None);
    smp::run_on_all(&|_cpu| {
        let mut mapper = Mapper::new(index);
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= pieces {
                return;
            }
            let (start, end) = (
                boundary(text, piece * PIECE),
                boundary(text, (piece + 1) * PIECE),
            );
            let mut lines = Vec::with_capacity(PIECE);
            for record in Records::new(&text[start..end]) {
                match record {
                    Ok(record) => {
                        let alignment = mapper.map(record.bases);
                        let references = index.references();
                        sam::write_record(&mut lines, references, &record, alignment.as_ref());
                        records.fetch_add(1, Ordering::Relaxed);
                        first();
                    }
                    Err(error) => {
                        *failed.lock() = Some(FastqError {
                            offset: start + error.offset,
                            ..error
                        });
                        return;
                    }
                }
            }
            *mapped[piece].lock() = lines;
        }
    });
    if let Some(error) = failed.into_inner() {
        return Err(Problem::Fastq(String::new(), error));
    }
    let mut records = records.into_inner();
    for lines in mapped {
        append(&lines.into_inner(), core::mem::take(&mut records))?;
    }
    Ok(())
}

/// Offset of the first record of `text` that starts at `at` or later; its length if there is none.
/// `text` starts with a record.
fn boundary(text: &[u8], at: usize) -> usize {
    if at == 0 {
        return 0;
    }
    let found = text.get(at - 1..).and_then(|rest| record_start(rest, 1));
    found.map_or(text.len(), |found| at - 1 + found)
}

/// Why the reads could not be mapped.
enum Problem {
    Disk(u32, DiskError),
    Archive(u32, tar::TarError),
    Fasta(forkvm_read_mapper::FastaError),
    Fastq(String, FastqError),
}

impl Problem {
    fn in_file(self, file: &File) -> Problem {
        match self {
            Problem::Fastq(_, error) => Problem::Fastq(file.name.clone(), error),
            other => other,
        }
    }
}

impl core::fmt::Display for Problem {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Problem::Disk(disk, error) => write!(out, "disk {disk} failed: {error}"),
            Problem::Archive(disk, error) => write!(out, "disk {disk}: {error}"),
            Problem::Fasta(error) => write!(out, "disk {REFERENCES}: {error}"),
            Problem::Fastq(file, error) => write!(out, "disk {READS}, share of {file}: {error}"),
        }
    }
}
