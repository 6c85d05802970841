//! FASTA and FASTQ as they are met in the wild, and SAM as other programs expect it.

use forkvm_read_mapper::fastq::{ErrorKind, Record, Records, record_start};
use forkvm_read_mapper::{FastaError, Index, Mapper, References, sam};
use proptest::prelude::*;

fn fasta(text: &str) -> Result<Vec<(String, usize)>, FastaError> {
    let references = References::from_fasta(text.as_bytes())?;
    Ok(references
        .list()
        .iter()
        .map(|one| (one.name().to_string(), one.bases()))
        .collect())
}

#[test]
fn fasta_names_end_at_the_first_blank_and_lines_are_joined() {
    let text = ">gi|1|ref|NC_1| Some title\r\nACGT\r\nAC\r\n\r\n>b\tx\nacgtn\n";
    let expected = vec![("gi|1|ref|NC_1|".to_string(), 6), ("b".to_string(), 5)];
    assert_eq!(fasta(text), Ok(expected));
}

#[test]
fn fasta_that_cannot_be_mapped_to_is_refused_by_name() {
    let name = || "a".to_string();
    assert_eq!(fasta(""), Err(FastaError::NoRecord));
    assert_eq!(fasta("ACGT\n>a\nA\n"), Err(FastaError::BasesBeforeTitle));
    assert_eq!(
        fasta(">a\n>b\nACGT\n"),
        Err(FastaError::Empty { name: name() })
    );
    assert_eq!(
        fasta(">a\nA\n>a\nA\n"),
        Err(FastaError::SameName { name: name() })
    );
    assert_eq!(
        fasta("> title\nA\n"),
        Err(FastaError::BadName {
            name: String::new()
        })
    );
    assert_eq!(
        fasta(">*a\nA\n"),
        Err(FastaError::BadName { name: "*a".into() })
    );
    assert_eq!(
        fasta(">a\nAC\x1f\n"),
        Err(FastaError::BadBase {
            name: name(),
            byte: 0x1f
        })
    );
}

/// Name and bases, or where and what is wrong.
type Read<'a> = Result<(&'a str, &'a str), (usize, ErrorKind)>;

fn records(text: &str) -> Vec<Read<'_>> {
    let text_of = |bytes| std::str::from_utf8(bytes).expect("part of a str");
    Records::new(text.as_bytes())
        .map(|record| match record {
            Ok(record) => Ok((text_of(record.name), text_of(record.bases))),
            Err(error) => Err((error.offset, error.kind)),
        })
        .collect()
}

#[test]
fn fastq_records_are_read_with_or_without_a_last_line_feed() {
    let text = "@r1 first\nACGT\n+r1\nIII@\n@r2\r\nNN\r\n+\r\n!~\r\n@r3\n\n+\n\n@r4\nA\n+\nI";
    let expected = vec![
        Ok(("r1", "ACGT")),
        Ok(("r2", "NN")),
        Ok(("r3", "")),
        Ok(("r4", "A")),
    ];
    assert_eq!(records(text), expected);
}

#[test]
fn a_malformed_fastq_record_is_named_by_its_offset_and_ends_the_iteration() {
    let good = "@r1\nA\n+\nI\n";
    for (bad, kind) in [
        ("r2\nA\n+\nI\n", ErrorKind::NoTitle),
        ("@ r2\nA\n+\nI\n", ErrorKind::BadName),
        ("@r@2\nA\n+\nI\n", ErrorKind::BadName),
        ("@r2\nA-\n+\nII\n", ErrorKind::BadBase),
        ("@r2\nA\nC\n+\nII\n", ErrorKind::NoPlus),
        ("@r2\nAC\n+\nI\n@r3\n", ErrorKind::UnequalLength),
        ("@r2\nA\n+\nII\n", ErrorKind::UnequalLength),
        ("@r2\nA\n+\n\x07\n", ErrorKind::BadQuality),
        ("@r2\nAC\n", ErrorKind::Truncated),
        ("@r2\nAC\n+\n", ErrorKind::Truncated),
        ("@r2\nAC\n+\nI", ErrorKind::Truncated),
        ("@r2\nAC\n+\nI\n", ErrorKind::UnequalLength),
    ] {
        let text = format!("{good}{bad}");
        assert_eq!(
            records(&text),
            vec![Ok(("r1", "A")), Err((10, kind))],
            "{bad:?}"
        );
    }
}

