//! The task table: a slab of 64-byte entries in 64 KiB pages, and the intrusive lists that run through it. A task is in
//! at most one list at a time: its lane, its key's successors, a binding's running tasks, the finished tasks.
//!
//! Of a large backlog most pages are not looked at for long. Beyond a bound pages are packed, and unpacked when a task
//! in them is looked at again (`docs/decisions/0011-packed-pages.md`).

use alloc::{boxed::Box, vec::Vec};
use core::{
    cell::{Cell, OnceCell, RefCell},
    ops::Range,
};

use crate::{
    id::{CellId, FunctionId, Lsn, RequestId, SlotIndex, Token},
    state::State,
    table::{
        numbering::Numbering,
        packed::{TaskPage, empty_page, pack, unpack},
        paged::PagedVec,
    },
};

/// No task, no holder, no waiter, no key.
pub const NIL: u32 = u32::MAX;

/// Entries of one page; a page is 64 KiB.
pub const TASKS_PER_PAGE: usize = 1024;

/// Records are measured in these units, so that their length fits 16 bits.
pub const RECORD_UNIT_BYTES: u32 = 32;

/// A fact about the task is appended and not durable yet; no other fact may be appended meanwhile.
pub const FLAG_BUSY: u16 = 1;
/// The task holds a credit of its queue's pool and counts against its function's concurrency.
pub const FLAG_CREDIT: u16 = 2;
/// The record has a name, key, content type, trace context or tags that its executor must see.
pub const FLAG_META: u16 = 4;
/// Its age ran out while it could not expire; it is not started again.
pub const FLAG_OVERDUE: u16 = 8;
/// It is the one task of its ordering key that may go beyond `Enqueued`.
pub const FLAG_KEY_HEAD: u16 = 16;
/// A read of its record is under way.
pub const FLAG_FETCHING: u16 = 32;
/// It entered the table of ages because its age is not its lane's.
pub const FLAG_OWN_AGE: u16 = 64;
/// Accepted with `durability=memory`.
pub const FLAG_MEMORY: u16 = 128;
/// It was delayed: its age counts from when it was due.
pub const FLAG_DELAYED: u16 = 256;
/// Its last attempt was given back in memory alone: the log knows it as running.
pub const FLAG_RELEASED: u16 = 512;
/// It fails, and its failure holds its ordering key.
pub const FLAG_HOLDS_KEY: u16 = 1024;

/// It has ended, and history does not have it yet.
pub const FLAG_UNSAVED: u16 = 2048;

/// One task. Owned by its shard; found by slot, verified by the rest of the request id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Task {
    /// `seq:40 | state:4 | retries:4 | flags:16`.
    word: u64,
    /// `accepted_ms:44 | max_age_s:20`.
    age: u64,
    /// Where its record stands in the log.
    pub position: Lsn,
    /// Scheduled, retrying: logged ms at which it is due. Enqueued, dequeued, running: monotonic us of when it became
    /// that. Finished: the position of its outcome, 0 where there is none.
    pub at: u64,
    /// Its function.
    pub function: FunctionId,
    /// Next task of its list.
    pub next: u32,
    /// Previous task of its list.
    pub prev: u32,
    /// Waiting: its bytes in the blob pool. Running: the binding that runs it.
    pub holder: u32,
    /// First of the callers waiting for its end. Finished: see [`Task::ended_ms`].
    pub waiter: u32,
    /// Its ordering key's entry.
    pub key: u32,
    /// `cell:12 | generation:4`.
    place: u16,
    /// Leases so far.
    pub attempt: u16,
    /// Length of its record in units of 32 bytes, rounded up.
    pub record_units: u16,
    /// Cost in the round robin. Finished: the length of its outcome's record, in the same units as `record_units`.
    pub cost: u16,
}

/// Says that a finished task's time counts seconds.
const SECONDS: u32 = 1 << 31;

const _: () = assert!(size_of::<Task>() == 64);
const _: () =
    assert!(crate::limits::RECORD_BYTES_MAX / (RECORD_UNIT_BYTES as usize) < u16::MAX as usize);
const _: () = assert!(crate::limits::MAX_AGE_S_MAX < 1 << 20);

