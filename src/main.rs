//! The binary: environment and arguments in, exit code out. Everything else is in the library.

use std::{io::IsTerminal as _, process::ExitCode};

use futures::FutureExt as _;
use inference_proxy::{
    app::App,
    base::config::{Config, Warning},
    cli::{self, Call, commands},
    control::discovery::docker::DockerDiscovery,
    demo,
    observe::status::text::Look,
    telemetry::log,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Bad configuration: a variable or an argument.
const BAD_CONFIGURATION: u8 = 2;

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no failures; clap knows which is which.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(BAD_CONFIGURATION) } else { ExitCode::SUCCESS };
        }
    };
    // Variables that are not text cannot be ours.
    #[expect(clippy::disallowed_methods, reason = "this is main")]
    let vars = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    let (config, warnings) = match Config::from_vars(vars) {
        Ok(resolved) => resolved,
        Err(error) => {
            eprintln!("inference-proxy: bad configuration: {error}");
            return ExitCode::from(BAD_CONFIGURATION);
        }
    };
    if let Err(error) = log::init(cli.log.unwrap_or(&config.log), cli.log_format.or(config.log_format)) {
        eprintln!("inference-proxy: cannot start: {error}");
        return ExitCode::FAILURE;
    }
    log::report_panics();
    let code = run(cli.call, config, warnings);
    log::flush();
    code
}

/// Does what is asked for. Its messages go by way of the log, which nothing ever waits for.
fn run(call: Call, config: Config, warnings: Vec<Warning>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return told(Err(format!("cannot start: {error}"))),
    };
    let code = runtime.block_on(async {
        match call {
            Call::Serve => {
                for warning in warnings {
                    tracing::warn!("{warning}");
                }
                serve(config).await
            }
            Call::Healthcheck { url } => told(commands::healthcheck(&config, url.as_deref()).await),
            Call::Status { url, form } => {
                #[expect(clippy::disallowed_methods, reason = "this is main")]
                let var = |name: &str| std::env::var(name).ok();
                let look = || Look::of(std::io::stdout().is_terminal(), commands::screen(), var);
                told(commands::status(&config, url.as_deref(), form, look).await)
            }
            Call::DemoBackend(options) => demo::serve(options).await,
            Call::AllocateMb(megabytes) => {
                demo::allocate_as_child(megabytes);
                ExitCode::SUCCESS
            }
        }
    });
    // Discovery may be in the middle of a question to the engine, whose answer is not needed any more.
    runtime.shutdown_background();
    code
}

fn told(outcome: Result<(), String>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            log::say(&format!("inference-proxy: {text}"));
            ExitCode::FAILURE
        }
    }
}

/// Runs the proxy until it is told to stop, and then to its end.
async fn serve(config: Config) -> ExitCode {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return told(Err("cannot listen for signals".to_owned()));
    };
    let own_ports = std::iter::once(config.port).chain(config.admin_port).collect();
    let discovery = DockerDiscovery::new(config.docker.clone(), config.network.clone(), own_ports);
    let mut app = match App::start(config, Box::new(discovery)).await {
        Ok(app) => app,
        Err(error) => return told(Err(error.to_string())),
    };
    let ended = tokio::select! {
        () = told_to_stop(&mut terminate, &mut interrupt) => None,
        ended = app.failed() => Some(ended),
    };
    let (shutdown, code) = match ended {
        None => (app.shutdown().map(drop).boxed(), ExitCode::SUCCESS),
        Some(ended) => {
            tracing::error!(task = ended.task, "{ended}");
            (app.give_up().boxed(), ExitCode::FAILURE)
        }
    };
    tokio::select! {
        () = shutdown => code,
        () = told_to_stop(&mut terminate, &mut interrupt) => {
            tracing::warn!("told to stop a second time, ending at once");
            ExitCode::FAILURE
        }
    }
}

async fn told_to_stop(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
