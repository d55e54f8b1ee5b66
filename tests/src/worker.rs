//! Executors within the test's own process, and what they have run.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use pelton_client::{
    Attempt, ClientOptions, Error, Executor, ExecutorHandle, RequestId, TaskError,
};
use tokio::{sync::Semaphore, task::JoinHandle};

/// An executor in a task of its own. Dropped, its connection breaks.
pub struct Worker {
    handle: ExecutorHandle,
    running: JoinHandle<Result<(), Error>>,
}

impl Worker {
    /// Connects, and offers what `offer` adds.
    pub async fn start(options: ClientOptions, offer: impl FnOnce(&mut Executor)) -> Worker {
        let connected = Executor::connect(options).await;
        let mut executor = connected.expect("the server listens");
        offer(&mut executor);
        Worker {
            handle: executor.handle(),
            running: tokio::spawn(executor.run()),
        }
    }

    /// Connects, and offers one function.
    pub async fn of<F, A>(options: ClientOptions, name: &str, slots: u32, handler: F) -> Worker
    where
        F: Fn(Attempt) -> A + Send + 'static,
        A: Future<Output = Result<Vec<u8>, TaskError>> + Send + 'static,
    {
        Worker::start(options, |executor| {
            executor.function(name, slots, handler);
        })
        .await
    }

    /// Closes in order, and answers how the executor ended.
    pub async fn close(mut self) -> Result<(), Error> {
        self.handle.close(Duration::from_secs(20)).await;
        (&mut self.running).await.expect("it does not panic")
    }

    /// Waits for an end that it comes to by itself.
    pub async fn ended(mut self) -> Result<(), Error> {
        (&mut self.running).await.expect("it does not panic")
    }

    /// Another way to close it.
    pub fn handle(&self) -> ExecutorHandle {
        self.handle.clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.running.abort();
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

/// Attempts per task, shared by handlers and the test.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    runs: Arc<Mutex<HashMap<RequestId, u32>>>,
}

impl Ledger {
    /// One more run of this task.
    pub fn note(&self, attempt: &Attempt) {
        *self.lock().entry(attempt.request_id()).or_default() += 1;
    }

    /// Runs of this task.
    pub fn runs(&self, task: RequestId) -> u32 {
        self.lock().get(&task).copied().unwrap_or(0)
    }

    /// Runs of all tasks.
    pub fn total(&self) -> u32 {
        self.lock().values().sum()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RequestId, u32>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Holds up whoever passes until it is opened, once for each.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Semaphore>);

impl Default for Gate {
    fn default() -> Gate {
        Gate(Arc::new(Semaphore::new(0)))
    }
}

impl Gate {
    /// Lets this many through.
    pub fn open(&self, count: usize) {
        self.0.add_permits(count);
    }

    /// Waits to be let through.
    pub async fn pass(&self) {
        let permit = self.0.acquire().await;
        permit.expect("the gate is never closed for good").forget();
    }
}
