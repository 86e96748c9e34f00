//! Parses the command line, dispatches, prints errors, sets the exit code.
#![expect(unused_crate_dependencies, reason = "the library uses them")]

use std::env;
use std::fmt;
use std::io::{self, IsTerminal as _};
use std::os::linux::fs::MetadataExt as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use ecmpvpn::cli::{Cli, Command};
use ecmpvpn::commands::{self, Failure};
use ecmpvpn::exit::Exit;
use ecmpvpn::host::privilege::protect_memory;
use ecmpvpn::host::wireguard::userspace::is_stopping;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, FormatEvent, FormatFields, Full, Writer};
use tracing_subscriber::fmt::time::SystemTime;
use tracing_subscriber::fmt::{FmtContext, format};
use tracing_subscriber::registry::LookupSpan;

/// Environment variable with the log filter. It overrides `-v`.
const LOG_VARIABLE: &str = "ECMPVPN_LOG";

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => Exit::Done.into(),
        Err(failure) => {
            failure.print();
            failure.exit.into()
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    protect_memory().context("keeping keys out of core dumps")?;
    let is_daemon = matches!(&cli.command, Command::Run(args) if !args.dry_run);
    start_logging(cli.verbose, if is_daemon { Lines::of_daemon() } else { Lines::Plain })?;
    // Before there is another thread: each has its own capabilities.
    commands::confine(&cli)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.context("starting the runtime")?.block_on(commands::dispatch(cli))
}

fn start_logging(verbose: u8, lines: Lines) -> Result<(), Failure> {
    let directives = match (env::var(LOG_VARIABLE), verbose) {
        (Ok(directives), _) => directives,
        (Err(_), 0) => "warn,ecmpvpn=info".to_owned(),
        (Err(_), 1) => "info,ecmpvpn=debug".to_owned(),
        (Err(_), _) => "debug,ecmpvpn=trace".to_owned(),
    };
    let filter = EnvFilter::try_new(&directives)
        .with_context(|| format!("{LOG_VARIABLE} is {directives:?}: give a list such as warn,ecmpvpn=debug"))
        .map_err(Failure::usage)?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(is_coloured())
        // A log line that cannot be written must not end the process: the tunnels stay up.
        .log_internal_errors(false)
        .event_format(lines)
        .init();
    Ok(())
}

/// Whether log lines may have colours: they go to a terminal that shows them, and the user did not ask for none
/// (<https://no-color.org>).
fn is_coloured() -> bool {
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    io::stderr().is_terminal() && !is_set("NO_COLOR") && env::var_os("TERM").is_some_and(|term| term != "dumb")
}

/// What a log line has besides its message.
enum Lines {
    /// Of the daemon: time and level.
    Timed(Format<Full, SystemTime>),
    /// Of the daemon where the reader adds the time: the level.
    Untimed(Format<Full, ()>),
    /// Of the other commands: the program's name, as in their other messages.
    Plain,
}

impl Lines {
    fn of_daemon() -> Self {
        let format = format().with_target(false);
        if is_journal() { Self::Untimed(format.without_time()) } else { Self::Timed(format) }
    }
}

/// Whether standard error is the journal of systemd, which stamps every line.
fn is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    let stderr = std::fs::metadata("/proc/self/fd/2");
    stderr.is_ok_and(|file| stream == format!("{}:{}", file.st_dev(), file.st_ino()))
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if is_stopping() && event.metadata().target().starts_with("gotatun") {
            return Ok(());
        }
        match self {
            Self::Timed(format) => format.format_event(context, writer, event),
            Self::Untimed(format) => format.format_event(context, writer, event),
            Self::Plain => {
                let level = match *event.metadata().level() {
                    Level::ERROR => "error: ",
                    Level::WARN => "warning: ",
                    Level::INFO => "",
                    Level::DEBUG | Level::TRACE => "debug: ",
                };
                write!(writer, "ecmpvpn: {level}")?;
                context.format_fields(writer.by_ref(), event)?;
                writeln!(writer)
            }
        }
    }
}
