//! Listing rows: the last ones in order that a filter lets through, over all blocks that may have them.

use std::collections::BinaryHeap;

use pelton_core::{
    id::{FunctionId, TenantId},
    state::State,
};
use redb::ReadTransaction;

use crate::{
    block::Block,
    row::Row,
    store::{
        BLOCKS, INDEX, Store, StoreError, TERMS, Term, bucket, bucket_of, bucket_start, find,
        index_key, index_keys, number_of, span_of, term,
    },
};

/// Rows that one question looks at, and entries of a term.
const LOOKED_MAX: usize = 100_000;
/// Rows that are found one by one for one question.
const NAMED_MAX: usize = 4_096;

/// What a list asks for.
#[derive(Clone, Copy, Debug)]
pub struct Filter<'a> {
    /// Only this state.
    pub state: Option<State>,
    /// Only this function.
    pub function: Option<FunctionId>,
    /// Only given names that begin like this; empty for all tasks.
    pub prefix: &'a str,
    /// Only tasks with this tag; empty for all.
    pub tag: &'a str,
    /// Only tasks whose [`pelton_core::id::RequestId::order`] lies between these two, which are no part of it.
    pub before: u128,
    /// See `before`.
    pub after: u128,
    /// Rows at most: the last ones in order.
    pub limit: usize,
}

impl Filter<'_> {
    /// True if the filter lets this row through, its order aside.
    fn takes(&self, row: &Row<'_>) -> bool {
        self.state.is_none_or(|state| state == row.state)
            && self
                .function
                .is_none_or(|function| function == row.function)
            && row.task_id.starts_with(self.prefix)
            && (self.tag.is_empty() || row.has_tag(self.tag.as_bytes()))
    }
}

/// What became of a list.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Page {
    /// Every row with this order or a larger one has been looked at; 0 for all.
    pub floor: u128,
    /// Blocks that could not be read.
    pub damaged: u32,
}

