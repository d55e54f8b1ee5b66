//! Every bound of Pelton in one place, asserted against each other where they depend on each other. A bound that is
//! reached answers with a typed refusal; nothing waits without one.

/// Parts of the id space. Part of the log's format.
pub const CELL_COUNT: u16 = 4096;
/// Shards that one process can run.
pub const SHARD_COUNT_MAX: usize = 256;
/// Edge threads that one process can run.
pub const EDGE_COUNT_MAX: usize = 256;

/// Bytes of a given name: tenant, function, `task_id`, ordering key.
pub const NAME_BYTES_MAX: usize = 128;
/// Tags of one task.
pub const TAG_COUNT_MAX: usize = 8;
/// Bytes of one tag, `name=value` or a bare word.
pub const TAG_BYTES_MAX: usize = 128;
/// Bytes of a content type.
pub const CONTENT_TYPE_BYTES_MAX: usize = 128;
/// Bytes of a W3C `traceparent`: version, trace id, parent id and flags as hex with dashes.
pub const TRACEPARENT_BYTES: usize = 55;

/// Default bound of a payload and of a result; configurable up to `PAYLOAD_BYTES_LIMIT`.
pub const PAYLOAD_BYTES_DEFAULT: usize = 1 << 20;
/// What `payload_bytes_max` may be set to at most.
pub const PAYLOAD_BYTES_LIMIT: usize = 1 << 20;
/// Bytes of an error message kept with an attempt; longer ones are cut.
pub const ERROR_BYTES_MAX: usize = 4096;
/// Bytes of an executor's captured output kept with an attempt; the tail of longer ones is kept.
pub const OUTPUT_BYTES_MAX: usize = 8192;

/// What a frame may hold beyond the payload limit.
pub const FRAME_OVERHEAD_BYTES: usize = 64 << 10;
/// Bytes of one frame on the wire.
pub const FRAME_BYTES_MAX: usize = PAYLOAD_BYTES_LIMIT + FRAME_OVERHEAD_BYTES;
/// Bytes of a frame that is not a submit, an execute or an outcome.
pub const CONTROL_FRAME_BYTES_MAX: usize = 64 << 10;
/// Tasks in one submit frame.
pub const SUBMIT_TASKS_MAX: usize = 4096;
/// Outcomes in one outcome frame.
pub const OUTCOMES_MAX: usize = 4096;

/// Bytes of a record in the log, its metadata included.
pub const RECORD_BYTES_MAX: usize = PAYLOAD_BYTES_LIMIT + FRAME_OVERHEAD_BYTES;
/// A record beyond this is large: at most one in a batch, and every second batch without.
pub const RECORD_BYTES_LARGE: usize = 64 << 10;
/// Once a batch holds this many bytes it takes no further submits while another one is in flight.
pub const BATCH_BYTES_SEAL: usize = 256 << 10;
/// Bytes of a log batch's buffer, header included.
pub const BATCH_BYTES_MAX: usize = 2 << 20;
/// The smallest segment.
pub const SEGMENT_BYTES_MIN: usize = 4 << 20;
/// The default segment.
pub const SEGMENT_BYTES_DEFAULT: usize = 64 << 20;
/// The most bytes of a snapshot's piece; with its header it is 192 KiB. Most have a tenth of that.
pub const SNAPSHOT_PIECE_BYTES: usize = (192 << 10) - 64;
/// The largest segment.
pub const SEGMENT_BYTES_MAX: usize = 256 << 20;
/// Finished tasks that a shard keeps in memory though the history has them.
pub const FINISHED_MAX_DEFAULT: u32 = 16_384;
/// Bytes of their records in the log; beyond either bound the oldest of them are forgotten.
pub const FINISHED_BYTES_MAX_DEFAULT: u64 = 64 << 20;
/// How long the history keeps a task after its end, in milliseconds: a week.
pub const HISTORY_RETENTION_MS_DEFAULT: u64 = 7 * 86_400_000;
/// Bytes of one tenant's history.
pub const HISTORY_BYTES_MAX_DEFAULT: u64 = 64 << 30;
/// Bytes of the records of ended tasks that the history may lack, per shard, before submits are refused.
pub const HISTORY_LAG_MAX_DEFAULT: u64 = 1 << 30;
/// Bytes of them that may come together while shards are busy.
pub const HISTORY_DEFER_MAX_DEFAULT: u64 = 256 << 20;
/// The log is not cleaned while it has fewer closed segments than this.
pub const CLEAN_SEGMENTS_MIN: u64 = 4;
/// Bytes of the log that cleaning goes through in one step.
pub const CLEAN_BYTES_STEP: usize = 32 << 10;
/// Pause between two steps of cleaning where nothing else keeps the shard awake.
pub const CLEAN_EVERY_NS: u64 = 100_000;
/// The same while the next record cannot be moved yet.
pub const CLEAN_WAITS_NS: u64 = 2_000_000;

/// Batches that one inbox of submits holds.
pub const INBOX_SUBMIT_BATCHES_MAX: usize = 1024;
/// Bytes of submits that wait in one inbox; the batch that crosses it is the last one taken.
pub const INBOX_SUBMIT_BYTES_MAX: usize = 64 << 20;
/// Messages that one inbox of control holds.
pub const INBOX_CONTROL_MAX: usize = 8192;
/// Batches of submits that a shard takes in one turn.
pub const INBOX_SUBMITS_PER_TURN: usize = 64;
/// Messages of control that a shard takes in one turn.
pub const INBOX_CONTROL_PER_TURN: usize = 256;
/// Deliveries that one outbox holds; beyond that a shard keeps what it has to say and adds to it.
pub const OUTBOX_DELIVERIES_MAX: usize = 1024;
/// Deliveries that were read and are kept to be filled again.
pub const OUTBOX_SPARE_MAX: usize = 8;
/// A delivery with more memory than this is not kept.
pub const OUTBOX_SPARE_BYTES_MAX: usize = 4 << 20;

