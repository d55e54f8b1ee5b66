//! A session: one bidirectional stream of a connection, from its hello to its end.
//!
//! Reading stops while the session has as many tasks in flight as the welcome allowed, or a shard's inbox is full;
//! what waits to be sent is bounded by that and by the session's end if its peer does not read.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use pelton_core::{
    error::Code,
    event::Control,
    id::{ConnectionId, name_is_valid},
    limits::{CONTROL_FRAME_BYTES_MAX, FRAME_OVERHEAD_BYTES},
};
use pelton_net::{
    error::ProtocolError,
    frame::{Frame, FrameReader, FrameType},
    quic::{Connection, RecvStream, SendStream, VarInt, server::Listener},
    session::{Credential, ErrorFrame, Hello, PROTOCOL_VERSION, Welcome},
};
use tokio::sync::Notify;

use crate::{
    edge::{execute::Executing, hub::Hub},
    keys::{Scopes, TenantSet},
};

/// Bytes that may wait for a peer that does not read; beyond that its session ends.
const OUT_BYTES_MAX: usize = 32 << 20;
/// Room that is made ahead for one piece.
const PIECE_BYTES_MAX: usize = 256 << 10;
/// Time for the hello after the stream was opened.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Questions of one session that may be unanswered.
const QUESTIONS_MAX: u32 = 256;
/// The tenant of a session that names none.
const TENANT_DEFAULT: &str = "default";
/// Chunks taken from a stream in one go.
const CHUNKS: usize = 32;

/// One stream of frames.
pub(crate) struct Session {
    pub(crate) id: ConnectionId,
    connection: Connection,
    pub(crate) tenant: String,
    pub(crate) scopes: Scopes,
    pub(crate) executor: Option<u64>,
    pub(crate) executing: Executing,
    pub(crate) several_shards: bool,
    out: RefCell<BytesMut>,
    /// What was sent in one piece lately: the next piece is made room for at once instead of step by step.
    piece_bytes: Cell<usize>,
    written: Notify,
    in_flight: Cell<u32>,
    answered: Notify,
    pub(crate) questions: Cell<u32>,
    heard: Cell<Instant>,
    /// The executor said goodbye, or was silent for too long: it is handed out nothing, and what it still holds when
    /// its connection ends is free at once.
    pub(crate) left: Cell<bool>,
    ended: Cell<bool>,
}

/// Takes connections for as long as the edge lives.
pub(crate) async fn accept(hub: Rc<Hub>, listener: Rc<Listener>) {
    while let Some(handshake) = listener.accept().await {
        let hub = Rc::clone(&hub);
        tokio::task::spawn_local(async move {
            let Ok(connection) = handshake.finish().await else {
                return;
            };
            // Each stream is a session of its own, with its own hello.
            while let Ok((send, receive)) = connection.accept_bi().await {
                let hub = Rc::clone(&hub);
                let connection = connection.clone();
                tokio::task::spawn_local(run(hub, connection, send, receive));
            }
        });
    }
}

async fn run(hub: Rc<Hub>, connection: Connection, mut send: SendStream, receive: RecvStream) {
    let mut input = Input::new(receive);
    let opened = tokio::time::timeout(HELLO_TIMEOUT, Session::open(&hub, &connection, &mut input));
    let session = match opened.await {
        Ok(Ok(session)) => session,
        Ok(Err(refusal)) => {
            refuse_stream(&mut send, refusal).await;
            return;
        }
        Err(_) => {
            refuse_stream(
                &mut send,
                (Code::DeadlineExceeded, "a session begins with a hello", 0),
            )
            .await;
            return;
        }
    };
    hub.sessions
        .borrow_mut()
        .insert(session.id.number(), Rc::clone(&session));
    if let Some(executor) = session.executor {
        for shard in hub.edge.shards() {
            let connection = session.id;
            let control = Control::SessionOpened {
                executor,
                connection,
            };
            hub.control(shard, control).await;
        }
    }
    let writer = tokio::task::spawn_local(Rc::clone(&session).write_out(Rc::clone(&hub), send));
    session.read_in(&hub, &mut input).await;
    session.ended.set(true);
    session.written.notify_one();
    hub.sessions.borrow_mut().remove(&session.id.number());
    if let Some(executor) = session.executor {
        for shard in hub.edge.shards() {
            let connection = session.id;
            let control = if session.left.get() {
                Control::SessionClosed {
                    executor,
                    connection,
                }
            } else {
                Control::SessionLost {
                    executor,
                    connection,
                }
            };
            hub.control(shard, control).await;
        }
    }
    let _ = writer.await;
}

