//! Commands that hold on to a machine which another process runs: `forkvm ps`, `info`, `pause`, `resume`,
//! `save`, `fork`, `stop`, `kill`, `wait`, `console`, `exec` and `cp`.
//!
//! Each is a client of that process's control socket (`super::control`), `stop`, `exec` and `cp` of the machine's agent as
//! well (`forkvm::agent`); nothing of a VM is here.

mod acts;
mod console;
mod copy;
mod exec;
mod info;
mod ps;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::control::client::Connection;
use super::control::protocol::Request;

pub(crate) use acts::{Fork, Kill, Pause, Resume, Save, Stop, Wait};
pub(crate) use console::Console;
pub(crate) use copy::Copy;
pub(crate) use exec::Exec;
pub(crate) use info::Info;
pub(crate) use ps::Ps;

/// Asks the machine that `vm` is of.
fn ask(vm: &str, request: &Request) -> anyhow::Result<Value> {
    Connection::to(vm)?.ask(request)
}

/// What is known of `vm`.
fn info_of(vm: &str) -> anyhow::Result<Value> {
    let request = Request::Info { vm: vm.to_owned() };
    Connection::to(vm)?.look_up(&request)
}

/// A text of an answer; empty if there is none.
fn text<'a>(answer: &'a Value, key: &str) -> &'a str {
    answer[key].as_str().unwrap_or_default()
}

/// What was said since when, for people.
pub(crate) fn ago(unix_ms: &Value) -> String {
    let since = UNIX_EPOCH + Duration::from_millis(unix_ms.as_u64().unwrap_or_default());
    let seconds = SystemTime::now()
        .duration_since(since)
        .unwrap_or_default()
        .as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}
