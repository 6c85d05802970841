//! A VM that runs the job `obey`, and does with its memory what its console says.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use std::{env, process};

use forkvm::End;
use forkvm::engine::Member;

use super::{Guest, Kept, LONG};

/// How long a guest may take to read a line before the console's interrupt is raised once more.
///
/// In the lane, never elsewhere, a guest was seen, once in some thousand runs, to sleep on with a line
/// in the console's queue (docs/testing.md). What happens after it has read the line is not helped by
/// this: nothing is rung for a page that does not come.
const NUDGE: Duration = Duration::from_secs(1);

/// How long until it counts as deaf: no interrupt reaches it any more.
const DEAF: Duration = Duration::from_secs(30);

/// With this status a test of the lane ends whose guest is deaf; the lane then runs it once more, and
/// says so.
const DEAF_STATUS: i32 = 77;

/// A VM and what it has answered so far.
pub struct Obedient<'a> {
    consoles: &'a Kept,
    pub member: Arc<Member>,
    /// Bytes of the consoles that were read.
    read: usize,
}

impl<'a> Obedient<'a> {
    /// `member` of the family of `vm`, which waits for a command.
    pub fn new(vm: &'a Guest, member: &Arc<Member>) -> Obedient<'a> {
        Obedient::of(&vm.consoles, member)
    }

    /// `member`, which prints to `consoles` and waits for a command.
    pub fn of(consoles: &'a Kept, member: &Arc<Member>) -> Obedient<'a> {
        Obedient {
            consoles,
            member: member.clone(),
            read: consoles.len(),
        }
    }

    /// Has it do what `line` says; what it printed before its `ok`.
    pub fn say(&mut self, line: &str) -> Vec<String> {
        self.begin(line);
        self.answer(line)
    }

    /// Sends `line`, waits until the guest has read it and not for what it does then; when that was.
    pub fn begin(&mut self, line: &str) -> Instant {
        self.read = self.consoles.len();
        self.send(format!("{line}\n").as_bytes());
        let sent = Instant::now();
        let mut nudged = sent;
        let heard = |lines: &[String]| lines.first().is_some_and(|line| line.starts_with("> "));
        self.wait_until(heard, |this| {
            if nudged.elapsed() > NUDGE {
                nudged = Instant::now();
                eprintln!("{} is rung once more for {line:?}", this.member.name());
                // An empty line is no command, and raises the console's interrupt.
                this.send(b"\n");
            }
            if sent.elapsed() > DEAF {
                this.give_up_deaf(line);
            }
        })
        .unwrap_or_else(|| self.fail(line));
        Instant::now()
    }

    /// Waits for the answer to a line that was sent.
    pub fn answer(&mut self, line: &str) -> Vec<String> {
        self.answer_or_end().unwrap_or_else(|| self.fail(line))
    }

    /// Waits for the answer to a line that was sent. `None` when the VM ends without one.
    pub fn answer_or_end(&mut self) -> Option<Vec<String>> {
        let done = |lines: &[String]| lines.last().is_some_and(|line| line.starts_with("ok "));
        let mut lines = self.wait_until(done, |_| {})?;
        lines.pop();
        lines.remove(0);
        Some(lines)
    }

    /// The lines since the last command was sent, once they are as `due`; `meanwhile` is called until
    /// then. `None` when the VM ends, or takes far too long.
    fn wait_until(
        &self,
        due: impl Fn(&[String]) -> bool,
        mut meanwhile: impl FnMut(&Self),
    ) -> Option<Vec<String>> {
        let start = Instant::now();
        loop {
            // In this order: all that it printed is there before its end is told.
            let over = start.elapsed() > LONG || self.member.wait_for(Duration::ZERO).is_some();
            let lines = lines_of(self.consoles, self.read, self.member.name());
            if due(&lines) {
                return Some(lines);
            }
            if over {
                return None;
            }
            meanwhile(self);
            thread::sleep(Duration::from_micros(500));
        }
    }

    fn send(&self, mut rest: &[u8]) {
        while !rest.is_empty() {
            match self.member.console_input(rest) {
                Ok(taken) => rest = &rest[taken..],
                Err(error) => panic!("{}: {error}\n{}", self.member.name(), self.consoles.text()),
            }
        }
    }

    /// Shows all of its state, for whoever looks for the reason.
    fn give_up_deaf(&self, line: &str) -> ! {
        let state = self.member.with_paused(|paused| paused.save());
        eprintln!("{} does not hear {line:?}: {state:x?}", self.member.name());
        if env::var_os("FORKVM_SVM_LANE").is_some() {
            process::exit(DEAF_STATUS);
        }
        self.fail(line)
    }

    fn fail(&self, line: &str) -> ! {
        panic!(
            "{} does not answer {line:?}\n{}",
            self.member.name(),
            self.consoles.text()
        )
    }

    /// Writes `value` + i to page `page` + i of `count`.
    pub fn write(&mut self, page: u64, value: u64, count: u64) {
        let said = self.say(&format!("w {page} {value} {count}"));
        assert!(said.is_empty(), "{}: {said:?}", self.member.name());
    }

    /// Page `page` + i holds `value` + i, for `count` pages.
    pub fn expect(&mut self, page: u64, value: u64, count: u64) {
        let said = self.say(&format!("r {page} {count}"));
        let due = (0..count).map(|index| format!("= {} {}", page + index, value + index));
        let wrong = due.zip(&said).find(|(due, said)| due != *said);
        assert!(
            said.len() as u64 == count && wrong.is_none(),
            "{} reads {} pages and what is due but not read is {wrong:?}",
            self.member.name(),
            said.len(),
        );
    }

    /// Has it exit with status 0.
    pub fn exit(mut self) {
        self.begin("q 0");
        let finished = self.member.wait_for(LONG);
        assert_eq!(
            finished.map(|finished| finished.end),
            Some(End::Exited(0)),
            "{}\n{}",
            self.member.name(),
            self.consoles.text()
        );
    }
}

/// The lines of VM `name` behind the first `from` bytes.
fn lines_of(consoles: &Kept, from: usize, name: &str) -> Vec<String> {
    let text = consoles.text_from(from);
    let lines = text.lines();
    let own = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    own.map(str::to_owned).collect()
}
