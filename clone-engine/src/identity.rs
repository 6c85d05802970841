//! Who a VM is.

use std::fs::File;
use std::io::{self, Read};

use forkvm_devices::SavedState;
use forkvm_devices::doorbell::Announcement;
use serde::{Deserialize, Serialize};

/// What tells a VM from every other one of its family, and from every other family. Section
/// `identity` of a saved machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Name: the parent's, a dot, and a number that counts all clones the parent ever had. `X`,
    /// `X.1`, `X.1.4`.
    pub name: String,
    /// 0 in a VM that was booted, 1..=n in the clones of one fork.
    pub clone_id: u32,
    /// Clone steps from the VM that was booted.
    pub depth: u32,
    /// Forks from the boot on, as parent or as clone.
    pub fork_count: u32,
    /// 16 random bytes: the generation id.
    pub generation: [u8; 16],
    /// Its vsock CID, where its family has any: no two VMs of a family have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cid: Option<u32>,
}

impl SavedState for Identity {
    const VERSION: u16 = 1;
}

impl Identity {
    /// Of a VM that is booted, or restored as a machine of its own.
    pub fn root(name: &str) -> io::Result<Identity> {
        let generation = fresh_generation()?;
        Ok(Identity {
            name: name.to_owned(),
            clone_id: 0,
            depth: 0,
            fork_count: 0,
            generation,
            cid: None,
        })
    }

    /// Of a clone of this VM: the VM's `number`th in all, and `clone_id` among those of its fork.
    pub(crate) fn of_clone(&self, number: u32, clone_id: u32) -> io::Result<Identity> {
        Ok(Identity {
            name: format!("{}.{number}", self.name),
            clone_id,
            depth: self.depth + 1,
            fork_count: self.fork_count + 1,
            generation: fresh_generation()?,
            cid: None,
        })
    }

    /// Of the same VM in another life, which is to be told from this one.
    pub(crate) fn reborn(&self) -> io::Result<Identity> {
        Ok(Identity {
            generation: fresh_generation()?,
            ..self.clone()
        })
    }

    /// As the doorbell page says it.
    pub(crate) fn announcement(&self) -> Announcement {
        Announcement {
            fork_count: self.fork_count,
            clone_id: self.clone_id,
            depth: self.depth,
            generation: self.generation,
        }
    }
}

fn fresh_generation() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
