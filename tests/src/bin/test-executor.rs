//! An executor in a process of its own, for tests that kill it: each attempt is told on stdout and never ends.

use std::{env, future::pending, io::Write, process::ExitCode};

use pelton_client::{Attempt, ClientOptions, Executor, TaskError, Trust};

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let (Some(server), Some(trust), Some(function)) =
        (arguments.next(), arguments.next(), arguments.next())
    else {
        eprintln!("test-executor SERVER sha256:FINGERPRINT FUNCTION");
        return ExitCode::from(2);
    };
    let Some(trust) = Trust::parse(&trust) else {
        eprintln!("that is no fingerprint");
        return ExitCode::from(2);
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be made");
    let ran = runtime.block_on(async {
        let options = ClientOptions::new(server).trust(trust);
        let mut executor = Executor::connect(options).await?;
        executor.function(&function, 4, async |task: Attempt| {
            let mut out = std::io::stdout();
            let told = writeln!(out, "{}", task.request_id()).and_then(|()| out.flush());
            told?;
            pending::<Result<Vec<u8>, TaskError>>().await
        });
        executor.run().await
    });
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
