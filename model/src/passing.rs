//! What the engine's files only hand on, or name and never look into.

/// As `engine/src/engine.rs` has it.
pub(crate) mod engine {
    use std::sync::{Arc, OnceLock};

    use crate::{
        inbox::{Outbox, ShardInbox},
        quarantine::Quarantine,
        routes::RoutePointer,
    };

    pub(crate) struct Shared {
        pub(crate) inboxes: Vec<ShardInbox>,
        pub(crate) edges: Vec<OnceLock<Arc<Outbox>>>,
        pub(crate) routes: RoutePointer,
        pub(crate) quarantined: Vec<OnceLock<Quarantine>>,
    }
}

/// In place of `engine/src/quarantine.rs`: every shard is served.
pub(crate) mod quarantine {
    pub struct Quarantine;
}

/// In place of `engine/src/routes.rs`: nobody asks where a task goes.
pub(crate) mod routes {
    pub struct Routes;

    pub(crate) struct RoutePointer(pub(crate) Routes);

    impl RoutePointer {
        pub(crate) fn with<R>(&self, read: impl FnOnce(&Routes) -> R) -> R {
            read(&self.0)
        }
    }
}

/// In place of `engine/src/info.rs`: no answer to a query is looked at.
pub(crate) mod info {
    #[derive(Debug)]
    pub struct Info;
}

/// In place of `engine/src/embedded.rs`: a call that has an answer, and the end of an attempt.
pub(crate) mod embedded {
    use std::sync::Arc;

    use crate::sync::Signal;

    pub(crate) enum Command {
        Submit(Answer),
        Ended,
    }

    /// The way to answer. Whoever waits at its other end learns that it was dropped, too.
    #[derive(Default)]
    pub(crate) struct Answer(pub(crate) Arc<Signal>);

    impl Drop for Answer {
        fn drop(&mut self) {
            // Once the checker has found something, there are no threads any more.
            if !std::thread::panicking() {
                self.0.give();
            }
        }
    }
}