impl Store {
    /// Gives rows of a tenant to `each`, the last one in order first.
    pub fn list(
        &self,
        tenant: TenantId,
        filter: &Filter<'_>,
        mut each: impl FnMut(&Row<'_>),
    ) -> Result<Page, StoreError> {
        self.look(|look| match named(look, tenant, filter)? {
            Some(named) => by_name(look, tenant, filter, &named, &mut each),
            None => by_time(look, tenant, filter, &mut each),
        })
    }

    /// The last task of this name, given to `found`.
    pub fn find<R>(
        &self,
        tenant: TenantId,
        function: FunctionId,
        key: &str,
        task_id: &str,
        mut found: impl FnMut(&Row<'_>) -> R,
    ) -> Result<Option<R>, StoreError> {
        self.look(|look| {
            let terms = look.open_table(TERMS)?;
            let first = term(tenant, Term::Name(task_id), Some(0));
            let last = term(tenant, Term::Name(task_id), Some(u128::MAX));
            for entry in terms.range(first.as_slice()..=last.as_slice())?.rev() {
                let order = order_of(entry?.0.value());
                if let Some((block, at)) = find(look, tenant, order)?
                    && let Some(row) = block.row(at)
                    && row.function == function
                    && row.key == key
                {
                    return Ok(Some(found(&row)));
                }
            }
            Ok(None)
        })
    }
}

/// Rows that a filter's tag or prefix names.
struct Named {
    /// Their orders, the last one first.
    orders: Vec<u128>,
    /// There may be more of them below this; 0 if not.
    floor: u128,
}

/// What a filter's term names, if it has one. A tag's entries are in order, so that the last of them are enough; those of
/// a prefix are not, and if it has too many the rows themselves are gone through.
fn named(
    look: &ReadTransaction,
    tenant: TenantId,
    filter: &Filter<'_>,
) -> Result<Option<Named>, StoreError> {
    let (first, last) = if !filter.tag.is_empty() {
        let tag = filter.tag.as_bytes();
        (
            term(tenant, Term::Tag(tag), Some(filter.after)),
            term(tenant, Term::Tag(tag), Some(filter.before)),
        )
    } else if !filter.prefix.is_empty() {
        let first = term(tenant, Term::Name(filter.prefix), None);
        let mut last = first.clone();
        last.push(u8::MAX);
        (first, last)
    } else {
        return Ok(None);
    };
    let terms = look.open_table(TERMS)?;
    let mut named = Named {
        orders: Vec::new(),
        floor: 0,
    };
    let mut looked = 0;
    for entry in terms.range(first.as_slice()..=last.as_slice())?.rev() {
        let (key, state) = entry?;
        let order = order_of(key.value());
        looked += 1;
        if looked > LOOKED_MAX && filter.tag.is_empty() {
            return Ok(None);
        }
        let wanted = filter
            .state
            .is_none_or(|wanted| wanted as u8 == state.value());
        if wanted && order > filter.after && order < filter.before {
            named.orders.push(order);
        }
        if looked == LOOKED_MAX && !filter.tag.is_empty() {
            named.floor = order;
            break;
        }
    }
    named.orders.sort_unstable_by(|a, b| b.cmp(a));
    Ok(Some(named))
}

fn by_name(
    look: &ReadTransaction,
    tenant: TenantId,
    filter: &Filter<'_>,
    named: &Named,
    each: &mut impl FnMut(&Row<'_>),
) -> Result<Page, StoreError> {
    let mut page = Page::default();
    let mut found = 0;
    for (looked, &order) in named.orders.iter().enumerate() {
        if found == filter.limit || looked == NAMED_MAX {
            page.floor = order + 1;
            return Ok(page);
        }
        if let Some((block, at)) = find(look, tenant, order)? {
            match block.row(at) {
                Some(row) if filter.takes(&row) => {
                    each(&row);
                    found += 1;
                }
                Some(_) => {}
                None => page.damaged += 1,
            }
        }
    }
    page.floor = named.floor;
    Ok(page)
}

/// A block that is being gone through, from its end on.
struct Open {
    block: Block,
    left: usize,
}

fn by_time(
    look: &ReadTransaction,
    tenant: TenantId,
    filter: &Filter<'_>,
    each: &mut impl FnMut(&Row<'_>),
) -> Result<Page, StoreError> {
    let index = look.open_table(INDEX)?;
    let blocks = look.open_table(BLOCKS)?;
    let states: Vec<State> = State::ALL
        .into_iter()
        .filter(|state| state.terminal() && filter.state.is_none_or(|wanted| wanted == *state))
        .collect();
    let mut page = Page::default();
    let mut before = filter.before;
    let (mut found, mut looked, mut last) = (0, 0, None);
    while before > filter.after {
        let top = bucket(before - 1);
        let mut next = None;
        for &state in &states {
            let keys = index_key(tenant, state, 0, 0)..=index_key(tenant, state, top, u64::MAX);
            if let Some(entry) = index.range(keys)?.next_back() {
                next = next.max(Some(bucket_of(&entry?.0.value())));
            }
        }
        let Some(current) = next else {
            return Ok(page);
        };
        // What the bucket holds, the block with the last row first.
        let mut entries = Vec::new();
        for &state in &states {
            for entry in index.range(index_keys(tenant, state, current))? {
                let (key, span) = entry?;
                let (first, last) = span_of(&span.value());
                if first < before && last > filter.after {
                    entries.push((last, state, number_of(&key.value())));
                }
            }
        }
        entries.sort_unstable_by_key(|entry| std::cmp::Reverse(entry.0));
        let mut entries = entries.into_iter().peekable();
        let mut open: Vec<Open> = Vec::new();
        let mut heads: BinaryHeap<(u128, usize)> = BinaryHeap::new();
        loop {
            while let Some((_, state, number)) =
                entries.next_if(|entry| heads.peek().is_none_or(|head| entry.0 >= head.0))
            {
                let block = blocks.get(number)?;
                let block = block.and_then(|block| Block::read(tenant, state, block.value()));
                let Some(block) = block else {
                    page.damaged += 1;
                    continue;
                };
                let left = block.rank(before);
                if left > 0 {
                    heads.push((block.order(left - 1), open.len()));
                }
                open.push(Open { block, left });
            }
            let Some((order, at)) = heads.pop() else {
                break;
            };
            if order <= filter.after {
                return Ok(page);
            }
            let Open { block, left } = &mut open[at];
            *left -= 1;
            let row = block.row(*left);
            if *left > 0 {
                heads.push((block.order(*left - 1), at));
            }
            // A row that was written twice is one.
            if last.replace(order) == Some(order) {
                continue;
            }
            looked += 1;
            match row {
                Some(row) if filter.takes(&row) => {
                    each(&row);
                    found += 1;
                }
                Some(_) => {}
                None => page.damaged += 1,
            }
            if found == filter.limit || looked == LOOKED_MAX {
                page.floor = order;
                return Ok(page);
            }
        }
        before = bucket_start(current);
    }
    Ok(page)
}

/// The order at the end of a term's key.
fn order_of(key: &[u8]) -> u128 {
    let part = key[key.len() - 16..].iter();
    part.fold(0, |order, &byte| order << 8 | u128::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pelton_core::id::RequestId;

    #[test]
    fn the_order_of_a_term_is_read_back() {
        let order = RequestId(77 << 90).order();
        let key = term(TenantId(1), Term::Name("a"), Some(order));
        assert_eq!(order_of(&key), order);
    }
}
