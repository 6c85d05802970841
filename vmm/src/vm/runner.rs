//! What a vCPU thread does from the start of its VM on: passes the gate, runs guest code, and tells
//! what an exit means to the VM's owner.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use forkvm_devices::Effect;

use super::{EndReason, EventSink, VmEvent};
use crate::gate::{Gate, Passage};
use crate::machine::{Buses, Devices, lock};
use crate::vcpu::{RunError, Stop, Vcpu};

/// What a vCPU thread works with.
pub(super) struct Runner {
    pub(super) index: u32,
    pub(super) vcpu: Arc<Mutex<Vcpu>>,
    pub(super) gate: Arc<Gate>,
    pub(super) events: EventSink,
    pub(super) has_run: Arc<AtomicBool>,
    pub(super) buses: Buses,
    pub(super) devices: Devices,
}

impl Runner {
    /// Until the gate says to end, or the vCPU has nothing more to do.
    pub(super) fn run(self) {
        let reason = match catch_unwind(AssertUnwindSafe(|| self.run_until_end())) {
            Ok(Ok(None)) => None,
            Ok(Ok(Some(reason))) => Some(reason),
            Ok(Err(error)) => Some(EndReason::Failed(error)),
            Err(_panic) => Some(EndReason::Failed(RunError::Panicked { vcpu: self.index })),
        };
        self.gate.leave(self.index, reason.is_some());
        if let Some(reason) = reason {
            (self.events)(VmEvent::Ended(reason));
        }
    }

    /// Passes the gate again and again; `None` when the gate said to end.
    fn run_until_end(&self) -> Result<Option<EndReason>, RunError> {
        while self.gate.pass(self.index) == Passage::Run {
            // Here rather than at the resume: the guest can prolong it, and a vCPU can be braked.
            if self.devices.brake.take_left_over()
                && let Err(error) = self.devices.activate()
            {
                tracing::error!(%error, "requests that a pause left over may stay unserved");
            }
            let mut vcpu = lock(&self.vcpu);
            let kickable = vcpu.kickable();
            // A kick between the gate and here had nothing to set: whoever closed the gate since
            // would wait for a vCPU that nobody calls back.
            if self.gate.called_back() {
                continue;
            }
            if !self.has_run.swap(true, Ordering::Relaxed) {
                (self.events)(VmEvent::Running { at: Instant::now() });
            }
            let ended = self.run_until_stopped(&mut vcpu);
            drop(kickable);
            drop(vcpu);
            if let Some(reason) = ended? {
                return Ok(Some(reason));
            }
        }
        Ok(None)
    }

    /// Runs guest code until a kick, a call, or the end.
    fn run_until_stopped(&self, vcpu: &mut Vcpu) -> Result<Option<EndReason>, RunError> {
        loop {
            let stop = vcpu.run(&self.buses)?;
            let seen = Instant::now();
            match stop {
                Stop::Kicked => {
                    // A kick may have come between an access and its completion.
                    return match vcpu.finish(&self.buses)? {
                        None => Ok(None),
                        Some(stop) => Ok(self.told(vcpu, stop, seen)?.ended),
                    };
                }
                stop => {
                    let told = self.told(vcpu, stop, seen)?;
                    if told.ended.is_some() || told.held {
                        return Ok(told.ended);
                    }
                }
            }
        }
    }

    /// Passes on what an exit means.
    fn told(&self, vcpu: &mut Vcpu, stop: Stop, at: Instant) -> Result<Told, RunError> {
        let mut told = Told {
            ended: None,
            held: false,
        };
        match stop {
            Stop::Kicked | Stop::Effect(Effect::None) => {}
            Stop::Effect(Effect::Report(value)) => (self.events)(VmEvent::Report { value, at }),
            Stop::Effect(Effect::Call(call)) => {
                // The vCPU may be saved while it is held: its `out` has to be over by then.
                if let Some(more) = vcpu.finish(&self.buses)? {
                    tracing::warn!(?more, "an access of a call's own instruction is ignored");
                }
                self.gate.hold(self.index);
                told.held = true;
                (self.events)(VmEvent::Call {
                    vcpu: self.index,
                    call,
                    at,
                });
            }
            Stop::Effect(Effect::Exit(status)) => told.ended = Some(EndReason::Exit(status)),
            Stop::TripleFault => told.ended = Some(EndReason::TripleFault { vcpu: self.index }),
            Stop::SystemEvent { reset: true } => told.ended = Some(EndReason::Reset),
            Stop::SystemEvent { reset: false } => told.ended = Some(EndReason::PowerOff),
        }
        Ok(told)
    }
}

struct Told {
    ended: Option<EndReason>,
    held: bool,
}
