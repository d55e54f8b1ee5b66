//! Snapshot: a shard's facts in pieces, so that a start need not read the whole log. The pieces are taken one by one
//! while the shard goes on: each shows its part of the facts as of its own place in the log. A start loads them all and
//! then replays the log from where the first piece was taken, leaving out of each part what that part knows already
//! (`docs/decisions/0008-snapshots.md`). Payloads, names and results stay in the log, which is complete without any
//! snapshot.
//!
//! Order of the pieces: configuration, tasks, names, ages, held keys, the end. Names, ages and held keys follow from what
//! happened to tasks; they are taken after all tasks, so that whatever a task's piece has left out of the replay is in
//! them.

use alloc::{collections::BTreeSet, vec::Vec};

use crate::{
    config::Change,
    flow::replay::Replayed,
    id::{CellId, FunctionId, Lsn, RequestId},
    limits::{CELL_COUNT, NAME_BYTES_MAX, SNAPSHOT_PIECE_BYTES},
    packing::{Packer, Unpacker},
    planted::{Bug, planted},
    record::{
        BatchSpace, ConfigRecordV1, RECORD_ALIGN, RECORD_HEADER_BYTES, Record, Schema, read,
        record_bytes,
    },
    shard::{Name, Shard},
    state::State,
    table::task::*,
};

/// What a piece holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum PieceKind {
    /// Tenants and functions, as records of the log.
    Config = 1,
    /// The tasks of a range of slots.
    Tasks = 2,
    /// Given names.
    Names = 3,
    /// When delayed tasks that have become due are too old.
    Ages = 4,
    /// Ordering keys that a failure holds.
    HeldKeys = 5,
    /// Running number and time. The last piece.
    End = 6,
}

impl PieceKind {
    /// The kind with this number.
    pub fn from_number(number: u16) -> Option<PieceKind> {
        [
            PieceKind::Config,
            PieceKind::Tasks,
            PieceKind::Names,
            PieceKind::Ages,
            PieceKind::HeldKeys,
            PieceKind::End,
        ]
        .into_iter()
        .find(|kind| *kind as u16 == number)
    }
}

/// How far a snapshot is.
#[derive(Clone, Copy, Debug)]
pub struct Cursor {
    /// The configuration with which it was begun: a change makes it void.
    config: u64,
    kind: PieceKind,
    /// The next change, slot, sub-table or key.
    next: usize,
    /// The next age.
    age: (u64, u32, u32),
}

/// One piece.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    /// What it holds.
    pub kind: PieceKind,
    /// Its bytes, at most [`SNAPSHOT_PIECE_BYTES`].
    pub bytes: Vec<u8>,
}

/// What a snapshot holds cannot be read: it is of another version, or contradicts itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unloadable;

/// Words of a task, 64 bits each: see `put_task`.
const TASK_WORDS: usize = 9;
/// Bytes of a task that is not packed.
const TASK_BYTES: usize = TASK_WORDS * 8;
/// Bytes of the slots' range and the number of tasks, which stand in front of them.
const TASKS_HEADER_BYTES: usize = 12;
/// Slots of one piece: whole pages of the table.
const SLOTS_PER_PIECE: usize = 2 * TASKS_PER_PAGE;
const _: () = assert!(
    TASKS_HEADER_BYTES + SLOTS_PER_PIECE * Packer::<TASK_WORDS>::ENTRY_BYTES_MAX
        <= SNAPSHOT_PIECE_BYTES
);
/// What a packed task is taken to have.
const TASK_BYTES_LIKELY: u64 = 24;
const NAME_BYTES: usize = 44;
const NAMES_PER_PIECE: usize = 1024;
/// A sub-table holds at most 512 names.
const _: () = assert!((NAMES_PER_PIECE + 512) * NAME_BYTES <= SNAPSHOT_PIECE_BYTES);
const KEY_BYTES: usize = 20;
/// Entries that are looked at for one piece, whether they belong into it or not.
const LOOKED_AT_MAX: usize = 2048;
const _: () = assert!(LOOKED_AT_MAX * KEY_BYTES <= SNAPSHOT_PIECE_BYTES);
const CHANGES_PER_PIECE: usize = 128;
const _: () = assert!(CHANGES_PER_PIECE * record_bytes(NAME_BYTES_MAX) <= SNAPSHOT_PIECE_BYTES);

