//! Handing in: a tenant's tasks at their pace, with the names that make a repeated submit harmless, and the ledger of
//! what was acknowledged.

use std::{
    cell::RefCell,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use pelton_client::{Client, ClientOptions, Error, Finished, RequestId, Task, TaskName};

/// Tasks of one call.
const BATCH: usize = 500;
const STEP: Duration = Duration::from_millis(20);
const AGAIN: Duration = Duration::from_millis(100);
/// Without any answer for so long, the run is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Questions of one connection at a time, below what a server allows a session.
const QUESTIONS: usize = 128;
/// What a task gets to be terminal, once all should be.
const TERMINAL: Duration = Duration::from_secs(10);

/// A task to be handed in.
#[derive(Clone)]
pub struct Job {
    /// Its name, unique in the run.
    pub task_id: String,
    /// Which input it is about.
    pub file: usize,
    pub payload: Bytes,
}

/// What one tenant hands in.
pub struct Plan {
    pub function: &'static str,
    pub jobs: Vec<Job>,
    /// Spread over this time.
    pub pace: Duration,
}

/// The ledger of acknowledged tasks: identity and job, in the order of the answers.
pub type Acknowledged = Rc<RefCell<Vec<(RequestId, usize)>>>;

/// Hands in everything. Tasks without an answer are handed in again under the same name.
pub async fn submit(
    client: Client,
    plan: Rc<Plan>,
    acknowledged: Acknowledged,
) -> Result<(), String> {
    let start = Instant::now();
    let mut heard = start;
    let mut next = 0;
    let mut again: Vec<usize> = Vec::new();
    while next < plan.jobs.len() || !again.is_empty() {
        let share = start.elapsed().as_secs_f64() / plan.pace.as_secs_f64().max(1e-9);
        let due = (share.min(1.0) * plan.jobs.len() as f64) as usize;
        let mut places = std::mem::take(&mut again);
        let fresh = due.min(next + BATCH.saturating_sub(places.len())).max(next);
        places.extend(next..fresh);
        next = fresh;
        if places.is_empty() {
            tokio::time::sleep(STEP).await;
            continue;
        }
        let tasks: Vec<Task> = places
            .iter()
            .map(|&place| {
                let job = &plan.jobs[place];
                Task::new(job.payload.clone()).task_id(&job.task_id)
            })
            .collect();
        let answers = client.submit_batch(plan.function, &tasks).await;
        for (place, answer) in places.into_iter().zip(answers) {
            match answer {
                Ok(submitted) => {
                    heard = Instant::now();
                    let entry = (submitted.request_id, place);
                    acknowledged.borrow_mut().push(entry);
                }
                Err(error) if is_passing(&error) => again.push(place),
                Err(error) => {
                    let name = &plan.jobs[place].task_id;
                    return Err(format!("{}/{name}: {error}", plan.function));
                }
            }
        }
        if heard.elapsed() > PATIENCE {
            return Err("the server has not answered for a minute".to_owned());
        }
        if !again.is_empty() {
            tokio::time::sleep(AGAIN).await;
        }
    }
    Ok(())
}

fn is_passing(error: &Error) -> bool {
    match error {
        Error::ConnectionLost(_) | Error::Unreachable(_) => true,
        other => other.retryable(),
    }
}

/// Asks after every acknowledged task over a new connection. What is missing or not terminal has its error.
pub async fn ask_all(
    options: ClientOptions,
    ids: Vec<RequestId>,
) -> Result<Vec<Result<Finished, String>>, String> {
    let client = Client::connect(options)
        .await
        .map_err(|error| error.to_string())?;
    let ids = Rc::new(ids);
    let next = Rc::new(RefCell::new(0));
    let answers = Rc::new(RefCell::new(vec![None; ids.len()]));
    let mut askers = tokio::task::JoinSet::new();
    // Should many be stuck, the time is for all of them together.
    let deadline = Instant::now() + 3 * TERMINAL;
    for _ in 0..QUESTIONS {
        let (client, ids) = (client.clone(), Rc::clone(&ids));
        let (next, answers) = (Rc::clone(&next), Rc::clone(&answers));
        askers.spawn_local(async move {
            loop {
                let place = next.replace_with(|place| *place + 1);
                let Some(&id) = ids.get(place) else {
                    return;
                };
                let left = deadline.saturating_duration_since(Instant::now());
                let time = TERMINAL.min(left).max(AGAIN);
                let answer = client.wait(&TaskName::Request(id), time).await;
                let answer = answer.map_err(|error| error.to_string());
                answers.borrow_mut()[place] = Some(answer);
            }
        });
    }
    while let Some(ended) = askers.join_next().await {
        ended.map_err(|error| error.to_string())?;
    }
    client.close().await;
    let answers = answers.take();
    let unasked = || Err("it was not asked after".to_owned());
    Ok(answers
        .into_iter()
        .map(|answer| answer.unwrap_or_else(unasked))
        .collect())
}
