//! `pelton log`: judges and prints the log of a data directory, and changes nothing in it.

use std::{
    fs,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Subcommand};
use pelton_core::{
    error::Code,
    id::RequestId,
    record::{
        self, ArchivedConfigRecordV1, ArchivedOutcomeRecordV1, ArchivedTaskRecordV1, Record, Schema,
    },
    state::State,
};
use pelton_storage::{
    device::{DeviceError, DeviceErrorKind},
    file::FileDevice,
    format::{BLOCK_BYTES, SegmentHeader},
    log::Options,
    manifest::{DataDirectory, DirectoryError, Manifest, has_begun, read_manifest, shard_folder},
    recover::{Outcome, RecoverError, Report, expect_segments, inspect, records},
    segment::parse_segment_name,
    snapshot::{Judgement, judge_snapshots},
};
use serde_json::{Value, json};

/// Look at the log of a data directory
#[derive(Args, Clone, Debug)]
pub struct LogArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Clone, Debug)]
enum Action {
    /// Read everything, check every checksum and every record, and say where damage is
    Verify(Place),
    /// Print a line per record
    Dump(DumpArgs),
}

#[derive(Args, Clone, Debug)]
struct Place {
    /// Where the log lives
    #[arg(long, default_value = "pelton-data", value_name = "DIR")]
    data: PathBuf,
    /// Only this shard
    #[arg(long, value_name = "N")]
    shard: Option<u16>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Clone, Debug)]
struct DumpArgs {
    #[command(flatten)]
    place: Place,
    /// Print payloads and results too
    #[arg(long)]
    payload: bool,
}

/// Exit code 1 for a damaged log, 8 where there is nothing to look at.
pub fn run(args: &LogArgs) -> ExitCode {
    let done = match &args.action {
        Action::Verify(place) => verify(place),
        Action::Dump(args) => dump(args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("pelton log: {error}");
            ExitCode::from(8)
        }
    }
}

/// A data directory that is looked at.
struct Look {
    manifest: Manifest,
    shards: Vec<u16>,
    /// Another process writes to it.
    in_use: bool,
    /// Keeps a server from starting meanwhile.
    _lock: Option<DataDirectory>,
}

impl Look {
    fn at(place: &Place) -> Result<Look, String> {
        let path = &place.data;
        let manifest = read_manifest(path)
            .map_err(|error| error.to_string())?
            .ok_or_else(|| {
                format!(
                    "{} is no data directory: it has no MANIFEST; name one with --data",
                    path.display()
                )
            })?;
        let (lock, in_use) = match DataDirectory::open(path) {
            Ok(directory) => (Some(directory), false),
            Err(DirectoryError::Locked { .. }) => (None, true),
            // A copy that may not be written to is as good to read.
            Err(DirectoryError::Io { .. }) => (None, false),
            Err(error) => return Err(error.to_string()),
        };
        let shards = match place.shard {
            None => (0..manifest.shards).collect(),
            Some(shard) if shard < manifest.shards => vec![shard],
            Some(shard) => {
                return Err(format!(
                    "there is no shard {shard}: the last one of {} is shard {}",
                    path.display(),
                    manifest.shards - 1
                ));
            }
        };
        Ok(Look {
            manifest,
            shards,
            in_use,
            _lock: lock,
        })
    }

    fn options(&self, shard: u16) -> Options {
        self.manifest.log(shard)
    }

