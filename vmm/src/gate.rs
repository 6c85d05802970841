//! The gate between a VM's owner and its vCPU threads: who may run, who waits, and the pause
//! barrier.
//!
//! A vCPU thread passes the gate before every stretch of guest code and comes back to it when it is
//! kicked, when it made a call that has no answer yet, or when it ends. The owner closes the gate
//! and waits until every vCPU stands at it. The gate knows no KVM; kicking is passed in.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forkvm_devices::brake::NotStill;
use thiserror::Error;

/// How long a thread that was told to end may take before it is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(100);

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    /// Signalled when vCPUs may have become free to go.
    go: Condvar,
    /// Signalled when a vCPU has come to the gate.
    came: Condvar,
}

#[derive(Debug)]
struct State {
    open: bool,
    ending: bool,
    /// The machine's end was seen by one of the threads.
    ended: bool,
    vcpus: Vec<Place>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Past the gate.
    Running,
    /// At the gate, and goes on when it is open.
    AtGate,
    /// At the gate until a call is answered.
    Held,
    /// Its thread has ended, or has not started.
    Gone,
}

/// What the gate tells a vCPU thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Passage {
    /// Run guest code.
    Run,
    /// End the thread.
    End,
}

impl Gate {
    /// A closed gate with no thread at it yet.
    pub(crate) fn new(vcpus: u32) -> Gate {
        let vcpus = vec![Place::Gone; vcpus as usize];
        Gate {
            state: Mutex::new(State {
                open: false,
                ending: false,
                ended: false,
                vcpus,
            }),
            go: Condvar::new(),
            came: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by thread `vcpu` between two stretches of guest code: waits until it may go on.
    pub(crate) fn pass(&self, vcpu: u32) -> Passage {
        let mut state = self.lock();
        let place = vcpu as usize;
        if state.vcpus[place] != Place::Held {
            state.vcpus[place] = Place::AtGate;
        }
        self.came.notify_all();
        loop {
            if state.ending {
                return Passage::End;
            }
            if state.open && state.vcpus[place] == Place::AtGate {
                state.vcpus[place] = Place::Running;
                return Passage::Run;
            }
            state = self.go.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Called by thread `vcpu` before it reports a call: its next [`pass`](Gate::pass) waits for
    /// [`release`](Gate::release).
    pub(crate) fn hold(&self, vcpu: u32) {
        self.lock().vcpus[vcpu as usize] = Place::Held;
    }

    /// Lets a held vCPU go on once the gate is open.
    pub(crate) fn release(&self, vcpu: u32) {
        let mut state = self.lock();
        if state.vcpus[vcpu as usize] == Place::Held {
            state.vcpus[vcpu as usize] = Place::AtGate;
        }
        drop(state);
        self.go.notify_all();
    }

    /// Lets every held vCPU go on once the gate is open: the machine is another one now, which made no
    /// call.
    pub(crate) fn release_all(&self) {
        let mut state = self.lock();
        for place in &mut state.vcpus {
            if *place == Place::Held {
                *place = Place::AtGate;
            }
        }
        drop(state);
        self.go.notify_all();
    }

    /// Called by thread `vcpu` as its last act; `ended` when the whole machine ends with it.
    pub(crate) fn leave(&self, vcpu: u32, ended: bool) {
        let mut state = self.lock();
        state.vcpus[vcpu as usize] = Place::Gone;
        state.ended |= ended;
        drop(state);
        self.came.notify_all();
    }

    /// Whether a thread has left with the machine's end.
    pub(crate) fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Whether the thread should come to the gate.
    pub(crate) fn called_back(&self) -> bool {
        let state = self.lock();
        !state.open || state.ending
    }

    /// Opens the gate.
    pub(crate) fn open(&self) {
        self.lock().open = true;
        self.go.notify_all();
    }

    /// Closes the gate and waits until every vCPU stands at it. `kick` is called for each one that
    /// runs. On an error the gate is still closed.
    pub(crate) fn close(&self, deadline: Duration, kick: impl Fn(u32)) -> Result<(), PauseError> {
        let until = Instant::now() + deadline;
        let mut state = self.lock();
        state.open = false;
        for (vcpu, place) in state.vcpus.iter().enumerate() {
            if *place == Place::Running {
                kick(vcpu as u32);
            }
        }
        loop {
            let Some(running) = state
                .vcpus
                .iter()
                .position(|place| *place == Place::Running)
            else {
                return Ok(());
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(PauseError::Vcpu {
                    vcpu: running as u32,
                    deadline,
                });
            }
            state = self
                .came
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Tells every thread to end. `kick` is called for each one that runs guest code.
    pub(crate) fn begin_end(&self, kick: impl Fn(u32)) {
        let mut state = self.lock();
        state.ending = true;
        self.go.notify_all();
        for (vcpu, place) in state.vcpus.iter().enumerate() {
            if *place == Place::Running {
                kick(vcpu as u32);
            }
        }
    }

    /// Tells every thread to end and waits until none runs guest code. `kick` is called for each one
    /// that does, again and again: an end has no deadline at which it could fail.
    pub(crate) fn end(&self, kick: impl Fn(u32)) {
        let mut state = self.lock();
        state.ending = true;
        self.go.notify_all();
        while let Some(running) = state
            .vcpus
            .iter()
            .position(|place| *place == Place::Running)
        {
            kick(running as u32);
            state = self
                .came
                .wait_timeout(state, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// The machine did not come to stand in time; it runs on.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PauseError {
    /// A vCPU did not come to the pause barrier.
    #[error(
        "vCPU {vcpu} did not reach the pause barrier within {deadline:?}: it is inside a host call \
         (a disk that hangs, or a page that does not come); the machine runs on"
    )]
    Vcpu {
        /// The vCPU, or the first of them.
        vcpu: u32,
        /// How long was waited.
        deadline: Duration,
    },
    /// A thread that feeds a device did not stop.
    #[error(transparent)]
    Device(#[from] NotStill),
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    const SOON: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(10);

    fn until_at_gate(gate: &Gate, vcpu: usize, place: Place) {
        while gate.lock().vcpus[vcpu] != place {
            thread::yield_now();
        }
    }

    #[test]
    fn a_thread_waits_until_the_gate_opens_and_ends_when_told() {
        let gate = Arc::new(Gate::new(1));
        let thread = thread::spawn({
            let gate = gate.clone();
            move || {
                let mut runs = 0;
                while gate.pass(0) == Passage::Run {
                    runs += 1;
                }
                gate.leave(0, false);
                runs
            }
        });
        until_at_gate(&gate, 0, Place::AtGate);
        gate.open();
        while gate.lock().vcpus[0] == Place::AtGate {
            thread::yield_now();
        }
        gate.end(|_| ());
        assert!(thread.join().unwrap() > 0);
    }

    #[test]
    fn a_vcpu_that_does_not_come_back_fails_the_pause_and_runs_on() {
        let gate = Gate::new(2);
        gate.open();
        assert_eq!(gate.pass(1), Passage::Run);
        let kicked = Mutex::new(Vec::new());
        let error = gate
            .close(SOON, |vcpu| kicked.lock().unwrap().push(vcpu))
            .unwrap_err();
        assert_eq!(
            error,
            PauseError::Vcpu {
                vcpu: 1,
                deadline: SOON
            }
        );
        assert_eq!(*kicked.lock().unwrap(), [1]);
        assert!(gate.called_back(), "it is for the owner to open it again");
    }

    #[test]
    fn a_held_vcpu_counts_as_paused_and_waits_for_its_answer_after_the_pause() {
        let gate = Arc::new(Gate::new(1));
        gate.open();
        let thread = thread::spawn({
            let gate = gate.clone();
            move || {
                gate.pass(0);
                gate.hold(0);
                gate.pass(0)
            }
        });
        until_at_gate(&gate, 0, Place::Held);
        gate.close(LONG, |_| ()).unwrap();
        gate.open();
        until_at_gate(&gate, 0, Place::Held);
        gate.release(0);
        assert_eq!(thread.join().unwrap(), Passage::Run);
    }

    #[test]
    fn a_vcpu_of_a_machine_that_is_another_one_now_waits_for_no_answer() {
        let gate = Arc::new(Gate::new(1));
        gate.open();
        let thread = thread::spawn({
            let gate = gate.clone();
            move || {
                gate.pass(0);
                gate.hold(0);
                gate.pass(0)
            }
        });
        until_at_gate(&gate, 0, Place::Held);
        gate.close(LONG, |_| ()).unwrap();
        gate.release_all();
        until_at_gate(&gate, 0, Place::AtGate);
        gate.open();
        assert_eq!(thread.join().unwrap(), Passage::Run);
    }

    #[test]
    fn a_vcpu_whose_thread_has_ended_does_not_delay_a_pause() {
        let gate = Gate::new(2);
        gate.open();
        gate.pass(0);
        gate.leave(0, false);
        gate.close(SOON, |_| ()).unwrap();
    }
}
