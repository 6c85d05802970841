//! Frames: a length, four bytes, little-endian, and so many bytes of CBOR.
//!
//! A frame is read whole before it is looked at, so its length is bounded; a peer can make the other one
//! hold [`FRAME_MAX`] bytes, not more.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// Most bytes of CBOR in a frame.
pub const FRAME_MAX: usize = 256 << 10;

/// Bytes of the length.
const LENGTH: usize = 4;

/// The bytes of one frame, its length in front.
///
/// # Errors
/// [`FrameError::TooLong`] for what does not fit into a frame.
pub fn encode(frame: &impl Serialize) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; LENGTH];
    // A vector takes all bytes, and the messages have no maps with keys that CBOR lacks.
    ciborium::into_writer(frame, &mut bytes)
        .map_err(|error| FrameError::Nonsense(error.to_string()))?;
    let length = bytes.len() - LENGTH;
    if length > FRAME_MAX {
        return Err(FrameError::TooLong { length });
    }
    bytes[..LENGTH].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

/// What the CBOR of one frame says.
///
/// # Errors
/// [`FrameError::Nonsense`]: it is not CBOR, not a `T`, or more than one.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    let mut rest = body;
    let frame = ciborium::from_reader(&mut rest)
        .map_err(|error| FrameError::Nonsense(error.to_string()))?;
    if rest.is_empty() {
        Ok(frame)
    } else {
        let more = rest.len();
        Err(FrameError::Nonsense(format!("{more} bytes after its end")))
    }
}

/// Writes one frame, by one write where the stream takes it.
///
/// # Errors
/// As [`encode`], and [`FrameError::Stream`].
pub fn write(stream: &mut impl Write, frame: &impl Serialize) -> Result<(), FrameError> {
    let bytes = encode(frame)?;
    stream.write_all(&bytes)?;
    stream.flush()?;
    Ok(())
}

/// Reads the next frame; `None` where the stream ends before it.
///
/// # Errors
/// [`FrameError::Cut`] where the stream ends within it, [`FrameError::TooLong`] (its bytes are
/// not read then), those of [`decode`], and [`FrameError::Stream`].
pub fn read<T: DeserializeOwned>(stream: &mut impl Read) -> Result<Option<T>, FrameError> {
    let mut length = [0; LENGTH];
    match read_up_to(stream, &mut length)? {
        0 => return Ok(None),
        LENGTH => {}
        _ => return Err(FrameError::Cut),
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > FRAME_MAX {
        return Err(FrameError::TooLong { length });
    }
    let mut body = vec![0; length];
    if read_up_to(stream, &mut body)? < length {
        return Err(FrameError::Cut);
    }
    decode(&body).map(Some)
}

/// Fills `buffer` as far as the stream goes.
fn read_up_to(stream: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Why there is no frame.
#[derive(Debug, Error)]
pub enum FrameError {
    /// Nobody of this protocol sends so much.
    #[error(
        "a frame of {length} bytes, more than the {FRAME_MAX} that there can be: that is not the agent's protocol"
    )]
    TooLong {
        /// As the frame says.
        length: usize,
    },
    /// The other side went away.
    #[error("the stream ended within a frame")]
    Cut,
    /// Not CBOR, or not of this protocol.
    #[error("a frame that says nothing known: {0}")]
    Nonsense(String),
    /// The stream failed.
    #[error("the stream failed")]
    Stream(#[from] io::Error),
}
