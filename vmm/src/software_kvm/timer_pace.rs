//! Timer interrupts at a pace that an interpreted ring 0 can bear.
//!
//! Where KVM interprets ring 0, a kernel's tick is thousands of interpreted instructions: milliseconds,
//! of the ten that lie between two ticks. A busy guest would spend more time on its ticks than between
//! them. So a vCPU's TSC deadline is put off while the last one that it saw is less than [`PERIOD`] ago.
//! One that comes alone is on time: a guest that sleeps is woken when it asked for. Kernels count ticks
//! that they missed by their clock, so time does not suffer.
//!
//! No part of a machine's state: the deadline that KVM was given is, among the vCPU's MSRs.

use std::time::Duration;

use kvm_ioctls::{MsrFilterRange, MsrFilterRangeFlags, VcpuFd};

use super::SoftwareKvmError;
use crate::vcpu::msrs::{TSC, TSC_DEADLINE};
use crate::vcpu::{StateError, read_msr, reading, restore_msrs};

/// Least time between two timer interrupts of a vCPU.
const PERIOD: Duration = Duration::from_millis(100);

/// The MSR that the guest may not write by itself.
pub(super) const FILTERED: MsrFilterRange<'_> = MsrFilterRange {
    flags: MsrFilterRangeFlags::WRITE,
    base: TSC_DEADLINE,
    msr_count: 1,
    bitmap: &[0; 8],
};

/// What a vCPU's timer was told.
#[derive(Debug, Default)]
pub(super) struct TimerPace {
    /// The deadline that KVM has; 0 for none.
    armed: u64,
    /// The last one that has passed.
    fired: u64,
}

impl TimerPace {
    /// The guest wrote `wanted` to its deadline: the TSC at which its local APIC's timer interrupts, or 0
    /// for never (Intel SDM volume 3, 11.5.4.1).
    pub(super) fn deadline_written(
        &mut self,
        vcpu: &VcpuFd,
        wanted: u64,
    ) -> Result<(), SoftwareKvmError> {
        let now = read_msr(vcpu, TSC).map_err(StateError::from)?;
        let khz = vcpu.get_tsc_khz().map_err(reading("TSC frequency"))?;
        let period = u64::from(khz) * PERIOD.as_millis() as u64;
        let given = self.pace(wanted, now, period);
        Ok(restore_msrs(vcpu, &[(TSC_DEADLINE, given)]).map_err(StateError::from)?)
    }

    /// The deadline to give to KVM for `wanted`, all in cycles of the guest's TSC.
    fn pace(&mut self, wanted: u64, now: u64, period: u64) -> u64 {
        if self.armed != 0 && self.armed <= now {
            self.fired = self.armed;
        }
        self.armed = match wanted {
            0 => 0,
            wanted => wanted.max(self.fired.saturating_add(period)),
        };
        self.armed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: u64 = 40;

    #[test]
    fn a_deadline_that_comes_alone_is_as_it_was_asked_for() {
        let mut timer = TimerPace::default();
        assert_eq!(timer.pace(1010, 1000, PERIOD), 1010);
        assert_eq!(timer.pace(1100, 1020, PERIOD), 1100);
    }

    #[test]
    fn ticks_of_a_busy_guest_come_at_the_pace_that_it_can_bear() {
        let mut timer = TimerPace::default();
        let mut now = 1000;
        for _ in 0..5 {
            let given = timer.pace(now + 10, now, PERIOD);
            now = given;
        }
        assert_eq!(now, 1010 + 4 * PERIOD);
    }

    #[test]
    fn a_deadline_that_was_moved_before_it_passed_puts_nothing_off() {
        let mut timer = TimerPace::default();
        assert_eq!(timer.pace(1500, 1000, PERIOD), 1500);
        assert_eq!(timer.pace(1020, 1001, PERIOD), 1020);
        assert_eq!(timer.pace(1010, 1002, PERIOD), 1010);
    }

    #[test]
    fn a_timer_that_was_stopped_stays_so_and_remembers_when_it_fired() {
        let mut timer = TimerPace::default();
        timer.pace(1010, 1000, PERIOD);
        assert_eq!(timer.pace(0, 1012, PERIOD), 0);
        assert_eq!(timer.pace(1020, 1015, PERIOD), 1010 + PERIOD);
    }
}
