//! `pelton executor`: runs a command for each task.

use std::{
    io,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use clap::Args;
use pelton_client::{Attempt, Executor, TaskError};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use crate::{
    command::{
        connect::ConnectArgs,
        exit::{Exit, Failure},
        time::parse_duration,
    },
    config::Config,
};

/// A command that ends with this code is tried again later: EX_TEMPFAIL.
const EXIT_THROTTLED: i32 = 75;
/// How long the function pauses then.
const THROTTLED_MS: u32 = 1_000;
/// After the command has ended, processes that it left behind may write for this long.
const LEFT_BEHIND: Duration = Duration::from_secs(1);
/// Bytes of stderr that are kept: the end of it.
const OUTPUT_BYTES_MAX: usize = 8 << 10;

/// Run a command for each task of a function
///
/// The payload is the command's standard input, its standard output is the result, and the end of its standard error
/// is kept with the attempt. Exit code 0 is success, 75 means that what the command needs is busy (the function
/// pauses for a second, no attempt is spent), any other one that the attempt failed. A cancelled command gets SIGTERM, and
/// SIGKILL when the grace of its stop is over.
///
/// The command finds PELTON_FUNCTION, PELTON_REQUEST_ID, PELTON_TASK_ID and PELTON_ATTEMPT in its environment.
///
/// SIGINT or SIGTERM lets what runs come to its end; a second one ends it at once.
#[derive(Args, Clone, Debug)]
pub struct ExecutorArgs {
    /// A function to run; may be repeated
    #[arg(long, value_name = "NAME", required = true)]
    function: Vec<String>,
    /// Tasks of each function that run at once [default: the number of cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    slots: Option<u32>,
    /// Run the command behind `--`
    #[arg(long, required = true)]
    exec: bool,
    /// Time for what runs when the executor is told to end
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    drain: Duration,
    #[command(flatten)]
    connect: ConnectArgs,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

impl ExecutorArgs {
    /// True if JSON is asked for.
    pub fn json(&self) -> bool {
        self.connect.json
    }
}

/// Runs until it is told to end.
pub async fn run(args: &ExecutorArgs, config: &Config) -> Result<Exit, Failure> {
    if !can_be_run(&args.command[0]) {
        return Err(Failure::usage(format!(
            "{} is no command that can be run here",
            args.command[0]
        )));
    }
    let slots = args.slots.unwrap_or_else(|| {
        let cores = std::thread::available_parallelism();
        cores.map_or(1, |cores| cores.get() as u32)
    });
    let mut executor = Executor::connect(args.connect.options(config)?).await?;
    let result_bytes_max = executor.payload_bytes_max();
    let command: Arc<[String]> = args.command.clone().into();
    for function in &args.function {
        let job = Job {
            function: function.as_str().into(),
            command: command.clone(),
            result_bytes_max,
        };
        executor.function(function, slots, move |attempt| {
            let job = job.clone();
            async move { job.run(&attempt).await }
        });
    }
    eprintln!("ready for {}, {slots} at once", args.function.join(", "));
    let handle = executor.handle();
    let mut running = std::pin::pin!(executor.run());
    let stop = |kind| signal(kind).map_err(|error| Failure::new(Exit::Failure, error.to_string()));
    let mut interrupt = stop(SignalKind::interrupt())?;
    let mut terminate = stop(SignalKind::terminate())?;
    tokio::select! {
        ended = &mut running => {
            ended?;
            return Ok(Exit::Ok);
        }
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    eprintln!(
        "ending: no new tasks, what runs has {} s",
        args.drain.as_secs()
    );
    let drain = args.drain;
    let closing = tokio::spawn(async move { handle.close(drain).await });
    tokio::select! {
        ended = &mut running => ended?,
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    closing.abort();
    Ok(Exit::Ok)
}

/// True for the path of a program, or the name of one in PATH.
fn can_be_run(command: &str) -> bool {
    let is_program = |path: &Path| {
        path.metadata()
            .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    if command.contains('/') {
        return is_program(Path::new(command));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| is_program(&folder.join(command)))
}

/// What is run for each task of a function.
#[derive(Clone)]
struct Job {
    function: Arc<str>,
    command: Arc<[String]>,
    result_bytes_max: usize,
}

impl Job {
    async fn run(&self, attempt: &Attempt) -> Result<Bytes, TaskError> {
        let request_id = attempt.request_id().to_string();
        let mut command = Command::new(&self.command[0]);
        command
            .args(&self.command[1..])
            // The executor's own credential is none of the function's business.
            .env_remove("PELTON_KEY")
            .env("PELTON_FUNCTION", &*self.function)
            .env("PELTON_TASK_ID", attempt.task_id().unwrap_or(&request_id))
            .env("PELTON_REQUEST_ID", &request_id)
            .env("PELTON_ATTEMPT", attempt.attempt().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| {
            TaskError::Failed(format!("{} cannot be started: {error}", self.command[0]))
        })?;
        let group = Group::of(&child);
        let mut result = Vec::new();
        let mut output = Vec::new();
        let ended = self
            .attend(&mut child, &group, attempt, &mut result, &mut output)
            .await;
        drop(group);
        attempt.output(&String::from_utf8_lossy(&output));
        let status = ended.map_err(TaskError::failed)?;
        if attempt.is_cancelled() {
            return Err(TaskError::Stopped);
        }
        match status.code() {
            Some(0) if result.len() > self.result_bytes_max => Err(TaskError::Failed(format!(
                "the result is larger than {} bytes: store it elsewhere and print a reference",
                self.result_bytes_max
            ))),
            Some(0) => Ok(result.into()),
            Some(EXIT_THROTTLED) => Err(TaskError::Throttled {
                retry_after_ms: THROTTLED_MS,
            }),
            _ => Err(TaskError::Failed(describe(status, &output))),
        }
    }

    /// Feeds the command and reads from it until it has ended.
    async fn attend(
        &self,
        child: &mut Child,
        group: &Group,
        attempt: &Attempt,
        result: &mut Vec<u8>,
        output: &mut Vec<u8>,
    ) -> io::Result<ExitStatus> {
        let stdin = child.stdin.take();
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        let pipes = async {
            let feed = async {
                if let Some(mut stdin) = stdin {
                    // A command need not read its payload.
                    let _ = stdin.write_all(attempt.payload()).await;
                }
            };
            let limit = self.result_bytes_max + 1;
            tokio::join!(
                feed,
                read_head(stdout, result, limit),
                read_tail(stderr, output)
            );
        };
        let mut pipes = std::pin::pin!(pipes);
        let mut drained = false;
        let mut told = false;
        let status = loop {
            tokio::select! {
                status = child.wait() => break status?,
                () = &mut pipes, if !drained => drained = true,
                () = attempt.cancelled(), if !told => {
                    // When its grace is over, this attempt is dropped, and its group gets SIGKILL.
                    told = true;
                    group.signal(Signal::TERM);
                }
            }
        };
        if !drained {
            let _ = tokio::time::timeout(LEFT_BEHIND, pipes).await;
        }
        Ok(status)
    }
}

fn describe(status: ExitStatus, output: &[u8]) -> String {
    use std::os::unix::process::ExitStatusExt;
    let end = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    };
    let output = String::from_utf8_lossy(output);
    match output.lines().rfind(|line| !line.trim().is_empty()) {
        Some(line) => format!("{end}: {}", line.trim()),
        None => end,
    }
}

/// Keeps the first bytes and reads the rest away.
async fn read_head(from: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>, limit: usize) {
    let Some(mut from) = from else { return };
    let mut piece = vec![0; 16 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut piece).await {
        let room = limit.saturating_sub(into.len());
        into.extend_from_slice(&piece[..bytes.min(room)]);
    }
}

/// Keeps the last bytes.
async fn read_tail(from: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut piece = vec![0; 4 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut piece).await {
        into.extend_from_slice(&piece[..bytes]);
        if into.len() > OUTPUT_BYTES_MAX {
            into.drain(..into.len() - OUTPUT_BYTES_MAX);
        }
    }
}

/// The processes of one attempt; none of them outlives it.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Group {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        Group(id.and_then(Pid::from_raw))
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.0 {
            // The last of them may just have ended.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_command_is_looked_for_as_a_shell_does() {
        assert!(can_be_run("sh") && can_be_run("/bin/sh"));
        assert!(!can_be_run("/etc") && !can_be_run("no-such-command-here"));
    }

    #[test]
    fn an_error_says_the_code_and_the_last_words() {
        let status = ExitStatus::from_raw(3 << 8);
        assert_eq!(describe(status, b""), "exit code 3");
        assert_eq!(describe(status, b"a\nno luck\n\n"), "exit code 3: no luck");
        assert_eq!(describe(ExitStatus::from_raw(9), b""), "ended by signal 9");
    }

    #[test]
    fn the_head_and_the_tail_are_bounded() {
        let bytes: Vec<u8> = (0..40_000u32).map(|n| n as u8).collect();
        let (mut head, mut tail) = (Vec::new(), Vec::new());
        crate::command::bench::local(async {
            read_head(Some(&bytes[..]), &mut head, 20_001).await;
            read_tail(Some(&bytes[..]), &mut tail).await;
        });
        assert_eq!(head, bytes[..20_001]);
        assert_eq!(tail, bytes[bytes.len() - OUTPUT_BYTES_MAX..]);
    }
}
