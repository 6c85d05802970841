//! One program under two names: the agent, and `forkvm-guest` for those who live in the machine.

use std::env;
use std::path::Path;
use std::process::ExitCode;

use forkvm_agent::{agent, init, inside, log, options};

fn main() -> ExitCode {
    let mut arguments = env::args_os();
    let name = arguments.next().unwrap_or_default();
    if Path::new(&name).ends_with("forkvm-guest") {
        return inside::main(arguments.collect());
    }
    if std::process::id() == 1 {
        init::main()
    }
    let ended = options::parse(arguments)
        .map_err(|error| error.to_string())
        .and_then(|options| agent::serve(&options).map_err(|error| error.to_string()));
    match ended {
        Ok(never) => match never {},
        Err(error) => {
            log::line(&error);
            ExitCode::FAILURE
        }
    }
}
