//! Where a VM's memory lies in this process, and how the kernel has it in pieces.
#![allow(unsafe_code)] // A slice of guest memory by address.

use super::*;

/// One region of RAM in this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostRange {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) address: u64,
}

impl VmMemory {
    pub(super) fn range_of(&self, offset: u64) -> HostRange {
        let found = self.ranges.iter().find(|range| offset < range.end());
        *found.expect("an offset within the RAM")
    }

    /// Host addresses of `range`, which lies in one region.
    pub(super) fn host(&self, range: &Range<u64>) -> Range<u64> {
        let within = self.range_of(range.start);
        let start = within.address + (range.start - within.offset);
        start..start + (range.end - range.start)
    }

    /// The kernel's mappings of this memory, as file offsets: a call of a userfaultfd that installs,
    /// protects or unprotects may not cross a border between two.
    pub(super) fn mappings(&self) -> Vec<Range<u64>> {
        let under = self.under();
        let whole = 0..self.ranges.last().map_or(0, HostRange::end);
        let parts: Vec<Range<u64>> = match under.mapped.as_slice() {
            [] => vec![whole],
            mapped => mapped.iter().map(|(range, _)| range.clone()).collect(),
        };
        let cut = |part: &Range<u64>| {
            let part = part.clone();
            self.ranges.iter().filter_map(move |range| {
                let both = part.start.max(range.offset)..part.end.min(range.end());
                (!both.is_empty()).then_some(both)
            })
        };
        parts.iter().flat_map(cut).collect()
    }

    /// Calls `each` for the host addresses of `range`, cut to `mappings`.
    pub(super) fn in_mappings(
        &self,
        mappings: &[Range<u64>],
        range: &Range<u64>,
        each: impl Fn(&Shard, &Range<u64>) -> Result<(), UserfaultError>,
    ) -> Result<(), UserfaultError> {
        let Some(shard) = self.shard.get() else {
            return Ok(());
        };
        let first = mappings.partition_point(|mapping| mapping.end <= range.start);
        let met = mappings[first..]
            .iter()
            .take_while(|mapping| mapping.start < range.end);
        for mapping in met {
            let part = range.start.max(mapping.start)..range.end.min(mapping.end);
            each(shard, &self.host(&part))?;
        }
        Ok(())
    }

    /// The bytes of `range`, which lies in one region.
    pub(super) fn slice(&self, range: &Range<u64>) -> VolatileSlice<'_> {
        let host = self.host(range);
        // SAFETY: the range lies in a region whose addresses `_addresses` holds; others write it meanwhile,
        // which is what volatile access is for.
        unsafe { VolatileSlice::new(host.start as *mut u8, (host.end - host.start) as usize) }
    }
}

impl HostRange {
    pub(super) fn end(&self) -> u64 {
        self.offset + self.len
    }

    pub(super) fn host(&self) -> Range<u64> {
        self.address..self.address + self.len
    }
}
