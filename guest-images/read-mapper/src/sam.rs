//! SAM 1.6 text: the header, and one line per read.
//!
//! Reads are written as single ones. A name that two reads share would make them segments of one
//! template (SAM 1.6, section 1.2), so whoever puts mate files together gives mates different
//! names.

use alloc::vec::Vec;

use crate::alignment::Alignment;
use crate::base::complement_letter;
use crate::fastq::Record;
use crate::references::References;

/// FLAG bit: the segment is unmapped (section 1.4).
const UNMAPPED: u64 = 0x4;

/// FLAG bit: SEQ is the reverse complement of what was sequenced (section 1.4).
const REVERSE: u64 = 0x10;

/// Appends the header: `@HD`, one `@SQ` per reference, and `@PG` for forkvm with its version.
pub fn write_header(out: &mut Vec<u8>, references: &References, version: &str) {
    out.extend_from_slice(b"@HD\tVN:1.6\tSO:unsorted\n");
    for reference in references.list() {
        out.extend_from_slice(b"@SQ\tSN:");
        out.extend_from_slice(reference.name().as_bytes());
        out.extend_from_slice(b"\tLN:");
        write_number(out, reference.bases() as u64);
        out.push(b'\n');
    }
    out.extend_from_slice(b"@PG\tID:forkvm\tPN:forkvm\tVN:");
    out.extend_from_slice(version.as_bytes());
    out.push(b'\n');
}

/// Appends the line of one read; `None` writes it as unmapped.
///
/// `references` are those of the index that the alignment came from.
pub fn write_record(
    out: &mut Vec<u8>,
    references: &References,
    read: &Record<'_>,
    alignment: Option<&Alignment>,
) {
    out.extend_from_slice(read.name);
    out.push(b'\t');
    match alignment {
        Some(alignment) => {
            write_number(out, if alignment.reverse { REVERSE } else { 0 });
            out.push(b'\t');
            out.extend_from_slice(references.list()[alignment.reference].name().as_bytes());
            out.push(b'\t');
            write_number(out, alignment.position as u64 + 1);
            out.push(b'\t');
            write_number(out, alignment.mapping_quality().into());
            out.push(b'\t');
            for run in alignment.cigar.runs() {
                write_number(out, run.length.into());
                out.push(run.op.letter());
            }
        }
        None => {
            write_number(out, UNMAPPED);
            out.extend_from_slice(b"\t*\t0\t0\t*");
        }
    }
    out.extend_from_slice(b"\t*\t0\t0\t");
    if read.bases.is_empty() {
        out.extend_from_slice(b"*\t*");
    } else if alignment.is_some_and(|alignment| alignment.reverse) {
        out.extend(
            read.bases
                .iter()
                .rev()
                .map(|&letter| complement_letter(letter)),
        );
        out.push(b'\t');
        out.extend(read.qualities.iter().rev());
    } else {
        out.extend_from_slice(read.bases);
        out.push(b'\t');
        out.extend_from_slice(read.qualities);
    }
    if let Some(alignment) = alignment {
        out.extend_from_slice(b"\tNM:i:");
        write_number(out, alignment.distance.into());
    }
    out.push(b'\n');
}

fn write_number(out: &mut Vec<u8>, number: u64) {
    let start = out.len();
    let mut rest = number;
    loop {
        // A decimal digit fits.
        out.push(b'0' + (rest % 10) as u8);
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out[start..].reverse();
}