impl Task {
    /// A task as its acceptance makes it, in no list.
    pub fn new(request: RequestId, function: FunctionId, position: Lsn, record_bytes: u32) -> Task {
        Task {
            word: request.seq() << 24 | (State::Enqueued as u64) << 20,
            age: request.accepted_ms() << 20,
            position,
            at: 0,
            function,
            next: NIL,
            prev: NIL,
            holder: NIL,
            waiter: NIL,
            key: NIL,
            place: request.cell().0 << 4,
            attempt: 0,
            record_units: record_bytes.div_ceil(RECORD_UNIT_BYTES) as u16,
            cost: 1,
        }
    }

    /// Its state.
    pub fn state(&self) -> State {
        const BY_NUMBER: [State; 16] = {
            let mut table = [State::Enqueued; 16];
            let mut index = 0;
            while index < State::ALL.len() {
                table[State::ALL[index] as usize] = State::ALL[index];
                index += 1;
            }
            table
        };
        BY_NUMBER[(self.word >> 20 & 15) as usize]
    }

    /// Puts it into a state; whether the table allows that is the caller's business.
    pub fn set_state(&mut self, state: State) {
        self.word = self.word & !(15 << 20) | (state as u64) << 20;
    }

    /// Retries spent.
    pub fn retries(&self) -> u8 {
        (self.word >> 16 & 15) as u8
    }

    /// Notes the retries spent, at most 8.
    pub fn set_retries(&mut self, retries: u8) {
        self.word = self.word & !(15 << 16) | u64::from(retries.min(15)) << 16;
    }

    /// True if any of `flags` is set.
    pub fn has(&self, flags: u16) -> bool {
        self.word as u16 & flags != 0
    }

    /// Sets flags.
    pub fn set(&mut self, flags: u16) {
        self.word |= u64::from(flags);
    }

    /// Clears flags.
    pub fn clear(&mut self, flags: u16) {
        self.word &= !u64::from(flags);
    }

    /// Logged time of its acceptance.
    pub fn accepted_ms(&self) -> u64 {
        self.age >> 20
    }

    /// Its own maximum age in seconds; 0 for its function's.
    pub fn max_age_s(&self) -> u32 {
        (self.age & 0xF_FFFF) as u32
    }

    /// Gives it a maximum age of its own.
    pub fn set_max_age_s(&mut self, seconds: u32) {
        self.age = self.age & !0xF_FFFF | u64::from(seconds.min(0xF_FFFF));
    }

    /// The fencing token of its current attempt.
    pub fn token(&self) -> Token {
        Token {
            generation: self.place & 15,
            attempt: self.attempt,
        }
    }

    /// The cell that it belongs to.
    pub fn cell(&self) -> CellId {
        CellId(self.place >> 4)
    }

    /// Its running number, which grows with its acceptance.
    pub fn seq(&self) -> u64 {
        self.word >> 24
    }

    /// Bytes of its record, rounded up to whole units.
    pub fn record_bytes(&self) -> u32 {
        u32::from(self.record_units) * RECORD_UNIT_BYTES
    }

    /// Notes the length of its record.
    pub fn set_record_bytes(&mut self, bytes: u32) {
        self.record_units = bytes.div_ceil(RECORD_UNIT_BYTES) as u16;
    }

    /// Bytes of a finished task's outcome record, rounded up to whole units; 0 where there is none.
    pub fn outcome_bytes(&self) -> u32 {
        if self.state().terminal() {
            u32::from(self.cost) * RECORD_UNIT_BYTES
        } else {
            0
        }
    }

    /// Logged time of a finished task's end: exact within 24 days of its acceptance, to the second after that.
    pub fn ended_ms(&self) -> u64 {
        let after = u64::from(self.waiter & !SECONDS);
        let unit = if self.waiter & SECONDS != 0 { 1_000 } else { 1 };
        self.accepted_ms() + after * unit
    }

    /// Notes when it ended.
    pub fn set_ended_ms(&mut self, ended_ms: u64) {
        let after = ended_ms.saturating_sub(self.accepted_ms());
        self.waiter = match u32::try_from(after) {
            Ok(after) if after < SECONDS => after,
            Ok(_) | Err(_) => (after / 1_000).min(u64::from(!SECONDS)) as u32 | SECONDS,
        };
    }

    /// The entry as numbers; nothing is lost.
    pub(super) fn words(&self) -> [u64; 8] {
        let pair = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let four = |parts: [u16; 4]| {
            let part = |number: usize| u64::from(parts[number]) << (16 * number);
            part(0) | part(1) | part(2) | part(3)
        };
        [
            self.word,
            self.age,
            self.position.0,
            self.at,
            pair(self.function.0, self.next),
            pair(self.prev, self.holder),
            pair(self.waiter, self.key),
            four([self.place, self.attempt, self.record_units, self.cost]),
        ]
    }

