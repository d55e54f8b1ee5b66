//! How a list is put together: from the memory of every shard and from the history, in one order, the last task first.
//!
//! Shards are asked first and the history after them. A task is in one of the two at any time and goes only from the one
//! to the other, so that none is missed; one that went in between is in both answers, and shown once. The order is that of
//! acceptance, which no task changes, so that a page goes on where the one before ended.

use pelton_core::{
    event::Filter as ShardFilter,
    id::{FunctionId, RequestId, ShardId, TenantId},
    state::State,
};
use pelton_history::{Filter as HistoryFilter, StoreError};

use crate::{history::History, info::TaskInfo};

/// What a list asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListFilter {
    /// Only this state.
    pub state: Option<State>,
    /// Only this function.
    pub function: Option<FunctionId>,
    /// Only given names that begin like this; empty for all tasks.
    pub prefix: String,
    /// Only tasks with this tag; empty for all.
    pub tag: String,
    /// Only tasks accepted at this logged time or later.
    pub since_ms: u64,
    /// Only tasks accepted before this logged time.
    pub until_ms: u64,
    /// What the page before ended with.
    pub cursor: Option<u128>,
    /// Tasks of a page.
    pub limit: u32,
}

impl Default for ListFilter {
    fn default() -> ListFilter {
        ListFilter {
            state: None,
            function: None,
            prefix: String::new(),
            tag: String::new(),
            since_ms: 0,
            until_ms: RequestId::ACCEPTED_MS_MAX,
            cursor: None,
            limit: 100,
        }
    }
}

impl ListFilter {
    fn before(&self) -> u128 {
        let until = RequestId::order_at(self.until_ms);
        self.cursor.map_or(until, |cursor| cursor.min(until))
    }

    fn after(&self) -> u128 {
        RequestId::order_at(self.since_ms).saturating_sub(1)
    }

    fn takes(&self, task: &TaskInfo) -> bool {
        task.task_id.starts_with(&self.prefix)
            && (self.tag.is_empty() || task.tags.contains(&self.tag))
    }
}

/// A page that is being put together. Ask what [`Listing::question`] says, and when it says nothing, finish.
#[derive(Debug)]
pub struct Listing {
    filter: ListFilter,
    shards: u16,
    shard: u16,
    pages: u32,
    /// Of the current shard, the last tasks in order.
    best: Vec<TaskInfo>,
    /// Of the shards before, those that the whole filter lets through.
    found: Vec<TaskInfo>,
    /// The shards have no others with this order or a larger one.
    floor: u128,
}

impl Listing {
    /// Nothing has been asked.
    pub fn new(filter: ListFilter, shards: u16) -> Listing {
        Listing {
            filter,
            shards,
            shard: 0,
            pages: u32::MAX,
            best: Vec::new(),
            found: Vec::new(),
            floor: 0,
        }
    }

    /// Whom to ask what; `None` when every shard has answered.
    pub fn question(&self) -> Option<(ShardId, ShardFilter)> {
        (self.shard < self.shards).then(|| {
            let filter = ShardFilter {
                state: self.filter.state,
                function: self.filter.function,
                before: self.filter.before(),
                after: self.bound().max(self.filter.after()),
                pages: self.pages,
                limit: self.filter.limit,
            };
            (ShardId(self.shard), filter)
        })
    }

    /// Tasks that come before this one in order are not among the last ones of the current shard.
    fn bound(&self) -> u128 {
        match self.best.get(self.filter.limit as usize - 1) {
            Some(last) => last.view.request.order(),
            None => 0,
        }
    }

    /// The shard that was asked has answered, and has not looked at so many pages of its table.
    pub fn on_page(&mut self, tasks: Vec<TaskInfo>, pages: u32) {
        self.best.extend(tasks);
        sort(&mut self.best);
        self.best.truncate(self.filter.limit as usize);
        self.pages = pages;
        if pages > 0 {
            return;
        }
        self.floor = self.floor.max(self.bound());
        let best = self.best.drain(..);
        self.found
            .extend(best.filter(|task| self.filter.takes(task)));
        self.shard += 1;
        self.pages = u32::MAX;
    }

    /// The page, and the cursor of the next one. Reads the disk.
    pub fn finish(
        mut self,
        tenant: TenantId,
        history: Option<&History>,
    ) -> Result<(Vec<TaskInfo>, Option<u128>), StoreError> {
        let mut floor = self.floor;
        if let Some(history) = history {
            let filter = HistoryFilter {
                state: self.filter.state,
                function: self.filter.function,
                prefix: &self.filter.prefix,
                tag: &self.filter.tag,
                before: self.filter.before(),
                after: self.filter.after().max(floor.saturating_sub(1)),
                limit: self.filter.limit as usize,
            };
            let (tasks, looked) = history.list(tenant, &filter)?;
            floor = floor.max(looked);
            // In front, so that of the same task the one that has ended stays.
            let held = std::mem::replace(&mut self.found, tasks);
            self.found.extend(held);
        }
        let mut tasks = self.found;
        sort(&mut tasks);
        tasks.dedup_by_key(|task| task.view.request);
        tasks.retain(|task| task.view.request.order() >= floor);
        let limit = self.filter.limit as usize;
        if tasks.len() > limit {
            tasks.truncate(limit);
            floor = tasks[limit - 1].view.request.order();
        }
        Ok((tasks, Some(floor).filter(|&floor| floor > 0)))
    }
}

/// The last one in order first; of the same task, the one that was in front stays in front.
fn sort(tasks: &mut [TaskInfo]) {
    tasks.sort_by_key(|task| std::cmp::Reverse(task.view.request.order()));
}
