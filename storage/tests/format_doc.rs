//! `docs/FORMAT.md` and the code say the same: every layout table of the text is compared with encoded bytes, every
//! number with its constant.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{collections::BTreeMap, mem::offset_of, mem::size_of};

use pelton_core::{
    id::Lsn,
    limits::{
        BATCH_BYTES_MAX, CELL_COUNT, SEGMENT_BYTES_DEFAULT, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN,
        SNAPSHOT_PIECE_BYTES,
    },
    record::*,
    snapshot::PieceKind,
    state::State,
};
use pelton_storage::{
    backup::{BACKUP_VERSION, Backup, CopiedFile, ShardCopy, copied_name},
    count::Counts,
    format::*,
    log::{
        CARRY_AFTER_NS, DEAD_COUNT_MAX, FILL_PIECES_MAX, Options, PREPARE_AGAIN_NS, PREPARED_COUNT,
        READ_TRIES,
    },
    manifest::{DIRECTORY_VERSION, DataDirectory, Manifest},
    segment::{FILL_PIECE_BYTES, segment_name},
    snapshot::{PIECE_HEADER_BYTES, SNAPSHOT_VERSION, SNAPSHOTS_KEPT, encode_piece, snapshot_name},
};
use xxhash_rust::xxh3::xxh3_64;

fn document() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/FORMAT.md");
    std::fs::read_to_string(path).unwrap()
}

/// The rows of the first table behind a heading, its own head left out, cell by cell and without backticks.
fn table(document: &str, heading: &str) -> Vec<Vec<String>> {
    let mut lines = document.lines().skip_while(|line| *line != heading);
    assert_eq!(lines.next(), Some(heading), "the heading is there");
    let rows: Vec<Vec<String>> = lines
        .take_while(|line| !line.starts_with('#'))
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| {
            let cells = line.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().replace('`', "")).collect()
        })
        .collect();
    assert!(!rows.is_empty(), "a table stands behind `{heading}`");
    rows
}

/// Offset, bytes and name of each row; the rows follow each other without a gap.
fn layout(document: &str, heading: &str) -> Vec<(usize, usize, String)> {
    let mut end = 0;
    let rows = table(document, heading).into_iter().map(|row| {
        let (at, bytes) = (row[0].parse().unwrap(), row[1].parse().unwrap());
        assert_eq!(at, end, "{heading}: `{}` follows the row before", row[2]);
        end = at + bytes;
        (at, bytes, row[2].clone())
    });
    rows.collect()
}

/// Compares encoded bytes with the values that they were made of, at the documented places.
fn check(document: &str, heading: &str, encoded: &[u8], values: &[(&str, u128)]) {
    let layout = layout(document, heading);
    let mut values: BTreeMap<&str, u128> = values.iter().copied().collect();
    for (at, bytes, name) in &layout {
        let found = &encoded[*at..at + bytes];
        if name == "zero" {
            assert!(found.iter().all(|&byte| byte == 0), "{heading}: {at}");
            continue;
        }
        let value = values.remove(name.as_str());
        let value = value.unwrap_or_else(|| panic!("{heading}: `{name}` is not in the code"));
        let mut wide = [0; 16];
        wide[..*bytes].copy_from_slice(found);
        assert_eq!(u128::from_le_bytes(wide), value, "{heading}: `{name}`");
    }
    assert!(values.is_empty(), "{heading} leaves out {values:?}");
    let (at, bytes, _) = layout.last().unwrap();
    assert_eq!(at + bytes, encoded.len(), "{heading}: the whole header");
}

fn u32_of(text: &[u8; 4]) -> u128 {
    u128::from(u32::from_le_bytes(*text))
}

#[test]
fn the_segment_header_stands_where_the_document_says() {
    let header = SegmentHeader {
        shard: 0x0102,
        log_id: 0x1112_1314_1516_1718_191a_1b1c_1d1e_1f10,
        segment: 0x2122_2324_2526_2728,
        segment_bytes: 0x3132_3334_3536_3738,
        epoch: 0x4142_4344_4546_4748,
        key: 0x5152_5354_5556_5758_595a_5b5c_5d5e_5f50,
    };
    let block = header.encode();
    let mut plain = block.clone();
    plain[8..12].fill(0);
    check(
        &document(),
        "### Segment header",
        &block,
        &[
            ("magic", u32_of(b"PLTS")),
            ("version", u128::from(FORMAT_VERSION)),
            ("crc", u128::from(crc32c::crc32c(&plain))),
            ("shard", u128::from(header.shard)),
            ("log_id", header.log_id),
            ("segment", u128::from(header.segment)),
            ("segment_bytes", u128::from(header.segment_bytes)),
            ("epoch", u128::from(header.epoch)),
            ("key", header.key),
        ],
    );
}

