//! How the endpoints make and use their UDP sockets.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, ServerConfig, TokioRuntime, UdpPoller,
};

/// What is asked of the kernel for each direction of a socket; it may grant less (`net.core.rmem_max`).
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// The largest UDP payload that QUIC allows, and so the size of one receive buffer.
const UDP_PAYLOAD_BYTES_MAX: u16 = 65_527;

/// Asks for large socket buffers. That the kernel grants less is no error: packets are lost and sent again.
pub(crate) fn enlarge_buffers(socket: &socket2::Socket) {
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
}

/// An endpoint on the current tokio runtime that takes packets of any size.
pub(crate) fn endpoint(
    mut config: EndpointConfig,
    server: Option<ServerConfig>,
    socket: std::net::UdpSocket,
) -> io::Result<Endpoint> {
    config
        .max_udp_payload_size(UDP_PAYLOAD_BYTES_MAX)
        .expect("the bound lies between the 1200 and the 65527 that QUIC allows");
    let runtime = Arc::new(TokioRuntime);
    let socket = Arc::new(OnePacketSocket(runtime.wrap_udp_socket(socket)?));
    Endpoint::new_with_abstract_socket(config, server, socket, runtime)
}

/// A socket that asks for buffers of one largest packet each. What the kernel hands over at once, several received
/// packets of one peer included, is never larger than that, whereas quinn would make room for 64 of them: 128 MiB an
/// endpoint.
#[derive(Debug)]
struct OnePacketSocket(Arc<dyn AsyncUdpSocket>);

impl AsyncUdpSocket for OnePacketSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.0.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.0.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_recv(cx, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        1
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }
}
