//! A family under the command line: consoles, signals, and the wait for its end.
//!
//! Clones outlive their parent, as processes do, so the command waits for all of them. SIGINT,
//! SIGTERM and SIGHUP end the family in one order: with `--save` the VM that was started is saved
//! while it still waits for its clones (so that it does not see them die), then the clones are
//! ended; without, everything is ended, the deepest clones first and the VM that was started last.
//! A second signal ends the process at once.

use std::io;
use std::path::{self, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use forkvm::engine::saved::{SaveError, SaveTo, Saver};
use forkvm::engine::{Family, ForkPoint, Member, MemberError, Observer, Phase, Vetoed};
use forkvm::vmm::{Kvm, PausedVm};
use forkvm::{End, FamilyConfig, FreezeKind, VsockSpec};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use super::console::{Terminal, pass_input};
use super::control::place::Claim;
use super::control::registry::{Registry, exit_code};
use super::control::taps::Taps;
use super::control::{Machine, Server};
use super::fork_options::ForkOptions;
use super::introductions::Introductions;
use super::output::{Outcome, Output};
use super::progress::Progress;
use super::raw_terminal::{self, LineFeeds, RawTerminal};
use forkvm::host::Host;

/// How long one VM is waited for before the others are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Options of every command that runs VMs.
#[derive(Debug, Args)]
pub(crate) struct SessionOptions {
    /// On Ctrl-C, SIGTERM or the guest's request save the machine to the new directory DIR rather
    /// than ending it; a clone that asks for it is saved to DIR-NAME
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Write the clones' consoles to DIR/NAME.log rather than to standard output
    #[arg(long, value_name = "DIR")]
    console_dir: Option<PathBuf>,
    /// Give the VM a vsock device, whose Unix socket is PATH, and PATH.N for its Nth clone; see docs/vsock.md
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) forks: ForkOptions,
}

impl SessionOptions {
    /// Where its vsock is, if the user does not say; there is none then without this.
    pub(crate) fn vsock_is_by_default(&mut self, path: PathBuf) {
        self.vsock.get_or_insert(path);
    }
}

/// A family that has no VM yet.
pub(crate) struct Session {
    family: Arc<Family>,
    births: Receiver<Birth>,
    control: Arc<Control>,
    save: Option<PathBuf>,
    vms: Arc<Registry>,
    taps: Arc<Taps>,
    /// The name under which it can be asked. Given up when all VMs are gone.
    claim: Option<Claim>,
}

/// What the thread that hears signals knows.
struct Control {
    family: Arc<Family>,
    /// The VM that was started, from then on.
    root: Mutex<Option<Arc<Member>>>,
    saves: bool,
    /// The signal that ended the family; 0 for none.
    ended_by: AtomicI32,
}

