//! Ends that a caller was promised to be told of, with its submit or by a wait: each once, to a connection of the task's
//! own tenant, and as the disk has it.

use pelton_core::{event::Finished, id::ConnectionId};

use crate::{
    oracle::{Check, broken},
    world::{Happening, World},
};

impl World {
    pub(crate) fn finished_leaves(&mut self, finished: &Finished, bytes: &[u8]) -> Check {
        let connection = finished.connection;
        let Some(&tenant) = self.tenants_of.get(&connection) else {
            return broken(
                "told_to_whom_asked",
                format!("{} is told to {connection:?}", finished.request),
            );
        };
        self.trace.event(
            self.now_ns,
            &[22, finished.request.0 as u64, finished.state as u64],
            || format!("{} is told to be {}", finished.request, finished.state),
        );
        self.oracle.finished_leaves(tenant, finished, bytes)?;
        if finished.index == u32::MAX {
            self.questions.remove(&(connection, finished.ticket));
        }
        let delay = self.around(100_000);
        let finished = *finished;
        self.after(
            delay,
            Happening::Finished {
                connection,
                finished,
            },
        );
        Ok(())
    }

    pub(crate) fn finished_arrives(
        &mut self,
        connection: ConnectionId,
        finished: &Finished,
    ) -> Check {
        let Some(caller) = self.caller_of(connection) else {
            return Ok(());
        };
        let target = &mut self.callers[caller];
        let spot = (finished.ticket, finished.index);
        if !target.told.insert(spot) {
            return broken(
                "told_once",
                format!(
                    "the end of {} is told twice to {connection:?}",
                    finished.request
                ),
            );
        }
        target.promised.remove(&spot);
        if finished.index == u32::MAX {
            target.waits.remove(&finished.ticket);
        }
        Ok(())
    }
}