    /// The entry with these numbers.
    pub(super) fn from_words(words: [u64; 8]) -> Task {
        Task {
            word: words[0],
            age: words[1],
            position: Lsn(words[2]),
            at: words[3],
            function: FunctionId(words[4] as u32),
            next: (words[4] >> 32) as u32,
            prev: words[5] as u32,
            holder: (words[5] >> 32) as u32,
            waiter: words[6] as u32,
            key: (words[6] >> 32) as u32,
            place: words[7] as u16,
            attempt: (words[7] >> 16) as u16,
            record_units: (words[7] >> 32) as u16,
            cost: (words[7] >> 48) as u16,
        }
    }

    /// Notes the length of a finished task's outcome record.
    pub fn set_outcome_bytes(&mut self, bytes: u32) {
        self.cost = bytes.div_ceil(RECORD_UNIT_BYTES) as u16;
    }
}

/// One list through the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct List {
    /// First task.
    pub head: u32,
    /// Last task.
    pub tail: u32,
    /// Tasks in it.
    pub count: u32,
}

impl Default for List {
    fn default() -> List {
        List {
            head: NIL,
            tail: NIL,
            count: 0,
        }
    }
}

/// The slab. A slot is reserved at admission and filled at commit; between the two it holds no task, yet is not free.
/// Free slots are chained through `next`, so that neither growth nor release moves anything.
///
/// A slot is meant by its place in the table; which number it has in ids, its [`Numbering`] says.
#[derive(Debug)]
pub struct TaskTable {
    numbering: Numbering,
    /// Pages that are not packed.
    pages: Vec<OnceCell<Box<TaskPage>>>,
    /// What else there is of each page.
    shelf: PagedVec<Shelved>,
    /// How many pages are not packed, bytes of the others, how many may be unpacked, and where the next one to pack is
    /// looked for.
    unpacked: Cell<u32>,
    packed_bytes: Cell<u64>,
    unpacked_max: u32,
    hand: u32,
    /// What a page is packed into first.
    packing: Vec<u8>,
    free: u32,
    used: u32,
    live: u32,
}

/// A page, but for its tasks if they are not packed.
#[derive(Debug, Default)]
struct Shelved {
    /// Nothing if it is not packed, or has never held a task.
    packed: RefCell<Box<[u8]>>,
    span: Span,
}

impl Default for TaskTable {
    fn default() -> TaskTable {
        TaskTable::new(Numbering::default(), u32::MAX)
    }
}

impl TaskTable {
    /// An empty table that packs pages when more than this many are not.
    pub fn new(numbering: Numbering, unpacked_max: u32) -> TaskTable {
        TaskTable {
            numbering,
            pages: Vec::new(),
            shelf: PagedVec::default(),
            unpacked: Cell::new(0),
            packed_bytes: Cell::new(0),
            unpacked_max,
            hand: 0,
            packing: Vec::new(),
            free: NIL,
            used: 0,
            live: 0,
        }
    }
}

/// When the tasks of a page were accepted: nothing in it is older or younger, though there may be no such task any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Span {
    /// Tasks of the page.
    pub live: u32,
    /// Logged time of acceptance, at least.
    pub accepted_ms_min: u64,
    /// The same, at most.
    pub accepted_ms_max: u64,
}

/// What stands in a slot without a task: state 0, which no task has.
pub(super) const EMPTY: Task = Task {
    word: 0,
    age: 0,
    position: Lsn(0),
    at: 0,
    function: FunctionId(0),
    next: NIL,
    prev: NIL,
    holder: NIL,
    waiter: NIL,
    key: NIL,
    place: 0,
    attempt: 0,
    record_units: 0,
    cost: 0,
};

impl TaskTable {
    /// Tasks in the table.
    pub fn live(&self) -> u32 {
        self.live
    }

    /// What is known of each page of [`TASKS_PER_PAGE`] slots.
    pub fn span(&self, page: u32) -> Span {
        self.shelf[page as usize].span
    }

    /// Bytes of the tasks of all pages.
    pub fn bytes(&self) -> u64 {
        u64::from(self.unpacked.get()) * size_of::<TaskPage>() as u64 + self.packed_bytes.get()
    }

