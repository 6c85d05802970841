//! Options of every command that forks: how memory is kept, mapped and filled.
//!
//! The words are the engine's. Which pairs exist is the engine's to say as well
//! ([`FreezeKind::check`]); here they are only held against each other before anything is built.

use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use forkvm::engine::spawn::Spawner;
use forkvm::engine::spawn::in_process::InProcess;
use forkvm::engine::{FaultConfig, check_userfaultfd};
use forkvm::{CloneSpec, FamilyConfig, FreezeKind, MemoryMode, Process, ProcessConfig};

use super::errors::Usage;
use super::worker;

/// Both memory modes.
const MODES: [MemoryMode; 2] = [MemoryMode::Cow, MemoryMode::Lazy];

/// See the module's text.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ForkOptions {
    /// How clones, and a machine that is restored, get their memory
    #[arg(long, value_name = "MODE", default_value = "cow", value_parser = modes())]
    pub(crate) memory_mode: MemoryMode,
    /// How a fork keeps the parent's memory
    #[arg(long, value_name = "FREEZE", default_value = "auto", value_parser = freezes())]
    freeze: FreezeKind,
    /// How fast memory that is not there yet is filled in the background: MiB a second, from 1 on;
    /// with `off` a page comes when it is touched, and never otherwise
    #[arg(long, value_name = "MIB_PER_S|off", default_value_t = Background::default())]
    background: Background,
    /// Where clones live
    #[arg(long, value_name = "SPAWNER", default_value = "in-process", value_parser = places())]
    spawner: Place,
}

/// Where clones live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    InProcess,
    Process,
}

impl ForkOptions {
    /// Refuses a pair that does not exist, and what this host cannot do.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        self.freeze
            .check(self.memory_mode)
            .map_err(|error| Usage(error.to_string()))?;
        let protects = matches!(self.freeze, FreezeKind::WriteProtect | FreezeKind::Delta);
        if protects || self.memory_mode == MemoryMode::Lazy {
            check_userfaultfd()?;
        }
        Ok(())
    }

    /// Whether the first fork of a booted VM is another one than those that follow.
    pub(crate) fn begins_otherwise(&self) -> bool {
        self.freeze == FreezeKind::Delta
    }

    /// A family whose forks are such, everything else by default. Starts workers, if its clones live in
    /// any.
    ///
    /// `delta` needs a parent that maps its memory privately, as a clone does. A VM that was booted
    /// does not, so as long as that is so its forks are done as `auto` chooses.
    pub(crate) fn family(&self) -> anyhow::Result<FamilyConfig> {
        let spec = CloneSpec {
            freeze: self.freeze,
            memory_mode: self.memory_mode,
            ..CloneSpec::default()
        };
        let while_shared = self.begins_otherwise().then(|| CloneSpec {
            freeze: FreezeKind::Auto,
            ..spec.clone()
        });
        let spawner: Arc<dyn Spawner> = match self.spawner {
            Place::InProcess => Arc::new(InProcess),
            Place::Process => Arc::new(Process::start(ProcessConfig::new(worker::program()?))?),
        };
        Ok(FamilyConfig {
            spawner,
            guest_forks: spec,
            guest_forks_while_shared: while_shared,
            faults: FaultConfig {
                background: self.background.0,
                ..FaultConfig::default()
            },
            ..FamilyConfig::default()
        })
    }
}

/// MiB a second; `None` for off.
#[derive(Clone, Copy, Debug)]
struct Background(Option<u32>);

impl Default for Background {
    fn default() -> Background {
        Background(FaultConfig::default().background)
    }
}

impl std::fmt::Display for Background {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(rate) => write!(f, "{rate}"),
            None => f.write_str("off"),
        }
    }
}

impl FromStr for Background {
    type Err = String;

    fn from_str(word: &str) -> Result<Background, String> {
        match word.parse() {
            _ if word == "off" => Ok(Background(None)),
            Ok(rate) if rate > 0 => Ok(Background(Some(rate))),
            _ => Err("it is a number of MiB a second, 1 or more, or off".into()),
        }
    }
}

fn places() -> impl TypedValueParser<Value = Place> {
    const IN_PROCESS: &str = "in-process";
    let values = [
        PossibleValue::new(IN_PROCESS).help("in this process, whose death ends them all"),
        PossibleValue::new("process")
            .help("in worker processes: what ends one of them ends its clones alone"),
    ];
    PossibleValuesParser::new(values).map(|word| match word.as_str() {
        IN_PROCESS => Place::InProcess,
        _ => Place::Process,
    })
}

pub(super) fn modes() -> impl TypedValueParser<Value = MemoryMode> {
    let value = |mode: MemoryMode| {
        PossibleValue::new(mode.as_str()).help(match mode {
            MemoryMode::Cow => "mapped copy-on-write from a whole image",
            MemoryMode::Lazy => {
                "runs at once; a page is fetched when it is first touched, from the running parent \
                 or from the saved machine"
            }
        })
    };
    PossibleValuesParser::new(MODES.map(value)).try_map(|word| word.parse::<MemoryMode>())
}

pub(super) fn freezes() -> impl TypedValueParser<Value = FreezeKind> {
    let value = |freeze: FreezeKind| {
        let about = match freeze {
            FreezeKind::Auto => "what serves the memory mode and is cheapest",
            FreezeKind::Remap => {
                "the parent's memory becomes the image and the parent goes on in a private mapping \
                 of it; nothing is copied. The first fork of a VM that was booted"
            }
            FreezeKind::WriteProtect => {
                "a page is copied before the parent writes it, or when a clone asks. As long as a \
                 VM that was booted was not remapped"
            }
            FreezeKind::Delta => {
                "the same for a clone or a remapped parent: only what it has written itself is \
                 looked at. The first fork of a VM that was booted is as auto then"
            }
            FreezeKind::Copy => "populated memory is copied in the pause; always possible",
            FreezeKind::Stop => "the parent does not run on; its memory is the image",
        };
        let modes: Vec<&str> = freeze.serves().iter().map(|mode| mode.as_str()).collect();
        PossibleValue::new(freeze.as_str()).help(format!("{about} [{}]", modes.join(", ")))
    };
    PossibleValuesParser::new(FreezeKind::ALL.map(value)).try_map(|word| word.parse::<FreezeKind>())
}