    /// Hands on every record of a shard's live log: its position, schema, body and what it reads as.
    fn read(
        &self,
        data: &Path,
        shard: u16,
        mut each: impl FnMut(u64, u16, &[u8], &Record<'_>) -> io::Result<()>,
    ) -> Result<Report, RecoverError> {
        let folder = shard_folder(data, shard);
        let mut device = FileDevice::new(&folder);
        if has_begun(data) {
            expect_segments(&mut device)?;
        }
        let segment_bytes = self.manifest.segment_bytes;
        inspect(&mut device, self.options(shard), &mut |header, batch| {
            let mut failed = None;
            let mut place = header.lsn.0;
            let whole = records(batch, header.records, |at, schema, body| {
                place = header.lsn.0 + at as u64;
                match record::read(schema, body) {
                    Ok(read) => {
                        if let Err(error) = each(place, schema, body, &read) {
                            failed = Some(RecoverError::Device(DeviceError {
                                kind: DeviceErrorKind::Io,
                                what: format!("write: {error}"),
                            }));
                            return None;
                        }
                    }
                    Err(unreadable) => {
                        failed = Some(RecoverError::Unreadable {
                            file: file_of(&folder, header.segment),
                            segment: header.segment,
                            offset: place % segment_bytes,
                            schema: unreadable.schema,
                        });
                        return None;
                    }
                }
                Some(())
            });
            match (failed, whole) {
                (Some(error), _) => Err(error),
                (None, Some(())) => Ok(()),
                (None, None) => Err(RecoverError::Corrupt {
                    file: file_of(&folder, header.segment),
                    segment: header.segment,
                    offset: place % segment_bytes,
                    what: "the lengths of a batch's records do not add up",
                }),
            }
        })
    }
}

/// The file that holds a segment.
fn file_of(folder: &Path, segment: u64) -> String {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    for name in names.filter_map(|entry| entry.file_name().into_string().ok()) {
        if parse_segment_name(&name).is_none() {
            continue;
        }
        let mut block = [0; BLOCK_BYTES];
        let read = fs::File::open(folder.join(&name))
            .and_then(|mut file| io::Read::read_exact(&mut file, &mut block));
        if read.is_ok()
            && SegmentHeader::decode(&block).is_ok_and(|header| header.segment == segment)
        {
            return name;
        }
    }
    "(no file)".to_owned()
}

fn verify(place: &Place) -> Result<bool, String> {
    let look = Look::at(place)?;
    if look.in_use {
        eprintln!(
            "{} is in use by a running server: what it writes at this moment may look like a torn tail or like damage. \
             Stop it for a sure answer.",
            place.data.display()
        );
    }
    let mut sound = true;
    let mut snapshots_sound = true;
    let mut described = Vec::new();
    for &shard in &look.shards {
        let folder = shard_folder(&place.data, shard);
        let mut counts = Counts::default();
        let read = look.read(&place.data, shard, |_, schema, _, _| {
            if let Some(count) = counts.get_mut(usize::from(schema).wrapping_sub(1)) {
                *count += 1;
            }
            Ok(())
        });
        let snapshots = judge_snapshots(&mut FileDevice::new(&folder), look.options(shard))
            .map_err(|error| error.to_string())?;
        sound &= read.is_ok();
        snapshots_sound &= snapshots.iter().all(|snapshot| snapshot.sound.is_some());
        if place.json {
            let mut shard = describe(shard, &read, &counts);
            shard["snapshots"] = snapshots.iter().map(describe_snapshot).collect();
            described.push(shard);
            continue;
        }
        match read {
            Ok(report) => {
                let ended = match report.outcome {
                    Outcome::Empty => "empty".to_owned(),
                    Outcome::Clean => "clean".to_owned(),
                    Outcome::TornTail { at } => format!(
                        "torn tail at segment {}, byte offset {} (nobody was told of it; the next start erases it)",
                        at.0 / look.manifest.segment_bytes,
                        at.0 % look.manifest.segment_bytes
                    ),
                };
                println!(
                    "shard {shard}: {ended}; {} segments, {} batches, {} records, {} bytes",
                    report.segments, report.batches, report.records, report.bytes
                );
                let counts = counts.iter().zip(KINDS);
                let counts: Vec<String> = counts.map(|(n, kind)| format!("{n} {kind}")).collect();
                println!("  {}", counts.join(", "));
            }
            Err(RecoverError::Corrupt {
                file,
                segment,
                offset,
                what,
            }) => println!(
                "shard {shard}: DAMAGED at {}, segment {segment}, byte offset {offset}: {what}",
                folder.join(file).display()
            ),
            Err(error) => println!("shard {shard}: NOT READABLE: {error}"),
        }
        for snapshot in &snapshots {
            let name = &snapshot.name;
            match &snapshot.sound {
                Some((begin, _)) => println!(
                    "  {name}: sound; a start replays the log from segment {}, byte offset {} on",
                    begin.start.0 / look.manifest.segment_bytes,
                    begin.start.0 % look.manifest.segment_bytes
                ),
                None => println!("  {}: DAMAGED", folder.join(name).display()),
            }
        }
    }
    if place.json {
        let object = json!({
            "sound": sound,
            "snapshots_sound": snapshots_sound,
            "in_use": look.in_use,
            "shards": described,
        });
        println!("{object}");
    } else if sound && !snapshots_sound {
        println!(
            "the log is sound and servers start on it: a damaged snapshot is passed over, and makes the start longer. \
             The disk has changed what was written: look after it"
        );
    } else if sound {
        println!("every checksum and every record holds");
    } else {
        println!(
            "nothing was changed; a server that starts on it does not serve what is damaged: restore that from a backup"
        );
    }
    Ok(sound && snapshots_sound)
}

fn describe_snapshot(snapshot: &Judgement) -> Value {
    json!({
        "file": snapshot.name,
        "sound": snapshot.sound.is_some(),
        "start": snapshot.sound.map(|(begin, _)| begin.start.0),
        "vouches_up_to": snapshot.sound.map(|(_, end)| end.0),
    })
}

/// Records by schema, in the order of [`KINDS`].
type Counts = [u64; KINDS.len()];

/// What the records of each schema are called, by its number.
const KINDS: [&str; Schema::ALL.len()] = [
    "tasks",
    "leases",
    "outcomes",
    "moves",
    "configs",
    "clocks",
    "relocated_tasks",
    "relocated_outcomes",
    "relocated_names",
];

/// Reads and judges the logs of a directory that nobody uses; `None` where there is none or somebody does. More than so
/// many bytes of log are not read.
pub(crate) fn judge(data: &Path, bytes_max: u64) -> Option<Judged> {
    let place = Place {
        data: data.to_owned(),
        shard: None,
        json: false,
    };
    read_manifest(data).ok().flatten()?;
    let look = Look::at(&place).ok().filter(|look| !look.in_use)?;
    let files = |shard| {
        fs::read_dir(shard_folder(data, shard))
            .into_iter()
            .flatten()
    };
    let bytes = look.shards.iter().flat_map(|&shard| files(shard)).flatten();
    let bytes = bytes
        .filter_map(|file| Some(file.metadata().ok()?.len()))
        .sum();
    if bytes > bytes_max {
        return Some(Judged::TooLarge { bytes });
    }
    let read = |&shard: &u16| look.read(data, shard, |_, _, _, _| Ok(()));
    let judged = look.shards.iter().map(|shard| (*shard, read(shard)));
    Some(Judged::Read(judged.collect()))
}

/// What [`judge`] comes to.
pub(crate) enum Judged {
    Read(Vec<(u16, Result<Report, RecoverError>)>),
    TooLarge { bytes: u64 },
}

fn describe(shard: u16, read: &Result<Report, RecoverError>, counts: &Counts) -> Value {
    match read {
        Ok(report) => {
            let (outcome, torn_at) = match report.outcome {
                Outcome::Empty => ("empty", None),
                Outcome::Clean => ("clean", None),
                Outcome::TornTail { at } => ("torn_tail", Some(at.0)),
            };
            let mut described = json!({
                "shard": shard,
                "outcome": outcome,
                "torn_at": torn_at,
                "segments": report.segments,
                "batches": report.batches,
                "records": report.records,
                "bytes": report.bytes,
            });
            for (count, kind) in counts.iter().zip(KINDS) {
                described[kind] = (*count).into();
            }
            described
        }
        Err(error) => {
            let mut described = json!({
                "shard": shard,
                "outcome": "not_readable",
                "error": error.to_string(),
            });
            if let Some((file, segment, offset)) = error.place() {
                described["outcome"] = "damaged".into();
                described["file"] = file.into();
                described["segment"] = segment.into();
                described["offset"] = offset.into();
            } else if let Some(file) = error.file() {
                described["file"] = file.into();
            }
            described
        }
    }
}

fn dump(args: &DumpArgs) -> Result<bool, String> {
    let place = &args.place;
    let look = Look::at(place)?;
    if look.in_use {
        return Err(format!(
            "{} is in use by a running server: stop it first, or ask it with `pelton task list`",
            place.data.display()
        ));
    }
    let mut out = BufWriter::new(io::stdout().lock());
    let mut sound = true;
    for &shard in &look.shards {
        let read = look.read(&place.data, shard, |lsn, schema, body, record| {
            let row = Row::of(record);
            if place.json {
                let object = row.to_json(shard, lsn, schema, body.len(), args.payload);
                writeln!(out, "{object}")
            } else {
                row.write(&mut out, shard, lsn, body.len(), args.payload)
            }
        });
        let flushed = out.flush();
        if flushed.is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            return Ok(true);
        }
        match read {
            Ok(_) => {}
            // Whoever reads has seen enough.
            Err(RecoverError::Device(error)) if error.what.contains("Broken pipe") => {
                return Ok(true);
            }
            Err(error) => {
                sound = false;
                eprintln!("shard {shard}: {error}");
            }
        }
    }
    Ok(sound)
}

