//! A machine with a name, and others that ask it: in a runtime directory that no other test has.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::harness::{Ended, Running, forkvm, wait_until};

/// See the module's text.
pub(crate) struct Named {
    pub(crate) running: Running,
    name: String,
    dir: TempDir,
}

impl Named {
    /// `forkvm run --name NAME` of the embedded guest's job `obey`, which waits for what it is told.
    pub(crate) fn obedient(name: &str) -> Named {
        Named::run(name, &["--guest", "obey pages=16"])
    }

    /// The same with these options. It can be asked, and its guest is ready.
    pub(crate) fn run(name: &str, options: &[&str]) -> Named {
        let dir = tempfile::tempdir().unwrap();
        let args = ["run", "--name", name, "--memory", "64"];
        let running = Running::start(dir.path(), &[&args[..], options].concat());
        let mut named = Named {
            running,
            name: name.into(),
            dir,
        };
        named.wait_until_ready();
        named
    }

    /// Waits until the guest has reported that it is.
    fn wait_until_ready(&mut self) {
        let (dir, name) = (self.dir.path(), self.name.as_str());
        self.running.wait_until("it is ready", || {
            let info = forkvm(dir, &["info", name, "--json", "-"]);
            let info: Value = serde_json::from_str(&info.stdout()).unwrap_or_default();
            info["reports"]["count"].as_u64() > Some(0)
        });
    }

    /// Where all commands of the test run.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The machine's own directory.
    pub(crate) fn place(&self) -> PathBuf {
        place(self.dir(), &self.name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.place().join("control.sock")
    }

    /// A command that asks it, run to its end.
    pub(crate) fn forkvm(&self, args: &[&str]) -> Ended {
        forkvm(self.dir(), args)
    }

    /// The object of a command that succeeds.
    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let ended = self.forkvm(&[args, &["--json", "-"]].concat());
        assert_eq!(ended.code(), 0, "{args:?}: {}", ended.stderr());
        serde_json::from_str(&ended.stdout()).unwrap()
    }

    /// `forkvm console VM`, to type by a pipe.
    pub(crate) fn console(&self, vm: &str) -> Running {
        let mut console = Running::start_with(self.dir(), &["console", vm], Stdio::piped());
        let pid = console.id();
        // It listens to its user once it hears the machine.
        console.wait_until("it is connected", || has_thread(pid, "stdin"));
        console
    }

    /// Names and states, as `ps` tells them.
    pub(crate) fn states(&self) -> Vec<(String, String)> {
        let ps = self.json(&["ps"]);
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let vms = ps["vms"].as_array().unwrap().iter();
        vms.map(|vm| (text(&vm["name"]), text(&vm["state"])))
            .collect()
    }

    /// As many clients as may be, all of which are served.
    pub(crate) fn all_clients(&self) -> Vec<Client> {
        let mut clients = Vec::new();
        // Those who were served before may have hung up only just now.
        wait_until("nobody else is served", || {
            clients = (0..32).map(|_| self.client()).collect();
            let served = |client: &mut Client| {
                client.send(b"{\"forkvm\":1,\"do\":\"ps\"}\n");
                client.hear().is_some_and(|answer| answer["ok"].is_object())
            };
            clients.iter_mut().all(served)
        });
        clients
    }

    /// A client of our own.
    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.socket())
    }
}

/// The directory of the machine `name` for commands that run in `dir`.
pub(crate) fn place(dir: &Path, name: &str) -> PathBuf {
    dir.join("forkvm").join(name)
}

fn has_thread(pid: u32, name: &str) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let mut names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.any(|found| found.trim_end() == name)
}

/// Somebody who speaks, or should, what docs/control-socket.md says.
pub(crate) struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Client {
    pub(crate) fn connect(socket: &Path) -> Client {
        let stream = UnixStream::connect(socket).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        Client { stream, lines }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        match self.stream.write_all(bytes) {
            // It may have refused a client before that has asked; it says so.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            sent => sent.unwrap(),
        }
    }

    /// The next line; `None` when the machine has hung up.
    pub(crate) fn hear(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn ask(&mut self, mut request: Value) -> Value {
        request["forkvm"] = json!(1);
        self.send(format!("{request}\n").as_bytes());
        self.hear().unwrap()
    }
}
