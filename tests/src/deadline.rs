//! Waiting for what is to become true, never for a time to pass.

use std::time::{Duration, Instant};

/// What a loaded machine may take for anything that is to happen at once.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(2);

/// Waits until `condition` holds; panics with `what` when it does not within `PATIENCE`.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(
            start.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
        tokio::time::sleep(STEP).await;
    }
}

/// As `eventually`, for a caller without a runtime; false if the time is over.
pub(crate) fn poll(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > patience {
            return false;
        }
        std::thread::sleep(STEP);
    }
    true
}