/// Answers what is no session with an error frame and ends the stream.
async fn refuse_stream(send: &mut SendStream, (code, text, tag): (Code, &'static str, u64)) {
    let mut out = BytesMut::new();
    ErrorFrame::new(code, text).encode(&mut out, tag);
    let _ = send.write_chunk(out.freeze()).await;
    let _ = send.finish();
    let _ = tokio::time::timeout(Duration::from_secs(1), send.stopped()).await;
}

/// The receiving half, cut into frames.
struct Input {
    receive: RecvStream,
    reader: FrameReader,
    chunks: [Bytes; CHUNKS],
    taken: usize,
    held: usize,
}

impl Input {
    fn new(receive: RecvStream) -> Input {
        Input {
            receive,
            reader: FrameReader::new(CONTROL_FRAME_BYTES_MAX),
            chunks: [const { Bytes::new() }; CHUNKS],
            taken: 0,
            held: 0,
        }
    }

    /// The next frame that is there already.
    fn ready(&mut self) -> Result<Option<Frame>, ProtocolError> {
        loop {
            if let Some(frame) = self.reader.next()? {
                return Ok(Some(frame));
            }
            if self.taken == self.held {
                return Ok(None);
            }
            self.reader
                .feed(std::mem::take(&mut self.chunks[self.taken]));
            self.taken += 1;
        }
    }

    /// Waits for more bytes; false at the end of the stream or of the connection.
    async fn more(&mut self) -> bool {
        self.taken = 0;
        match self.receive.read_chunks(&mut self.chunks).await {
            Ok(Some(held)) => {
                self.held = held;
                true
            }
            Ok(None) | Err(_) => {
                self.held = 0;
                false
            }
        }
    }
}

impl Session {
    /// Reads the hello and says welcome.
    async fn open(
        hub: &Rc<Hub>,
        connection: &Connection,
        input: &mut Input,
    ) -> Result<Rc<Session>, (Code, &'static str, u64)> {
        let frame = loop {
            match input.ready() {
                Ok(Some(frame)) => break frame,
                Ok(None) => {}
                Err(error) => return Err((error.code, error.what, 0)),
            }
            if !input.more().await {
                return Err((Code::InvalidArgument, "a session begins with a hello", 0));
            }
        };
        let tag = frame.tag;
        if frame.kind != FrameType::Hello {
            return Err((Code::InvalidArgument, "a session begins with a hello", tag));
        }
        let hello = Hello::parse(&frame).map_err(|error| (error.code, error.what, tag))?;
        let (tenant, scopes) = admit(hub, connection, &hello).map_err(|(c, w)| (c, w, tag))?;
        if hello.executor.is_some() && !scopes.execute() {
            return Err((
                Code::PermissionDenied,
                "the key does not cover `execute`: `pelton key create --scope execute`",
                tag,
            ));
        }
        let payload_bytes_max = hub.settings.payload_bytes_max;
        let frame_bytes_max = payload_bytes_max + FRAME_OVERHEAD_BYTES;
        input.reader.set_body_bytes_max(frame_bytes_max);
        let session = Rc::new(Session {
            id: hub.next_connection(),
            connection: connection.clone(),
            tenant,
            scopes,
            executor: hello.executor,
            executing: Executing::default(),
            several_shards: hub.edge.shard_count() > 1,
            out: RefCell::new(BytesMut::new()),
            piece_bytes: Cell::new(0),
            written: Notify::new(),
            in_flight: Cell::new(0),
            answered: Notify::new(),
            questions: Cell::new(0),
            heard: Cell::new(Instant::now()),
            left: Cell::new(false),
            ended: Cell::new(false),
        });
        session.write(|out| {
            Welcome {
                protocol: PROTOCOL_VERSION,
                server: hub.server,
                frame_bytes_max: frame_bytes_max as u32,
                payload_bytes_max: payload_bytes_max as u32,
                in_flight_tasks_max: hub.settings.in_flight_max,
                heartbeat_ms: hub.settings.heartbeat.as_millis() as u32,
                lease_ms: hub.lease_ms,
                tenant: &session.tenant,
            }
            .encode(out, tag);
        });
        Ok(session)
    }

    async fn read_in(self: &Rc<Self>, hub: &Rc<Hub>, input: &mut Input) {
        loop {
            loop {
                match input.ready() {
                    Ok(Some(frame)) => {
                        let tag = frame.tag;
                        if let Err(error) = self.on_frame(hub, frame).await {
                            // The frame's borders are known: the session goes on.
                            self.error(tag, error.code, &error.to_string());
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        // Where the next frame begins is not known any more.
                        self.error(0, error.code, &error.to_string());
                        hub.wake_shards();
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        return;
                    }
                }
            }
            hub.wake_shards();
            self.heard.set(Instant::now());
            hub.has_heard();
            if self.ended.get() || !input.more().await {
                return;
            }
        }
    }

    async fn on_frame(self: &Rc<Self>, hub: &Rc<Hub>, frame: Frame) -> Result<(), ProtocolError> {
        match frame.kind {
            FrameType::Submit => {
                if !self.scopes.submit() {
                    self.forbidden(frame.tag, "submit");
                    return Ok(());
                }
                while self.in_flight.get() >= hub.settings.in_flight_max && !self.ended.get() {
                    hub.wake_shards();
                    self.answered.notified().await;
                }
                self.on_submit(hub, frame).await
            }
            FrameType::Outcome if self.executor.is_some() => self.on_outcomes(hub, frame).await,
            FrameType::Register => self.on_register(hub, &frame).await,
            FrameType::Resume => self.on_resume(hub, &frame).await,
            FrameType::Heartbeat => self.on_heartbeat(hub, &frame).await,
            FrameType::Goodbye => {
                // It goes on sending outcomes, and closes the connection when it is done.
                self.left.set(true);
                self.lend_nothing(hub).await;
                Ok(())
            }
            FrameType::Query | FrameType::Wait | FrameType::Stop => self.on_question(hub, frame),
            FrameType::Unknown => {
                self.error(
                    frame.tag,
                    Code::Unimplemented,
                    "this server does not know that frame type",
                );
                Ok(())
            }
            FrameType::Hello
            | FrameType::Welcome
            | FrameType::Error
            | FrameType::HeartbeatAck
            | FrameType::SubmitAnswer
            | FrameType::Finished
            | FrameType::StopAnswer
            | FrameType::QueryAnswer
            | FrameType::Registered
            | FrameType::Execute
            | FrameType::Outcome
            | FrameType::OutcomeAck
            | FrameType::Cancel
            | FrameType::Resumed => {
                self.error(
                    frame.tag,
                    Code::FailedPrecondition,
                    "a client does not send this frame now",
                );
                Ok(())
            }
        }
    }

    /// Sends what was written, in as large pieces as have come together.
    async fn write_out(self: Rc<Self>, hub: Rc<Hub>, mut send: SendStream) {
        loop {
            let bytes = self.out.borrow_mut().split().freeze();
            if bytes.is_empty() {
                if self.ended.get() {
                    let _ = send.finish();
                    return;
                }
                self.written.notified().await;
                continue;
            }
            let lately = self.piece_bytes.get();
            let piece = bytes.len().max(lately - lately / 8);
            self.piece_bytes.set(piece.min(PIECE_BYTES_MAX));
            if send.write_chunk(bytes).await.is_err() {
                self.end(Code::Unavailable, "the peer does not read any more");
                return;
            }
            if self.executor.is_some() {
                let waiting = self.out.borrow().len();
                self.lend_by_backlog(&hub, waiting).await;
            }
        }
    }

    /// Adds to what is sent.
    pub(crate) fn write(&self, write: impl FnOnce(&mut BytesMut)) {
        let mut out = self.out.borrow_mut();
        if out.is_empty() {
            out.reserve(self.piece_bytes.get());
        }
        write(&mut out);
        let waiting = out.len();
        drop(out);
        if waiting > OUT_BYTES_MAX {
            self.end(
                Code::ResourceExhausted,
                "the peer does not read its answers",
            );
        }
        self.written.notify_one();
    }

    pub(crate) fn error(&self, tag: u64, code: Code, text: &str) {
        self.write(|out| ErrorFrame::new(code, text).encode(out, tag));
    }

    pub(crate) fn forbidden(&self, tag: u64, scope: &str) {
        let text = format!("the key does not cover `{scope}`: `pelton key create --scope {scope}`");
        self.error(tag, Code::PermissionDenied, &text);
    }

    /// Tasks were handed to a shard.
    pub(crate) fn submitted(&self, count: u32) {
        self.in_flight.set(self.in_flight.get() + count);
    }

    /// Tasks were answered.
    pub(crate) fn answered(&self, count: u32) {
        self.in_flight
            .set(self.in_flight.get().saturating_sub(count));
        self.answered.notify_one();
    }

    /// True after the executor's goodbye.
    pub(crate) fn is_leaving(&self) -> bool {
        self.left.get()
    }

    /// One more question is asked; false if there are too many.
    pub(crate) fn begin_question(&self) -> bool {
        let asked = self.questions.get() < QUESTIONS_MAX;
        self.questions.set(self.questions.get() + u32::from(asked));
        asked
    }

    pub(crate) fn end_question(&self) {
        self.questions.set(self.questions.get() - 1);
    }

    /// True while something of the session is unanswered or unsent.
    pub(crate) fn has_work(&self) -> bool {
        !self.ended.get()
            && (self.in_flight.get() > 0
                || self.questions.get() > 0
                || !self.out.borrow().is_empty())
    }

    /// Ends an executor's session that has not been heard of for so long: its leases are over.
    pub(crate) fn end_if_silent(&self, longest: Duration) {
        if self.executor.is_some() && self.heard.get().elapsed() > longest {
            self.left.set(true);
            self.end(Code::DeadlineExceeded, "no heartbeat came in time");
        }
    }

    fn end(&self, code: Code, why: &str) {
        self.ended.set(true);
        self.connection
            .close(VarInt::from_u32(code as u32), why.as_bytes());
        self.answered.notify_one();
        self.written.notify_one();
    }
}

/// The tenant and the rights of whoever says hello.
fn admit(
    hub: &Hub,
    connection: &Connection,
    hello: &Hello<'_>,
) -> Result<(String, Scopes), (Code, &'static str)> {
    let valid = |tenant: &str| {
        if name_is_valid(tenant) {
            Ok(tenant.to_owned())
        } else {
            Err((
                Code::InvalidArgument,
                "the tenant's name breaks the rule for names",
            ))
        }
    };
    let key = match hello.credential {
        Credential::Key(key) => key,
        Credential::None => {
            if !hub.keys.is_empty() {
                return Err((
                    Code::Unauthenticated,
                    "this server wants a key: `pelton key create`, then --key or PELTON_KEY",
                ));
            }
            if !connection
                .remote_address()
                .ip()
                .to_canonical()
                .is_loopback()
            {
                return Err((
                    Code::Unauthenticated,
                    "without keys only clients on the same machine are served: `pelton key create`",
                ));
            }
            return Ok((
                valid(hello.tenant.unwrap_or(TENANT_DEFAULT))?,
                Scopes::all(),
            ));
        }
    };
    let identity = std::str::from_utf8(key)
        .ok()
        .and_then(|key| hub.keys.authenticate(key))
        .ok_or((
            Code::Unauthenticated,
            "the key is not known: it was revoked, or belongs to another server",
        ))?;
    let tenant = match (hello.tenant, &identity.tenants) {
        (Some(tenant), TenantSet::All) => valid(tenant)?,
        (None, TenantSet::All) => TENANT_DEFAULT.to_owned(),
        (Some(tenant), TenantSet::Named(names)) if names.contains(tenant) => tenant.to_owned(),
        (Some(_), TenantSet::Named(_)) => {
            return Err((Code::PermissionDenied, "the key does not cover that tenant"));
        }
        (None, TenantSet::Named(names)) => match names.iter().next() {
            Some(only) if names.len() == 1 => only.clone(),
            _ => {
                return Err((
                    Code::InvalidArgument,
                    "the key covers several tenants: the hello must name one, --tenant",
                ));
            }
        },
    };
    Ok((tenant, identity.scopes))
}
