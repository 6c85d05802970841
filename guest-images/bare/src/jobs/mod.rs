//! The jobs, by name. A job is one file here and one line in [`JOBS`].

mod blk_verify;
mod counter;
mod discard;
mod fork;
mod hello;
mod map_reads;
mod obey;
mod oracle;
mod reach;
mod registers;
mod ring;
mod rubbish;
mod save;
mod spin;
mod sweep;
mod touch;
mod tree;
mod triple_fault;
mod window;
mod work;

use crate::args::Args;
use crate::machine::Machine;
use crate::println;

/// Exit status of a job that did what it should.
pub const OK: u32 = 0;
/// Exit status of a job that found something wrong; it has printed what.
pub const WRONG: u32 = 1;
/// Exit status of a command line that cannot be served.
pub const USAGE: u32 = 2;

/// A job: what it is handed, and the exit status that it ends with.
type Job = fn(&Machine, Args<'_>) -> u32;

/// Every job, with the name that `job=` takes.
const JOBS: &[(&str, Job)] = &[
    ("blk-verify", blk_verify::run),
    ("counter", counter::run),
    ("discard", discard::run),
    ("fork", fork::run),
    ("hello", hello::run),
    ("map-reads", map_reads::run),
    ("obey", obey::run),
    ("oracle", oracle::run),
    ("reach", reach::run),
    ("registers", registers::run),
    ("ring", ring::run),
    ("rubbish", rubbish::run),
    ("save", save::run),
    ("spin", spin::run),
    ("sweep", sweep::run),
    ("touch", touch::run),
    ("tree", tree::run),
    ("triple-fault", triple_fault::run),
    ("window", window::run),
    ("work", work::run),
];

/// Runs the job that `command_line` names.
pub fn run(machine: &Machine, command_line: &str) -> u32 {
    let args = Args::new(command_line);
    let name = args.text("job").unwrap_or_default();
    match JOBS.iter().find(|(job, _)| *job == name) {
        Some((_, job)) => job(machine, args),
        None => {
            println!("no job {name:?}; say job=NAME on the command line, with one of:");
            JOBS.iter().for_each(|(job, _)| println!("  {job}"));
            USAGE
        }
    }
}