/// The task's record names a trace context, a key or the like: `FLAG_META`.
const SHOWN_META: u8 = 1;
/// `FLAG_MEMORY`.
const SHOWN_MEMORY: u8 = 2;
/// `FLAG_DELAYED`.
const SHOWN_DELAYED: u8 = 4;
/// `FLAG_OVERDUE`.
const SHOWN_OVERDUE: u8 = 8;
/// Not `FLAG_UNSAVED`: it has ended, and history has it.
const SHOWN_SAVED: u8 = 16;
const SHOWN: [(u8, u16); 4] = [
    (SHOWN_META, FLAG_META),
    (SHOWN_MEMORY, FLAG_MEMORY),
    (SHOWN_DELAYED, FLAG_DELAYED),
    (SHOWN_OVERDUE, FLAG_OVERDUE),
];

impl Shard {
    /// Begins a snapshot.
    pub fn snapshot(&self) -> Cursor {
        Cursor {
            config: self.directory.version(),
            kind: PieceKind::Config,
            next: 0,
            age: (0, 0, 0),
        }
    }

    /// The secret by which names and keys are hashed: a shard that loads the snapshot goes on with it.
    pub fn secret(&self) -> u64 {
        self.options.seed
    }

    /// Tasks and names that a snapshot would hold now.
    pub fn snapshot_entries(&self) -> u64 {
        u64::from(self.tasks.live()) + self.names.len() as u64
    }

    /// About how many bytes it would have: each page of the table that is not full makes its pieces no longer.
    pub fn snapshot_bytes(&self) -> u64 {
        let tasks = u64::from(self.tasks.live()) * TASK_BYTES_LIKELY;
        tasks + (self.names.len() * NAME_BYTES) as u64
    }

    /// The next piece; `None` if the snapshot is void, because the configuration has changed meanwhile. Called between
    /// two steps: it shows the facts of all batches that a step was shown as durable.
    pub fn snapshot_piece(&self, cursor: &mut Cursor) -> Option<Piece> {
        if cursor.config != self.directory.version() || self.poisoned {
            return None;
        }
        let kind = cursor.kind;
        let mut bytes = Vec::with_capacity(SNAPSHOT_PIECE_BYTES);
        let more = match kind {
            PieceKind::Config => self.show_config(cursor, &mut bytes),
            PieceKind::Tasks => self.show_tasks(cursor, &mut bytes),
            PieceKind::Names => self.show_names(cursor, &mut bytes),
            PieceKind::Ages => self.show_ages(cursor, &mut bytes),
            PieceKind::HeldKeys => self.show_held_keys(cursor, &mut bytes),
            PieceKind::End => {
                bytes.extend(self.next_seq.to_le_bytes());
                bytes.extend(self.now.logged_ms.to_le_bytes());
                true
            }
        };
        if !more {
            cursor.next = 0;
            cursor.kind = match kind {
                PieceKind::Config => PieceKind::Tasks,
                PieceKind::Tasks => PieceKind::Names,
                PieceKind::Names => PieceKind::Ages,
                PieceKind::Ages => PieceKind::HeldKeys,
                PieceKind::HeldKeys | PieceKind::End => PieceKind::End,
            };
        }
        Some(Piece { kind, bytes })
    }

    fn show_config(&self, cursor: &mut Cursor, bytes: &mut Vec<u8>) -> bool {
        bytes.resize(SNAPSHOT_PIECE_BYTES, 0);
        let mut space = BatchSpace {
            bytes,
            len: 0,
            base: Lsn(0),
            records: 0,
        };
        let changes = self.directory.dump().skip(cursor.next);
        let mut shown = 0;
        for change in changes.take(CHANGES_PER_PIECE) {
            space.append(Schema::Config, &ConfigRecordV1::new(cursor.config, &change));
            shown += 1;
        }
        let len = space.len;
        bytes.truncate(len);
        cursor.next += shown;
        shown == CHANGES_PER_PIECE
    }