    /// Pages.
    pub fn pages(&self) -> u32 {
        self.pages.len() as u32
    }

    /// One past the highest slot ever used.
    pub fn used(&self) -> u32 {
        self.used
    }

    fn entry(&mut self, slot: u32) -> &mut Task {
        let page = slot as usize / TASKS_PER_PAGE;
        if self.pages[page].get().is_none() && self.unpack(page).is_none() {
            self.unpacked.set(self.unpacked.get() + 1);
            self.pages[page] = OnceCell::from(empty_page());
        }
        let tasks = self.pages[page].get_mut();
        &mut tasks.expect("just made")[slot as usize % TASKS_PER_PAGE]
    }

    /// Unpacks a page; `None` if it has never held a task.
    #[cold]
    fn unpack(&self, page: usize) -> Option<&TaskPage> {
        let packed = self.shelf.get(page)?.packed.take();
        if packed.is_empty() {
            return None;
        }
        let bytes = self.packed_bytes.get() - packed.len() as u64;
        self.packed_bytes.set(bytes);
        self.unpacked.set(self.unpacked.get() + 1);
        Some(self.pages[page].get_or_init(|| unpack(&packed)))
    }

    fn page(&self, page: usize) -> Option<&TaskPage> {
        match self.pages.get(page)?.get() {
            Some(tasks) => Some(tasks),
            None => self.unpack(page),
        }
    }

    /// Packs at most this many pages, if more than the bound are not packed.
    pub fn pack(&mut self, pages_max: u32) {
        for _ in 0..pages_max {
            if self.unpacked.get() <= self.unpacked_max {
                return;
            }
            let page = loop {
                let page = self.hand as usize % self.pages.len();
                self.hand = page as u32 + 1;
                if let Some(tasks) = self.pages[page].take() {
                    pack(&tasks, &mut self.packing);
                    break page;
                }
            };
            let packed = self.packing.as_slice().into();
            self.shelf[page].packed = RefCell::new(packed);
            let bytes = self.packed_bytes.get() + self.packing.len() as u64;
            self.packed_bytes.set(bytes);
            self.unpacked.set(self.unpacked.get() - 1);
        }
    }

    /// Shows every task of these slots in order. Packed pages stay so.
    pub fn scan(&self, slots: Range<u32>, mut look: impl FnMut(u32, &Task)) {
        let mut slot = slots.start;
        let end = slots.end.min(self.used);
        while slot < end {
            let page = slot as usize / TASKS_PER_PAGE;
            let behind = ((page + 1) * TASKS_PER_PAGE).min(end as usize) as u32;
            let mut show = |tasks: &TaskPage| {
                for slot in slot..behind {
                    let task = &tasks[slot as usize % TASKS_PER_PAGE];
                    if task.word != 0 {
                        look(slot, task);
                    }
                }
            };
            let shelved = &self.shelf[page];
            match self.pages[page].get() {
                Some(tasks) => show(tasks),
                None if shelved.span.live == 0 => {}
                None => {
                    let packed = shelved.packed.take();
                    let tasks = unpack(&packed);
                    shelved.packed.replace(packed);
                    show(&tasks);
                }
            }
            slot = behind;
        }
    }

    /// Takes a free slot and tells its number in ids; `None` if they are used up.
    pub fn reserve(&mut self) -> Option<SlotIndex> {
        if self.free != NIL {
            let slot = self.free;
            self.free = self.entry(slot).next;
            return self.index(slot);
        }
        let own = self
            .numbering
            .first_page
            .saturating_mul(TASKS_PER_PAGE as u32);
        let slot = self.used.max(own);
        if slot == NIL - 1 {
            return None;
        }
        let index = self.index(slot)?;
        self.grow_to(slot + 1);
        Some(index)
    }

    /// The number of a slot in ids; `None` if it has none.
    pub fn index(&self, slot: u32) -> Option<SlotIndex> {
        self.numbering.slot(slot)
    }

    /// The slot that this id names, whatever lives in it; `None` if it is another shard's.
    pub fn place(&self, request: RequestId) -> Option<u32> {
        self.numbering.place(request.slot())
    }

    /// The identity of the task in a slot.
    pub fn request(&self, slot: u32) -> RequestId {
        self.request_of(slot, &self[slot])
    }

    /// The identity of this task, which is that in the slot.
    pub fn request_of(&self, slot: u32, task: &Task) -> RequestId {
        let index = self.index(slot).expect("a slot with a task has a number");
        RequestId::new(task.cell(), task.accepted_ms(), task.seq(), index)
    }

