//! The guest's end of the fork doorbell ([`forkvm_abi::doorbell`]).

#![allow(unsafe_code)] // A page that the host writes.

use core::mem::offset_of;
use core::ptr;

use forkvm_abi::doorbell::{
    CALLS, Call, MAGIC, PORT, Page, PageHeader, VERSION, call_offset, op, reg, report,
};
use forkvm_abi::{errno, slot};

use crate::pages::Page as RamPage;
use crate::{interrupts, port};

/// The page. The guest's memory is zero at boot, as the host expects the page to be.
#[repr(C, align(4096))]
struct DoorbellPage([u8; size_of::<Page>()]);

static mut PAGE: DoorbellPage = DoorbellPage([0; size_of::<Page>()]);

/// A doorbell that answered.
#[derive(Clone, Copy)]
pub struct Doorbell {
    vcpus: u32,
}

/// What a fork that took place has made of this VM.
#[derive(Clone, Copy, Debug)]
pub struct Forked {
    /// 0 in the parent, 1..=granted in the clones.
    pub id: u32,
    /// Clones that were granted, at most as many as were asked for.
    pub granted: u32,
    /// What the parent joins.
    pub ticket: u32,
}

/// Finds the doorbell and gives it the page; `None` where there is none, or none of this version.
pub fn connect() -> Option<Doorbell> {
    if port::read32(PORT + reg::MAGIC) != MAGIC || port::read32(PORT + reg::VERSION) != VERSION {
        return None;
    }
    port::write32(
        PORT + reg::PAGE,
        ((&raw const PAGE).addr() / size_of::<Page>()) as u32,
    );
    let vcpus = port::read32(PORT + reg::VCPUS);
    Some(Doorbell { vcpus })
}

impl Doorbell {
    /// vCPUs of the machine.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// Forks this VM into `clones`, by the call slot of vCPU `cpu`. The error is a negated
    /// [`forkvm_abi::errno`], and nothing was forked. A clone reports [`report::ACTION`] first.
    pub fn fork(&self, cpu: usize, clones: u32) -> Result<Forked, i64> {
        self.fork_ringing(cpu, clones, port::write32)
    }

    /// [`Doorbell::fork`] with a bell of the caller's: `ring` writes its second argument to the
    /// port that is its first.
    pub fn fork_ringing(
        &self,
        cpu: usize,
        clones: u32,
        ring: impl FnOnce(u16, u32),
    ) -> Result<Forked, i64> {
        let id = self.call(cpu, request(op::FORK, clones), ring)? as u32;
        if id != 0 {
            self.report(report::ACTION);
        }
        let answer = read_call(cpu);
        Ok(Forked {
            id,
            granted: answer.granted,
            ticket: answer.ticket,
        })
    }

    /// Waits until all clones of `forked` have ended and answers the worst of their statuses.
    pub fn join(&self, cpu: usize, forked: Forked) -> Result<u32, i64> {
        self.call(cpu, request(op::JOIN, forked.ticket), port::write32)
            .map(|status| status as u32)
    }

    /// Saves this machine. Answers whether this is the machine that was restored from it.
    pub fn save(&self, cpu: usize) -> Result<bool, i64> {
        self.call(cpu, request(op::SAVE, 0), port::write32)
            .map(|answer| answer != 0)
    }

    /// Gives `pages`, at least one, back to the host and answers how many were given back. They read
    /// as zero then. In a VM that was forked meanwhile it asks again.
    pub fn discard(&self, cpu: usize, pages: &[RamPage]) -> Result<usize, i64> {
        let frame = pages.as_ptr().addr() / size_of::<RamPage>();
        let call = Call {
            pages: pages.len() as u32,
            ..request(op::DISCARD, frame as u32)
        };
        loop {
            match self.call(cpu, call, port::write32) {
                Err(error) if error == -errno::EAGAIN => {}
                answer => return answer.map(|given| given as usize),
            }
        }
    }

    /// Gives the doorbell its page again.
    pub fn reconnect(&self) {
        connect();
    }