    fn show_tasks(&self, cursor: &mut Cursor, bytes: &mut Vec<u8>) -> bool {
        let from = cursor.next;
        let to = (from + SLOTS_PER_PIECE).min(self.tasks.used() as usize);
        bytes.extend((from as u32).to_le_bytes());
        bytes.extend((to as u32).to_le_bytes());
        bytes.extend([0; 4]);
        let mut tasks = 0u32;
        let mut packer = Packer::new(bytes);
        self.tasks.scan(from as u32..to as u32, |slot, task| {
            packer.put(self.words_of(slot, task));
            tasks += 1;
        });
        packer.end();
        bytes[8..TASKS_HEADER_BYTES].copy_from_slice(&tasks.to_le_bytes());
        cursor.next = to;
        to < self.tasks.used() as usize
    }

    /// A task as a replay would know it: what only memory knows of it is left out.
    fn words_of(&self, slot: u32, task: &Task) -> [u64; TASK_WORDS] {
        let state = match self.logged_state(task) {
            // It was delayed for a time that has come.
            State::Enqueued if task.has(FLAG_DELAYED) => State::Scheduled,
            state => state,
        };
        let at = match (state, task.state()) {
            (State::Retrying, State::Retrying) | (State::Scheduled, State::Scheduled) => task.at,
            (State::Retrying, _) => self.now.logged_ms,
            _ if state.terminal() => task.at,
            _ => 0,
        };
        let key = match task.key {
            // Such a task has no key any more.
            NIL if state.terminal() => u128::from(task.ended_ms()),
            NIL => 0,
            key => self.keys[key].hash,
        };
        let request = self.tasks.request_of(slot, task);
        let shown = SHOWN.iter().filter(|(_, flag)| task.has(*flag));
        let mut shown = shown.fold(0, |all, (bit, _)| all | bit);
        if state.terminal() && self.has_history() && !task.has(FLAG_UNSAVED) {
            shown |= SHOWN_SAVED;
        }
        let [kind, retries, shown] = [state as u8, task.retries(), shown].map(u64::from);
        let [cell, attempt] = [request.cell().0, task.attempt].map(u64::from);
        let [units, cost] = [task.record_units, task.cost].map(u64::from);
        [
            u64::from(slot) | u64::from(task.function.0) << 32,
            request.seq(),
            request.accepted_ms(),
            task.position.0,
            at,
            key as u64,
            (key >> 64) as u64,
            u64::from(task.max_age_s()) | cell << 32 | attempt << 48,
            units | cost << 16 | kind << 32 | retries << 40 | shown << 48,
        ]
    }

    fn show_names(&self, cursor: &mut Cursor, bytes: &mut Vec<u8>) -> bool {
        let mut shown = 0;
        while shown < NAMES_PER_PIECE && cursor.next < self.names.tables() {
            // A table that splits moves half of its names into one behind all others: none is missed.
            for (hash, name) in self.names.table(cursor.next) {
                bytes.extend(hash.to_le_bytes());
                bytes.extend(name.request.0.to_le_bytes());
                bytes.extend(name.payload_hash.to_le_bytes());
                bytes.extend(name.segment.to_le_bytes());
                shown += 1;
            }
            cursor.next += 1;
        }
        cursor.next < self.names.tables()
    }

    fn show_ages(&self, cursor: &mut Cursor, bytes: &mut Vec<u8>) -> bool {
        let mut looked_at = 0;
        for &(at, slot, seq) in self.ages.range(cursor.age..).take(LOOKED_AT_MAX) {
            cursor.age = (at, slot, seq);
            looked_at += 1;
            let task = self.tasks.get(slot);
            if task.is_some_and(|task| {
                task.seq() as u32 == seq && task.has(FLAG_OWN_AGE) && task.has(FLAG_DELAYED)
            }) {
                bytes.extend(at.to_le_bytes());
                bytes.extend(slot.to_le_bytes());
                bytes.extend(seq.to_le_bytes());
            }
        }
        cursor.age.2 = cursor.age.2.saturating_add(1);
        looked_at == LOOKED_AT_MAX
    }

