//! Bugs that are put in on purpose, to show that the simulation finds them. A normal build has none: there
//! [`planted`] is `false` and the compiler drops what hangs on it. A build with `--cfg pelton_planted` has all of
//! them asleep, and [`plant`] wakes one.

/// A bug, by what it breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Bug {
    /// A submit is answered before its record is on the disk.
    AckBeforeFlush = 1,
    /// A flush that failed is tried again, and its second answer believed.
    RetriedFlush,
    /// A new segment's name is not flushed.
    MissingDirectoryFlush,
    /// A damaged place in what was accepted is taken for the end of the log.
    TruncateOnCorruption,
    /// A segment is used again before a durable batch says that it is dead.
    RecycledTooEarly,
    /// What a read brings is believed without its checksum.
    RotAccepted,
    /// A lane whose pause is over is not woken.
    LostWakeUp,
    /// A throttled attempt keeps its credit.
    CreditLeak,
    /// A home lends credits before every shard has reported.
    LendsBeforeReports,
    /// An outcome counts whatever its token.
    StaleTokenAccepted,
    /// An outcome counts although the same one is on its way to the disk.
    CompletionCountedTwice,
    /// A name counts only once its first task is durable.
    DuplicateForgotten,
    /// A delayed task ages from its acceptance.
    ExpiredEarly,
    /// A task that is to be tried again lets the next one of its key pass.
    OrderKeyBroken,
    /// A restart forgets when a task is to be tried again.
    RetryForgotten,
    /// A restart knows only the first configuration of a function.
    ConfigNotReplayed,
    /// A task is tried once more than its function allows.
    OneRetryTooMany,
    /// The slot of an attempt that timed out is used before its executor lets go.
    OverdueSlotReused,
    /// A task is shown to whoever has its id.
    OtherTenantShown,
    /// Callers that wait for a task are not told that the log has failed.
    FailedLogNotTold,
    /// A task's record is moved while another fact about it is on its way to the disk.
    MovedWhileSettling,
    /// A name whose record was moved is unknown after a restart.
    NameLostInMove,
    /// A restart leaves the tasks of a key in the order in which their records were moved.
    OrderLostInMove,
    /// A snapshot's names are not loaded.
    NamesLostInSnapshot,
    /// What a snapshot knows already is replayed over it.
    SnapshotReplayedOver,
    /// A snapshot is believed without its checksums.
    DamagedSnapshotTrusted,
    /// What was handed to history counts as safe before history has it on the disk.
    HistoryConfirmsTooEarly,
}

impl Bug {
    /// Every bug.
    pub const ALL: [Bug; 27] = [
        Bug::AckBeforeFlush,
        Bug::RetriedFlush,
        Bug::MissingDirectoryFlush,
        Bug::TruncateOnCorruption,
        Bug::RecycledTooEarly,
        Bug::RotAccepted,
        Bug::LostWakeUp,
        Bug::CreditLeak,
        Bug::LendsBeforeReports,
        Bug::StaleTokenAccepted,
        Bug::CompletionCountedTwice,
        Bug::DuplicateForgotten,
        Bug::ExpiredEarly,
        Bug::OrderKeyBroken,
        Bug::RetryForgotten,
        Bug::ConfigNotReplayed,
        Bug::OneRetryTooMany,
        Bug::OverdueSlotReused,
        Bug::OtherTenantShown,
        Bug::FailedLogNotTold,
        Bug::MovedWhileSettling,
        Bug::NameLostInMove,
        Bug::OrderLostInMove,
        Bug::NamesLostInSnapshot,
        Bug::SnapshotReplayedOver,
        Bug::DamagedSnapshotTrusted,
        Bug::HistoryConfirmsTooEarly,
    ];

    /// The name by which a command asks for it.
    pub fn name(self) -> &'static str {
        match self {
            Bug::AckBeforeFlush => "ack_before_flush",
            Bug::RetriedFlush => "retried_flush",
            Bug::MissingDirectoryFlush => "missing_directory_flush",
            Bug::TruncateOnCorruption => "truncate_on_corruption",
            Bug::RecycledTooEarly => "recycled_too_early",
            Bug::RotAccepted => "rot_accepted",
            Bug::LostWakeUp => "lost_wake_up",
            Bug::CreditLeak => "credit_leak",
            Bug::LendsBeforeReports => "lends_before_reports",
            Bug::StaleTokenAccepted => "stale_token_accepted",
            Bug::CompletionCountedTwice => "completion_counted_twice",
            Bug::DuplicateForgotten => "duplicate_forgotten",
            Bug::ExpiredEarly => "expired_early",
            Bug::OrderKeyBroken => "order_key_broken",
            Bug::RetryForgotten => "retry_forgotten",
            Bug::ConfigNotReplayed => "config_not_replayed",
            Bug::OneRetryTooMany => "one_retry_too_many",
            Bug::OverdueSlotReused => "overdue_slot_reused",
            Bug::OtherTenantShown => "other_tenant_shown",
            Bug::FailedLogNotTold => "failed_log_not_told",
            Bug::MovedWhileSettling => "moved_while_settling",
            Bug::NameLostInMove => "name_lost_in_move",
            Bug::OrderLostInMove => "order_lost_in_move",
            Bug::NamesLostInSnapshot => "names_lost_in_snapshot",
            Bug::SnapshotReplayedOver => "snapshot_replayed_over",
            Bug::DamagedSnapshotTrusted => "damaged_snapshot_trusted",
            Bug::HistoryConfirmsTooEarly => "history_confirms_too_early",
        }
    }

    /// The bug with this name.
    pub fn from_name(name: &str) -> Option<Bug> {
        Bug::ALL.into_iter().find(|bug| bug.name() == name)
    }
}

#[cfg(pelton_planted)]
static AWAKE: core::sync::atomic::AtomicU8 = core::sync::atomic::AtomicU8::new(0);

/// True if this build has bugs to wake.
pub const AVAILABLE: bool = cfg!(pelton_planted);

/// Wakes a bug for the rest of the process.
#[cfg(pelton_planted)]
pub fn plant(bug: Bug) {
    AWAKE.store(bug as u8, core::sync::atomic::Ordering::Relaxed);
}

/// True while this bug is awake.
#[cfg(pelton_planted)]
pub fn planted(bug: Bug) -> bool {
    AWAKE.load(core::sync::atomic::Ordering::Relaxed) == bug as u8
}

/// True while this bug is awake, which it never is in this build.
#[cfg(not(pelton_planted))]
pub const fn planted(_bug: Bug) -> bool {
    false
}
