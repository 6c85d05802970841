//! An order of pages in which neighbours lie far apart.

use crate::pages::PER_CHUNK;

/// Every page of an array exactly once: as many as there are chunks in as many different chunks,
/// and these in no simple order.
pub struct Scatter {
    chunks: usize,
    stride: usize,
}

impl Scatter {
    /// For `pages` pages, at least a chunk.
    pub fn new(pages: usize) -> Scatter {
        let chunks = pages / PER_CHUNK;
        // Near the golden section, and with no factor in common: a full period.
        let mut stride = chunks * 618 / 1000 + 1;
        while gcd(stride, chunks) != 1 {
            stride += 1;
        }
        Scatter { chunks, stride }
    }

    /// Number of the page that comes in place `index`; it begins anew after the last.
    pub fn page(&self, index: usize) -> usize {
        let (round, index) = (index / self.chunks, index % self.chunks);
        let chunk = index * self.stride % self.chunks;
        chunk * PER_CHUNK + (round + 5 * chunk) % PER_CHUNK
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
