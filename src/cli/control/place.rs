//! Where a machine that has a name can be found: a directory of that name under the user's runtime directory.
//!
//! A process that runs such a machine holds a lock in it (flock(2)), which the kernel gives up with the
//! process, however that ends. So a name is taken exactly as long as somebody runs, and what a killed process
//! left is swept away by the next one. All of it is the owner's alone: what is not is refused.

use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::geteuid;

/// The socket in a machine's directory.
const SOCKET: &str = "control.sock";

/// The file that is locked, with the process id of who holds it.
const LOCK: &str = "lock";

/// The socket of the machine's vsock device, where no other path is given.
const VSOCK: &str = "vsock";

/// Longest path of a Unix socket: `sun_path` of sockaddr_un without its final zero.
const LONGEST: usize = 107;

/// How often a directory may vanish under the hands of who claims it: each time another process has just
/// given it up.
const TRIES: u32 = 100;

/// How long a name may be held by somebody who only looks whether it is.
const PATIENCE: Duration = Duration::from_millis(100);

/// The machines of this user.
pub(crate) struct Places(PathBuf);

impl Places {
    pub(crate) fn of_user() -> anyhow::Result<Places> {
        Ok(Places(runtime_dir()?.join("forkvm")))
    }

    /// Where it is.
    pub(crate) fn dir(&self) -> &Path {
        &self.0
    }

    /// The socket of the machine `name`.
    pub(crate) fn socket(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.0.join(name).join(SOCKET);
        let len = path.as_os_str().as_bytes().len();
        ensure!(
            len <= LONGEST,
            "the control socket of {name} would be {}, which has {len} bytes, and a Unix socket's path has at most \
             {LONGEST}: take a shorter name, or set XDG_RUNTIME_DIR to a shorter directory",
            path.display()
        );
        Ok(path)
    }

    /// Names that have a directory, whether or not somebody runs there; none where there is nothing.
    pub(crate) fn names(&self) -> anyhow::Result<Vec<String>> {
        let what = || format!("listing the machines in {}", self.0.display());
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(what)?,
        };
        check_private(&self.0)?;
        let mut names = Vec::new();
        for entry in entries {
            names.extend(entry.with_context(what)?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }

    /// That whoever listens under `name` is this user: both directories are, where they are there.
    pub(super) fn check(&self, name: &str) -> anyhow::Result<()> {
        for dir in [self.0.clone(), self.0.join(name)] {
            // A file that stands in the way is nobody's.
            if fs::symlink_metadata(&dir).is_ok_and(|found| !found.is_file()) {
                check_private(&dir)?;
            }
        }
        Ok(())
    }

    /// The process that holds `name`, as far as it has said so; `None` when nobody does.
    pub(crate) fn holder(&self, name: &str) -> anyhow::Result<Option<String>> {
        let path = self.0.join(name).join(LOCK);
        let what = || format!("opening {}", path.display());
        match File::open(&path) {
            // Names that are too long, or that a file stands in the way of, are nobody's.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::NotADirectory
                        | io::ErrorKind::InvalidFilename
                ) =>
            {
                Ok(None)
            }
            lock => holder_of(&lock.with_context(what)?).with_context(what),
        }
    }
}

/// A name that is this process's. Given up, with the directory, when it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    dir: PathBuf,
    socket: PathBuf,
    /// Locked.
    _lock: File,
}

impl Claim {
    /// Takes the name `name` for this process.
    pub(crate) fn take(name: &str) -> anyhow::Result<Claim> {
        let places = Places::of_user()?;
        let socket = places.socket(name)?;
        let dir = places.0.join(name);
        make_private(&places.0)?;
        for _ in 0..TRIES {
            make_private(&dir)?;
            if let Some(lock) = lock(name, &dir)? {
                let claim = Claim {
                    dir,
                    socket,
                    _lock: lock,
                };
                claim
                    .sweep()
                    .context("removing what an ended machine left")?;
                return Ok(claim);
            }
        }
        bail!(
            "{} vanishes whenever it is made: does something remove it?",
            dir.display()
        )
    }

    /// Where its control socket goes.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Where the socket of its vsock device goes.
    pub(crate) fn vsock(&self) -> PathBuf {
        self.dir.join(VSOCK)
    }