    /// Puts `call`, whatever it says, into the page and rings slot `rung`, which need not
    /// be one.
    pub fn ring_rubbish(&self, rubbish: Call, rung: u32) {
        // SAFETY: a slot of the page, which the host reads when the bell rings.
        unsafe { slot(rung as usize % CALLS).write_volatile(rubbish) };
        port::write32(PORT + reg::RING, rung);
    }

    /// Tells the host `value`; never waits.
    pub fn report(&self, value: u32) {
        port::write32(PORT + reg::REPORT, value);
    }

    /// Forks between this VM and the boot.
    pub fn fork_count(&self) -> u32 {
        header(offset_of!(PageHeader, fork_count))
    }

    /// 0 in a VM that was booted or was the parent of its last fork, 1.. in a clone.
    pub fn clone_id(&self) -> u32 {
        header(offset_of!(PageHeader, clone_id))
    }

    /// The first eight bytes of what no other VM has.
    pub fn generation(&self) -> u64 {
        let [low, high] = [0, 4].map(|at| header(offset_of!(PageHeader, generation) + at));
        u64::from(high) << 32 | u64::from(low)
    }

    /// Reports [`report::ACTION`] in a VM that a fork of the host's has made a clone.
    pub fn report_action_of_clone(&self) {
        if self.clone_id() != 0 {
            self.report(report::ACTION);
        }
    }

    /// Asks for an interrupt at each change of [`Doorbell::fork_count`].
    pub fn want_interrupt(&self) {
        interrupts::route(slot::DOORBELL_GSI);
        set_wish(1);
    }

    /// [`Doorbell::fork`] of a VM that wants interrupts, but not for this: who asks for a fork sees its
    /// answer.
    pub fn fork_without_interrupt(&self, cpu: usize, clones: u32) -> Result<Forked, i64> {
        set_wish(0);
        let forked = self.fork(cpu, clones);
        set_wish(1);
        forked
    }

    /// Halts the first vCPU until [`Doorbell::fork_count`] is no longer `seen`.
    /// [`Doorbell::want_interrupt`] was called before.
    pub fn wait_for_fork(&self, seen: u32) {
        while self.fork_count() == seen {
            let interrupts = interrupts::count(slot::DOORBELL_GSI);
            if self.fork_count() == seen {
                interrupts::wait_for(slot::DOORBELL_GSI, interrupts);
            }
        }
    }

    fn call(&self, cpu: usize, call: Call, ring: impl FnOnce(u16, u32)) -> Result<i64, i64> {
        // SAFETY: the slot is this vCPU's own; the host reads it when the bell rings.
        unsafe { slot(cpu).write_volatile(call) };
        ring(PORT + reg::RING, cpu as u32);
        match read_call(cpu).result {
            error if error < 0 => Err(error),
            answer => Ok(answer),
        }
    }
}

/// Whether this VM wants an interrupt at a fork.
fn set_wish(wish: u32) {
    let field = (&raw mut PAGE)
        .cast::<u8>()
        .wrapping_add(offset_of!(PageHeader, want_interrupt));
    // SAFETY: an aligned field of the page, which only the host reads.
    unsafe { field.cast::<u32>().write_volatile(wish) };
}

/// A call that is not answered yet.
fn request(op: u32, arg: u32) -> Call {
    Call {
        op,
        arg,
        result: 0,
        granted: 0,
        ticket: 0,
        pages: 0,
        reserved: [0; 36],
    }
}

fn slot(cpu: usize) -> *mut Call {
    (&raw mut PAGE)
        .cast::<u8>()
        .wrapping_add(call_offset(cpu))
        .cast()
}

fn read_call(cpu: usize) -> Call {
    // SAFETY: aligned and within the page; integers only, so whatever the host wrote is valid.
    unsafe { ptr::read_volatile(slot(cpu)) }
}

fn header(offset: usize) -> u32 {
    let field = (&raw const PAGE).cast::<u8>().wrapping_add(offset);
    // SAFETY: an aligned 32-bit field of the page.
    unsafe { field.cast::<u32>().read_volatile() }
}