#[test]
fn the_header_of_a_piece_stands_where_the_document_says() {
    let options = Options {
        shard: 0x0102,
        log_id: 0x1112_1314_1516_1718_191a_1b1c_1d1e_1f10,
        segment_bytes: SEGMENT_BYTES_DEFAULT as u64,
    };
    let number = 0x2122_2324_2526_2728;
    let position = Lsn(0x3132_3334_3536_3738);
    let piece = encode_piece(options, number, 0x4142_4344, 5, position, &[7; 40]);
    assert_eq!(piece.len(), BLOCK_BYTES);
    let header = &piece[..PIECE_HEADER_BYTES];
    let checksum = xxh3_64(&[7; 40]).rotate_left(1) ^ xxh3_64(&header[..56]);
    check(
        &document(),
        "### Piece",
        header,
        &[
            ("magic", u32_of(b"PLSN")),
            ("version", u128::from(SNAPSHOT_VERSION)),
            ("kind", 5),
            ("payload_bytes", 40),
            ("index", 0x4142_4344),
            ("log_id", options.log_id),
            ("number", u128::from(number)),
            ("position", u128::from(position.0)),
            ("shard", u128::from(options.shard)),
            ("checksum", u128::from(checksum)),
        ],
    );
}

#[test]
fn the_batch_header_stands_where_the_document_says() {
    let header = BatchHeader {
        crc: 0,
        flags: 0x0102,
        payload_bytes: 32,
        records: 0x1112_1314,
        shard: 0x2122,
        segment: 0x3132_3334_3536_3738,
        lsn: Lsn(0x4142_4344_4546_4748),
        epoch: 0x5152_5354_5556_5758,
        durable: Lsn(0x6162_6364_6566_6768),
        retired: Lsn(0x7172_7374_7576_7778),
        prev_crc: 0x8182_8384,
    };
    let key: u128 = 99 << 70;
    let mut batch = vec![7; BATCH_HEADER_BYTES + 32];
    let sealed = header.seal(&mut batch, key);
    let mut plain = batch.clone();
    plain[8..12].fill(0);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&key.to_le_bytes()), &plain);
    assert_eq!(sealed, crc, "the key, then the batch with its crc as zero");
    check(
        &document(),
        "### Batch header",
        &batch[..BATCH_HEADER_BYTES],
        &[
            ("magic", u32_of(b"PLTB")),
            ("version", u128::from(FORMAT_VERSION)),
            ("flags", u128::from(header.flags)),
            ("crc", u128::from(crc)),
            ("payload_bytes", u128::from(header.payload_bytes)),
            ("records", u128::from(header.records)),
            ("shard", u128::from(header.shard)),
            ("segment", u128::from(header.segment)),
            ("lsn", u128::from(header.lsn.0)),
            ("epoch", u128::from(header.epoch)),
            ("durable", u128::from(header.durable.0)),
            ("retired", u128::from(header.retired.0)),
            ("prev_crc", u128::from(header.prev_crc)),
        ],
    );
}

#[test]
fn the_record_header_stands_where_the_document_says() {
    let mut buffer = vec![0xff; 4096];
    let mut space = BatchSpace {
        bytes: &mut buffer,
        len: BATCH_HEADER_BYTES,
        base: Lsn(0),
        records: 0,
    };
    let record = MoveRecordV1 {
        request: 1,
        at_ms: 2,
        state: 3,
    };
    let placed = space.append(Schema::Move, &record);
    assert_eq!(space.len % RECORD_ALIGN, 0);
    let end = space.len;
    let (lsn, key) = (Lsn(77 << 40), 99_u128 << 70);
    seal_records(&mut buffer[..end], lsn, 1, key);
    let start = placed.offset as usize;
    let body = u128::from(placed.bytes) - RECORD_HEADER_BYTES as u128;
    let written = &buffer[start..start + placed.bytes as usize];
    let position = Lsn(lsn.0 + start as u64);
    let covered = [
        &xxh3_64(&written[RECORD_HEADER_BYTES..]).to_le_bytes()[..],
        &position.0.to_le_bytes(),
        &written[..8],
        &key.to_le_bytes(),
    ];
    let checksum = xxh3_64(&covered.concat());
    assert!(record_holds(written, position, key));
    check(
        &document(),
        "### Record header",
        &buffer[start..start + RECORD_HEADER_BYTES],
        &[
            ("body_bytes", body),
            ("schema", Schema::Move as u128),
            ("checksum", u128::from(checksum)),
        ],
    );
}

/// Offset, bytes and name of every field of an archived record.
macro_rules! archived {
    ($archived:ty { $($field:ident),* }) => {{
        fn bytes_of<T, F>(_: fn(&T) -> &F) -> usize {
            size_of::<F>()
        }
        let fields = vec![$((
            offset_of!($archived, $field),
            bytes_of::<$archived, _>(|record| &record.$field),
            stringify!($field).to_owned(),
        )),*];
        let bytes: usize = fields.iter().map(|field| field.1).sum();
        assert_eq!(bytes, size_of::<$archived>(), "every field is listed");
        fields
    }};
}

