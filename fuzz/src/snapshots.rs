//! Snapshots: a sound one whose pieces are changed as an input says, with checksums that hold again or without, and files
//! of any bytes. A snapshot is refused, or it leads to a shard that keeps its rules, goes on, and can be written and
//! loaded again.
//!
//! An input whose first byte is even is a file; else it is a list of changes of eight bytes each: to which piece, what is
//! done, where, and with what. Where the tasks of a piece can be unpacked, that is done to them, and they are packed again.

use std::sync::OnceLock;

use pelton_core::{
    clock::Now,
    event::{Effects, Inbox},
    id::Lsn,
    limits::SNAPSHOT_PIECE_BYTES,
    record::BatchSpace,
    shard::{Options as ShardOptions, Shard},
    snapshot::{PieceKind, packed_tasks, unpacked_tasks},
};
use pelton_storage::{
    device::{Device, DeviceOp, Output},
    format::{BATCH_HEADER_BYTES, BLOCK_BYTES},
    log::Options,
    memory::MemoryDevice,
    snapshot::{PIECE_HEADER_BYTES, Read, Reading, encode_piece, snapshot_name},
};

use crate::Input;

/// The snapshot that the tests of the format keep.
const KEPT: &[u8] = include_bytes!("../../storage/tests/golden/snapshot-v3.bin");
const OPTIONS: Options = Options {
    shard: 258,
    log_id: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
    segment_bytes: 1 << 26,
};
const NUMBER: u64 = 7;
const CHANGES_MAX: usize = 16;
/// The log ends here, whatever the pieces say: it has no more segments than this.
const END: Lsn = Lsn(6 << 26);
/// Pieces of a shard as small as the kept one's.
const PIECES_MAX: usize = 16;

/// Room for what a few steps append.
const STEP_BYTES: usize = 128 << 10;

/// A piece as it stands in a file.
#[derive(Clone)]
struct Piece {
    kind: u16,
    position: Lsn,
    payload: Vec<u8>,
}

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    if input.byte().is_multiple_of(2) {
        check(input.0);
        return;
    }
    static SOUND: OnceLock<Vec<Piece>> = OnceLock::new();
    let mut pieces = SOUND.get_or_init(sound).clone();
    let mut torn = Vec::new();
    let mut changes = 0;
    while !input.0.is_empty() && changes < CHANGES_MAX {
        change(&mut pieces, &mut torn, &mut input);
        changes += 1;
    }
    let mut file = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        file.extend(encode_piece(
            OPTIONS,
            NUMBER,
            index as u32,
            piece.kind,
            piece.position,
            &piece.payload,
        ));
    }
    for (place, bit) in torn {
        let place = place % file.len().max(1);
        if let Some(byte) = file.get_mut(place) {
            *byte ^= 1 << bit;
        }
    }
    let loaded = check(&file);
    assert!(
        loaded || changes > 0,
        "nothing was changed, and it is refused"
    );
}

/// The kept snapshot, piece by piece.
fn sound() -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < KEPT.len() {
        let header = &KEPT[at..at + PIECE_HEADER_BYTES];
        let field = |at: usize| u64::from_le_bytes(*header[at..].first_chunk().expect("8 bytes"));
        let length = field(8) as u32 as usize;
        let payload = KEPT[at + PIECE_HEADER_BYTES..][..length].to_vec();
        pieces.push(Piece {
            kind: (field(0) >> 48) as u16,
            position: Lsn(field(40)),
            payload,
        });
        at += (PIECE_HEADER_BYTES + length).next_multiple_of(BLOCK_BYTES);
    }
    pieces
}

fn change(pieces: &mut Vec<Piece>, torn: &mut Vec<(usize, u8)>, input: &mut Input<'_>) {
    let (what, which) = (input.byte() % 12, usize::from(input.byte()));
    let (place, with) = (usize::from(input.u16()), input.u32());
    if pieces.is_empty() {
        return;
    }
    let which = which % pieces.len();
    let piece = &mut pieces[which];
    let packed = what < 8 && piece.kind == PieceKind::Tasks as u16 && !place.is_multiple_of(4);
    if packed && let Some(plain) = unpacked_tasks(&piece.payload) {
        piece.payload = plain;
        change_bytes(piece, what, place, with, input);
        if let Some(packed) = packed_tasks(&piece.payload) {
            piece.payload = packed;
            piece.payload.truncate(SNAPSHOT_PIECE_BYTES);
        }
        return;
    }
    if what < 8 {
        return change_bytes(piece, what, place, with, input);
    }
    match what {
        8 => piece.kind = with as u16 % 9,
        9 => {
            pieces.remove(which);
        }
        10 => {
            let again = pieces[which].clone();
            if pieces.len() < PIECES_MAX {
                pieces.insert(place % pieces.len(), again);
            }
        }
        _ => torn.push((with as usize, place as u8 % 8)),
    }
}