/// Pages of a shard's task table, of 1,024 tasks and 64 KiB, that are in memory as they are: two million tasks. Further
/// ones are packed.
pub const TASK_PAGES_MAX_DEFAULT: u32 = 2048;
/// Pages that are packed in one step: more than a step's batch can fill.
pub const PAGES_PACKED_STEP: u32 = 8;

/// Most retries that a function may ask for.
pub const RETRIES_MAX: u8 = 8;
/// Retries of a function that does not say.
pub const RETRIES_DEFAULT: u8 = 3;
/// Longest age of a task, in seconds: a week.
pub const MAX_AGE_S_MAX: u32 = 604_800;
/// Age of a task of a function that does not say, in seconds: a day.
pub const MAX_AGE_S_DEFAULT: u32 = 86_400;
/// Longest delay of a task, in milliseconds: a year.
pub const DELAY_MS_MAX: u64 = 366 * 86_400_000;
/// Shortest and longest time one attempt may take, in milliseconds: a second and a day.
pub const TIMEOUT_MS_MIN: u64 = 1_000;
/// See `TIMEOUT_MS_MIN`.
pub const TIMEOUT_MS_MAX: u64 = 86_400_000;
/// Time one attempt may take where the function does not say, in milliseconds.
pub const TIMEOUT_MS_DEFAULT: u64 = 60_000;
/// What a running attempt gets to end by itself where a stop does not say, and when it took too long, in milliseconds.
pub const STOP_GRACE_MS_DEFAULT: u32 = 5_000;
/// What a stop may give at most, in milliseconds: an hour.
pub const STOP_GRACE_MS_MAX: u32 = 3_600_000;
/// What is said of a stop that gives more.
pub const STOP_GRACE: &str = "the grace of a stop is at most an hour: 3600000 ms";
/// Largest weight of a tenant in the round robin.
pub const WEIGHT_MAX: u16 = 1_000;
/// Largest cost of one task in the round robin.
pub const COST_MAX: u16 = 1_000;
/// Time for which a `task_id` names one task, in milliseconds: a day.
pub const DEDUP_WINDOW_MS: u64 = 86_400_000;

const _: () = assert!(
    RECORD_BYTES_MAX + 4096 <= BATCH_BYTES_MAX,
    "a batch holds the largest record and its header"
);
const _: () = assert!(
    BATCH_BYTES_SEAL + RECORD_BYTES_MAX + 4096 <= BATCH_BYTES_MAX,
    "a batch at the seal mark still takes one large record"
);
const _: () = assert!(
    BATCH_BYTES_MAX * 2 <= SEGMENT_BYTES_MIN,
    "a segment holds at least two full batches"
);
const _: () = assert!(
    SEGMENT_BYTES_MIN <= SEGMENT_BYTES_DEFAULT && SEGMENT_BYTES_DEFAULT <= SEGMENT_BYTES_MAX
);
const _: () = assert!(
    FRAME_BYTES_MAX <= RECORD_BYTES_MAX,
    "what a frame carries fits a record"
);
const _: () = assert!(CONTROL_FRAME_BYTES_MAX <= FRAME_BYTES_MAX);
const _: () = assert!(
    STOP_GRACE_MS_DEFAULT <= STOP_GRACE_MS_MAX && STOP_GRACE_MS_MAX as u64 <= TIMEOUT_MS_MAX,
    "an attempt that is being stopped ends with its timeout at the latest"
);
const _: () = assert!(
    INBOX_SUBMIT_BYTES_MAX >= INBOX_SUBMITS_PER_TURN * FRAME_OVERHEAD_BYTES + FRAME_BYTES_MAX,
    "an inbox has room for the largest frame beside a turn's worth of small ones"
);
const _: () = assert!(
    INBOX_SUBMITS_PER_TURN <= INBOX_SUBMIT_BATCHES_MAX
        && INBOX_CONTROL_PER_TURN <= INBOX_CONTROL_MAX,
    "a turn takes no more than an inbox holds"
);
const _: () = assert!(
    INBOX_CONTROL_PER_TURN >= SHARD_COUNT_MAX,
    "one turn of shard 0 hears every shard's report of a change"
);
const _: () = assert!(
    INBOX_CONTROL_MAX >= 2 * SHARD_COUNT_MAX + EDGE_COUNT_MAX,
    "reports of all shards leave room for what edges have to say"
);
const _: () = assert!(
    OUTBOX_SPARE_MAX <= OUTBOX_DELIVERIES_MAX && OUTBOX_SPARE_BYTES_MAX >= BATCH_BYTES_MAX,
    "what a whole batch of the log has to say is kept for reuse"
);
const _: () = assert!(
    HISTORY_DEFER_MAX_DEFAULT <= HISTORY_LAG_MAX_DEFAULT / 2,
    "history writes before submits are refused"
);
const _: () = assert!(PAYLOAD_BYTES_DEFAULT <= PAYLOAD_BYTES_LIMIT);
const _: () = assert!(
    CELL_COUNT as usize <= 1 << 12,
    "a cell fits its 12 bits of a request id"
);
const _: () = assert!(
    TAG_COUNT_MAX * TAG_BYTES_MAX
        + 2 * NAME_BYTES_MAX
        + CONTENT_TYPE_BYTES_MAX
        + TRACEPARENT_BYTES
        + 512
        <= FRAME_OVERHEAD_BYTES,
    "the metadata of one task fits beside the largest payload"
);
