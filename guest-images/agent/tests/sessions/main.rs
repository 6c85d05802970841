//! The agent as an ordinary process of this host, spoken to frame by frame.

mod agent;
mod exec;
mod files;
mod local;
mod strangers;