    /// Removes all but the lock.
    fn sweep(&self) -> anyhow::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let path = entry.path();
            if entry.file_name() != LOCK {
                let removed = match entry.file_type()?.is_dir() {
                    true => fs::remove_dir_all(&path),
                    false => fs::remove_file(&path),
                };
                removed.with_context(|| format!("removing {}", path.display()))?;
            }
        }
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let give_up = || -> anyhow::Result<()> {
            self.sweep()?;
            fs::remove_file(self.dir.join(LOCK))?;
            match fs::remove_dir(&self.dir) {
                // Somebody has claimed the name since the lock's file went.
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
                other => Ok(other?),
            }
        };
        if let Err(error) = give_up() {
            let (dir, error) = (self.dir.display(), format!("{error:#}"));
            tracing::warn!(error, %dir, "the machine's directory stays; its name is free all the same");
        }
    }
}

/// Locks the directory `dir` of `name`; `None` when that has just been removed.
fn lock(name: &str, dir: &Path) -> anyhow::Result<Option<File>> {
    let path = dir.join(LOCK);
    let what = || format!("locking {}", path.display());
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path);
    let mut lock = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.with_context(what)?,
    };
    match lock_patiently(&lock) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => bail!(
            "a machine named {name} runs already, in process {}: `forkvm kill {name}` ends it, or take another name",
            pid_in(&lock).with_context(what)?
        ),
        Err(TryLockError::Error(error)) => return Err(error).with_context(what),
    }
    // The one who held it before removes the file, and then gives up the lock of what is no file any more.
    let locked = lock.metadata().with_context(what)?.ino();
    match fs::symlink_metadata(&path) {
        Ok(found) if found.ino() == locked => {}
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(what),
    }
    let write = |lock: &mut File| -> io::Result<()> {
        lock.set_len(0)?;
        writeln!(lock, "{}", std::process::id())
    };
    write(&mut lock).with_context(what)?;
    Ok(Some(lock))
}

/// Locks it, unless somebody holds it for longer than a look takes: that is a lock as well.
fn lock_patiently(lock: &File) -> Result<(), TryLockError> {
    let until = Instant::now() + PATIENCE;
    loop {
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(PATIENCE / 20),
            locked => return locked,
        }
    }
}

fn holder_of(lock: &File) -> io::Result<Option<String>> {
    match lock.try_lock_shared() {
        // Given up again at once, as the file is closed.
        Ok(()) => Ok(None),
        Err(TryLockError::WouldBlock) => pid_in(lock).map(Some),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// What stands in a lock's file.
fn pid_in(lock: &File) -> io::Result<String> {
    let mut text = String::new();
    lock.take(32).read_to_string(&mut text)?;
    let pid = text.trim();
    // Whoever has just locked it may not have written it yet.
    Ok(if pid.is_empty() { "(starting)" } else { pid }.to_owned())
}

/// The user's directory for what lives as long as processes do (XDG Base Directory Specification).
fn runtime_dir() -> anyhow::Result<PathBuf> {
    // A relative one is to be ignored.
    let named = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    if let Some(dir) = named.filter(|dir| dir.is_absolute()) {
        let found = fs::metadata(&dir);
        let found = found.with_context(|| {
            format!("looking at {}, which XDG_RUNTIME_DIR names", dir.display())
        })?;
        ensure!(
            found.is_dir(),
            "XDG_RUNTIME_DIR names {}, which is no directory",
            dir.display()
        );
        return Ok(dir);
    }
    let uid = geteuid().as_raw();
    let run = PathBuf::from(format!("/run/user/{uid}"));
    if check_private(&run).is_ok() {
        return Ok(run);
    }
    // Where everybody may make it: so it counts only if it is ours.
    let tmp = PathBuf::from(format!("/tmp/forkvm-{uid}"));
    make_private(&tmp)?;
    Ok(tmp)
}

/// Makes the directory, if it is not there; it must be this user's alone.
fn make_private(dir: &Path) -> anyhow::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("making the directory {}", dir.display()));
        }
        _ => {}
    }
    match check_private(dir) {
        // Whoever ran there has just given it up; who locks it finds that out.
        Err(error)
            if error
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == io::ErrorKind::NotFound) =>
        {
            Ok(())
        }
        checked => checked,
    }
}

fn check_private(dir: &Path) -> anyhow::Result<()> {
    let found =
        fs::symlink_metadata(dir).with_context(|| format!("looking at {}", dir.display()))?;
    let mode = found.mode() & 0o777;
    ensure!(
        found.is_dir() && found.uid() == geteuid().as_raw() && mode & 0o077 == 0,
        "{} must be a directory of the user's own with mode 0700, and it is {} of user {} with mode {mode:04o}: \
         remove it, or set XDG_RUNTIME_DIR to a directory of yours",
        dir.display(),
        if found.is_dir() {
            "a directory"
        } else {
            "no directory"
        },
        found.uid()
    );
    Ok(())
}
