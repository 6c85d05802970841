//! The mapper against a full dynamic-programming table over every reference and both strands.

use forkvm_read_mapper::{Alignment, CigarOp, Index, Mapper, References, edit_bound};
use proptest::prelude::*;
use proptest::sample::{Index as Pick, select};

/// Distance between the read and the best substring that starts at each position of `text`.
///
/// Sellers' algorithm on both strings reversed: there the free end is the start.
fn distance_by_start(read: &[u8], text: &[u8]) -> Vec<usize> {
    let mut column: Vec<usize> = (0..=read.len()).collect();
    let mut last = vec![read.len(); text.len() + 1];
    for start in (0..text.len()).rev() {
        let mut diagonal = column[0];
        for (i, base) in read.iter().rev().enumerate() {
            let equal = *base == text[start] && b"ACGT".contains(base);
            let best = (diagonal + usize::from(!equal))
                .min(column[i] + 1)
                .min(column[i + 1] + 1);
            diagonal = column[i + 1];
            column[i + 1] = best;
        }
        last[start] = column[read.len()];
    }
    last
}

fn reverse_complement(read: &[u8]) -> Vec<u8> {
    let complement = |base: &u8| match base {
        b'A' => b'T',
        b'C' => b'G',
        b'G' => b'C',
        b'T' => b'A',
        other => *other,
    };
    read.iter().rev().map(complement).collect()
}

/// Best place by brute force: (distance, reference, position, reverse), and how many such places.
fn brute_force(
    references: &[Vec<u8>],
    read: &[u8],
) -> Option<((usize, usize, usize, bool), usize)> {
    let bound = edit_bound(read.len())?;
    let strands = [(false, read.to_vec()), (true, reverse_complement(read))];
    let mut all = Vec::new();
    for (reverse, read) in &strands {
        for (reference, text) in references.iter().enumerate() {
            let starts = distance_by_start(read, text).into_iter().enumerate();
            all.extend(starts.map(|(start, distance)| (distance, reference, start, *reverse)));
        }
    }
    let best = *all.iter().min().filter(|best| best.0 <= bound)?;
    // Grouped by strand and reference, ascending: the order in which they were collected.
    let starts: Vec<_> = all.into_iter().filter(|start| start.0 == best.0).collect();
    let same = |a: &(usize, usize, usize, bool), b: &(usize, usize, usize, bool)| {
        (a.1, a.3) == (b.1, b.3) && b.2 - a.2 <= best.0
    };
    Some((best, starts.chunk_by(same).count()))
}

/// Edits that the CIGAR spells out, walking read and reference side by side.
fn edits_of(alignment: &Alignment, references: &[Vec<u8>], read: &[u8]) -> usize {
    let read = if alignment.reverse {
        reverse_complement(read)
    } else {
        read.to_vec()
    };
    let text = &references[alignment.reference];
    let (mut i, mut j, mut edits) = (0, alignment.position, 0);
    for run in alignment.cigar.runs() {
        let length = run.length as usize;
        match run.op {
            CigarOp::Match => {
                for k in 0..length {
                    let (a, b) = (read[i + k], text[j + k]);
                    edits += usize::from(a != b || !b"ACGT".contains(&a));
                }
                (i, j) = (i + length, j + length);
            }
            CigarOp::Insertion => (i, edits) = (i + length, edits + length),
            CigarOp::Deletion => (j, edits) = (j + length, edits + length),
        }
    }
    assert_eq!(i, read.len(), "the CIGAR covers the whole read");
    assert_eq!(j - alignment.position, alignment.cigar.reference_len());
    edits
}

fn index_of(references: &[Vec<u8>]) -> Index {
    let mut fasta = Vec::new();
    for (number, bases) in references.iter().enumerate() {
        fasta.extend(format!(">ref{number} title\n").bytes());
        for line in bases.chunks(60) {
            fasta.extend(line);
            fasta.push(b'\n');
        }
    }
    Index::build(References::from_fasta(&fasta).expect("the test's own FASTA"))
}

