//! The entropy device (virtio 1.2 section 5.4): fills the driver's buffers with random bytes.
//!
//! Bytes come from getrandom(2), which needs no descriptor: an idle clone has one less.
#![allow(unsafe_code)] // std has no getrandom(2).

use std::io;

use crate::virtio::{Chain, VirtioDevice};
use crate::{Brake, GuestMemory};

/// Device ID of an entropy device.
const DEVICE_TYPE: u32 = 4;

/// Size of the only queue.
const QUEUE_SIZES: &[u16] = &[64];

/// Most bytes that one request gets. A driver that wants more asks again.
const MOST_PER_REQUEST: u64 = 64 * 1024;

/// The entropy device. It has neither features nor state.
#[derive(Debug, Default)]
pub struct Rng;

impl VirtioDevice for Rng {
    type State = ();

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn serve(
        &mut self,
        _queue: usize,
        mut request: Chain,
        _features: u64,
        memory: &GuestMemory,
        brake: &Brake,
    ) -> u32 {
        if let Some(fault) = request.fault {
            tracing::debug!(%fault, "rng: a malformed request gets no bytes");
            return 0;
        }
        let wanted = request.writable.len().min(MOST_PER_REQUEST) as usize;
        let mut bytes = [0; 1024];
        let mut done = 0;
        // Nothing of guest memory is used here; a condemned machine just needs no more bytes.
        while done < wanted && !brake.condemned() {
            let part = &mut bytes[..(wanted - done).min(1024)];
            if let Err(error) = fill_random(part) {
                tracing::warn!(%error, "rng: the host gives no random bytes");
                break;
            }
            if let Err(error) = request.writable.write(memory, part) {
                tracing::debug!(%error, "rng: a request's buffer cannot be written");
                break;
            }
            done += part.len();
        }
        done as u32
    }

    fn save(&self) -> Self::State {}

    fn restore(&mut self, (): Self::State) -> Result<(), String> {
        Ok(())
    }
}

/// Fills `bytes` from the kernel's generator.
fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: the pointer and the length are those of `rest`, which is writable and outlives
        // the call.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => done += got,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
