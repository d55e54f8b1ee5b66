//! One port, several sockets, each connection at the same socket for its whole life.
//!
//! The kernel spreads packets over sockets that share a port by a hash of the addresses, so a client whose port changes
//! (a rebound NAT, a phone in another network) would reach a socket that does not know it. Here a small program picks the
//! socket by the first byte of the destination connection id instead, and each socket hands out ids whose first byte
//! leads back to it. A client's very first packet carries an id of the client's choice: any socket may get it.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::Duration;

use quinn_proto::{ConnectionId, ConnectionIdGenerator};

const ID_BYTES: usize = 8;

/// Makes connection ids whose first byte modulo `count` is `index`; the rest is random.
pub(crate) struct SteeredIds {
    index: u8,
    count: u16,
}

impl SteeredIds {
    /// Ids of the socket `index` of `count`, at most 256.
    pub(crate) fn new(index: u8, count: u16) -> SteeredIds {
        assert!(u16::from(index) < count && count <= 256);
        SteeredIds { index, count }
    }
}

impl ConnectionIdGenerator for SteeredIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID_BYTES];
        getrandom::fill(&mut id)
            .expect("the kernel's random source answers once the machine is up");
        let multiples = 256 / self.count;
        let first = u16::from(id[0]) % multiples * self.count + u16::from(self.index);
        id[0] = first as u8;
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Installs the program for all sockets bound to the same address and port as `socket`. The number that it returns is
/// a socket's place in the order in which they were bound.
pub(crate) fn steer(socket: &UdpSocket, count: u16) -> io::Result<()> {
    // Opcodes of classic BPF: class, size and mode in one number.
    const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
    const JUMP_IF_SET: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
    const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
    const MODULO: u16 = (libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_A) as u16;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        op(LOAD_BYTE, 0, 0, 0),      // offset 0 is the first byte of the UDP payload
        op(JUMP_IF_SET, 0, 2, 0x80), // a long header: version and id length stand before the id
        op(LOAD_BYTE, 0, 0, 6),
        op(JUMP, 0, 0, 1),
        op(LOAD_BYTE, 0, 0, 1),
        op(MODULO, 0, 0, u32::from(count)),
        op(RETURN, 0, 0, 0),
    ];
    let fprog = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the descriptor is open for as long as `socket` is borrowed; `fprog` and the program that it points to
    // outlive the call, which copies them. The test of the steered listener runs it.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const fprog).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_leads_back_to_its_socket() {
        for count in [1u16, 2, 3, 7, 64, 255, 256] {
            for index in [0, count / 2, count - 1] {
                let mut ids = SteeredIds::new(index as u8, count);
                for _ in 0..200 {
                    assert_eq!(u16::from(ids.generate_cid()[0]) % count, index);
                }
            }
        }
    }
}