impl Session {
    /// Opens KVM and the consoles, and begins to hear signals. The options have been checked. With a
    /// `claim` its VMs can be asked from outside.
    pub(crate) fn new(
        options: SessionOptions,
        output: &Output,
        claim: Option<Claim>,
    ) -> anyhow::Result<Session> {
        let SessionOptions {
            save,
            console_dir,
            vsock,
            forks,
        } = options;
        if let Some(dir) = &console_dir {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("making the directory {}", dir.display()))?;
        }
        if let Some(dir) = &save {
            // Now rather than when the machine has to be saved.
            anyhow::ensure!(
                std::fs::symlink_metadata(dir).is_err(),
                "cannot save to {}: it exists already; name another directory, or remove it",
                dir.display()
            );
        }
        let (sender, births) = channel();
        let taps = Arc::new(Taps::new(Terminal::new(output.text(), console_dir)));
        let vms = Arc::new(Registry::default());
        let observer = Births {
            vms: vms.clone(),
            told: Mutex::new(sender),
        };
        let config = FamilyConfig {
            consoles: taps.clone(),
            observer: Arc::new(observer),
            saver: save
                .clone()
                .map(|dir| Arc::new(saver(dir)) as Arc<dyn Saver>),
            // Others are told where it is, and may ask from anywhere.
            vsock: vsock
                .map(path::absolute)
                .transpose()?
                .map(|path| VsockSpec { path }),
            ..forks.family()?
        };
        let family = Family::new(Arc::new(Kvm::open()?), config);
        let control = Arc::new(Control {
            family: family.clone(),
            root: Mutex::default(),
            saves: save.is_some(),
            ended_by: AtomicI32::new(0),
        });
        control.clone().hear_signals().context("hearing signals")?;
        Ok(Session {
            family,
            births,
            control,
            save,
            vms,
            taps,
            claim,
        })
    }

    /// The family, to start its first VM.
    pub(crate) fn family(&self) -> &Arc<Family> {
        &self.family
    }

    /// Serves the VM that was started, and its clones, until all have ended. Where the terminal is to be
    /// `raw`, each key goes to the VM as it is pressed.
    pub(crate) fn serve(mut self, root: Arc<Member>, raw: bool) -> anyhow::Result<Outcome> {
        self.vms.add(&root);
        *self
            .control
            .root
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(root.clone());
        let around = self.begin(&root, raw);
        if around.is_err() {
            self.family.end();
        }
        let (server, raw, introductions) = around?;
        let vms = self.wait_for_all(root.clone(), introductions.as_ref());
        drop(raw);
        let end = root.wait().end;
        let saved_to = self.vms.saved_to(root.name()).or(self.save.take());
        // Those who wait for the end are told before the name is free.
        drop((server, self.claim.take()));
        let signal = self.control.ended_by.load(Ordering::Acquire);
        let status = if signal == 0 {
            exit_code(&end)
        } else {
            exit_code_of_signal(signal)
        };
        let saved_to = saved_to.filter(|_| end == End::Saved);
        let report = json!({ "host": Host::here(), "vms": vms, "saved_to": saved_to });
        Ok(Outcome { status, report })
    }

    /// What is around a machine that runs.
    fn begin(
        &self,
        root: &Arc<Member>,
        raw: bool,
    ) -> anyhow::Result<(Option<Server>, Option<RawTerminal>, Option<Introductions>)> {
        let server = self.listen()?;
        let raw = raw.then(begin_raw).transpose();
        let raw = raw.context("making the terminal raw")?;
        let escape: Option<fn()> = raw.is_some().then_some(interrupt);
        pass_input(root.clone(), escape).context("starting a thread for standard input")?;
        let introductions = Introductions::of(&self.family);
        if let Some(introductions) = &introductions {
            let heard = introductions.hear_of(root);
            heard.context("starting a thread for the machine's agent")?;
        }
        Ok((server, raw, introductions))
    }

    /// Serves those who ask from outside.
    fn listen(&self) -> anyhow::Result<Option<Server>> {
        let Some(claim) = &self.claim else {
            return Ok(None);
        };
        let machine = Machine {
            family: self.family.clone(),
            vms: self.vms.clone(),
            taps: self.taps.clone(),
        };
        let server = Server::start(claim.socket(), machine);
        let what = || format!("listening on {}", claim.socket().display());
        server.map(Some).with_context(what)
    }

    /// Tells of each VM as it ends; returns what was told.
    fn wait_for_all(&self, root: Arc<Member>, introductions: Option<&Introductions>) -> Vec<Value> {
        let mut running = vec![root];
        let mut ended = Vec::new();
        loop {
            // A clone is announced before its parent can end, so none is missed.
            let before = running.len();
            let mut left = Vec::new();
            for vm in running {
                match vm.wait_for(Duration::ZERO) {
                    Some(finished) => ended.push(self.tell(&vm, &finished.end)),
                    None => left.push(vm),
                }
            }
            running = left;
            let gone = before != running.len();
            for birth in self.births.try_iter() {
                match birth {
                    Birth::Clone(clone) => {
                        if let Some(introductions) = introductions
                            && let Err(error) = introductions.hear_of(&clone)
                        {
                            tracing::error!(%error, clone = clone.name(), "no thread to tell a clone who it is: it is ended");
                            clone.kill();
                        }
                        running.push(clone);
                    }
                    Birth::ByHost { parent } => {
                        if let Some(introductions) = introductions
                            && let Some(parent) = running.iter().find(|vm| vm.name() == parent)
                            && let Err(error) = introductions.hear_of_fork(parent)
                        {
                            let vm = parent.name();
                            tracing::warn!(%error, vm, "no thread to tell it that it was forked");
                        }
                    }
                }
            }
            match running.first() {
                None => return ended,
                Some(_) if gone => {}
                Some(vm) => {
                    vm.wait_for(LOOK_EVERY);
                }
            }
        }
    }

    fn tell(&self, vm: &Member, end: &End) -> Value {
        let identity = vm.identity();
        eprintln!("forkvm: {} {end}", identity.name);
        let usual = || Some(SaveTo::new(self.save.as_ref()?).dir_of(&identity));
        let saved_to = self.vms.saved_to(&identity.name).or_else(usual);
        if let (End::Saved, Some(dir)) = (end, saved_to) {
            eprintln!("forkvm: `forkvm restore {}` lets it run on", dir.display());
        }
        json!({
            "name": identity.name,
            "depth": identity.depth,
            "end": end.to_string(),
            "status": end.status(),
        })
    }
}

