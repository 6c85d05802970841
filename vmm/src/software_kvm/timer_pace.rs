//! Timer interrupts at a pace that an interpreted ring 0 can bear.
//!
//! Where KVM interprets ring 0, a kernel's tick is some ten thousand interpreted instructions: milliseconds,
//! and more of them where several vCPUs share a core of the host. At 100 ticks a second a busy guest would do
//! nothing else. So after a timer interrupt the vCPU's next one waits for as long as the first part of this one
//! took, [`REST`] times: from the deadline until the guest has written the next one. However slow or busy the
//! host is, ticks are a like share of the time then. One that comes alone is on time: a guest that sleeps is
//! woken when it asked for. Kernels count ticks that they missed by their clock, so time does not suffer.
//!
//! No part of a machine's state: the deadline that KVM was given is, among the vCPU's MSRs.

use std::time::Duration;

use kvm_ioctls::{MsrFilterRange, MsrFilterRangeFlags, VcpuFd};

use super::SoftwareKvmError;
use crate::vcpu::msrs::{TSC, TSC_DEADLINE};
use crate::vcpu::{StateError, read_msr, reading, restore_msrs};

/// How many times as long the next one waits as the guest took to come to its next deadline. Twice as much
/// again of a tick follows that (Linux 6.1: what else is due, load averages, RCU), so some 12 % of a busy guest's time
/// goes to ticks.
const REST: u64 = 24;

/// Longest wait: a guest that was paused when its deadline passed has not worked on it all the time.
const LONGEST: Duration = Duration::from_secs(1);

/// The MSR that the guest may not write by itself.
pub(super) const FILTERED: MsrFilterRange<'_> = MsrFilterRange {
    flags: MsrFilterRangeFlags::WRITE,
    base: TSC_DEADLINE,
    msr_count: 1,
    bitmap: &[0; 8],
};

/// What a vCPU's timer was told, in cycles of the guest's TSC.
#[derive(Debug, Default)]
pub(super) struct TimerPace {
    /// The deadline that KVM was given last; 0 for none.
    armed: u64,
    /// None is given to it that comes before.
    earliest: u64,
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
        let longest = u64::from(khz) * LONGEST.as_millis() as u64;
        let given = self.pace(wanted, now, longest);
        Ok(restore_msrs(vcpu, &[(TSC_DEADLINE, given)]).map_err(StateError::from)?)
    }

    /// The deadline to give to KVM for `wanted`, when the guest writes that at `now`.
    fn pace(&mut self, wanted: u64, now: u64, longest: u64) -> u64 {
        if self.armed != 0 && self.armed <= now {
            let took = now - self.armed;
            self.earliest = now + took.saturating_mul(REST).min(longest);
        }
        self.armed = match wanted {
            0 => 0,
            wanted => wanted.max(self.earliest),
        };
        self.armed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: u64 = 1000;

    #[test]
    fn a_deadline_that_comes_alone_is_as_it_was_asked_for() {
        let mut timer = TimerPace::default();
        assert_eq!(timer.pace(1010, 1000, LONGEST), 1010);
        // It took 3 to come here.
        assert_eq!(timer.pace(1100, 1013, LONGEST), 1100);
    }

    #[test]
    fn ticks_of_a_busy_guest_take_the_same_share_of_its_time_on_any_host() {
        for took in [1, 7, 40] {
            let mut timer = TimerPace::default();
            let mut due = timer.pace(1010, 1000, LONGEST);
            for _ in 0..5 {
                let now = due + took;
                due = timer.pace(now + 10, now, LONGEST);
                assert_eq!(due - now, took * REST);
            }
        }
    }

    #[test]
    fn a_guest_that_was_paused_is_not_made_to_wait_for_that() {
        let mut timer = TimerPace::default();
        let due = timer.pace(1010, 1000, LONGEST);
        let now = due + 1_000_000;
        assert_eq!(timer.pace(now + 10, now, LONGEST), now + LONGEST);
    }

    #[test]
    fn a_deadline_that_was_moved_before_it_passed_puts_nothing_off() {
        let mut timer = TimerPace::default();
        assert_eq!(timer.pace(1500, 1000, LONGEST), 1500);
        assert_eq!(timer.pace(1020, 1001, LONGEST), 1020);
        assert_eq!(timer.pace(1010, 1002, LONGEST), 1010);
    }

    #[test]
    fn a_timer_that_was_stopped_stays_so_and_what_its_last_interrupt_took_counts() {
        let mut timer = TimerPace::default();
        timer.pace(1010, 1000, LONGEST);
        assert_eq!(timer.pace(0, 1012, LONGEST), 0);
        assert_eq!(timer.pace(1020, 1015, LONGEST), 1012 + 2 * REST);
    }
}
