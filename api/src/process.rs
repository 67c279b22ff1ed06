//! From `main` to exit: what happens in which order, and why.
//!
//! ```text
//!  inherited descriptors → log → config file → event monitor (a FIFO waits for its reader)
//!  → signals blocked → API socket → VMM thread → signal thread → filter of the main thread
//!  → requests … VMM thread has ended → answers in flight → socket removed
//! ```
//! Signals keep their default action until nothing waits for others any more, so that SIGTERM
//! ends a process whose FIFO nobody reads; from when there is a socket to remove they are blocked,
//! and heard by a thread of their own. The main thread's filter is installed after all threads
//! are spawned.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use devices::sandbox::violation::report_violations;
use devices::sandbox::{COMMON, Filter, SandboxError, SeccompMode};
use devices::worker::STACK_BYTES;
use thiserror::Error;
use vmm::Handle;
use vmm::command::Command;
use vmm::config::VmConfig;
use vmm::event::Events;
use vmm::overcommit::ledger::{Ledger, LedgerError};

use crate::cli::{Arguments, Target, Tool};
use crate::error::ApiError;
use crate::event_monitor::EventMonitor;
use crate::raw::BlockedSignals;
use crate::server::{self, Limits};
use crate::socket::{ApiSocket, SocketError};
use crate::{body, disk, log, routes, sandbox};

/// How long the event monitor's reader may take for the last events.
const GRACE: Duration = Duration::from_secs(1);

