//! Which freeze is taken, for every pair that can be asked for, with and without userfaultfd.

use std::sync::Arc;

use forkvm_vmm::memory;

use super::*;

fn shared() -> Backing {
    Backing::Shared(Arc::new(memory::memfd(c"test", 4096).unwrap()))
}

fn private() -> Backing {
    let image = Arc::new(memory::memfd(c"test", 4096).unwrap());
    Backing::Private(Arc::new(image))
}

/// What is chosen, or the error's text.
fn chosen(
    asked: FreezeKind,
    backing: &Backing,
    mode: MemoryMode,
    userfaultfd: bool,
) -> Result<FreezeKind, String> {
    let chosen = asked.choose(backing, mode, || userfaultfd);
    chosen
        .map(|(freeze, _why)| freeze.kind())
        .map_err(|error| error.to_string())
}

#[test]
fn auto_takes_the_cheapest_that_gives_the_memory_mode() {
    use FreezeKind::{Auto, Delta, Remap, WriteProtect};
    use MemoryMode::{Cow, Lazy};
    assert_eq!(chosen(Auto, &shared(), Cow, true), Ok(Remap));
    assert_eq!(chosen(Auto, &shared(), Lazy, true), Ok(WriteProtect));
    assert_eq!(chosen(Auto, &private(), Cow, true), Ok(Delta));
    assert_eq!(chosen(Auto, &private(), Lazy, true), Ok(Delta));
}

#[test]
fn without_userfaultfd_auto_remaps_once_and_copies_afterwards() {
    let cow = MemoryMode::Cow;
    let auto = FreezeKind::Auto;
    assert_eq!(chosen(auto, &shared(), cow, false), Ok(FreezeKind::Remap));
    assert_eq!(chosen(auto, &private(), cow, false), Ok(FreezeKind::Copy));
}

#[test]
fn without_userfaultfd_lazy_is_not_made_cow_in_silence() {
    // What was asked for is chosen, and then fails with the kernel's reason.
    let (lazy, auto) = (MemoryMode::Lazy, FreezeKind::Auto);
    let chosen_shared = chosen(auto, &shared(), lazy, false);
    assert_eq!(chosen_shared, Ok(FreezeKind::WriteProtect));
    assert_eq!(chosen(auto, &private(), lazy, false), Ok(FreezeKind::Delta));
    let refused = UserfaultError::Unavailable(std::io::Error::from_raw_os_error(libc::EPERM));
    let said = FreezeError::from(refused).to_string();
    for part in ["lazy", "doctor", "remap", "copy"] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn auto_says_why_it_chose() {
    for (backing, mode, userfaultfd, because) in [
        (shared(), MemoryMode::Cow, true, "shared"),
        (shared(), MemoryMode::Lazy, true, "lazy"),
        (private(), MemoryMode::Cow, true, "privately"),
        (private(), MemoryMode::Cow, false, "userfaultfd"),
    ] {
        let (_, why) = FreezeKind::Auto
            .choose(&backing, mode, || userfaultfd)
            .unwrap();
        assert!(why.contains(because), "{why}");
    }
}

/// contracts.md: remap, copy -> cow; write-protect -> lazy; delta, stop -> both.
#[test]
fn a_pair_that_does_not_exist_is_refused_and_the_pairs_that_do_are_named() {
    for freeze in FreezeKind::ALL {
        for mode in [MemoryMode::Cow, MemoryMode::Lazy] {
            let exists = match freeze {
                FreezeKind::Remap | FreezeKind::Copy => mode == MemoryMode::Cow,
                FreezeKind::WriteProtect => mode == MemoryMode::Lazy,
                FreezeKind::Auto | FreezeKind::Delta | FreezeKind::Stop => true,
            };
            assert_eq!(freeze.check(mode).is_ok(), exists, "{freeze} {mode:?}");
            let backing = if freeze == FreezeKind::Delta {
                private()
            } else {
                shared()
            };
            match chosen(freeze, &backing, mode, true) {
                Ok(kind) => {
                    assert!(exists, "{freeze} {mode:?}");
                    assert!(kind == freeze || freeze == FreezeKind::Auto);
                }
                Err(said) => {
                    assert!(!exists, "{freeze} {mode:?}: {said}");
                    for other in ["remap", "copy", "write-protect", "delta", "stop", "auto"] {
                        assert!(said.contains(other), "{said}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_freeze_that_does_not_go_with_how_the_vm_maps_its_memory_is_refused_with_those_that_do() {
    let remap = chosen(FreezeKind::Remap, &private(), MemoryMode::Cow, true);
    let said = remap.unwrap_err();
    assert!(said.contains("delta") && said.contains("auto"), "{said}");
    let protect = chosen(FreezeKind::WriteProtect, &private(), MemoryMode::Lazy, true);
    let said = protect.unwrap_err();
    assert!(said.contains("delta") && said.contains("auto"), "{said}");
    let delta = chosen(FreezeKind::Delta, &shared(), MemoryMode::Cow, true);
    let said = delta.unwrap_err();
    assert!(said.contains("remap") && said.contains("auto"), "{said}");
}
