//! A share of the reads on a disk: the records that start in a range of its bytes.
//!
//! Shares are cut by bytes, so nobody has to read the whole input to find its own; a record belongs
//! to the share in which it starts. Only the sectors of the share are read, and as many after it
//! as its last record needs.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use forkvm_read_mapper::fastq::record_start;

use crate::tar::File;
use crate::virtio_blk::{Disk, DiskError, SECTOR};

/// Bytes that are read beyond a range at first, to find the end of its last record.
const LOOK_AHEAD: u64 = 16 << 10;

/// Bytes `start..end` of `files`, taken as one after the other, cut at the files' ends: the parts
/// of files that make up share `index` of `shares`.
pub fn parts(files: &[File], index: u64, shares: u64) -> Vec<(&File, Range<u64>)> {
    let total: u64 = files.iter().map(|file| file.len).sum();
    let cut = |index: u64| (u128::from(total) * u128::from(index) / u128::from(shares)) as u64;
    let (start, end) = (cut(index), cut(index + 1));
    let mut parts = Vec::new();
    let mut base = 0;
    for file in files {
        let range = start.max(base)..end.min(base + file.len);
        if range.start < range.end {
            parts.push((file, range.start - base..range.end - base));
        }
        base += file.len;
    }
    parts
}

/// The records of `file` that start in `range`.
pub fn read(disk: &Disk, file: &File, range: Range<u64>) -> Result<Vec<u8>, DiskError> {
    let mut look_ahead = LOOK_AHEAD;
    loop {
        // The byte before the range says whether a line starts at it.
        let from = range.start.saturating_sub(1) / SECTOR as u64 * SECTOR as u64;
        let to = (range.end + look_ahead).min(file.len);
        let mut bytes = vec![0; ((to - from) as usize).next_multiple_of(SECTOR)];
        disk.read(file.sector + from / SECTOR as u64, &mut bytes)?;
        bytes.truncate((to - from) as usize);

        let boundary = |at: u64| match at.checked_sub(1) {
            None => Some(0),
            Some(before) => {
                let skip = (before - from) as usize;
                record_start(&bytes[skip..], 1).map(|found| skip + found)
            }
        };
        let at_end = to == file.len;
        let start = boundary(range.start);
        let end = if range.end == file.len {
            None
        } else {
            boundary(range.end)
        };
        match (start, end) {
            (Some(start), Some(end)) => return Ok(cut(bytes, start, end)),
            // No record starts after the range, or none even in it.
            (Some(start), None) if at_end => {
                let len = bytes.len();
                return Ok(cut(bytes, start, len));
            }
            (None, _) if at_end => return Ok(Vec::new()),
            _ => look_ahead *= 4,
        }
    }
}

fn cut(mut bytes: Vec<u8>, start: usize, end: usize) -> Vec<u8> {
    bytes.truncate(end);
    bytes.drain(..start.min(end));
    bytes
}
