//! What the host and the agent in a guest say to each other, over one stream of bytes a session.
//!
//! [`frame`] cuts the stream into frames, [`message`] says what they hold. docs/agent.md tells the whole
//! conversation. It opens no socket and keeps no state: `forkvm-agent` does in the guest, `forkvm`'s
//! `agent` module on the host, and `forkvm-guest` for programs inside.
#![forbid(unsafe_code)]

mod bytes;
pub mod frame;
mod generation;
pub mod message;

pub use bytes::Bytes;
pub use frame::{FRAME_MAX, FrameError};
pub use generation::Generation;
pub use message::{
    AgentFrame, ClientFrame, Exec, Exit, Forked, Healthy, Hello, Identified, Identity, Refusal,
    Request, Size, StepTook,
};

/// The vsock port that the agent listens on.
pub const PORT: u32 = 1024;

/// What [`Hello::magic`] is: nobody else says it by chance.
pub const MAGIC: &str = "forkvm-agent";

/// Version of the conversation. Another one is refused by both sides.
pub const VERSION: u32 = 1;

/// Bits of [`Hello::features`]. A bit that is not known is ignored.
pub mod feature {
    /// The machine has a fork doorbell: [`crate::Request::Fork`] is served.
    pub const FORK: u64 = 1 << 0;
}

/// Bytes of standard input that a client may send before the first [`AgentFrame::StdinRoom`].
pub const STDIN_WINDOW: u32 = 64 << 10;

/// Most bytes of a file or an output that one frame carries: well below [`FRAME_MAX`].
pub const CHUNK: usize = 64 << 10;

/// Fewest bytes of entropy in an [`Identity`].
pub const ENTROPY_MIN: usize = 32;

/// The socket of the agent inside a guest, for programs of the guest.
pub const LOCAL_SOCKET: &str = "/run/forkvm/agent.sock";
