//! Logging: traces of all crates to standard error.

use std::env;
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;

use super::errors::Usage;

/// Used when `--log` is not given.
const VARIABLE: &str = "FORKVM_LOG";

/// What `--log` said.
static OPTION: OnceLock<String> = OnceLock::new();

/// What `--log` said, for a process that is to log the same; the environment it inherits.
pub(crate) fn option() -> Option<&'static str> {
    OPTION.get().map(String::as_str)
}

/// Starts logging by `filter`, the environment, or warnings only.
pub(crate) fn init(option: Option<&str>) -> anyhow::Result<()> {
    let from_environment = env::var(VARIABLE).ok();
    let (origin, filter) = match (option, &from_environment) {
        (Some(filter), _) => ("--log", filter),
        (None, Some(filter)) => (VARIABLE, filter.as_str()),
        (None, None) => ("default", "warn"),
    };
    let parsed = EnvFilter::try_new(filter)
        .map_err(|error| Usage(format!("{origin}: {filter:?} is no log filter: {error}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        // A file, or a reader of a pipe, wants no escape sequences.
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    if let Some(option) = option {
        OPTION.get_or_init(|| option.to_owned());
    }
    Ok(())
}