    fn grow_to(&mut self, used: u32) {
        while self.pages.len() * TASKS_PER_PAGE < used as usize {
            self.pages.push(OnceCell::new());
            self.shelf.push(Shelved::default());
        }
        self.used = self.used.max(used);
    }

    /// Fills a slot: a reserved one, or any empty one while the log is replayed.
    pub fn insert(&mut self, slot: u32, task: Task) {
        self.grow_to(slot + 1);
        let entry = self.entry(slot);
        assert!(entry.word == 0, "a slot holds one task");
        *entry = task;
        self.live += 1;
        let accepted_ms = task.accepted_ms();
        let span = &mut self.shelf[slot as usize / TASKS_PER_PAGE].span;
        *span = Span {
            live: span.live + 1,
            accepted_ms_min: match span.live {
                0 => accepted_ms,
                _ => span.accepted_ms_min.min(accepted_ms),
            },
            accepted_ms_max: match span.live {
                0 => accepted_ms,
                _ => span.accepted_ms_max.max(accepted_ms),
            },
        };
    }

    /// Empties a slot and frees it. An inherited page goes with its last task.
    pub fn remove(&mut self, slot: u32) {
        let free = self.free;
        let entry = self.entry(slot);
        assert!(entry.word != 0, "only a task is removed");
        *entry = Task {
            next: free,
            ..EMPTY
        };
        self.live -= 1;
        let page = slot as usize / TASKS_PER_PAGE;
        let span = &mut self.shelf[page].span;
        span.live -= 1;
        if self.numbering.is_own(page as u32) {
            self.free = slot;
        } else if span.live == 0 {
            self.pages[page] = OnceCell::new();
            self.unpacked.set(self.unpacked.get() - 1);
        }
    }

    /// Chains every empty slot again, lowest first. A replay fills and empties slots in any order and ends with this.
    pub fn rebuild_free(&mut self) {
        self.free = NIL;
        let own = self
            .numbering
            .first_page
            .saturating_mul(TASKS_PER_PAGE as u32);
        for slot in (own..self.used).rev() {
            if self.get(slot).is_none() {
                let free = self.free;
                self.entry(slot).next = free;
                self.free = slot;
            }
            if slot.is_multiple_of(TASKS_PER_PAGE as u32) {
                self.pack(1);
            }
        }
    }

    /// The task in a slot.
    pub fn get(&self, slot: u32) -> Option<&Task> {
        let page = self.page(slot as usize / TASKS_PER_PAGE)?;
        let task = &page[slot as usize % TASKS_PER_PAGE];
        (task.word != 0).then_some(task)
    }

    /// The slot of the task with this identity.
    pub fn find(&self, request: RequestId) -> Option<u32> {
        let slot = self.place(request)?;
        self.get(slot).filter(|task| {
            (task.seq(), task.accepted_ms(), task.cell())
                == (request.seq(), request.accepted_ms(), request.cell())
        })?;
        Some(slot)
    }

    /// Appends a task that is in no list.
    pub fn push_back(&mut self, list: &mut List, slot: u32) {
        let tail = list.tail;
        let task = &mut self[slot];
        task.prev = tail;
        task.next = NIL;
        if tail == NIL {
            list.head = slot;
        } else {
            self[tail].next = slot;
        }
        list.tail = slot;
        list.count += 1;
    }

    /// Puts a task that is in no list in front.
    pub fn push_front(&mut self, list: &mut List, slot: u32) {
        let head = list.head;
        let task = &mut self[slot];
        task.prev = NIL;
        task.next = head;
        if head == NIL {
            list.tail = slot;
        } else {
            self[head].prev = slot;
        }
        list.head = slot;
        list.count += 1;
    }

    /// Takes a task out of the list that it is in.
    pub fn unlink(&mut self, list: &mut List, slot: u32) {
        let task = &mut self[slot];
        let (prev, next) = (task.prev, task.next);
        task.prev = NIL;
        task.next = NIL;
        if prev == NIL {
            assert!(list.head == slot, "the task is in this list");
            list.head = next;
        } else {
            self[prev].next = next;
        }
        if next == NIL {
            list.tail = prev;
        } else {
            self[next].prev = prev;
        }
        list.count -= 1;
    }
}

impl core::ops::Index<u32> for TaskTable {
    type Output = Task;