#[test]
fn a_quality_line_that_looks_like_a_title_starts_no_record() {
    let text = b"@r1\nACGT\n+\n@@@@\n@r2\nACGT\n+\n++++\n";
    let starts: Vec<_> = (0..text.len())
        .map(|from| record_start(text, from))
        .collect();
    let expected = |from: usize| match from {
        0 => Some(0),
        1..=16 => Some(16),
        _ => None,
    };
    assert_eq!(starts, (0..text.len()).map(expected).collect::<Vec<_>>());
}

proptest! {
    /// What clones do: each takes the records that start in its range of bytes.
    #[test]
    fn any_division_of_a_file_gives_every_record_to_exactly_one_share(
        reads in prop::collection::vec("[ACGTN]{1,12}", 1..30),
        quality in "[!-~]",
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let mut text = String::new();
        for (number, bases) in reads.iter().enumerate() {
            text += &format!("@r{number}\n{bases}\n+\n{}\n", quality.repeat(bases.len()));
        }
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(text.len())).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let start = |cut| record_start(text.as_bytes(), cut).unwrap_or(text.len());
        let shares = cuts.windows(2).map(|share| &text[start(share[0])..start(share[1])]);
        let together: Vec<_> = shares.flat_map(records).collect();
        prop_assert_eq!(together, records(&text));
    }
}

/// 60 bases of which no 12-mer occurs twice.
const GENOME: &str = "ATGACCGTTAGCAATCCGGATTACGCTTGAGTCCATAGGCTAACTGTCGATCAGGTACCT";

fn sam_line(bases: &str, qualities: &str) -> String {
    let references = References::from_fasta(format!(">chr\n{GENOME}\n").as_bytes());
    let index = Index::build(references.expect("the test's own FASTA"));
    let record = Record {
        name: b"r",
        bases: bases.as_bytes(),
        qualities: qualities.as_bytes(),
    };
    let alignment = Mapper::new(&index).map(record.bases);
    let mut out = Vec::new();
    sam::write_record(&mut out, index.references(), &record, alignment.as_ref());
    String::from_utf8(out).expect("SAM is ASCII")
}

#[test]
fn a_forward_read_is_written_as_it_was_sequenced() {
    let line = sam_line("AGCAATCCGGATTNCGCTTGAGTC", "ABCDEFGHIJKLMNOPQRSTUVWX");
    let expected = "r\t0\tchr\t10\t60\t24M\t*\t0\t0\tAGCAATCCGGATTNCGCTTGAGTC\t\
        ABCDEFGHIJKLMNOPQRSTUVWX\tNM:i:1\n";
    assert_eq!(line, expected);
}

#[test]
fn a_reverse_read_is_written_complemented_with_its_qualities_reversed() {
    let line = sam_line("gactcaagcgnaatccggattgct", "ABCDEFGHIJKLMNOPQRSTUVWX");
    let expected = "r\t16\tchr\t10\t60\t24M\t*\t0\t0\tagcaatccggattncgcttgagtc\t\
        XWVUTSRQPONMLKJIHGFEDCBA\tNM:i:1\n";
    assert_eq!(line, expected);
}

#[test]
fn an_unmapped_read_keeps_its_bases_and_an_empty_one_gets_stars() {
    assert_eq!(
        sam_line("ACGT", "IIII"),
        "r\t4\t*\t0\t0\t*\t*\t0\t0\tACGT\tIIII\n"
    );
    assert_eq!(sam_line("", ""), "r\t4\t*\t0\t0\t*\t*\t0\t0\t*\t*\n");
}

#[test]
fn the_header_lists_the_references_and_the_program() {
    let references = References::from_fasta(b">a x\nACGT\n>b\nAC\n").expect("good FASTA");
    let mut out = Vec::new();
    sam::write_header(&mut out, &references, "1.2.3");
    let expected = "@HD\tVN:1.6\tSO:unsorted\n@SQ\tSN:a\tLN:4\n@SQ\tSN:b\tLN:2\n\
        @PG\tID:forkvm\tPN:forkvm\tVN:1.2.3\n";
    assert_eq!(String::from_utf8(out).expect("SAM is ASCII"), expected);
}
