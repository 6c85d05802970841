//! Pseudo-terminals.

use std::io;
use std::os::fd::OwnedFd;

use forkvm_agent_protocol::Size;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// A terminal: the agent's end, and the program's until it is started.
pub(super) struct Terminal {
    master: OwnedFd,
    slave: Option<OwnedFd>,
}

impl Terminal {
    pub(super) fn open(size: Size) -> io::Result<Terminal> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        let terminal = Terminal {
            master,
            slave: Some(slave),
        };
        terminal.resize(size)?;
        Ok(terminal)
    }

    pub(super) fn master(&self) -> &OwnedFd {
        &self.master
    }

    /// The program's end, once for each of its streams.
    pub(super) fn slave(&self) -> io::Result<OwnedFd> {
        match &self.slave {
            Some(slave) => slave.try_clone(),
            None => Err(io::Error::other("the terminal has been given away")),
        }
    }

    /// Closes this process's hold on the program's end.
    pub(super) fn let_go(&mut self) {
        self.slave = None;
    }

    /// Tells the terminal, and by SIGWINCH its foreground group.
    pub(super) fn resize(&self, size: Size) -> io::Result<()> {
        let size = Winsize {
            ws_row: size.rows,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(tcsetwinsize(&self.master, size)?)
    }
}
