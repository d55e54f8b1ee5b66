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
    record::{self, Record},
    state::State,
};
use pelton_storage::{
    device::{DeviceError, DeviceErrorKind},
    file::FileDevice,
    format::{BLOCK_BYTES, SegmentHeader},
    log::Options,
    manifest::{DataDirectory, DirectoryError, Manifest, read_manifest, shard_folder},
    recover::{Outcome, RecoverError, Report, inspect, records},
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
        Options {
            shard,
            log_id: self.manifest.log_id,
            segment_bytes: self.manifest.segment_bytes,
        }
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
        let mut counts = [0u64; 6];
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
                let [tasks, leases, outcomes, moves, configs, clocks] = counts;
                println!(
                    "shard {shard}: {ended}; {} segments, {} batches, {} records, {} bytes\n  \
                     {tasks} tasks, {leases} leases, {outcomes} outcomes, {moves} moves, {configs} config, \
                     {clocks} clock",
                    report.segments, report.batches, report.records, report.bytes
                );
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
            "nothing was changed; no server starts on it: restore the directory from a backup"
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

fn describe(shard: u16, read: &Result<Report, RecoverError>, counts: &[u64; 6]) -> Value {
    match read {
        Ok(report) => {
            let [tasks, leases, outcomes, moves, configs, clocks] = counts;
            let (outcome, torn_at) = match report.outcome {
                Outcome::Empty => ("empty", None),
                Outcome::Clean => ("clean", None),
                Outcome::TornTail { at } => ("torn_tail", Some(at.0)),
            };
            json!({
                "shard": shard,
                "outcome": outcome,
                "torn_at": torn_at,
                "segments": report.segments,
                "batches": report.batches,
                "records": report.records,
                "bytes": report.bytes,
                "tasks": tasks,
                "leases": leases,
                "outcomes": outcomes,
                "moves": moves,
                "configs": configs,
                "clocks": clocks,
            })
        }
        Err(error) => {
            let mut described = json!({
                "shard": shard,
                "outcome": "not_readable",
                "error": error.to_string(),
            });
            if let RecoverError::Corrupt {
                file,
                segment,
                offset,
                ..
            }
            | RecoverError::Unreadable {
                file,
                segment,
                offset,
                ..
            } = error
            {
                described["outcome"] = "damaged".into();
                described["file"] = file.clone().into();
                described["segment"] = (*segment).into();
                described["offset"] = (*offset).into();
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
        let token = |generation: u16, attempt: u16| format!("{generation}.{attempt}");
        let state = |number: u8| match State::from_number(number) {
            Some(state) => state.name().to_owned(),
            None => number.to_string(),
        };
        let mut fields = Vec::new();
        let mut put = |name, value: Value| fields.push((name, value));
        let (name, request, bytes) = match record {
            Record::Task(task) => {
                put("tenant", task.tenant.to_native().into());
                put("function", task.function.to_native().into());
                if !task.task_id.is_empty() {
                    put("task_id", (&*task.task_id).into());
                }
                if !task.key.is_empty() {
                    put("key", (&*task.key).into());
                }
                if task.due_ms.to_native() > 0 {
                    put("due_ms", task.due_ms.to_native().into());
                }
                put("payload_bytes", task.payload.len().into());
                ("task", Some(task.request()), Some(&*task.payload))
            }
            Record::Lease(lease) => {
                let generation = lease.generation.to_native();
                put("token", token(generation, lease.attempt.to_native()).into());
                put("at_ms", lease.at_ms.to_native().into());
                let executor = format!("{:016x}", lease.executor.to_native());
                put("executor", executor.into());
                ("lease", Some(RequestId(lease.request.to_native())), None)
            }
            Record::Outcome(outcome) => {
                let generation = outcome.generation.to_native();
                let attempt = outcome.attempt.to_native();
                put("token", token(generation, attempt).into());
                put("state", state(outcome.state).into());
                put("at_ms", outcome.at_ms.to_native().into());
                if outcome.due_ms.to_native() > 0 {
                    put("due_ms", outcome.due_ms.to_native().into());
                }
                let code = outcome.code.to_native();
                if code != 0 {
                    let name = Code::from_number(code).map(|code| code.name().to_owned());
                    put("code", name.unwrap_or_else(|| code.to_string()).into());
                    put("error", (&*outcome.error).into());
                }
                put("result_bytes", outcome.result.len().into());
                let request = RequestId(outcome.request.to_native());
                ("outcome", Some(request), Some(&*outcome.result))
            }
            Record::Move(moved) => {
                put("state", state(moved.state).into());
                put("at_ms", moved.at_ms.to_native().into());
                ("move", Some(RequestId(moved.request.to_native())), None)
            }
            Record::Config(config) => {
                let kind = match config.kind {
                    1 => "tenant",
                    2 => "function",
                    3 => "function_removed",
                    _ => "unknown",
                };
                put("kind", kind.into());
                put("version", config.version.to_native().into());
                put("tenant", config.tenant.to_native().into());
                if config.kind != 1 {
                    put("function", config.function.to_native().into());
                }
                put("name", (&*config.name).into());
                ("config", None, None)
            }
            Record::RelocatedTask(relocated) => {
                put("from", relocated.from.to_native().into());
                put("state", state(relocated.state).into());
                let generation = relocated.generation.to_native();
                let attempt = relocated.attempt.to_native();
                put("token", token(generation, attempt).into());
                put("at_ms", relocated.at_ms.to_native().into());
                if relocated.due_ms.to_native() > 0 {
                    put("due_ms", relocated.due_ms.to_native().into());
                }
                let payload = &*relocated.task.payload;
                put("payload_bytes", payload.len().into());
                let request = relocated.task.request();
                ("relocated_task", Some(request), Some(payload))
            }
            Record::RelocatedOutcome(relocated) => {
                put("from", relocated.from.to_native().into());
                put("state", state(relocated.outcome.state).into());
                let result = &*relocated.outcome.result;
                put("result_bytes", result.len().into());
                let request = RequestId(relocated.outcome.request.to_native());
                ("relocated_outcome", Some(request), Some(result))
            }
            Record::RelocatedName(name) => {
                put("function", name.function.to_native().into());
                put("task_id", (&*name.task_id).into());
                if !name.key.is_empty() {
                    put("key", (&*name.key).into());
                }
                let request = RequestId(name.request.to_native());
                ("relocated_name", Some(request), None)
            }
            Record::Clock(clock) => {
                put("logged_ms", clock.logged_ms.to_native().into());
                put("next_seq", clock.next_seq.to_native().into());
                ("clock", None, None)
            }
        };
        Row {
            name,
            request,
            fields,
            bytes,
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