#[test]
fn the_records_have_the_fields_that_the_document_lists() {
    let document = document();
    let layouts = [
        archived!(ArchivedTaskRecordV1<'static> {
            request, tenant, function, due_ms, payload_hash, max_age_s, cost, priority, durability,
            task_id, key, content_type, traceparent, tags, payload
        }),
        archived!(ArchivedLeaseRecordV1 {
            request,
            executor,
            at_ms,
            generation,
            attempt
        }),
        archived!(ArchivedOutcomeRecordV1<'static> {
            request, at_ms, due_ms, generation, attempt, state, retries, code, holds_key, error, output, result
        }),
        archived!(ArchivedMoveRecordV1 {
            request,
            at_ms,
            state
        }),
        archived!(ArchivedConfigRecordV1<'static> {
            version, kind, tenant, function, weight, waiting_max, concurrency, retries,
            backoff_ms_min, backoff_ms_max, max_age_s, timeout_ms, on_failure, paused, name
        }),
        archived!(ArchivedClockRecordV1 {
            logged_ms,
            next_seq
        }),
        archived!(ArchivedRelocatedTaskRecordV1<'static> {
            task, from, at_ms, due_ms, outcome, outcome_bytes, max_age_s, generation, attempt,
            state, retries, holds_key
        }),
        archived!(ArchivedRelocatedOutcomeRecordV1<'static> { outcome, from }),
        archived!(ArchivedRelocatedNameRecordV1<'static> {
            request, payload_hash, function, key, task_id
        }),
    ];
    for (schema, mut fields) in Schema::ALL.into_iter().zip(layouts) {
        fields.sort();
        let heading = format!("#### Schema {}: {schema:?}", schema as u16);
        assert_eq!(layout(&document, &heading), fields, "{heading}");
    }
    assert_eq!(
        document.matches("\n#### Schema ").count(),
        Schema::ALL.len()
    );
}

#[test]
fn a_records_root_is_the_end_of_its_body() {
    let mut buffer = vec![0; 4096];
    let mut space = BatchSpace {
        bytes: &mut buffer,
        len: 0,
        base: Lsn(0),
        records: 0,
    };
    let record = ConfigRecordV1 {
        name: "acme",
        ..ConfigRecordV1::new(
            0x0102_0304_0506_0708,
            &pelton_core::config::Change::FunctionRemoved {
                id: pelton_core::id::FunctionId(9),
            },
        )
    };
    let placed = space.append(Schema::Config, &record);
    let body = &buffer[RECORD_HEADER_BYTES..placed.bytes as usize];
    let root = body.len() - size_of::<ArchivedConfigRecordV1<'static>>();
    let rows = layout(&document(), "#### Schema 5: Config");
    let field = |name: &str| {
        let row = rows.iter().find(|row| row.2 == name).unwrap();
        (root + row.0, &body[root + row.0..root + row.0 + row.1])
    };
    assert_eq!(field("version").1, record.version.to_le_bytes());
    assert_eq!(field("function").1, 9u32.to_le_bytes());
    let (at, name) = field("name");
    let distance = i32::from_le_bytes(name[..4].try_into().unwrap());
    let length = u32::from_le_bytes(name[4..].try_into().unwrap()) as usize;
    let text = (at as i64 + i64::from(distance)) as usize;
    assert_eq!(&body[text..text + length], b"acme");
}

