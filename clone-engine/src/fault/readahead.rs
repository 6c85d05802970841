//! Which pages a VM that touches its memory in order will touch next.
//!
//! A VM that misses three chunks in a row is taken to read on, and what follows is brought before it
//! asks: a chunk at first, then twice as much after each further miss, up to a window. Scattered
//! touches bring nothing ahead. The streams of several vCPUs are told apart. Knows no images; the
//! fault thread asks it ([`VmMemory`](crate::vm_memory::VmMemory)) between two faults.

use std::ops::Range;

/// Streams of one VM that are followed at a time; the one that was quiet for longest goes first.
const MOST_STREAMS: usize = 8;

/// Misses in a row after which something is brought ahead.
const IN_A_ROW: u32 = 3;

/// See the module's text. Offsets are file offsets of RAM in bytes.
#[derive(Debug)]
pub(crate) struct Readahead {
    chunk: u64,
    /// Most bytes that are brought ahead of a stream.
    most: u64,
    /// The one that missed last at the end.
    streams: Vec<Stream>,
}

#[derive(Debug)]
struct Stream {
    /// From where on pages were brought for it without a gap.
    start: u64,
    /// Up to where: its next miss is here.
    at: u64,
    /// Up to where pages shall be brought before that.
    until: u64,
    window: u64,
    in_a_row: u32,
}

impl Readahead {
    /// `chunk` is what a miss brings, `most` how much may be brought ahead of one stream; 0 for
    /// nothing.
    pub(crate) fn new(chunk: u64, most: u64) -> Readahead {
        Readahead {
            chunk,
            most,
            streams: Vec::new(),
        }
    }

    /// A miss has brought `range`, which lies in memory that ends at `end`. Whether something should
    /// be brought ahead now.
    pub(crate) fn missed(&mut self, range: &Range<u64>, end: u64) -> bool {
        let found = self
            .streams
            .iter()
            .position(|stream| (stream.start..=stream.at).contains(&range.start));
        let Some(found) = found else {
            if self.streams.len() == MOST_STREAMS {
                self.streams.remove(0);
            }
            self.streams.push(Stream {
                start: range.start,
                at: range.end,
                until: range.end,
                window: 0,
                in_a_row: 1,
            });
            return false;
        };
        let mut stream = self.streams.remove(found);
        // A miss behind the end was raised before its page came ahead.
        if range.start == stream.at {
            stream.in_a_row += 1;
            stream.at = range.end;
            if stream.in_a_row >= IN_A_ROW {
                stream.window = (stream.window * 2).max(self.chunk).min(self.most);
            }
            stream.start = range.start;
            stream.until = (range.end + stream.window).min(end).max(range.end);
        }
        let more = stream.at < stream.until;
        self.streams.push(stream);
        more
    }

    /// What is to be brought ahead next: a chunk at most, for the stream that missed last.
    pub(crate) fn next(&mut self) -> Option<Range<u64>> {
        let waiting = self.streams.iter_mut().rev();
        let stream = waiting
            .into_iter()
            .find(|stream| stream.at < stream.until)?;
        let end = (stream.at / self.chunk + 1) * self.chunk;
        let range = stream.at..end.min(stream.until);
        stream.at = range.end;
        Some(range)
    }

    /// What was to be brought ahead cannot be: the streams go on when they miss again.
    pub(crate) fn stop(&mut self) {
        for stream in &mut self.streams {
            stream.until = stream.at;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 64 << 10;
    const END: u64 = 1 << 30;

    fn readahead() -> Readahead {
        Readahead::new(CHUNK, 16 * CHUNK)
    }

    fn chunk(number: u64) -> Range<u64> {
        number * CHUNK..(number + 1) * CHUNK
    }

    /// A VM that touches chunks in order from `first` on: how many it misses until `end`.
    fn misses(readahead: &mut Readahead, first: u64, end: u64) -> Vec<u64> {
        let (mut missed, mut at) = (Vec::new(), first * CHUNK);
        while at < end * CHUNK {
            missed.push(at / CHUNK);
            readahead.missed(&(at..at + CHUNK), END);
            at += CHUNK;
            while let Some(next) = readahead.next() {
                assert_eq!(next.start, at, "in order, without a gap");
                at = next.end;
            }
        }
        missed
    }

    #[test]
    fn a_vm_that_reads_on_misses_less_and_less() {
        // Three in a row, then 1, 2, 4, 8 and always 16 chunks are there before the next miss.
        let expected = [0, 1, 2, 4, 7, 12, 21, 38, 55];
        assert_eq!(misses(&mut readahead(), 0, 60), expected);
    }

    #[test]
    fn scattered_touches_bring_nothing_ahead() {
        let mut readahead = readahead();
        for number in 0..1000 {
            let scattered = chunk(number * 7919 % 16384);
            assert!(!readahead.missed(&scattered, END));
            assert_eq!(readahead.next(), None);
        }
    }

    #[test]
    fn two_in_a_row_are_chance() {
        let mut readahead = readahead();
        for number in (0..1000).step_by(3) {
            assert!(!readahead.missed(&chunk(number), END));
            assert!(!readahead.missed(&chunk(number + 1), END));
        }
        assert_eq!(readahead.next(), None);
    }

    #[test]
    fn the_streams_of_several_vcpus_are_told_apart() {
        let mut readahead = readahead();
        for step in 0..3 {
            for vcpu in 0..MOST_STREAMS as u64 {
                let more = readahead.missed(&chunk(vcpu * 1000 + step), END);
                assert_eq!(more, step == 2, "vcpu {vcpu} step {step}");
                while let Some(next) = readahead.next() {
                    assert_eq!(next, chunk(vcpu * 1000 + 3));
                }
            }
        }
    }

    #[test]
    fn nothing_is_brought_beyond_the_end_of_the_memory() {
        let mut readahead = readahead();
        let end = 4 * CHUNK - 4096;
        for number in 0..3 {
            readahead.missed(&chunk(number), end);
        }
        assert_eq!(readahead.next(), Some(3 * CHUNK..end));
        assert_eq!(readahead.next(), None);
    }

    #[test]
    fn a_miss_that_was_raised_before_its_page_came_changes_nothing() {
        let mut readahead = readahead();
        misses(&mut readahead, 0, 3);
        let late = chunk(3).start..chunk(3).start + 4096;
        assert!(!readahead.missed(&late, END));
        assert!(readahead.missed(&chunk(4), END));
        assert_eq!(readahead.next(), Some(chunk(5)));
    }

    #[test]
    fn what_cannot_be_brought_is_not_asked_for_again() {
        let mut readahead = readahead();
        (0..3).for_each(|number| assert_eq!(readahead.missed(&chunk(number), END), number == 2));
        readahead.stop();
        assert_eq!(readahead.next(), None);
    }

    #[test]
    fn without_a_window_nothing_is_brought_ahead() {
        let mut readahead = Readahead::new(CHUNK, 0);
        assert_eq!(misses(&mut readahead, 0, 50).len(), 50);
    }
}
