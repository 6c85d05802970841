//! Files in and out, one a session.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use forkvm_agent_protocol::{AgentFrame, Bytes, CHUNK, ClientFrame, Refusal};

use crate::outbox::Outbox;
use crate::refusal::{invalid, of_io};
use crate::session::{Inbox, next, out_of_turn};

/// Numbers the files that are being written.
static UNFINISHED: AtomicU64 = AtomicU64::new(0);

/// Writes a file: beside its place, and there by a rename once all bytes have come.
pub(crate) fn put(
    path: &Bytes,
    mode: u32,
    length: u64,
    inbox: &mut Inbox,
    outbox: &Outbox,
) -> Result<(), Refusal> {
    let path = checked(path)?;
    if mode > 0o7777 {
        return Err(invalid(format!("a file has no mode {mode:#o}")));
    }
    check_replaceable(path)?;
    let what = format!("writing {}", path.display());
    let mut file = Unfinished::create(path).map_err(|error| of_io(&what, &error))?;
    outbox.send_if_heard(&AgentFrame::Ready);
    let mut left = length;
    // A disk that is full is told when the client has sent all: it does not listen before.
    let mut written = Ok(());
    while left > 0 {
        let bytes = match next(inbox)? {
            ClientFrame::Data(Bytes(bytes)) => bytes,
            other => return Err(out_of_turn(&other)),
        };
        left = left
            .checked_sub(bytes.len() as u64)
            .ok_or_else(|| invalid(format!("{what}: more than {length} bytes came")))?;
        written = written.and_then(|()| file.file.write_all(&bytes));
    }
    written
        .and_then(|()| file.finish(mode))
        .map_err(|error| of_io(&what, &error))?;
    outbox.send_if_heard(&AgentFrame::Stored);
    Ok(())
}

/// Sends a file.
pub(crate) fn get(path: &Bytes, outbox: &Outbox) -> Result<(), Refusal> {
    let path = checked(path)?;
    let what = format!("reading {}", path.display());
    let fail = |error: io::Error| of_io(&what, &error);
    // A FIFO without a writer must not hold the session.
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if metadata.is_dir() {
        return Err(directory(path));
    }
    if !metadata.is_file() {
        return Err(invalid(format!("{} is no file", path.display())));
    }
    let head = AgentFrame::File {
        mode: metadata.mode() & 0o7777,
        length: metadata.len(),
    };
    let gone = |_| Refusal {
        errno: libc::EPIPE,
        text: format!("{what}: the client went away"),
    };
    outbox.send(&head).map_err(gone)?;
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer).map_err(fail)? {
            0 => break,
            count => outbox
                .send(&AgentFrame::Data(buffer[..count].into()))
                .map_err(gone)?,
        }
    }
    outbox.send(&AgentFrame::DataEnd).map_err(gone)
}

/// Paths are absolute: a session has no working directory.
fn checked(path: &Bytes) -> Result<&Path, Refusal> {
    let path = path.as_path();
    if path.is_absolute() && path.file_name().is_some() {
        Ok(path)
    } else if path == Path::new("/") {
        Err(directory(path))
    } else {
        Err(invalid(format!(
            "{path:?} is no absolute path of a file in the guest"
        )))
    }
}

/// A rename would put a file in the place of a device or a socket, which nobody means. Symbolic links are replaced, but not one
/// that stands for a directory.
fn check_replaceable(path: &Path) -> Result<(), Refusal> {
    if path.is_dir() {
        return Err(directory(path));
    }
    match path.symlink_metadata() {
        Ok(there) if !there.is_file() && !there.is_symlink() => Err(invalid(format!(
            "{} is there and is no file: it is not replaced by one",
            path.display()
        ))),
        // Not there, most likely; else the file cannot be made either, and that says why.
        _ => Ok(()),
    }
}

fn directory(path: &Path) -> Refusal {
    Refusal {
        errno: libc::EISDIR,
        text: format!(
            "{} is a directory: one file a session is copied; send a directory by running tar",
            path.display()
        ),
    }
}

/// A file that is removed unless it is finished.
struct Unfinished<'a> {
    file: File,
    beside: PathBuf,
    place: &'a Path,
    finished: bool,
}

impl Unfinished<'_> {
    fn create(place: &Path) -> io::Result<Unfinished<'_>> {
        let (beside, file) = loop {
            let number = UNFINISHED.fetch_add(1, Ordering::Relaxed);
            let name = format!(".forkvm-{}-{number}", std::process::id());
            let beside = place.with_file_name(name);
            let made = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&beside);
            match made {
                // Left by an agent of the same number whose machine was killed.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => break (beside, made?),
            }
        };
        Ok(Unfinished {
            file,
            beside,
            place,
            finished: false,
        })
    }

    /// Set-user-id and its like are nothing that a copy brings along.
    fn finish(mut self, mode: u32) -> io::Result<()> {
        self.file
            .set_permissions(fs::Permissions::from_mode(mode & 0o777))?;
        fs::rename(&self.beside, self.place)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = fs::remove_file(&self.beside)
        {
            crate::log::line(&format!("removing {}: {error}", self.beside.display()));
        }
    }
}
