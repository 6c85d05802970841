//! The `forkvm` command.

fn main() {}