fn base() -> impl Strategy<Value = u8> {
    prop_oneof![40 => select(b"ACGT".to_vec()), 1 => Just(b'N')]
}

/// Random bases, or a short unit again and again: where many places are equally good.
fn sequence() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => prop::collection::vec(base(), 1..400),
        1 => (prop::collection::vec(base(), 1..60), 2..8usize).prop_map(|(unit, n)| unit.repeat(n)),
    ]
}

#[derive(Clone, Debug)]
enum Edit {
    Substitute(Pick, u8),
    Insert(Pick, u8),
    Delete(Pick),
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        (any::<Pick>(), base()).prop_map(|(at, base)| Edit::Substitute(at, base)),
        (any::<Pick>(), base()).prop_map(|(at, base)| Edit::Insert(at, base)),
        any::<Pick>().prop_map(Edit::Delete),
    ]
}

/// Where a read is taken from, and what then happens to it.
#[derive(Clone, Debug)]
struct Draw {
    reference: Pick,
    start: Pick,
    len: usize,
    edits: Vec<Edit>,
    reverse: bool,
    overhang: (Vec<u8>, Vec<u8>),
}

fn draw() -> impl Strategy<Value = Draw> {
    let overhang = || prop::collection::vec(base(), 0..4);
    (
        any::<Pick>(),
        any::<Pick>(),
        0..260usize,
        prop::collection::vec(edit(), 0..9),
        any::<bool>(),
        (overhang(), overhang()),
    )
        .prop_map(|(reference, start, len, edits, reverse, overhang)| Draw {
            reference,
            start,
            len,
            edits,
            reverse,
            overhang,
        })
}

impl Draw {
    fn read(&self, references: &[Vec<u8>]) -> Vec<u8> {
        let text = self.reference.get(references);
        let start = self.start.index(text.len());
        let end = text.len().min(start + self.len);
        let mut read = [&self.overhang.0, &text[start..end], &self.overhang.1].concat();
        for edit in &self.edits {
            if read.is_empty() {
                break;
            }
            match edit {
                Edit::Substitute(at, base) => *at.get_mut(&mut read) = *base,
                Edit::Insert(at, base) => read.insert(at.index(read.len()), *base),
                Edit::Delete(at) => {
                    read.remove(at.index(read.len()));
                }
            }
        }
        if self.reverse {
            reverse_complement(&read)
        } else {
            read
        }
    }
}

/// Everything that is promised about one read.
fn check(references: &[Vec<u8>], mapper: &mut Mapper<'_>, read: &[u8]) {
    let shown = String::from_utf8_lossy(read);
    let Some(found) = mapper.map(read) else {
        assert_eq!(
            brute_force(references, read),
            None,
            "{shown} was not mapped"
        );
        return;
    };
    let answer = (
        found.distance as usize,
        found.reference,
        found.position,
        found.reverse,
    );
    assert_eq!(
        Some((answer, found.locations)),
        brute_force(references, read),
        "{shown}"
    );
    assert_eq!(
        edits_of(&found, references, read),
        answer.0,
        "{shown}: {}",
        found.cigar
    );
}

proptest! {
    // Each case builds an index of 64 MiB: few cases with many reads each.
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn finds_what_the_full_table_finds(
        references in prop::collection::vec(sequence(), 1..4),
        draws in prop::collection::vec(draw(), 100),
    ) {
        let index = index_of(&references);
        let mut mapper = Mapper::new(&index);
        for draw in &draws {
            check(&references, &mut mapper, &draw.read(&references));
        }
    }
}

/// 100 bases without a repeated 12-mer on either strand.
const GENOME: &[u8; 100] = b"ATGACCGTTAGCAATCCGGATTACGCTTGAGTCCATAGGCTAACTGTCGATCAGGTACCTTGCAGAATCTGCGCCTAATGTTCGACAAGTGGCTCATTCG";

fn map(read: &[u8]) -> Option<Alignment> {
    let index = index_of(&[GENOME.to_vec()]);
    let mut mapper = Mapper::new(&index);
    check(&[GENOME.to_vec()], &mut mapper, read);
    mapper.map(read)
}