impl Control {
    fn hear_signals(self: Arc<Self>) -> io::Result<()> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let hear = move || {
            let mut second = false;
            for signal in signals.forever() {
                let root = self
                    .root
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone();
                let Some(root) = root.filter(|_| !second) else {
                    raw_terminal::restore();
                    signal_hook::low_level::exit(exit_code_of_signal(signal).into());
                };
                second = true;
                // In a thread of its own, so that a second signal is heard meanwhile.
                let control = self.clone();
                let end = move || control.end(&root, signal);
                if let Err(error) = thread::Builder::new().name("end".into()).spawn(end) {
                    tracing::error!(%error, "no thread to end the family; it ends at once");
                    raw_terminal::restore();
                    signal_hook::low_level::exit(exit_code_of_signal(signal).into());
                }
            }
        };
        thread::Builder::new().name("signals".into()).spawn(hear)?;
        Ok(())
    }

    /// Ends the family in its order. What cannot be saved runs on.
    fn end(&self, root: &Member, signal: i32) {
        let saved = if self.saves { Some(root.save()) } else { None };
        match saved {
            // The guest may have asked for the same a moment before.
            Some(
                Ok(())
                | Err(MemberError::Ended {
                    end: End::Saved, ..
                }),
            ) => {}
            Some(Err(MemberError::Ended { .. } | MemberError::Save(SaveError::Ended))) | None => {
                self.ended_by.store(signal, Ordering::Release);
            }
            Some(Err(error)) => {
                super::errors::report(&error.into());
                eprintln!(
                    "forkvm: {} runs on; another signal ends it at once",
                    root.name()
                );
                return;
            }
        }
        self.family.end();
    }
}

/// What a fork brought.
enum Birth {
    Clone(Arc<Member>),
    /// It was the host that asked the VM of this name for it: the guest does not know.
    ByHost {
        parent: String,
    },
}

/// Hears of forks.
struct Births {
    vms: Arc<Registry>,
    told: Mutex<Sender<Birth>>,
}

impl Observer for Births {
    fn enter(&self, _phase: Phase, _paused: Option<&PausedVm<'_>>) -> Result<(), Vetoed> {
        Ok(())
    }

    fn leave(&self, _phase: Phase, _took: Duration) {}

    fn parent_paused(&self, _took: Duration) {}

    fn forked(&self, point: &Arc<ForkPoint>, clones: &[Arc<Member>]) {
        clones.iter().for_each(|clone| self.vms.add(clone));
        let parent = || Birth::ByHost {
            parent: point.parent().name.clone(),
        };
        let goes_on = point.freeze() != FreezeKind::Stop;
        let by_host = (goes_on && !point.by_guest()).then(parent);
        let births = clones.iter().cloned().map(Birth::Clone).chain(by_host);
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        for birth in births {
            if told.send(birth).is_err() {
                let parent = &point.parent().name;
                tracing::debug!(parent, "forked while the command ends");
            }
        }
    }
}

fn saver(dir: PathBuf) -> SaveTo {
    let bar = Mutex::new(None);
    SaveTo::new(dir).with_progress(move |progress| {
        let mut bar = bar.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = bar.get_or_insert_with(|| Progress::new("saving memory"));
        shown.update(progress.done, progress.total);
        if progress.done == progress.total {
            *bar = None;
        }
    })
}

/// Of standard input, if people are at both ends.
fn begin_raw() -> io::Result<RawTerminal> {
    // SIGINT, SIGTERM and SIGHUP end the family in its order.
    let raw = RawTerminal::begin(&[SIGQUIT], LineFeeds::ByLines)?;
    eprintln!("forkvm: keys go to the guest; Ctrl-] is what Ctrl-C is elsewhere");
    Ok(raw)
}

/// As Ctrl-C does where the terminal makes a signal of it.
fn interrupt() {
    if let Err(error) = signal_hook::low_level::raise(SIGINT) {
        tracing::error!(%error, "SIGINT could not be raised");
    }
}

fn exit_code_of_signal(signal: i32) -> u8 {
    128 + signal as u8
}
