//! Forks, with a host that a test plays: what parent and clone are answered, and what they may do then.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use forkvm_agent_protocol::{
    AgentFrame, Bytes, ClientFrame, Exec, Generation, Hello, Identity, Request, frame,
};

use crate::agent::{Agent, Last};
use crate::doorbell::{Doorbell, DoorbellError, Fork, Who};
use crate::identity::{HookError, Identities, Role, System};
use crate::outbox::Outbox;
use crate::session::{Incoming, Peer, serve};

/// The machine before the fork, and after it.
const BEFORE: Generation = Generation([1; 16]);
const AFTER: Generation = Generation([2; 16]);

/// A host that makes this machine number `becomes` of a fork.
struct Host {
    becomes: u32,
    who: Arc<Mutex<Generation>>,
    forked: Mutex<Sender<u32>>,
}

impl Doorbell for Host {
    fn who(&self) -> Option<Who> {
        Some(Who {
            clone_id: 0,
            generation: *self.who.lock().unwrap(),
        })
    }

    fn fork(&self, clones: u32) -> Result<Fork, DoorbellError> {
        if clones > 8 {
            return Err(DoorbellError::Refused {
                call: "fork this machine",
                errno: libc::ENOMEM,
            });
        }
        if self.becomes != 0 {
            *self.who.lock().unwrap() = AFTER;
        }
        let generation = *self.who.lock().unwrap();
        self.forked.lock().unwrap().send(clones).unwrap();
        Ok(Fork {
            clone_id: self.becomes,
            granted: clones - 1,
            ticket: 77,
            generation,
        })
    }

    fn join(&self, ticket: u32) -> Result<u32, DoorbellError> {
        assert_eq!(ticket, 77);
        Ok(5)
    }

    fn report_ready(&self) {}

    fn exit(&self, _status: u8) {}
}

/// A system that takes on whatever it is told, and notes as whom its hooks ran.
struct Willing(Arc<Mutex<Vec<Role>>>);