    fn show_held_keys(&self, cursor: &mut Cursor, bytes: &mut Vec<u8>) -> bool {
        let to = (cursor.next + LOOKED_AT_MAX).min(self.keys.used() as usize);
        for index in cursor.next..to {
            let key = self.keys[index as u32];
            // A key that was removed is not held.
            if key.held {
                bytes.extend(key.hash.to_le_bytes());
                bytes.extend(key.function.0.to_le_bytes());
            }
        }
        cursor.next = to;
        to < self.keys.used() as usize
    }

    /// A snapshot is about to be loaded: whatever was loaded or replayed before is forgotten. `first_segment` is the
    /// first of the log. Then come [`Shard::load`] for each piece and [`Shard::replay`] from the snapshot's start on.
    pub fn load_begins(&mut self, secret: u64, first_segment: u64) {
        assert!(self.replaying, "a snapshot is loaded before the start");
        let mut options = self.options;
        options.seed = secret;
        *self = Shard::new(options);
        self.see_segment(first_segment);
    }

    /// No snapshot can be loaded to its end: the whole log comes now.
    pub fn load_failed(&mut self) {
        *self = Shard::new(self.options);
    }

    /// Takes a piece. `position` is the place in the log as of which it was taken.
    pub fn load(&mut self, kind: PieceKind, position: Lsn, bytes: &[u8]) -> Result<(), Unloadable> {
        let mut fields = Fields(bytes);
        match kind {
            PieceKind::Config => return self.load_config(bytes),
            PieceKind::Tasks => return self.load_tasks(position, fields),
            PieceKind::Names => {
                if planted(Bug::NamesLostInSnapshot) {
                    return Ok(());
                }
                self.replayed.names_moved = true;
                while !fields.0.is_empty() {
                    let hash = fields.u128()?;
                    let name = Name {
                        request: RequestId(fields.u128()?),
                        payload_hash: fields.u64()?,
                        segment: fields.u32()?,
                    };
                    if hash == 0 || u64::from(name.segment) > self.segment_of(position) {
                        return Err(Unloadable);
                    }
                    self.found_name(hash, name);
                }
            }
            PieceKind::Ages => {
                while !fields.0.is_empty() {
                    let (at, slot, seq) = (fields.u64()?, fields.u32()?, fields.u32()?);
                    self.load_age(at, slot, seq);
                }
            }
            PieceKind::HeldKeys => {
                while !fields.0.is_empty() {
                    let hash = fields.u128()?;
                    let function = FunctionId(fields.u32()?);
                    if hash == 0 || self.directory.function(function).is_none() {
                        return Err(Unloadable);
                    }
                    let key = self.load_key(function, hash)?;
                    self.keys[key].held = true;
                }
            }
            PieceKind::End => {
                let (next_seq, logged_ms) = (fields.u64()?, fields.u64()?);
                if next_seq > RequestId::SEQ_MAX || logged_ms > RequestId::ACCEPTED_MS_MAX {
                    return Err(Unloadable);
                }
                self.next_seq = self.next_seq.max(next_seq);
                self.now.logged_ms = self.now.logged_ms.max(logged_ms);
                self.number_ends();
            }
        }
        if fields.0.is_empty() {
            Ok(())
        } else {
            Err(Unloadable)
        }
    }

    fn load_config(&mut self, bytes: &[u8]) -> Result<(), Unloadable> {
        let mut at = 0;
        while at < bytes.len() {
            let mut header = Fields(&bytes[at..]);
            let length = header.u32()? as usize;
            let schema = header.u16()?;
            let body = bytes.get(at + RECORD_HEADER_BYTES..);
            let body = body.and_then(|body| body.get(..length)).ok_or(Unloadable)?;
            let Ok(Record::Config(record)) = read(schema, body) else {
                return Err(Unloadable);
            };
            let change: Change = record.change().ok_or(Unloadable)?;
            // Each comes once, by its number, and what belongs to it behind it.
            let tenants = self.directory.tenants().len() as u32;
            let functions = self.directory.functions().len() as u32;
            let follows = match &change {
                Change::Tenant { id, .. } => id.0 == tenants,
                Change::Function { id, tenant, .. } => id.0 == functions && tenant.0 < tenants,
                Change::FunctionRemoved { id } => id.0 < functions,
            };
            if !follows {
                return Err(Unloadable);
            }
            self.apply_change(record.version.to_native(), change);
            at = (at + RECORD_HEADER_BYTES + length).next_multiple_of(RECORD_ALIGN);
        }
        Ok(())
    }

