//! Programs: streams, ends, signals, terminals.

use std::fs;
use std::process::Command;
use std::thread;

use forkvm_agent_protocol::{
    AgentFrame, Bytes, ClientFrame, Exec, Exit, Request, STDIN_WINDOW, Size,
};

use crate::agent::{Agent, Session, shell, wait_for_end_of_fifo};

fn run(agent: &Agent, exec: Exec) -> Session {
    agent.ask(Request::Exec(exec))
}

#[test]
fn output_errors_and_status_come_apart_and_whole() {
    let agent = Agent::start();
    let ran = run(&agent, shell("echo out; echo err >&2; exit 7")).finish();
    assert_eq!(ran.stdout, b"out\n");
    assert_eq!(ran.stderr, b"err\n");
    assert_eq!(ran.exit, Exit::Code(7));
}

#[test]
fn a_signal_is_told_as_a_signal() {
    let agent = Agent::start();
    let ran = run(&agent, shell("kill -KILL $$")).finish();
    assert_eq!(ran.exit, Exit::Signal(9));
}

#[test]
fn a_program_that_is_not_there_is_refused_with_the_kernels_number() {
    let agent = Agent::start();
    let exec = Exec {
        argv: vec!["no-such-program".into()],
        ..Exec::default()
    };
    let refusal = run(&agent, exec).refusal();
    assert_eq!(refusal.errno, libc::ENOENT);
    assert!(refusal.text.contains("no-such-program"), "{refusal:?}");
    let refusal = run(&agent, Exec::default()).refusal();
    assert_eq!(refusal.errno, libc::EINVAL);
}

#[test]
fn environment_and_directory_are_the_clients() {
    let agent = Agent::start();
    let exec = Exec {
        env: vec![("COLOUR".into(), "red".into())],
        directory: Some("/usr".into()),
        ..shell("echo $COLOUR $PWD $HOME")
    };
    let ran = run(&agent, exec).finish();
    assert_eq!(ran.stdout, b"red /usr /root\n");
}

#[test]
fn ten_megabytes_go_in_and_come_back_through_one_program() {
    let agent = Agent::start();
    let mut session = run(&agent, shell("cat"));
    let data: Vec<u8> = (0..10 << 20).map(|n: u32| (n % 251) as u8).collect();
    let (mut room, mut sent) = (STDIN_WINDOW as usize, 0);
    let mut back = Vec::new();
    loop {
        if sent < data.len() && room > 0 {
            let end = data.len().min(sent + room);
            session.say(&ClientFrame::Stdin(data[sent..end].into()));
            room -= end - sent;
            sent = end;
            if sent == data.len() {
                session.say(&ClientFrame::StdinEnd);
            }
        }
        match session.hear() {
            Some(AgentFrame::Started { .. }) => {}
            Some(AgentFrame::StdinRoom(more)) => room += more as usize,
            Some(AgentFrame::Stdout(Bytes(bytes))) => back.extend(bytes),
            Some(AgentFrame::Ended(exit)) => break assert_eq!(exit, Exit::Code(0)),
            other => panic!("{other:?}"),
        }
    }
    assert!(back == data, "{} of {} bytes", back.len(), data.len());
}

#[test]
fn a_program_that_does_not_read_its_input_still_hears_signals() {
    let agent = Agent::start();
    let mut session = run(&agent, shell("echo up; while :; do sleep 1000; done"));
    session.hear_out("up");
    session.say(&ClientFrame::Stdin(Bytes(vec![0; STDIN_WINDOW as usize])));
    session.say(&ClientFrame::Signal(15));
    assert_eq!(session.finish().exit, Exit::Signal(15));
}

#[test]
fn a_program_that_closes_its_input_does_not_stop_its_client() {
    let agent = Agent::start();
    let mut session = run(&agent, shell("exec <&-; echo closed; sleep 1000"));
    session.hear_out("closed");
    for _ in 0..4 {
        session.say(&ClientFrame::Stdin(Bytes(vec![0; STDIN_WINDOW as usize])));
        let room = AgentFrame::StdinRoom(STDIN_WINDOW);
        assert_eq!(session.hear(), Some(room));
    }
    session.say(&ClientFrame::Signal(9));
    assert_eq!(session.finish().exit, Exit::Signal(9));
}

