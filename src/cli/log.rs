//! Logging: traces of all crates to standard error.

use std::env;

use tracing_subscriber::EnvFilter;

use super::errors::Usage;

/// Used when `--log` is not given.
const VARIABLE: &str = "FORKVM_LOG";

/// Starts logging by `filter`, the environment, or warnings only.
pub(crate) fn init(filter: Option<&str>) -> anyhow::Result<()> {
    let from_environment = env::var(VARIABLE).ok();
    let (origin, filter) = match (filter, &from_environment) {
        (Some(filter), _) => ("--log", filter),
        (None, Some(filter)) => (VARIABLE, filter.as_str()),
        (None, None) => ("default", "warn"),
    };
    let parsed = EnvFilter::try_new(filter)
        .map_err(|error| Usage(format!("{origin}: {filter:?} is no log filter: {error}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}