    fn load_tasks(&mut self, position: Lsn, mut fields: Fields<'_>) -> Result<(), Unloadable> {
        let (from, to, tasks) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let known = self.replayed.captured.len() * SLOTS_PER_PIECE;
        if from as usize != known || to < from || (to - from) as usize > SLOTS_PER_PIECE {
            return Err(Unloadable);
        }
        let plain = unpack(fields.0, tasks).ok_or(Unloadable)?;
        let mut fields = Fields(&plain);
        let mut heads = BTreeSet::new();
        while !fields.0.is_empty() {
            let slot = fields.u32()?;
            let function = FunctionId(fields.u32()?);
            let (seq, accepted_ms) = (fields.u64()?, fields.u64()?);
            let (place, at) = (Lsn(fields.u64()?), fields.u64()?);
            let key = fields.u128()?;
            let (max_age_s, cell) = (fields.u32()?, CellId(fields.u16()?));
            let (attempt, record_units, cost) = (fields.u16()?, fields.u16()?, fields.u16()?);
            let [state, retries, shown, _] = fields.take()?;
            let state = State::from_number(state).ok_or(Unloadable)?;
            let tenant = self.directory.function(function).ok_or(Unloadable)?.tenant;
            let leased = matches!(state, State::Running | State::Stopping | State::Retrying);
            let delayed = shown & SHOWN_DELAYED != 0;
            let possible = match state {
                State::Dequeued | State::Paused => false,
                State::Scheduled => delayed && attempt == 0 && cost > 0,
                State::Enqueued => !delayed && attempt == 0 && cost > 0,
                State::Running | State::Stopping | State::Retrying => attempt > 0 && cost > 0,
                State::Succeeded
                | State::Failed
                | State::Stopped
                | State::Expired
                | State::Invalid => at < position.0,
            };
            if !possible
                || !(from..to).contains(&slot)
                || self.tasks.get(slot).is_some()
                || place >= position
                || seq > RequestId::SEQ_MAX
                || accepted_ms > RequestId::ACCEPTED_MS_MAX
                || cell.0 >= CELL_COUNT
            {
                return Err(Unloadable);
            }
            self.lane_mut(function, tenant).tenant = tenant;
            let index = self.tasks.index(slot).ok_or(Unloadable)?;
            let request = RequestId::new(cell, accepted_ms, seq, index);
            let mut task = Task::new(request, function, place, 0);
            task.set_state(state);
            task.set_retries(retries);
            task.set_max_age_s(max_age_s);
            (task.at, task.attempt) = (at, attempt);
            (task.record_units, task.cost) = (record_units, cost);
            for (_, flag) in SHOWN.iter().filter(|(bit, _)| shown & bit != 0) {
                task.set(*flag);
            }
            if state.terminal() {
                task.set_ended_ms(u64::try_from(key).map_err(|_| Unloadable)?);
                if shown & SHOWN_SAVED == 0 {
                    task.set(FLAG_UNSAVED);
                }
            } else if key != 0 {
                task.key = self.load_key(function, key)?;
                if leased && !heads.insert(key) {
                    return Err(Unloadable);
                }
            }
            let overdue = task.has(FLAG_OVERDUE);
            task.clear(FLAG_OVERDUE);
            if !state.terminal() && (overdue || task.has(FLAG_DELAYED) && attempt > 0) {
                // Too old already, unless a later piece knows when it will be.
                task.set(FLAG_OWN_AGE);
                self.ages.insert((0, slot, seq as u32));
            }
            self.tasks.insert(slot, task);
        }
        self.tasks.pack(1);
        self.replayed.captured.push(position);
        self.replayed.behind = self.replayed.behind.max(position);
        Ok(())
    }

