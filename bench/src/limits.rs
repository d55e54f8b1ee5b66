//! What the machine can do at best, measured in the same run: one flush, log records without an engine, QUIC frames
//! without a log.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use hdrhistogram::Histogram;
use pelton_client::ClientOptions;
use pelton_net::{
    frame::{FrameReader, FrameType},
    id::RequestId,
    limits::FRAME_BYTES_MAX,
    quic::{RecvStream, SendStream, certificate::Certificate, client::Trust, server::bind},
    session::{PROTOCOL_VERSION, Welcome},
    submit::{ANSWER_DURABLE, AnswerWriter, Durability, SubmitView, TaskAnswer},
};

use crate::load::{Counted, Load, closed};

const BLOCK_BYTES: usize = 4096;
const FILE_BYTES: usize = 64 << 20;
/// What a record of the log has beside its payload.
const RECORD_OVERHEAD_BYTES: usize = 120;
/// One write of the log under load.
const WRITE_BYTES: usize = 256 << 10;

/// Figures of the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) flush_p50_us: f64,
    pub(crate) log_records_per_s: f64,
    pub(crate) quic_frames_per_s: f64,
}

/// Measures the disk under `folder`, and QUIC over loopback between two threads with the load's shape.
pub(crate) async fn measure(folder: &Path, load: &Load) -> Result<Limits, String> {
    let disk = {
        let path = folder.join("limits");
        let payload = load.payload;
        tokio::task::spawn_blocking(move || {
            let measured = disk(&path, payload);
            let _ = std::fs::remove_file(&path);
            measured
        })
    };
    let (flush_p50_us, log_records_per_s) = disk
        .await
        .expect("the measurement does not panic")
        .map_err(|error| format!("measuring the disk: {error}"))?;
    let quic = quic(folder, load).await?;
    Ok(Limits {
        flush_p50_us,
        log_records_per_s,
        quic_frames_per_s: quic.measured as f64 / quic.seconds,
    })
}

/// The median of one block written and flushed, and records a second in large writes, each flushed.
fn disk(path: &Path, payload: usize) -> io::Result<(f64, f64)> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    let zeroes = aligned(1 << 20);
    for offset in (0..FILE_BYTES).step_by(1 << 20) {
        file.write_all_at(&zeroes.0[zeroes.1..][..1 << 20], offset as u64)?;
    }
    file.sync_all()?;
    let mut flushes = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)
        .expect("the bounds and digits are valid");
    let block = &zeroes.0[zeroes.1..][..BLOCK_BYTES];
    let start = Instant::now();
    for round in 0..2_000 {
        let offset = (round * BLOCK_BYTES % FILE_BYTES) as u64;
        let before = Instant::now();
        write_and_flush(&file, block, offset)?;
        flushes.saturating_record(before.elapsed().as_nanos() as u64);
        if start.elapsed() > Duration::from_secs(2) {
            break;
        }
    }
    let large = &zeroes.0[zeroes.1..][..WRITE_BYTES];
    let start = Instant::now();
    let mut written = 0;
    while start.elapsed() < Duration::from_secs(1) {
        write_and_flush(&file, large, (written % FILE_BYTES) as u64)?;
        written += WRITE_BYTES;
    }
    let records = written as f64 / (payload + RECORD_OVERHEAD_BYTES) as f64;
    Ok((
        flushes.value_at_quantile(0.5) as f64 / 1000.0,
        records / start.elapsed().as_secs_f64(),
    ))
}

fn write_and_flush(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    file.write_all_at(bytes, offset)?;
    file.sync_data()
}

/// Bytes and where the aligned ones among them begin.
fn aligned(len: usize) -> (Vec<u8>, usize) {
    let bytes = vec![0u8; len + BLOCK_BYTES];
    let start = bytes.as_ptr().align_offset(BLOCK_BYTES);
    (bytes, start)
}

/// The load against a server that accepts everything and keeps nothing.
async fn quic(folder: &Path, load: &Load) -> Result<Counted, String> {
    let folder = folder.join("limits-quic");
    std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    let certificate = Certificate::load_or_make(&folder).map_err(|error| error.to_string())?;
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let mut sockets = bind(address, 1, &certificate).map_err(|error| error.to_string())?;
    let socket = sockets.remove(0);
    let address = socket.local_addr();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime can be made");
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, async move {
            let listener = socket.listen().expect("the socket is bound");
            let accept = async {
                while let Some(handshake) = listener.accept().await {
                    tokio::task::spawn_local(async move {
                        if let Ok(connection) = handshake.finish().await {
                            while let Ok((send, receive)) = connection.accept_bi().await {
                                tokio::task::spawn_local(answer(send, receive));
                            }
                        }
                    });
                }
            };
            tokio::select! { () = accept => {}, _ = stopped => {} }
        });
    });
    let trust = Trust::Fingerprint(certificate.fingerprint_bytes());
    let load = Load {
        options: ClientOptions::at(address).trust(trust),
        until_finished: false,
        warmup: Duration::from_millis(300),
        time: Duration::from_millis(1_500),
        tasks_max: None,
        ..load.clone()
    };
    let counted = closed(load, || {}, || {}).await;
    drop(stop);
    let _ = tokio::task::spawn_blocking(move || server.join()).await;
    let _ = std::fs::remove_dir_all(&folder);
    counted.map_err(|error| error.to_string())
}

async fn answer(mut send: SendStream, mut receive: RecvStream) {
    let mut reader = FrameReader::new(FRAME_BYTES_MAX);
    let mut out = BytesMut::new();
    while let Ok(Some(chunk)) = receive.read_chunk(usize::MAX, true).await {
        reader.feed(chunk.bytes);
        while let Ok(Some(frame)) = reader.next() {
            match frame.kind {
                FrameType::Hello => Welcome {
                    protocol: PROTOCOL_VERSION,
                    server: 1,
                    frame_bytes_max: FRAME_BYTES_MAX as u32,
                    payload_bytes_max: 1 << 20,
                    in_flight_tasks_max: 1 << 20,
                    heartbeat_ms: 5_000,
                    lease_ms: 15_000,
                    tenant: "",
                }
                .encode(&mut out, frame.tag),
                FrameType::Submit => {
                    let Ok(view) = SubmitView::parse(&frame) else {
                        return;
                    };
                    let mut writer = AnswerWriter::begin(&mut out, frame.tag);
                    for (index, task) in view.tasks(1 << 20).enumerate() {
                        let task = task.expect("the load sends sound tasks");
                        assert!(task.durability == Durability::Disk || index < view.len());
                        writer.push(&TaskAnswer {
                            index: index as u16,
                            code: pelton_net::Code::Ok,
                            flags: ANSWER_DURABLE,
                            retry_after_ms: 0,
                            request_id: RequestId(u128::from(frame.tag)),
                            text: "",
                        });
                    }
                    writer.finish();
                }
                _ => {}
            }
        }
        if !out.is_empty() && send.write_chunk(out.split().freeze()).await.is_err() {
            return;
        }
    }
}