impl System for Willing {
    fn wait_for_address(&self, _cid: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_hostname(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn set_machine_id(&self, _id: &str) -> io::Result<()> {
        Ok(())
    }

    fn reseed(&self, _entropy: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn set_wall_clock(&self, _nanoseconds: u64) -> io::Result<()> {
        Ok(())
    }

    fn run_hooks(&self, role: Role, _generation: Generation) -> Result<Vec<String>, HookError> {
        self.0.lock().unwrap().push(role);
        Ok(vec!["app".into()])
    }

    fn clock_source(&self) -> String {
        String::new()
    }
}

struct Machine {
    agent: Arc<Agent>,
    who: Arc<Mutex<Generation>>,
    hooks: Arc<Mutex<Vec<Role>>>,
    forks: Receiver<u32>,
    ends: Receiver<Last>,
}

impl Machine {
    fn that_becomes(becomes: u32) -> Machine {
        crate::reaper::start().unwrap();
        let who = Arc::new(Mutex::new(BEFORE));
        let (forked, forks) = channel();
        let (power, ends) = channel();
        let host = Host {
            becomes,
            who: who.clone(),
            forked: Mutex::new(forked),
        };
        let hooks = Arc::new(Mutex::new(Vec::new()));
        let identities = Identities::new(Box::new(Willing(hooks.clone())));
        Machine {
            agent: Arc::new(Agent::new(Box::new(host), identities, Some(power))),
            who,
            hooks,
            forks,
            ends,
        }
    }

    /// A session, and what serves it.
    fn session(&self, peer: Peer, request: Request) -> (UnixStream, JoinHandle<()>) {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let agent = self.agent.clone();
        let stream = Arc::new(File::from(OwnedFd::from(theirs)));
        let served = thread::spawn(move || serve(&agent, stream, peer));
        frame::write(&mut ours, &ClientFrame::Hello(Hello::new(0))).unwrap();
        frame::write(&mut ours, &ClientFrame::Request(request)).unwrap();
        let greeting = hear(&mut ours);
        assert!(
            matches!(greeting, Some(AgentFrame::Hello(Hello { features: 1, .. }))),
            "{greeting:?}"
        );
        (ours, served)
    }

    fn fork(&self, peer: Peer) -> UnixStream {
        self.session(peer, Request::Fork { clones: 4 }).0
    }

    fn identify(&self, generation: Generation) {
        let identity = Identity {
            clone_id: 3,
            generation,
            hostname: "clone".into(),
            machine_id: "0".repeat(32),
            entropy: Bytes(vec![0; 32]),
            wall_clock: 0,
            cid: 3,
        };
        let (mut stream, _) = self.session(Peer::Host, Request::Identify(identity));
        let answer = hear(&mut stream);
        assert!(matches!(answer, Some(AgentFrame::Identified(_))));
    }
}

fn hear(stream: &mut UnixStream) -> Option<AgentFrame> {
    frame::read(stream).unwrap()
}

const LOCAL: Peer = Peer::Local { root: false };

#[test]
fn the_parent_is_answered_when_its_hooks_have_run_and_may_join() {
    let machine = Machine::that_becomes(0);
    let mut stream = machine.fork(LOCAL);
    let Some(AgentFrame::Forked(forked)) = hear(&mut stream) else {
        panic!("a fork");
    };
    assert_eq!(*machine.hooks.lock().unwrap(), [Role::Parent]);
    assert_eq!((forked.clone_id, forked.granted), (0, 3));
    assert_eq!(forked.generation, BEFORE);
    frame::write(&mut stream, &ClientFrame::Join).unwrap();
    assert_eq!(hear(&mut stream), Some(AgentFrame::Joined { status: 5 }));
    assert_eq!(hear(&mut stream), None);
}

#[test]
fn a_parent_cannot_be_ended_by_who_forked_it() {
    let machine = Machine::that_becomes(0);
    let mut stream = machine.fork(LOCAL);
    hear(&mut stream);
    frame::write(&mut stream, &ClientFrame::End(0)).unwrap();
    let answer = hear(&mut stream);
    assert!(matches!(answer, Some(AgentFrame::Refused(_))), "{answer:?}");
    assert!(machine.ends.try_recv().is_err());
}

#[test]
fn a_clone_is_answered_once_it_has_its_new_identity_and_ends_with_a_status() {
    let machine = Machine::that_becomes(3);
    machine.identify(BEFORE);
    let mut stream = machine.fork(LOCAL);
    assert_eq!(machine.forks.recv().unwrap(), 4);
    // Nothing may be there yet. It may be too early to tell, as the agent's thread may not be back from the fork; that nobody
    // is answered without an identity is the next test's.
    stream.set_nonblocking(true).unwrap();
    assert!(frame::read::<AgentFrame>(&mut stream).is_err());
    stream.set_nonblocking(false).unwrap();
    machine.identify(AFTER);
    let Some(AgentFrame::Forked(forked)) = hear(&mut stream) else {
        panic!("a fork");
    };
    assert_eq!((forked.clone_id, forked.generation), (3, AFTER));
    frame::write(&mut stream, &ClientFrame::End(9)).unwrap();
    assert_eq!(machine.ends.recv().unwrap(), Last::Exit(9));
}

#[test]
fn a_clone_that_nobody_identifies_is_ended_before_its_program_hears_of_it() {
    let machine = Machine::that_becomes(3);
    machine.identify(BEFORE);
    let (_program, theirs) = UnixStream::pair().unwrap();
    let stream = Arc::new(File::from(OwnedFd::from(theirs)));
    let (mut inbox, outbox) = (Incoming::inbox(stream.clone()), Outbox::new(stream));
    let limit = Duration::from_millis(50);
    let refusal =
        crate::forks::serve(&machine.agent, LOCAL, 4, &mut inbox, &outbox, limit).unwrap_err();
    assert_eq!(refusal.errno, libc::ETIMEDOUT, "{refusal:?}");
    assert_eq!(machine.ends.try_recv(), Ok(Last::Exit(1)));
}

#[test]
fn a_clone_does_not_say_that_it_is_its_parent() {
    let machine = Machine::that_becomes(3);
    machine.identify(BEFORE);
    let says = || {
        let (mut stream, _) = machine.session(LOCAL, Request::Health);
        let Some(AgentFrame::Healthy(healthy)) = hear(&mut stream) else {
            panic!("health");
        };
        (healthy.generation, healthy.clone_id)
    };
    assert_eq!(says(), (Some(BEFORE), Some(3)));
    *machine.who.lock().unwrap() = AFTER;
    assert_eq!(says(), (None, None));
    machine.identify(AFTER);
    assert_eq!(says(), (Some(AFTER), Some(3)));
}

#[test]
fn the_hosts_own_stream_is_not_answered_in_a_clone() {
    let machine = Machine::that_becomes(1);
    assert_eq!(hear(&mut machine.fork(Peer::Host)), None);
    let machine = Machine::that_becomes(0);
    let answer = hear(&mut machine.fork(Peer::Host));
    assert!(matches!(answer, Some(AgentFrame::Forked(_))), "{answer:?}");
}

#[test]
fn a_parent_that_the_host_has_forked_runs_its_hooks_when_the_host_says_so() {
    let machine = Machine::that_becomes(0);
    let (mut stream, _) = machine.session(Peer::Host, Request::AfterFork);
    let ran = AgentFrame::HooksRan(vec!["app".into()]);
    assert_eq!(hear(&mut stream), Some(ran));
    assert_eq!(*machine.hooks.lock().unwrap(), [Role::Parent]);
    // Programs of the guest cannot make root's hooks run.
    let (mut stream, _) = machine.session(LOCAL, Request::AfterFork);
    let answer = hear(&mut stream);
    assert!(matches!(answer, Some(AgentFrame::Refused(_))), "{answer:?}");
}

#[test]
fn what_the_host_refuses_is_told_with_its_number() {
    let machine = Machine::that_becomes(0);
    let (mut stream, _) = machine.session(LOCAL, Request::Fork { clones: 9 });
    let Some(AgentFrame::Refused(refusal)) = hear(&mut stream) else {
        panic!("a refusal");
    };
    assert_eq!(refusal.errno, libc::ENOMEM);
}

/// A program that writes a file once its input is over.
fn waits_for_its_client(place: &std::path::Path) -> Request {
    let script = format!("cat; echo alive > '{}'", place.display());
    Request::Exec(Exec {
        argv: ["sh", "-c", &script].map(Bytes::from).to_vec(),
        ..Exec::default()
    })
}

#[test]
fn a_program_of_the_parents_client_goes_on_in_a_clone() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("said");
    let machine = Machine::that_becomes(1);
    let (mut stream, served) = machine.session(Peer::Host, waits_for_its_client(&place));
    let started = hear(&mut stream);
    assert!(matches!(started, Some(AgentFrame::Started { .. })));
    // Now this is a clone, whose streams of the parent are reset.
    *machine.who.lock().unwrap() = AFTER;
    drop(stream);
    served.join().unwrap();
    assert_eq!(fs::read_to_string(place).unwrap(), "alive\n");
}

#[test]
fn a_program_whose_own_client_hangs_up_is_ended() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("said");
    let machine = Machine::that_becomes(1);
    let (mut stream, served) = machine.session(Peer::Host, waits_for_its_client(&place));
    hear(&mut stream);
    drop(stream);
    served.join().unwrap();
    assert!(!place.exists());
}
