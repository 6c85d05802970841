//! Bases as small numbers, such that what must not match never compares equal.
//!
//! The four bases are 0 to 3. Anything else in a reference is [`TEXT_OTHER`] and in a read
//! [`READ_OTHER`]: two different numbers, so an N matches nothing, not even an N.

/// Not one of A, C, G, T in a reference; also what separates two references.
pub(crate) const TEXT_OTHER: u8 = 4;

/// Not one of A, C, G, T in a read.
pub(crate) const READ_OTHER: u8 = 5;

/// Stands before a read's first base, so that a comparison running off its start ends.
pub(crate) const READ_EDGE: u8 = 6;

/// 0 to 3 for A, C, G, T of either case; `other` for anything else.
pub(crate) fn code(letter: u8, other: u8) -> u8 {
    match letter {
        b'A' | b'a' => 0,
        b'C' | b'c' => 1,
        b'G' | b'g' => 2,
        b'T' | b't' => 3,
        _ => other,
    }
}

/// Complement of a code; what is not a base stays what it is.
pub(crate) fn complement_code(code: u8) -> u8 {
    if code < 4 { 3 - code } else { code }
}

/// Complement of an IUPAC letter, in its own case; a letter without one stays what it is.
pub(crate) fn complement_letter(letter: u8) -> u8 {
    let upper = match letter.to_ascii_uppercase() {
        b'A' => b'T',
        b'C' => b'G',
        b'G' => b'C',
        b'T' | b'U' => b'A',
        b'R' => b'Y',
        b'Y' => b'R',
        b'K' => b'M',
        b'M' => b'K',
        b'B' => b'V',
        b'V' => b'B',
        b'D' => b'H',
        b'H' => b'D',
        _ => return letter,
    };
    // Bit 5 is what tells lower case from upper case in ASCII.
    upper | (letter & 0x20)
}