/// Why the process could not start.
#[derive(Debug, Error)]
enum StartError {
    #[error("give --api-socket, --config or both; see --help")]
    NothingToDo,
    #[error("--api-socket and --event-monitor name the same descriptor")]
    SameDescriptor,
    #[error("--log-file {}: {source}", path.display())]
    Log { path: PathBuf, source: io::Error },
    #[error("--event-monitor: {0}")]
    EventMonitor(io::Error),
    #[error("--api-socket: {0}")]
    Socket(#[from] SocketError),
    #[error("--overcommit-ledger: {0}")]
    Ledger(#[from] LedgerError),
    #[error("--config {}: {message}", path.display())]
    Config { path: PathBuf, message: String },
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    Vmm(#[from] vmm::Error),
    #[error("{doing}: {source}")]
    Host {
        doing: &'static str,
        source: io::Error,
    },
}

impl StartError {
    fn host(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { doing, source }
    }
}

/// The whole life of the process; `start` is when it began.
pub fn run(arguments: &Arguments, start: Instant) -> ExitCode {
    if arguments.version {
        print!("{}", arguments.version_text());
        return ExitCode::SUCCESS;
    }
    log::install_panic_hook();
    match &arguments.tool {
        Some(Tool::Host(command)) => return command.run(),
        Some(Tool::Disk(command)) => return disk::run(command),
        None => {}
    }
    match Prepared::new(arguments, start).and_then(Prepared::serve) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ballast: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Everything that is opened before the first thread is spawned.
struct Prepared {
    events: Events,
    monitor: Option<EventMonitor>,
    socket: Option<ApiSocket>,
    ledger: Option<Ledger>,
    signals: BlockedSignals,
    config: Option<(PathBuf, VmConfig)>,
    seccomp: SeccompMode,
    exit_on_power_off: bool,
}

impl Prepared {
    fn new(arguments: &Arguments, start: Instant) -> Result<Self, StartError> {
        let api = arguments.api_socket.as_ref();
        let monitor = arguments.event_monitor.as_ref();
        if api.is_none() && arguments.config.is_none() {
            return Err(StartError::NothingToDo);
        }
        if api == monitor && is_descriptor(&api) {
            return Err(StartError::SameDescriptor);
        }
        let events = Events::new(start);
        let open_socket = |target| ApiSocket::open(target).map_err(StartError::from);
        let open_monitor =
            |target| EventMonitor::open(target, &events).map_err(StartError::EventMonitor);
        // Inherited descriptors first, while no number can be one of our own.
        let inherited_socket = api.filter(|t| is_descriptor(&Some(t))).map(open_socket);
        let inherited_socket = inherited_socket.transpose()?;
        let inherited_monitor = monitor
            .filter(|t| is_descriptor(&Some(t)))
            .map(open_monitor);
        let inherited_monitor = inherited_monitor.transpose()?;
        log::init(arguments.log_file.as_deref(), arguments.verbosity).map_err(|source| {
            let path = arguments.log_file.clone().unwrap_or_default();
            StartError::Log { path, source }
        })?;
        let config = arguments.config.as_deref().map(read_config).transpose()?;
        let monitor = match inherited_monitor {
            Some(monitor) => Some(monitor),
            None => monitor.map(open_monitor).transpose()?,
        };
        // From here on there is something to tidy up.
        let signals = BlockedSignals::block(&[libc::SIGTERM, libc::SIGINT])
            .map_err(StartError::host("blocking signals"))?;
        let socket = match inherited_socket {
            Some(socket) => Some(socket),
            None => api.map(open_socket).transpose()?,
        };
        // Last, as it is for others to see.
        let named = api.map(ToString::to_string).unwrap_or_default();
        let open_ledger = |path: &PathBuf| Ledger::open(path, &named, events.clone());
        let ledger = arguments.overcommit_ledger.as_ref().map(open_ledger);
        let ledger = ledger.transpose()?;
        Ok(Self {
            events,
            monitor,
            socket,
            ledger,
            signals,
            config,
            seccomp: arguments.seccomp,
            exit_on_power_off: !arguments.no_shutdown,
        })
    }

    /// Starts the threads and serves until the end.
    fn serve(self) -> Result<ExitCode, StartError> {
        // Its file goes whenever this function is left.
        let socket = self.socket;
        let filter = Filter::compile("main", self.seccomp, &[COMMON, sandbox::MAIN])?;
        self.events.emit("vmm", "starting", &[]);
        let last_words = self.monitor.as_ref().map(EventMonitor::duplicate);
        let last_words = last_words.transpose().map_err(StartError::EventMonitor)?;
        report_violations(self.events.start(), last_words)
            .map_err(StartError::host("handling SIGSYS"))?;
        let options = vmm::vmm::Options {
            seccomp: self.seccomp,
            exit_on_power_off: self.exit_on_power_off,
            ..vmm::vmm::Options::default()
        };
        let handle = vmm::vmm::start(options, self.ledger, self.events.clone())?;
        spawn_signal_thread(self.signals, self.seccomp, handle.clone())?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(StartError::host("starting the event loop"))?;
        let (config, monitor) = (self.config, self.monitor);
        let code = runtime.block_on(async {
            let listener = socket
                .as_ref()
                .map(|socket| tokio::net::UnixListener::from_std(socket.listener()?))
                .transpose()
                .map_err(StartError::host("serving the API socket"))?;
            let monitor = monitor
                .map(EventMonitor::into_writer)
                .transpose()
                .map_err(StartError::EventMonitor)?;
            filter.install()?;
            let monitor = monitor.map(|writer| tokio::spawn(writer.run(handle.clone())));
            let code = serve_until_ended(listener, &handle, config).await;
            if let Some(monitor) = monitor {
                // A reader that does not read loses the last events.
                let _ = tokio::time::timeout(GRACE, monitor).await;
            }
            Ok::<_, StartError>(code)
        })?;
        Ok(code)
    }
}

fn is_descriptor(target: &Option<&Target>) -> bool {
    matches!(target, Some(Target::Descriptor(_)))
}

fn read_config(path: &Path) -> Result<(PathBuf, VmConfig), StartError> {
    let fail = |message: String| StartError::Config {
        path: path.to_owned(),
        message,
    };
    let bytes = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
    let config = body::parse(&bytes).map_err(|e| fail(e.message().to_owned()))?;
    Ok((path.to_owned(), config))
}

/// The thread that waits for SIGTERM and SIGINT, so that no handler ever interrupts another.
fn spawn_signal_thread(
    signals: BlockedSignals,
    seccomp: SeccompMode,
    handle: Handle,
) -> Result<(), StartError> {
    let name = "signal-handler";
    let filter = Filter::compile(name, seccomp, &[COMMON, sandbox::SIGNALS])?;
    let (installed, outcome) = mpsc::channel();
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let result = filter.install();
            let failed = result.is_err();
            // The spawner waits for this, so it is there to hear it.
            let _ = installed.send(result);
            if failed {
                return;
            }
            loop {
                match signals.wait() {
                    Ok(signal) => {
                        tracing::info!(signal, "told to end");
                        handle.terminate();
                    }
                    Err(error) => {
                        tracing::error!(%error, "signals are not heard any more");
                        return;
                    }
                }
            }
        })
        .map_err(StartError::host("starting the signal thread"))?;
    match outcome.recv() {
        Ok(result) => Ok(result?),
        Err(_) => Err(StartError::host("starting the signal thread")(
            io::ErrorKind::BrokenPipe.into(),
        )),
    }
}

/// Serves the API, boots the VM of `--config` if there is one, and returns when the VMM has ended.
async fn serve_until_ended(
    listener: Option<tokio::net::UnixListener>,
    handle: &Handle,
    config: Option<(PathBuf, VmConfig)>,
) -> ExitCode {
    let server = async {
        match listener {
            Some(listener) => {
                let router = routes::router(handle.clone());
                server::serve(listener, router, handle.clone(), Limits::default()).await;
            }
            None => handle.ended().await,
        }
    };
    tokio::pin!(server);
    let mut code = ExitCode::SUCCESS;
    if let Some((path, config)) = config {
        // First in the inbox, before any client's command; clients are served meanwhile.
        tokio::select! {
            biased;
            result = create_and_boot(handle, config) => if let Err(error) = result {
                eprintln!("ballast: --config {}: {}", path.display(), error.message());
                handle.terminate();
                code = ExitCode::FAILURE;
            },
            () = &mut server => return code,
        }
    }
    server.await;
    code
}

async fn create_and_boot(handle: &Handle, config: VmConfig) -> Result<(), ApiError> {
    let config = Box::new(config);
    handle
        .request(|reply| Command::Create { config, reply })
        .await?;
    handle.request(|reply| Command::Boot { reply }).await?;
    Ok(())
}
