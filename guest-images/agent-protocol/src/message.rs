//! What frames hold. The order in which they come is docs/agent.md's table.
//!
//! Names are what CBOR carries: a field can be added (with `#[serde(default)]`), none renamed, without a new
//! [`crate::VERSION`].

use serde::{Deserialize, Serialize};

use crate::{Bytes, Generation, MAGIC, VERSION};

/// From whoever opened the session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientFrame {
    /// First.
    Hello(Hello),
    /// Second, and once.
    Request(Request),
    /// Exec: bytes for the standard input, never more than there is room for.
    Stdin(Bytes),
    /// Exec: the standard input is over. With a terminal: its end-of-file character is typed.
    StdinEnd,
    /// Exec: a signal for the process group, 1..=31. Another one is refused, and the program goes on.
    Signal(u8),
    /// Exec: the terminal has another size.
    Resize(Size),
    /// Put: the next bytes of the file.
    Data(Bytes),
    /// Fork, in the parent: wait until all clones have ended.
    Join,
    /// Fork, in a clone: end this machine, with this as its exit status.
    End(u8),
}

/// From the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentFrame {
    /// First.
    Hello(Hello),
    /// The session is over: nothing was done, or it failed.
    Refused(Refusal),
    /// Exec: the program runs.
    Started {
        /// In the guest.
        pid: u32,
    },
    /// Exec: what it wrote; with a terminal, all of it.
    Stdout(Bytes),
    /// Exec: what it wrote to its standard error.
    Stderr(Bytes),
    /// Exec: so many more bytes of standard input may be sent.
    StdinRoom(u32),
    /// Exec: the program ended, and all that it wrote was sent before.
    Ended(Exit),
    /// Put: the data may come.
    Ready,
    /// Put: the file is there.
    Stored,
    /// Get: the data follow.
    File {
        /// Permissions.
        mode: u32,
        /// Bytes, as the file system says: 0 for what the kernel makes up while it is read.
        length: u64,
    },
    /// Get: the next bytes.
    Data(Bytes),
    /// Get: that was all.
    DataEnd,
    /// Identify: the machine is who it shall be.
    Identified(Identified),
    /// Health.
    Healthy(Healthy),
    /// AfterFork: names of the hooks that ran, in order.
    HooksRan(Vec<String>),
    /// Fork: in the parent, and in each clone.
    Forked(Forked),
    /// Join: all clones have ended.
    Joined {
        /// The worst exit status.
        status: u32,
    },
    /// PowerOff: the machine ends now.
    PoweringOff,
}

/// Who speaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::MAGIC`].
    pub magic: String,
    /// [`crate::VERSION`].
    pub version: u32,
    /// Bits of [`crate::feature`].
    #[serde(default)]
    pub features: u64,
}

impl Hello {
    /// This side's, with `features`.
    pub fn new(features: u64) -> Hello {
        Hello {
            magic: MAGIC.into(),
            version: VERSION,
            features,
        }
    }

    /// What is wrong with a peer that says this, if anything.
    pub fn fault(&self) -> Option<String> {
        if self.magic != MAGIC {
            let magic = &self.magic;
            return Some(format!("it says {magic:?} where {MAGIC:?} is said"));
        }
        (self.version != VERSION).then(|| {
            let theirs = self.version;
            format!("it speaks version {theirs} of the agent's protocol, this side version {VERSION}: use agent and forkvm of one release")
        })
    }
}

/// What a session is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Run a program: `Started`, then both sides' frames of it, then `Ended`.
    Exec(Exec),
    /// Write a file: `Ready`, then the client's `Data`, then `Stored`.
    Put {
        /// Absolute. What is there is replaced, a symbolic link itself, not what it points to.
        path: Bytes,
        /// Permissions, 0..=0o7777; no file gets more of them than 0o777.
        mode: u32,
        /// Bytes that follow.
        length: u64,
    },
    /// Read a file: `File`, `Data`, `DataEnd`.
    Get {
        /// Absolute.
        path: Bytes,
    },
    /// Become another machine: `Identified`.
    Identify(Identity),
    /// `Healthy`.
    Health,
    /// Fork this machine: `Forked`, in the parent and in each clone.
    Fork {
        /// 1 or more.
        clones: u32,
    },
    /// The host has forked this machine, which is the parent: run its hooks, `HooksRan`.
    AfterFork,
    /// End this machine in order: `PoweringOff`.
    PowerOff,
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program, looked for in PATH unless it has a slash, and its arguments.
    pub argv: Vec<Bytes>,
    /// Put on top of PATH, HOME and USER.
    #[serde(default)]
    pub env: Vec<(Bytes, Bytes)>,
    /// Working directory; the user's home, or `/`, without.
    #[serde(default)]
    pub directory: Option<Bytes>,
    /// Name or number of the user; the agent's own, root, without.
    #[serde(default)]
    pub user: Option<String>,
    /// Give it a terminal of this size: it has a session of its own then, and no standard error apart.
    #[serde(default)]
    pub terminal: Option<Size>,
}

/// Of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this status.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

impl Exit {
    /// As a shell tells it: the status, or 128 and the signal's number.
    pub fn status(self) -> u8 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => 128 | signal,
        }
    }
}

/// Who a machine shall be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// 0 in a parent, 1.. in a clone.
    pub clone_id: u32,
    /// What no other machine has.
    pub generation: Generation,
    /// 1..=64 bytes.
    pub hostname: String,
    /// 32 hexadecimal digits, lower case.
    pub machine_id: String,
    /// For the kernel's random numbers, [`crate::ENTROPY_MIN`] bytes or more, all of them secret.
    pub entropy: Bytes,
    /// Nanoseconds since 1970, UTC.
    pub wall_clock: u64,
    /// The address of the machine's vsock.
    pub cid: u64,
}

/// Who a machine has become.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identified {
    /// As asked for.
    pub generation: Generation,
    /// What the kernel tells time by, `kvm-clock`; empty where it does not say.
    pub clock_source: String,
    /// Names of the hooks that ran, in order.
    pub hooks: Vec<String>,
    /// What each step took, in order.
    #[serde(default)]
    pub steps: Vec<StepTook>,
}

/// A step of an identification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepTook {
    /// `vsock-address`, `hostname`, `machine-id`, `entropy`, `clock`, `hooks`.
    pub step: String,
    /// Microseconds of the guest's monotonic clock.
    pub us: u64,
}

/// How the agent is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Healthy {
    /// Of the agent's release.
    pub version: String,
    /// Milliseconds since the kernel booted, clones' time before the fork included.
    pub uptime_ms: u64,
    /// As in [`Identified`].
    pub clock_source: String,
    /// Of the identity that was taken on; none in a clone that has not been told its own.
    pub generation: Option<Generation>,
    /// Its clone id.
    pub clone_id: Option<u32>,
}

/// What a fork has made of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forked {
    /// 0 in the parent, 1..=granted in the clones.
    pub clone_id: u32,
    /// Clones that there are, at most as many as were asked for.
    pub granted: u32,
    /// Of this machine, now.
    pub generation: Generation,
}

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Linux's number.
    pub errno: i32,
    /// For people: what was tried, on what.
    pub text: String,
}
