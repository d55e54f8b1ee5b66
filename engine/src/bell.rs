//! What wakes a sleeper that waits for a descriptor: a shard in its log's ring, an embedding program in its own loop.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

/// An eventfd. What it was rung for is kept until somebody reads it.
#[derive(Debug)]
pub(crate) struct Bell {
    fd: OwnedFd,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        // SAFETY: the call has no memory of ours to touch.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made, and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Bell { fd })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(crate) fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: the eight bytes are there, and the descriptor is open. It fails only when the counter is full, and
        // then the reader is being woken already.
        unsafe { libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Waits until it is rung, or for so long. For a thread without a ring.
    pub(crate) fn wait(&self, timeout: Duration) {
        let mut poll = libc::pollfd {
            fd: self.fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let timeout_ms = timeout.as_millis().min(1 << 30) as libc::c_int;
        // SAFETY: one pollfd is there.
        let ready = unsafe { libc::poll(&mut poll, 1, timeout_ms) };
        if ready == 1 {
            let mut count = [0u8; 8];
            // SAFETY: the eight bytes are there, and the descriptor is open.
            unsafe { libc::read(self.fd(), count.as_mut_ptr().cast(), count.len()) };
        }
    }
}
