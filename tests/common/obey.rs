//! A VM that runs the job `obey`, and does with its memory what its console says.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use forkvm::End;
use forkvm::engine::Member;

use super::{Guest, Kept, LONG, expect_end};

/// How long an answer may take before the console's interrupt is raised once more.
///
/// In the lane's cell without nested paging a guest was seen, twice in hundreds of runs, to sleep on
/// with its line in the console's queue or in its hands. A page that does not come is not helped by
/// this: KVM goes on waiting for the one that it has asked for.
const NUDGE: Duration = Duration::from_secs(10);

/// A VM of the family `vm` and what it has answered so far.
pub struct Obedient<'a> {
    vm: &'a Guest,
    pub member: Arc<Member>,
    /// Bytes of the consoles that were read.
    read: usize,
}

impl<'a> Obedient<'a> {
    /// `member` of the family of `vm`, which waits for a command.
    pub fn new(vm: &'a Guest, member: &Arc<Member>) -> Obedient<'a> {
        Obedient {
            vm,
            member: member.clone(),
            read: vm.consoles.len(),
        }
    }

    /// Has it do what `line` says; what it printed before its `ok`.
    pub fn say(&mut self, line: &str) -> Vec<String> {
        self.begin(line);
        self.answer(line)
    }

    /// Sends `line` and does not wait for the answer.
    pub fn begin(&mut self, line: &str) {
        self.read = self.vm.consoles.len();
        let text = format!("{line}\n");
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            match self.member.console_input(rest) {
                Ok(taken) => rest = &rest[taken..],
                Err(error) => panic!("{line:?}: {error}\n{}", self.vm.consoles.text()),
            }
        }
    }

    /// Waits for the answer to a line that was sent.
    pub fn answer(&mut self, line: &str) -> Vec<String> {
        let start = Instant::now();
        let mut nudged = start;
        loop {
            let mut lines = lines_of(&self.vm.consoles, self.read, self.member.name());
            if lines.last().is_some_and(|line| line.starts_with("ok ")) {
                lines.pop();
                return lines;
            }
            assert!(
                start.elapsed() < LONG && self.member.wait_for(Duration::ZERO).is_none(),
                "{} does not answer {line:?}\n{}",
                self.member.name(),
                self.vm.consoles.text()
            );
            if nudged.elapsed() > NUDGE {
                nudged = Instant::now();
                eprintln!("{} is rung once more for {line:?}", self.member.name());
                // An empty line says nothing and raises the console's interrupt.
                self.member.console_input(b"\n").unwrap();
            }
            thread::sleep(Duration::from_micros(500));
        }
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
        expect_end(self.vm, &self.member, End::Exited(0));
    }
}

/// The lines of VM `name` behind the first `from` bytes.
fn lines_of(consoles: &Kept, from: usize, name: &str) -> Vec<String> {
    let text = consoles.text_from(from);
    let lines = text.lines();
    let own = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    own.map(str::to_owned).collect()
}