    /// The entry of an ordering key, which belongs to one function.
    fn load_key(&mut self, function: FunctionId, hash: u128) -> Result<u32, Unloadable> {
        let key = self.key_entry(function, hash);
        let known = self.keys[key].function == function;
        known.then_some(key).ok_or(Unloadable)
    }

    /// A delayed task that had become due is too old at this time.
    fn load_age(&mut self, at: u64, slot: u32, seq: u32) {
        let Some(task) = self.tasks.get(slot).copied() else {
            return;
        };
        if task.seq() as u32 != seq || !task.has(FLAG_DELAYED) {
            return;
        }
        if task.state() == State::Scheduled {
            if task.at == 0 {
                self.tasks[slot].at = at.saturating_sub(u64::from(task.max_age_s()) * 1_000);
            }
        } else if self.ages.remove(&(0, slot, seq)) {
            self.ages.insert((at, slot, seq));
        }
    }

    /// Loaded tasks that have ended come before those that the replay will see end.
    fn number_ends(&mut self) {
        let mut ended = Vec::new();
        self.tasks.scan(0..self.tasks.used(), |slot, task| {
            if task.state().terminal() {
                ended.push((task.at.max(task.position.0), slot));
            }
        });
        ended.sort_unstable();
        for (_, slot) in ended {
            self.replayed.ended += 1;
            self.tasks[slot].holder = self.replayed.ended;
            self.tasks.pack(1);
        }
    }
}

impl Replayed {
    /// True if a loaded piece knows what the record at this place says of the task in this slot.
    pub(crate) fn is_known(&self, slot: u32, position: Lsn) -> bool {
        let captured = self.captured.get(slot as usize / SLOTS_PER_PIECE);
        captured.is_some_and(|&captured| position < captured) && !planted(Bug::SnapshotReplayedOver)
    }
}

/// A piece of tasks whose tasks stand one behind the other without being packed, 72 bytes each; `None` if it is none.
pub fn unpacked_tasks(piece: &[u8]) -> Option<Vec<u8>> {
    let (header, packed) = piece.split_at_checked(TASKS_HEADER_BYTES)?;
    let tasks = u32::from_le_bytes(*header.last_chunk()?);
    Some([&header[..8], &unpack(packed, tasks)?].concat())
}

/// The reverse of [`unpacked_tasks`].
pub fn packed_tasks(plain: &[u8]) -> Option<Vec<u8>> {
    let (range, plain) = plain.split_at_checked(8)?;
    let (tasks, []) = plain.as_chunks::<TASK_BYTES>() else {
        return None;
    };
    let mut piece = range.to_vec();
    piece.extend((tasks.len() as u32).to_le_bytes());
    let mut packer = Packer::<TASK_WORDS>::new(&mut piece);
    for task in tasks {
        let (words, _) = task.as_chunks::<8>();
        packer.put(core::array::from_fn(|word| u64::from_le_bytes(words[word])));
    }
    packer.end();
    Some(piece)
}

fn unpack(packed: &[u8], tasks: u32) -> Option<Vec<u8>> {
    if tasks as usize > SLOTS_PER_PIECE {
        return None;
    }
    let mut plain = Vec::with_capacity(tasks as usize * TASK_BYTES);
    let mut unpacker = Unpacker::<TASK_WORDS>::new(packed);
    for _ in 0..tasks {
        for word in unpacker.next()? {
            plain.extend(word.to_le_bytes());
        }
    }
    unpacker.is_at_end().then_some(plain)
}

/// Little-endian fields, one behind the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Unloadable> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Unloadable)?;
        self.0 = rest;
        Ok(*first)
    }

    fn u16(&mut self) -> Result<u16, Unloadable> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Unloadable> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Unloadable> {
        self.take().map(u64::from_le_bytes)
    }

    fn u128(&mut self) -> Result<u128, Unloadable> {
        self.take().map(u128::from_le_bytes)
    }
}