#[test]
fn a_read_shorter_than_a_seed_is_never_mapped() {
    assert_eq!(map(&GENOME[10..21]), None);
    assert_eq!(map(b""), None);
}

#[test]
fn a_read_of_less_than_two_seeds_is_mapped_only_without_an_edit() {
    let mut read = GENOME[30..53].to_vec();
    assert_eq!(
        map(&read).map(|found| (found.position, found.distance)),
        Some((30, 0))
    );
    read[11] = b'N';
    assert_eq!(map(&read), None);
}

#[test]
fn the_edit_bound_grows_by_one_with_each_seed_up_to_seven() {
    let bounds: Vec<_> = [11, 12, 23, 24, 95, 96, 108, 500].map(edit_bound).into();
    let expected = [
        None,
        Some(0),
        Some(0),
        Some(1),
        Some(6),
        Some(7),
        Some(7),
        Some(7),
    ];
    assert_eq!(bounds, expected);
}

#[test]
fn each_n_of_a_read_is_one_edit() {
    let mut read = GENOME[2..98].to_vec();
    for at in [0, 13, 26, 39, 52, 65, 95] {
        read[at] = b'N';
    }
    assert_eq!(
        map(&read).map(|found| (found.position, found.distance)),
        Some((2, 7))
    );
    read[47] = b'N';
    assert_eq!(map(&read), None);
}

#[test]
fn an_n_of_the_reference_does_not_match_an_n_of_the_read() {
    let mut reference = GENOME.to_vec();
    reference[50] = b'N';
    let index = index_of(&[reference.clone()]);
    let mut mapper = Mapper::new(&index);
    check(&[reference.clone()], &mut mapper, &reference[20..80]);
    assert_eq!(
        mapper.map(&reference[20..80]).map(|found| found.distance),
        Some(1)
    );
}

#[test]
fn bases_that_hang_over_the_reference_s_ends_are_insertions() {
    let left = [b"GG", &GENOME[..60]].concat();
    let found = map(&left).map(|found| (found.position, found.cigar.to_string()));
    assert_eq!(found, Some((0, "2I60M".into())));
    let right = [&GENOME[40..], b"CC"].concat();
    let found = map(&right).map(|found| (found.position, found.cigar.to_string()));
    assert_eq!(found, Some((40, "60M2I".into())));
}

#[test]
fn a_read_does_not_lie_across_two_references() {
    let halves = [GENOME[..50].to_vec(), GENOME[50..].to_vec()];
    let index = index_of(&halves);
    let mut mapper = Mapper::new(&index);
    check(&halves, &mut mapper, &GENOME[20..80]);
    assert_eq!(mapper.map(&GENOME[20..80]), None);
}

#[test]
fn a_deleted_base_and_the_strand_show_in_the_answer() {
    let read = reverse_complement(&[&GENOME[5..40], &GENOME[41..85]].concat());
    let found = map(&read).map(|found| (found.position, found.reverse, found.cigar.to_string()));
    assert_eq!(found, Some((5, true, "35M1D44M".into())));
}

#[test]
fn a_read_with_two_equal_places_gets_the_first_and_no_confidence() {
    let twice = [GENOME.to_vec(), GENOME.to_vec()];
    let index = index_of(&twice);
    let found = Mapper::new(&index)
        .map(&GENOME[10..90])
        .expect("an exact read");
    assert_eq!(
        (found.reference, found.locations, found.mapping_quality()),
        (0, 2, 3)
    );
    let found = map(&GENOME[10..90]).expect("an exact read");
    assert_eq!((found.locations, found.mapping_quality()), (1, 60));
}

#[test]
fn lower_case_is_the_same_base() {
    let lower = GENOME[10..90].to_ascii_lowercase();
    let found = map(&GENOME[10..90]);
    let index = index_of(&[GENOME.to_ascii_lowercase()]);
    assert_eq!(Mapper::new(&index).map(&lower), found);
}
