//! What two processes say to each other about pages of images that one of them fills and the other maps.
//!
//! A request goes by a number of whoever asks.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::image::ImageName;
use crate::source::SourceError;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum PageMessage {
    /// From whoever maps an image: it does so, until it says [`Leave`](PageMessage::Leave). In the end comes
    /// [`Whole`](PageMessage::Whole) or [`Lost`](PageMessage::Lost), for all who map it there.
    Watch {
        /// Which.
        image: ImageName,
    },
    /// It takes no more pages of it.
    Leave {
        /// Which.
        image: ImageName,
    },
    /// Pages are missing. Answered by [`Came`](PageMessage::Came).
    Want {
        /// Number of this request.
        request: u64,
        /// Of this image.
        image: ImageName,
        /// File offsets of RAM in bytes.
        ranges: Vec<Range<u64>>,
    },
    /// Is all done that was said before? Answered by [`Came`](PageMessage::Came).
    Flush {
        /// Number of this request.
        request: u64,
    },
    /// From whoever fills an image: every page is there.
    Whole {
        /// Of this image.
        image: ImageName,
    },
    /// What an image holds cannot be relied on any more.
    Lost {
        /// Which.
        image: ImageName,
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
