//! What the engine and a worker say to each other about pages, over a socket of their own: who waits
//! for a page must not wait behind a clone that is being prepared.
//!
//! The engine fills all images; a worker maps them. It names an image by the number that the engine gave
//! it. What the engine says here is short and is always read, so the engine never waits for long.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::image::ImageNumber;
use crate::source::SourceError;

/// What a worker asks.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum PageCall {
    /// What becomes of an image? Answered once, by [`PageNews::Whole`] or [`PageNews::Lost`].
    Watch {
        /// Which.
        image: ImageNumber,
    },
    /// Pages are missing. Answered by [`PageNews::Came`].
    Want {
        /// Number of this request.
        request: u64,
        /// Of this image.
        image: ImageNumber,
        /// File offsets of RAM in bytes.
        ranges: Vec<Range<u64>>,
    },
}

/// What the engine answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum PageNews {
    /// Every page is there.
    Whole {
        /// Of this image.
        image: ImageNumber,
    },
    /// What an image holds cannot be relied on any more.
    Lost {
        /// Which.
        image: ImageNumber,
        /// What happened.
        why: SourceError,
    },
    /// The pages that were wanted are in the image's file, or will never be.
    Came {
        /// The request.
        request: u64,
        /// Why they will not.
        outcome: Result<(), SourceError>,
    },
}
