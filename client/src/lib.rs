//! Rust client of Pelton over QUIC: hand in tasks, wait for them, run them.
//!
//! `Client` is for callers, `Executor` for those who run functions, `pipeline` for load generators. Each of them is one
//! connection with one long-lived stream of frames.
//!
//! ```no_run
//! use pelton_client::{Client, ClientOptions, Task};
//!
//! # async fn example() -> Result<(), pelton_client::Error> {
//! let client = Client::connect(ClientOptions::from_env()?).await?;
//! let submitted = client.submit("digest", Task::new("some bytes").task_id("order-42")).await?;
//! println!("{} is on disk: {}", submitted.request_id, submitted.durable);
//! let finished = submitted.finished().await?;
//! println!("{} after {} attempts", finished.status.name(), finished.attempts);
//! # Ok(())
//! # }
//! ```
//!
//! Reading order: `error`, `options`; `link` is a connection with frames in both directions; `task` and `session` are
//! what `client` is made of; `pipeline`; `attempt`, `work` and `executor`.

mod error;
mod options;

mod link;

mod task;

mod session;

mod client;

pub mod pipeline;

mod attempt;

mod work;

mod executor;

pub use attempt::{Attempt, TaskError};
pub use client::{Client, List, Submitted};
pub use error::{Error, Refusal};
pub use executor::{Executor, ExecutorHandle, ExecutorOptions};
pub use link::SharedSocket;
pub use options::ClientOptions;
pub use pelton_net::Code;
pub use pelton_net::execute::ExecuteTask;
pub use pelton_net::id::{RequestId, TaskName};
pub use pelton_net::query::Operation;
pub use pelton_net::quic::client::Trust;
pub use pelton_net::submit::{Priority, TaskStatus};
pub use task::{Finished, Task};