/// One of the first eight changes, those of what a piece says.
fn change_bytes(piece: &mut Piece, what: u8, place: usize, with: u32, input: &mut Input<'_>) {
    let at = place % piece.payload.len().max(1);
    match what {
        0 => {
            if let Some(byte) = piece.payload.get_mut(at) {
                *byte ^= 1 << (with % 8);
            }
        }
        // A number somewhere, of one to eight bytes.
        1..=4 => {
            let number = (u64::from(with) << 32 | u64::from(with)).to_le_bytes();
            let bytes = 1 << (what - 1);
            let end = (at + bytes).min(piece.payload.len());
            piece.payload[at..end].copy_from_slice(&number[..end - at]);
        }
        5 => {
            let bytes = input.take(with as usize % 512);
            let end = (at + bytes.len()).min(piece.payload.len());
            piece.payload[at..end].copy_from_slice(&bytes[..end - at]);
        }
        6 => piece.payload.truncate(at),
        7 => {
            let bytes = input.take(with as usize % 512);
            piece.payload.splice(at..at, bytes.iter().copied());
            piece.payload.truncate(SNAPSHOT_PIECE_BYTES);
        }
        _ => {}
    }
}

/// Reads a file; true if a shard can start from it.
fn check(file: &[u8]) -> bool {
    let mut device = disk(file);
    let opened = Reading::open(&mut device, OPTIONS, NUMBER).expect("a disk in memory works");
    let Some((mut reading, begin)) = opened else {
        return false;
    };
    let mut shard = Shard::new(options());
    shard.load_begins(begin.secret, 0);
    let mut whole = false;
    loop {
        let read = reading.next(&mut device).expect("a disk in memory works");
        let Read::Piece(kind, _, payload) = read else {
            break;
        };
        if shard.load(kind, END, payload).is_err() {
            break;
        }
        if kind == PieceKind::End {
            whole = true;
            break;
        }
    }
    reading.close(&mut device);
    if whole {
        goes_on(shard);
    }
    whole
}

/// A shard that was loaded keeps its rules, and is written and loaded again as the same; then time goes on.
fn goes_on(mut shard: Shard) {
    let start = shard.last_logged_ms();
    let now = |after_ms: u64| Now {
        mono_ns: 1 + after_ms * 1_000_000,
        logged_ms: start + after_ms,
    };
    shard.start(now(0), Lsn(0));
    shard.audit();

    let mut again = Shard::new(options());
    again.load_begins(shard.secret(), 0);
    let mut cursor = shard.snapshot();
    for count in 1.. {
        assert!(count <= PIECES_MAX, "a small shard has few pieces");
        let piece = shard.snapshot_piece(&mut cursor);
        let piece = piece.expect("nothing makes it void");
        let loaded = again.load(piece.kind, END, &piece.bytes);
        assert_eq!(loaded, Ok(()), "what is written can be loaded");
        if piece.kind == PieceKind::End {
            break;
        }
    }
    again.start(now(0), Lsn(0));
    again.audit();
    again.audit_against(&shard);

    let mut bytes = vec![0; STEP_BYTES];
    let mut space = BatchSpace {
        bytes: &mut bytes,
        len: BATCH_HEADER_BYTES,
        base: END,
        records: 0,
    };
    for after_ms in [1, 1_000, 100_000_000] {
        let (mut inbox, mut effects) = (Inbox::default(), Effects::default());
        shard.step(now(after_ms), None, &mut inbox, &mut space, &mut effects);
        shard.audit();
    }
}

fn options() -> ShardOptions {
    ShardOptions {
        segment_bytes: OPTIONS.segment_bytes,
        ..ShardOptions::default()
    }
}

/// The disk of a shard with this one file.
fn disk(file: &[u8]) -> MemoryDevice {
    let mut device = MemoryDevice::new(1, BLOCK_BYTES);
    let mut perform = |op| device.perform(op).expect("a disk in memory works");
    let created = perform(DeviceOp::Create {
        name: snapshot_name(NUMBER),
        bytes: file.len() as u64,
    });
    let Output::File(id, _) = created else {
        panic!("creating brings a file");
    };
    perform(DeviceOp::Write {
        file: id,
        offset: 0,
        data: file.to_vec(),
    });
    perform(DeviceOp::Close { file: id });
    device
}