#[test]
fn the_numbers_in_the_document_are_the_constants() {
    let document = document();
    let pairs = |heading: &str| -> Vec<(String, String)> {
        let rows = table(&document, heading).into_iter();
        rows.map(|row| (row[0].clone(), row[1].clone())).collect()
    };
    let named = |list: &[(&str, usize)]| -> Vec<(String, String)> {
        let rows = list.iter();
        rows.map(|(name, value)| ((*name).to_owned(), value.to_string()))
            .collect()
    };
    let constants = named(&[
        ("directory version", DIRECTORY_VERSION as usize),
        ("format version", FORMAT_VERSION as usize),
        ("block", BLOCK_BYTES),
        ("first batch", SEGMENT_DATA_OFFSET as usize),
        ("batch header", BATCH_HEADER_BYTES),
        ("record header", RECORD_HEADER_BYTES),
        ("record alignment", RECORD_ALIGN),
        ("largest batch", BATCH_BYTES_MAX),
        ("smallest segment", SEGMENT_BYTES_MIN),
        ("default segment", SEGMENT_BYTES_DEFAULT),
        ("largest segment", SEGMENT_BYTES_MAX),
        ("piece of filling", FILL_PIECE_BYTES),
        ("cells", CELL_COUNT as usize),
        ("pieces of filling in flight", FILL_PIECES_MAX as usize),
        ("prepared segments", PREPARED_COUNT),
        ("dead files kept", DEAD_COUNT_MAX),
        (
            "idle time before a carry batch, ms",
            (CARRY_AFTER_NS / 1_000_000) as usize,
        ),
        (
            "pause after a failed preparation, ms",
            (PREPARE_AGAIN_NS / 1_000_000) as usize,
        ),
        ("tries of a read", READ_TRIES as usize),
        ("snapshot version", usize::from(SNAPSHOT_VERSION)),
        ("piece header", PIECE_HEADER_BYTES),
        ("largest payload of a piece", SNAPSHOT_PIECE_BYTES),
        ("snapshots kept", SNAPSHOTS_KEPT),
        ("backup version", BACKUP_VERSION as usize),
    ]);
    assert_eq!(pairs("## Numbers"), constants);
    let places: Vec<String> = pairs("## Segments").into_iter().map(|row| row.0).collect();
    let [second, first] = [BLOCK_BYTES as u64, SEGMENT_DATA_OFFSET].map(|at| at.to_string());
    assert_eq!(places, ["0".to_owned(), second, first]);
    let flags = named(&[
        ("1", FLAG_OPENING as usize),
        ("2", FLAG_CARRY as usize),
        ("4", FLAG_CLOSING as usize),
    ]);
    let names = ["opening", "carry", "closing"];
    let rows = pairs("### Batch flags");
    assert_eq!(rows.len(), flags.len());
    for ((row, flag), name) in rows.iter().zip(&flags).zip(names) {
        assert_eq!((row.0.as_str(), row.1.as_str()), (flag.1.as_str(), name));
    }
    let states: Vec<_> = State::ALL
        .into_iter()
        .map(|state| ((state as u8).to_string(), state.name().to_owned()))
        .collect();
    assert_eq!(pairs("### States"), states);
    assert_eq!(segment_name(1), "segment-000001.plt");
    assert!(document.contains("`segment-000001.plt`"));
    assert_eq!(snapshot_name(7), "snapshot-000007.pls");
    assert!(document.contains("`snapshot-000007.pls`"));
    let kinds = pairs("### Kinds of pieces").into_iter().skip(1);
    let names = ["config", "tasks", "names", "ages", "held keys", "end"];
    for ((number, name), known) in kinds.zip(names) {
        assert_eq!(name, known);
        assert!(PieceKind::from_number(number.parse().unwrap()).is_some());
    }
}

#[test]
fn a_backup_reads_as_the_document_shows_it() {
    let document = document();
    let shown = document.split("```backup\n").nth(1).unwrap();
    let shown = shown.split("```").next().unwrap();
    let segment_bytes = SEGMENT_BYTES_DEFAULT as u64;
    let log_id = 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef;
    let manifest = Manifest::new(log_id, 2, segment_bytes).next(1, 12);
    let file = |segment, bytes, checksum| CopiedFile {
        name: copied_name(&manifest, 0, 3, segment),
        bytes,
        checksum,
    };
    let backup = Backup {
        manifest,
        program: "0.1.0".to_owned(),
        taken_ms: 1_795_795_167_232,
        shards: vec![ShardCopy {
            first: 3,
            end: Lsn(4 * segment_bytes + 28_672),
            counts: Counts {
                live: 17,
                tasks: 20,
                records: 65,
                batches: 9,
            },
        }],
        history_rows: Some(1200),
        files: vec![
            file(3, segment_bytes, 0xf763_0fe2_0112_a02f),
            file(4, 28_672, 0xbbdb_2b23_dbe4_8220),
        ],
    };
    let folder = std::env::temp_dir().join(format!("pelton-format-backup-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    backup.write(&folder).unwrap();
    let written = std::fs::read_to_string(folder.join("BACKUP")).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(shown, written);
}

#[test]
fn the_manifest_reads_as_the_document_shows_it() {
    let document = document();
    let shown = document.split("```manifest\n").nth(1).unwrap();
    let shown = shown.split("```").next().unwrap();
    let folder = std::env::temp_dir().join(format!("pelton-format-{}", std::process::id()));
    let mut directory = DataDirectory::open(&folder).unwrap();
    directory
        .write(Manifest::new(
            0x0123_4567_89ab_cdef_0123_4567_89ab_cdef,
            2,
            SEGMENT_BYTES_DEFAULT as u64,
        ))
        .unwrap();
    let written = std::fs::read_to_string(folder.join("MANIFEST")).unwrap();
    let first_shard_exists = folder.join("shard-000").is_dir();
    drop(directory);
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(shown, written);
    assert!(first_shard_exists && document.contains("`shard-000`"));
}
