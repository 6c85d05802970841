//! The command line: one module per command.
//!
//! A command prints for people and returns an [`Outcome`]; what all commands share (options,
//! logging, JSON, errors, exit codes) is here and in [`output`]. Words and exit codes are a contract
//! with scripts: 0 done, 1 failed, 2 usage, 3 the host lacks something, 128 + n ended by signal n.

mod bench;
mod console;
mod control;
mod demo;
mod demo_linux;
mod disk;
mod disk_option;
mod doctor;
mod errors;
mod fork_options;
mod image;
mod introductions;
mod kernel_options;
mod log;
mod machines;
mod output;
mod progress;
mod raw_terminal;
mod restore;
mod run;
mod said;
mod session;
mod state;
mod stop;
mod template;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use forkvm::engine::limits;

use output::{Outcome, Output};

const EXAMPLES: &str = "\
Examples:
  forkvm doctor                                  Does this host suffice?
  forkvm run --guest hello                       Boot the guest that forkvm carries with it
  forkvm run --guest 'fork n=3 mib=4'            A guest that forks itself into three clones
  forkvm run --image minimal                     A Linux machine (`forkvm image build minimal`)
  forkvm run --guest 'touch mib=64' --save DIR   Ctrl-C saves the machine to DIR ...
  forkvm restore DIR                             ... and this lets it run on
  forkvm restore DIR --memory-mode lazy          At once, with its memory read as it is touched
  forkvm run --guest obey --name web             A machine that can be asked for by its name:
  forkvm ps                                      ... which machines run, and their clones
  forkvm fork web -n 8                           ... eight clones of it, now
  forkvm console web.3                           ... what one of them prints; Ctrl-] leaves it
  forkvm state show DIR                          What is in a saved machine
  forkvm bench instantiate --quick               How fast is it here?
  forkvm disk commit disk.img                    Merge what a forked VM wrote into its disk
  forkvm image build minimal                     A Linux kernel and initramfs to boot
  forkvm template create web                     ... boot them once, and from then on start
  forkvm fork web -n 8 -- hostname               ... clones, with a program in each

Exit codes: 0 done, 1 failed, 2 usage, 3 the host lacks something, 128+n ended by signal n;
run and restore end with the status of the VM that was started.";

/// fork() for virtual machines.
#[derive(Debug, Parser)]
#[command(name = "forkvm", version, about, after_help = EXAMPLES)]
struct Cli {
    /// Write the result as one JSON object to FILE; with `-` to standard output, and all else goes
    /// to standard error
    #[arg(long, value_name = "FILE", global = true)]
    json: Option<PathBuf>,
    /// What to log to standard error, such as `info` or `forkvm_clone_engine=debug` [default: warn,
    /// or the environment variable FORKVM_LOG]
    #[arg(long, value_name = "FILTER", global = true)]
    log: Option<String>,
    #[command(subcommand)]
    command: Command,
}

/// Each is a module of its name.
#[derive(Debug, Subcommand)]
enum Command {
    /// Check whether this host has what forkvm needs, and say how to mend what it lacks
    Doctor(doctor::Doctor),
    /// Run the main job on real input: clones of one VM map reads of real genomes
    Demo(demo::Demo),
    /// Boot a Linux machine once, and run a program of Debian's in clones of it
    DemoLinux(demo_linux::DemoLinux),
    /// Measure what forkvm does, so that it can be quoted and repeated
    Bench(bench::Bench),
    /// Boot a VM and serve it until it and all its clones have ended
    Run(run::Run),
    /// Let a saved VM run on
    Restore(restore::Restore),
    /// List the machines that run, and their clones
    Ps(machines::Ps),
    /// Tell more of one
    Info(machines::Info),
    /// Let it stand until it is resumed
    Pause(machines::Pause),
    /// Let it run on
    Resume(machines::Resume),
    /// Save it to a directory, and end it
    Save(machines::Save),
    /// Make clones of a running machine, which go on from this very instant
    Fork(machines::Fork),
    /// Switch it off in order, as its own poweroff does
    Stop(machines::Stop),
    /// End it at once
    Kill(machines::Kill),
    /// Wait for its end, and end with its status
    Wait(machines::Wait),
    /// See what it prints from now on, and type to it
    Console(machines::Console),
    /// Run a program in it
    Exec(machines::Exec),
    /// Copy a file into it, or out of it
    Cp(machines::Copy),
    /// Look at saved machines
    #[command(subcommand)]
    State(state::State),
    /// Work on disks that were forked
    #[command(subcommand)]
    Disk(disk::Disk),
    /// Build the Linux images that machines boot, and look after those that were built
    #[command(subcommand)]
    Image(image::Image),
    /// Make templates: machines that were booted once, for clones to start from
    #[command(subcommand)]
    Template(template::Template),
    /// Run clones for the process that started this one
    #[command(hide = true)]
    Worker,
    /// Print the completions of a shell, to be put where that shell looks for them
    #[command(after_help = "Example:\n  forkvm completions bash > /etc/bash_completion.d/forkvm")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Runs the command that the arguments name.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = log::init(cli.log.as_deref()) {
        return errors::report(&error);
    }
    if let Err(error) = limits::raise_nofile() {
        tracing::warn!(%error, "RLIMIT_NOFILE could not be raised: few clones will fit");
    }
    let output = Output::new(cli.json);
    let outcome = cli.command.run(&output);
    let status = match &outcome {
        Ok(outcome) => ExitCode::from(outcome.status),
        Err(error) => errors::report(error),
    };
    let report = match outcome {
        Ok(outcome) => outcome.report,
        Err(error) => errors::to_json(&error),
    };
    match output.write_json(&report) {
        Ok(()) => status,
        Err(error) => errors::report(&error),
    }
}

impl Command {
    fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        match self {
            Command::Doctor(command) => command.run(output),
            Command::Demo(command) => command.run(output),
            Command::DemoLinux(command) => command.run(output),
            Command::Bench(command) => command.run(output),
            Command::Run(command) => command.run(output),
            Command::Restore(command) => command.run(output),
            Command::Ps(command) => command.run(output),
            Command::Info(command) => command.run(output),
            Command::Pause(command) => command.run(output),
            Command::Resume(command) => command.run(output),
            Command::Save(command) => command.run(output),
            Command::Fork(command) => command.run(output),
            Command::Stop(command) => command.run(output),
            Command::Kill(command) => command.run(output),
            Command::Wait(command) => command.run(output),
            Command::Console(command) => command.run(output),
            Command::Exec(command) => command.run(output),
            Command::Cp(command) => command.run(output),
            Command::State(command) => command.run(output),
            Command::Disk(command) => command.run(output),
            Command::Image(command) => command.run(output),
            Command::Template(command) => command.run(output),
            Command::Worker => worker::run(),
            Command::Completions { shell } => {
                let mut text = output.text();
                clap_complete::generate(shell, &mut Cli::command(), "forkvm", &mut text);
                Ok(Outcome::done(
                    serde_json::json!({ "shell": shell.to_string() }),
                ))
            }
        }
    }
}
