//! `rubbish seed=1 rounds=2000`: what a guest must not be able to do its host any harm with.
//!
//! Writes and reads random values, in random widths, at the ports and pages of the doorbell, the
//! registers of all virtio slots, queues at random places included, and at ports and addresses that
//! nothing decodes. Exits 0 if it lives: the host may well write into this guest's own memory where
//! it is told to. The exit device is left alone.

#![allow(unsafe_code)] // Accesses to anything.

use core::ptr::with_exposed_provenance_mut;

use forkvm_abi::doorbell::{CALLS, Call, PORT, PORT_LEN, reg};
use forkvm_abi::{EXIT_PORT, EXIT_PORT_LEN, slot};

use crate::args::Args;
use crate::jobs::OK;
use crate::machine::Machine;
use crate::random::Random;
use crate::{port, println};

/// First address that is neither RAM nor a slot, and the bytes from there on that are tried.
const UNMAPPED: u64 = slot::MMIO_BASE + slot::COUNT as u64 * slot::MMIO_STRIDE;
const UNMAPPED_LEN: u64 = 0x1000_0000;

/// Throws rubbish at everything.
pub fn run(machine: &Machine, args: Args<'_>) -> u32 {
    let mut random = Random::new(args.number("seed", 1));
    let ram = machine.ram_mib() << 20;
    for _ in 0..args.number("rounds", 2000) {
        match random.below(6) {
            0 => ports(&mut random, PORT, PORT_LEN),
            1 => machine
                .doorbell()
                .ring_rubbish(call(&mut random), random.below(40) as u32),
            2 => {
                // Beyond the end of RAM as often as within.
                let frame = random.below(ram / 4096 * 2) as u32;
                port::write32(PORT + reg::PAGE, frame);
                port::write32(PORT + reg::RING, random.below(CALLS as u64) as u32);
                machine.doorbell().reconnect();
            }
            3 => {
                let register = slot::base(random.below(slot::COUNT.into()) as u32);
                memory(&mut random, register, slot::MMIO_STRIDE, ram);
            }
            4 => memory(&mut random, UNMAPPED, UNMAPPED_LEN, ram),
            _ => ports(&mut random, 0x500, u16::MAX - 0x500),
        }
    }
    println!("rubbish done");
    OK
}

fn call(random: &mut Random) -> Call {
    Call {
        op: random.below(6) as u32,
        arg: any(random) as u32,
        result: any(random) as i64,
        granted: 0,
        ticket: 0,
        pages: any(random) as u32,
        reserved: [0; 36],
    }
}

/// Any number.
fn any(random: &mut Random) -> u64 {
    random.below(u64::MAX)
}

fn ports(random: &mut Random, first: u16, len: u16) {
    let at = first + random.below(len.into()) as u16;
    if (EXIT_PORT..EXIT_PORT + EXIT_PORT_LEN).contains(&at) || at == PORT + reg::PAGE {
        return;
    }
    match random.below(4) {
        0 => port::write8(at, any(random) as u8),
        1 => port::write32(at, any(random) as u32),
        2 => {
            port::read8(at);
        }
        _ => {
            port::read32(at);
        }
    }
}

/// An access of random width; what is written is as often an address in RAM as any number.
fn memory(random: &mut Random, start: u64, len: u64, ram: u64) {
    let at = (start + random.below(len / 8) * 8) as usize;
    let value = if random.below(2) == 0 {
        random.below(ram)
    } else {
        any(random)
    };
    // SAFETY: no RAM is there, and devices write into memory only where they were told to: into
    // whatever is there, which this job is for.
    unsafe {
        match random.below(6) {
            0 => with_exposed_provenance_mut::<u8>(at).write_volatile(value as u8),
            1 => with_exposed_provenance_mut::<u64>(at).write_volatile(value),
            2 => {
                with_exposed_provenance_mut::<u32>(at).read_volatile();
            }
            3 => {
                with_exposed_provenance_mut::<u64>(at).read_volatile();
            }
            _ => with_exposed_provenance_mut::<u32>(at).write_volatile(value as u32),
        }
    }
}