#[test]
fn a_client_that_hangs_up_ends_the_whole_process_group() {
    let agent = Agent::start();
    let fifo = agent.path("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    // Both hold the fifo open, and neither hears SIGHUP.
    let script = format!(
        "trap '' HUP; exec 3>'{}'; sleep 1000 & echo up; wait",
        fifo.display()
    );
    let mut session = run(&agent, shell(&script));
    // Opening a fifo waits for its other end.
    let ended = thread::spawn(move || wait_for_end_of_fifo(&fifo));
    session.hear_out("up");
    drop(session);
    ended.join().unwrap();
    agent.assert_well();
}

#[test]
fn what_a_leader_leaves_when_its_client_hangs_up_may_clean_up_and_is_ended_then() {
    let agent = Agent::start();
    let fifo = agent.path("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    // The leader dies of SIGHUP at once. One of the others needs a moment, one never goes. None starts a program when the
    // signal may come: a shell that does may not hear it.
    let script = format!(
        "exec 3>'{fifo}'; (trap '' HUP; exec sleep 1000) & \
         (trap 'sleep 0.3; echo clean > {place}; exit' HUP; sleep 1000 & echo up; wait) & wait",
        fifo = fifo.display(),
        place = agent.path("said").display(),
    );
    let mut session = run(&agent, shell(&script));
    let place = agent.path("said");
    let ended = thread::spawn(move || wait_for_end_of_fifo(&fifo));
    session.hear_out("up");
    drop(session);
    ended.join().unwrap();
    assert_eq!(fs::read_to_string(place).unwrap(), "clean\n");
    agent.assert_well();
}

#[test]
fn what_outlives_a_program_in_the_background_does_not_hold_its_session() {
    let agent = Agent::start();
    let ran = run(&agent, shell("sleep 1000 & echo $!")).finish();
    assert_eq!(ran.exit, Exit::Code(0));
    let pid = String::from_utf8(ran.stdout).unwrap();
    let killed = Command::new("kill").arg(pid.trim()).status().unwrap();
    assert!(killed.success(), "it lives on, as with a shell");
}

#[test]
fn a_terminal_has_its_size_and_one_stream() {
    let agent = Agent::start();
    let exec = Exec {
        terminal: Some(Size {
            rows: 33,
            columns: 111,
        }),
        ..shell("stty size; echo err >&2; tty >/dev/null && echo tty")
    };
    let ran = run(&agent, exec).finish();
    assert_eq!(ran.stdout, b"33 111\r\nerr\r\ntty\r\n");
    assert!(ran.stderr.is_empty());
}

#[test]
fn a_terminal_can_be_resized_and_interrupted_by_its_keys() {
    let agent = Agent::start();
    let exec = Exec {
        terminal: Some(Size {
            rows: 1,
            columns: 1,
        }),
        ..shell(
            "stty -echo; trap 'stty size; echo seen' WINCH; echo up; while :; do read line; done",
        )
    };
    let mut session = run(&agent, exec);
    session.hear_out("up");
    session.say(&ClientFrame::Resize(Size {
        rows: 40,
        columns: 90,
    }));
    // A shell runs its trap once its read is over. Without an echo, which may come in between what it says.
    session.say(&ClientFrame::Stdin("\n".into()));
    session.hear_out("40 90\r\nseen");
    session.say(&ClientFrame::Stdin("\x03".into()));
    assert_eq!(session.finish().exit, Exit::Signal(2));
}

#[test]
fn the_end_of_a_terminals_input_is_typed() {
    let agent = Agent::start();
    let exec = Exec {
        terminal: Some(Size {
            rows: 24,
            columns: 80,
        }),
        ..shell("stty -echo; echo up; cat; echo over")
    };
    let mut session = run(&agent, exec);
    session.hear_out("up");
    session.say(&ClientFrame::Stdin("line\n".into()));
    session.say(&ClientFrame::StdinEnd);
    let ran = session.finish();
    let said = String::from_utf8(ran.stdout).unwrap();
    assert!(said.ends_with("line\r\nover\r\n"), "{said:?}");
}

#[test]
fn a_signal_that_there_is_not_is_refused_and_the_program_goes_on() {
    let agent = Agent::start();
    let mut session = run(&agent, shell("sleep 1000"));
    for (number, named) in [(0, "signal 0"), (64, "signal 64")] {
        session.say(&ClientFrame::Signal(number));
        let refusal = session.refusal();
        assert!(refusal.text.contains(named), "{refusal:?}");
    }
    session.say(&ClientFrame::Signal(15));
    assert_eq!(session.finish().exit, Exit::Signal(15));
}

#[test]
fn a_program_can_run_as_another_user_where_the_agent_is_root() {
    let agent = Agent::start();
    let exec = Exec {
        user: Some("4711".into()),
        ..shell("id -u; id -g")
    };
    let mut session = run(&agent, exec);
    if rustix::process::geteuid().is_root() {
        assert_eq!(session.finish().stdout, b"4711\n4711\n");
    } else {
        assert_eq!(session.refusal().errno, libc::EPERM);
    }
    let exec = Exec {
        user: Some("no-such-user".into()),
        ..shell("id")
    };
    assert!(run(&agent, exec).refusal().text.contains("no-such-user"));
}

#[test]
fn a_program_of_another_user_can_open_its_own_streams() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can run a program as somebody else");
        return;
    }
    let agent = Agent::start();
    let exec = Exec {
        user: Some("4711".into()),
        ..shell("echo out > /proc/self/fd/1; echo err > /dev/stderr; cat /dev/stdin")
    };
    let mut session = run(&agent, exec);
    session.say(&ClientFrame::Stdin("in\n".into()));
    session.say(&ClientFrame::StdinEnd);
    let ran = session.finish();
    assert_eq!(
        (&*ran.stdout, &*ran.stderr),
        (&b"out\nin\n"[..], &b"err\n"[..])
    );
    let exec = Exec {
        user: Some("4711".into()),
        terminal: Some(Size {
            rows: 24,
            columns: 80,
        }),
        ..shell("echo said > $(tty)")
    };
    assert_eq!(run(&agent, exec).finish().stdout, b"said\r\n");
}
