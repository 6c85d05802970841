//! Programs of the guest: `forkvm-guest`, and what the local socket lets whom do.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use forkvm_agent_protocol::{AgentFrame, Request, frame};

use crate::agent::{Agent, Session, connect, shell};

fn guest(agent: &Agent, words: &[&str]) -> Output {
    // It has to be there first.
    drop(connect(&agent.path("local")));
    Command::new(env!("CARGO_BIN_EXE_forkvm-agent"))
        .arg0("forkvm-guest")
        .args(words)
        .env("FORKVM_AGENT_SOCKET", agent.path("local"))
        .output()
        .unwrap()
}

#[test]
fn a_fork_says_why_there_is_none() {
    let agent = Agent::start();
    let output = guest(&agent, &["fork", "-n", "2", "--", "true"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("no fork doorbell"), "{said}");
}

#[test]
fn an_identity_that_nobody_gave_is_not_invented() {
    let agent = Agent::start();
    let output = guest(&agent, &["id"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("has not told"), "{said}");
}

#[test]
fn a_command_line_that_means_nothing_is_a_usage_error() {
    let agent = Agent::start();
    assert_eq!(guest(&agent, &["spoon"]).status.code(), Some(2));
}

#[test]
fn who_is_not_root_may_ask_for_health_and_forks_only() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can speak to the agent as somebody else");
        return;
    }
    let agent = Agent::start();
    drop(connect(&agent.path("local")));
    // Root may.
    let session = Session::ask(connect(&agent.path("local")), Request::Exec(shell("true")));
    drop(session);
    // The temporary directory is root's alone: it is entered before another user connects from within.
    let said = Command::new("perl")
        .arg("-e")
        .arg(
            "use IO::Socket::UNIX; chdir $ARGV[0] or die; $< = $> = 65534; my $s = IO::Socket::UNIX->new('local') or die; \
             print $s pack('H*', $ARGV[1]); $s->flush; local $/; binmode STDOUT; print <$s>",
        )
        .arg(agent.path(""))
        .arg(hex_of(Request::PowerOff))
        .output();
    let Ok(said) = said else {
        eprintln!("skipped: perl is not there");
        return;
    };
    let mut said = &said.stdout[..];
    let mut heard = Vec::new();
    while let Some(one) = frame::read::<AgentFrame>(&mut said).unwrap() {
        heard.push(one);
    }
    let Some(AgentFrame::Refused(refusal)) = heard.last() else {
        panic!("{heard:?}");
    };
    assert_eq!(refusal.errno, libc::EPERM, "{refusal:?}");
}

#[test]
fn programs_of_the_guest_that_take_all_their_places_do_not_lock_the_host_out() {
    let agent = Agent::start();
    drop(connect(&agent.path("local")));
    // More than the agent has threads for, and none says a word.
    let held: Vec<_> = (0..100).map(|_| connect(&agent.path("local"))).collect();
    let turned_away = Session::new(connect(&agent.path("local"))).refusal();
    assert_eq!(turned_away.errno, libc::EAGAIN, "{turned_away:?}");
    agent.assert_well();
    drop(held);
}

fn hex_of(request: Request) -> String {
    use forkvm_agent_protocol::{ClientFrame, Hello};
    let hello = frame::encode(&ClientFrame::Hello(Hello::new(0))).unwrap();
    let request = frame::encode(&ClientFrame::Request(request)).unwrap();
    let bytes = hello.iter().chain(&request);
    bytes.map(|byte| format!("{byte:02x}")).collect()
}