    fn index(&self, slot: u32) -> &Task {
        let page = self.page(slot as usize / TASKS_PER_PAGE);
        &page.expect("a slot that was used")[slot as usize % TASKS_PER_PAGE]
    }
}

impl core::ops::IndexMut<u32> for TaskTable {
    fn index_mut(&mut self, slot: u32) -> &mut Task {
        self.entry(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(seq: u64, slot: u32) -> Task {
        let request = RequestId::new(CellId(4095), 1_790_000_000_000, seq, SlotIndex(slot));
        let task = Task::new(request, FunctionId(3), Lsn(7), 1_000);
        assert_eq!((task.seq(), task.cell()), (seq, request.cell()));
        task
    }

    #[test]
    fn an_entry_keeps_its_packed_parts_apart() {
        let mut task = task(RequestId::SEQ_MAX, 5);
        for state in State::ALL {
            task.set_state(state);
            task.set_retries(8);
            task.set(FLAG_BUSY | FLAG_META);
            task.set_max_age_s(604_800);
            assert_eq!(
                (task.state(), task.retries(), task.max_age_s()),
                (state, 8, 604_800)
            );
            assert!(task.has(FLAG_BUSY) && !task.has(FLAG_CREDIT));
            task.clear(FLAG_BUSY);
            assert!(!task.has(FLAG_BUSY) && task.has(FLAG_META));
        }
        assert_eq!(task.seq(), RequestId::SEQ_MAX);
        assert_eq!(task.record_bytes(), 1_024);
    }

    #[test]
    fn the_time_of_an_end_is_kept_over_a_year() {
        let mut task = task(1, 5);
        for (after, kept) in [
            (0, 0),
            (1_234_567, 1_234_567),
            (31_622_400_999, 31_622_400_000),
        ] {
            task.set_ended_ms(task.accepted_ms() + after);
            assert_eq!(task.ended_ms() - task.accepted_ms(), kept);
        }
    }

    #[test]
    fn a_page_knows_when_its_tasks_were_accepted() {
        let mut table = TaskTable::default();
        for (slot, ms) in [(0, 20), (1, 10), (1025, 30)] {
            let request = RequestId::new(CellId(0), ms, 1, SlotIndex(slot));
            table.insert(slot, Task::new(request, FunctionId(0), Lsn(0), 32));
        }
        let span = |table: &TaskTable, page: u32| {
            let span = table.span(page);
            (span.live, span.accepted_ms_min, span.accepted_ms_max)
        };
        assert_eq!(span(&table, 0), (2, 10, 20));
        assert_eq!(span(&table, 1), (1, 30, 30));
        table.remove(0);
        table.remove(1);
        assert_eq!(span(&table, 0).0, 0);
        let request = RequestId::new(CellId(0), 50, 2, SlotIndex(1));
        table.insert(1, Task::new(request, FunctionId(0), Lsn(0), 32));
        assert_eq!(span(&table, 0), (1, 50, 50), "an empty page forgets");
    }

    #[test]
    fn a_slot_is_found_only_by_the_identity_it_holds() {
        let mut table = TaskTable::default();
        let slot = table.reserve().unwrap().0;
        assert!(table.get(slot).is_none());
        table.insert(slot, task(1, slot));
        let old = table.request(slot);
        assert_eq!(table.find(old), Some(slot));
        table.remove(slot);
        assert_eq!(
            table.reserve(),
            Some(SlotIndex(slot)),
            "a freed slot is used again"
        );
        table.insert(slot, task(2, slot));
        assert_eq!(table.find(old), None);
        table.insert(40, task(3, 40));
        table.rebuild_free();
        assert_eq!(
            table.reserve(),
            Some(SlotIndex(1)),
            "a replay leaves the gaps free"
        );
    }

    #[test]
    fn lists_keep_order_when_tasks_leave_anywhere() {
        let mut table = TaskTable::default();
        let mut list = List::default();
        for seq in 0..5 {
            let slot = table.reserve().unwrap().0;
            table.insert(slot, task(seq, slot));
            table.push_back(&mut list, slot);
        }
        for slot in [2, 0, 4] {
            table.unlink(&mut list, slot);
        }
        table.push_front(&mut list, 4);
        let mut order = Vec::new();
        let mut at = list.head;
        while at != NIL {
            order.push(at);
            at = table[at].next;
        }
        assert_eq!((order, list.count, list.tail), (alloc::vec![4, 1, 3], 3, 3));
    }
}
