//! Writes a job's answer to a disk, as [`forkvm_abi::records`] lays it out.

use alloc::vec::Vec;

use forkvm_abi::records::{COUNT_OFFSET, HEADER_SECTOR, LENGTH_OFFSET, MAGIC, TEXT_SECTOR};

use crate::virtio_blk::{Disk, DiskError, SECTOR};

/// Bytes that are gathered before they are written.
const PIECE: usize = 256 << 10;

/// A text on its way to a disk, piece by piece.
pub struct RecordsWriter<'a> {
    disk: &'a Disk,
    /// Starts on a sector; shorter than a piece between two calls.
    piece: Vec<u8>,
    sector: u64,
    len: u64,
    records: u64,
}

impl<'a> RecordsWriter<'a> {
    /// Starts a text on `disk`, whose content is given up.
    pub fn new(disk: &'a Disk) -> RecordsWriter<'a> {
        RecordsWriter {
            disk,
            piece: Vec::with_capacity(PIECE),
            sector: TEXT_SECTOR,
            len: 0,
            records: 0,
        }
    }

    /// Appends `text`, which holds `records` records.
    pub fn append(&mut self, mut text: &[u8], records: u64) -> Result<(), DiskError> {
        self.len += text.len() as u64;
        self.records += records;
        while self.piece.len() + text.len() >= PIECE {
            let (head, tail) = text.split_at(PIECE - self.piece.len());
            self.piece.extend_from_slice(head);
            self.write_piece()?;
            text = tail;
        }
        self.piece.extend_from_slice(text);
        Ok(())
    }

    /// Writes what is left, then the header, and makes both stable. Answers the number of records.
    pub fn finish(mut self) -> Result<u64, DiskError> {
        self.piece
            .resize(self.piece.len().next_multiple_of(SECTOR), 0);
        self.write_piece()?;
        self.disk.flush()?;
        let mut header = [0; SECTOR];
        header[..MAGIC.len()].copy_from_slice(&MAGIC);
        header[LENGTH_OFFSET..LENGTH_OFFSET + 8].copy_from_slice(&self.len.to_le_bytes());
        header[COUNT_OFFSET..COUNT_OFFSET + 8].copy_from_slice(&self.records.to_le_bytes());
        self.disk.write(HEADER_SECTOR, &header)?;
        self.disk.flush()?;
        Ok(self.records)
    }

    fn write_piece(&mut self) -> Result<(), DiskError> {
        self.disk.write(self.sector, &self.piece)?;
        self.sector += (self.piece.len() / SECTOR) as u64;
        self.piece.clear();
        Ok(())
    }
}