/// A record as it is printed: what it is, whose it is, and its fields in their order.
struct Row<'a> {
    name: &'static str,
    request: Option<RequestId>,
    fields: Vec<(&'static str, Value)>,
    /// The payload or the result.
    bytes: Option<&'a [u8]>,
}

impl<'a> Row<'a> {
    fn of(record: &'a Record<'_>) -> Row<'a> {
        let mut row = Row {
            name: "",
            request: None,
            fields: Vec::new(),
            bytes: None,
        };
        match record {
            Record::Task(task) => {
                row.name = "task";
                row.task(task);
            }
            Record::Lease(lease) => {
                row.name = "lease";
                row.request = Some(RequestId(lease.request.to_native()));
                row.token(lease.generation.to_native(), lease.attempt.to_native());
                row.put("at_ms", lease.at_ms.to_native());
                let executor = format!("{:016x}", lease.executor.to_native());
                row.put("executor", executor);
            }
            Record::Outcome(outcome) => {
                row.name = "outcome";
                row.outcome(outcome);
            }
            Record::Move(moved) => {
                row.name = "move";
                row.request = Some(RequestId(moved.request.to_native()));
                row.state(moved.state);
                row.put("at_ms", moved.at_ms.to_native());
            }
            Record::Config(config) => {
                row.name = "config";
                row.config(config);
            }
            Record::RelocatedTask(relocated) => {
                row.name = "relocated_task";
                row.put("from", relocated.from.to_native());
                row.state(relocated.state);
                let generation = relocated.generation.to_native();
                row.token(generation, relocated.attempt.to_native());
                row.put("at_ms", relocated.at_ms.to_native());
                row.some("retries", relocated.retries.into());
                row.some("outcome", relocated.outcome.to_native());
                row.some("outcome_bytes", relocated.outcome_bytes.to_native().into());
                row.some("holds_key", relocated.holds_key.into());
                row.task(&relocated.task);
                // These of the task's own were overtaken.
                let overtaken = |name: &str| name == "due_ms" || name == "max_age_s";
                row.fields.retain(|(name, _)| !overtaken(name));
                row.some("due_ms", relocated.due_ms.to_native());
                row.some("max_age_s", relocated.max_age_s.to_native().into());
            }
            Record::RelocatedOutcome(relocated) => {
                row.name = "relocated_outcome";
                row.put("from", relocated.from.to_native());
                row.outcome(&relocated.outcome);
            }
            Record::RelocatedName(name) => {
                row.name = "relocated_name";
                row.request = Some(RequestId(name.request.to_native()));
                row.put("function", name.function.to_native());
                row.put("task_id", &*name.task_id);
                row.text("key", &name.key);
                row.hash(name.payload_hash.to_native());
            }
            Record::Clock(clock) => {
                row.name = "clock";
                row.put("logged_ms", clock.logged_ms.to_native());
                row.put("next_seq", clock.next_seq.to_native());
            }
        }
        row
    }

    fn put(&mut self, name: &'static str, value: impl Into<Value>) {
        self.fields.push((name, value.into()));
    }

    /// A number that is left out where it is 0.
    fn some(&mut self, name: &'static str, value: u64) {
        if value > 0 {
            self.put(name, value);
        }
    }

    /// A text that is left out where it is empty.
    fn text(&mut self, name: &'static str, value: &str) {
        if !value.is_empty() {
            self.put(name, value);
        }
    }

    fn token(&mut self, generation: u16, attempt: u16) {
        self.put("token", format!("{generation}.{attempt}"));
    }

    fn state(&mut self, number: u8) {
        let known = State::from_number(number).map(|state| state.name().to_owned());
        self.put("state", known.unwrap_or_else(|| number.to_string()));
    }

    fn hash(&mut self, hash: u64) {
        if hash != 0 {
            self.put("payload_hash", format!("{hash:016x}"));
        }
    }

    fn task(&mut self, task: &'a ArchivedTaskRecordV1<'_>) {
        self.request = Some(task.request());
        self.put("tenant", task.tenant.to_native());
        self.put("function", task.function.to_native());
        self.text("task_id", &task.task_id);
        self.text("key", &task.key);
        self.some("due_ms", task.due_ms.to_native());
        self.some("max_age_s", task.max_age_s.to_native().into());
        self.put("cost", task.cost.to_native());
        self.some("priority", task.priority.into());
        let memory = task.durability == 1;
        self.put("durability", if memory { "memory" } else { "disk" });
        self.text("content_type", &task.content_type);
        self.text("traceparent", &task.traceparent);
        let tags: Vec<_> = record::tags(&task.tags)
            .map(String::from_utf8_lossy)
            .collect();
        if !tags.is_empty() {
            self.put("tags", tags.join(","));
        }
        self.hash(task.payload_hash.to_native());
        self.put("payload_bytes", task.payload.len());
        self.bytes = Some(&task.payload);
    }

    fn outcome(&mut self, outcome: &'a ArchivedOutcomeRecordV1<'_>) {
        self.request = Some(RequestId(outcome.request.to_native()));
        let generation = outcome.generation.to_native();
        self.token(generation, outcome.attempt.to_native());
        self.state(outcome.state);
        self.put("at_ms", outcome.at_ms.to_native());
        self.some("due_ms", outcome.due_ms.to_native());
        self.some("retries", outcome.retries.into());
        let code = outcome.code.to_native();
        if code != 0 {
            let name = Code::from_number(code).map(|code| code.name().to_owned());
            self.put("code", name.unwrap_or_else(|| code.to_string()));
        }
        self.some("holds_key", outcome.holds_key.into());
        self.text("error", &outcome.error);
        self.text("output", &String::from_utf8_lossy(&outcome.output));
        self.put("result_bytes", outcome.result.len());
        self.bytes = Some(&outcome.result);
    }

    fn config(&mut self, config: &ArchivedConfigRecordV1<'_>) {
        let kind = match config.kind {
            1 => "tenant",
            2 => "function",
            3 => "function_removed",
            _ => "unknown",
        };
        self.put("kind", kind);
        self.put("version", config.version.to_native());
        self.put("name", &*config.name);
        if config.kind != 3 {
            self.put("tenant", config.tenant.to_native());
        }
        if config.kind != 1 {
            self.put("function", config.function.to_native());
        }
        self.some("weight", config.weight.to_native().into());
        self.some("waiting_max", config.waiting_max.to_native());
        self.some("concurrency", config.concurrency.to_native().into());
        self.some("retries", config.retries.into());
        self.some("backoff_ms_min", config.backoff_ms_min.to_native().into());
        self.some("backoff_ms_max", config.backoff_ms_max.to_native().into());
        self.some("max_age_s", config.max_age_s.to_native().into());
        self.some("timeout_ms", config.timeout_ms.to_native().into());
        if config.kind == 2 {
            let hold = config.on_failure == 1;
            self.put("on_failure", if hold { "hold" } else { "continue" });
            self.put("paused", config.paused == 1);
        }
    }

    fn write(
        &self,
        out: &mut impl Write,
        shard: u16,
        lsn: u64,
        bytes: usize,
        payload: bool,
    ) -> io::Result<()> {
        write!(out, "{shard} {lsn:012} {:7}", self.name)?;
        match self.request {
            Some(request) => write!(out, " {request}")?,
            None => write!(out, " {:33}", "-")?,
        }
        write!(out, " bytes={bytes}")?;
        for (name, value) in &self.fields {
            match value.as_str() {
                Some(text) if !text.contains([' ', '"', '\n']) => write!(out, " {name}={text}")?,
                Some(_) | None => write!(out, " {name}={value}")?,
            }
        }
        if payload && let Some(bytes) = self.bytes {
            write!(out, " \"{}\"", bytes.escape_ascii())?;
        }
        writeln!(out)
    }

    fn to_json(&self, shard: u16, lsn: u64, schema: u16, bytes: usize, payload: bool) -> Value {
        let mut object = json!({
            "shard": shard,
            "lsn": lsn,
            "schema": schema,
            "record": self.name,
            "request_id": self.request.map(|request| request.to_string()),
            "bytes": bytes,
        });
        for (name, value) in &self.fields {
            object[*name] = value.clone();
        }
        if payload && let Some(bytes) = self.bytes {
            object["content"] = bytes.escape_ascii().to_string().into();
        }
        object
    }
}
