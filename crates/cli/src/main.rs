//! The `longbit` command: the lab's verbs, and those of the inference crate.

#![forbid(unsafe_code)]

mod args;
mod capture;
mod convert;
mod estimate;
mod generate;
mod inspect;
mod logits;
mod model_args;
mod perplexity;
mod profile;
mod status;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use longbit_lab::engine::ProcessEngine;
use longbit_lab::{Exit, LabError, check, cmp, report, run, views};

use args::{Cli, Colour, Command, filters};

fn main() -> ExitCode {
    // The engine's own process, started by the runner: no command line to parse, no terminal to serve.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == longbit_lab::engine::ENGINE_VERB) {
        longbit_sys::die_with_parent();
        let code = longbit_worker::serve(std::io::stdin().lock(), std::io::stdout().lock());
        return ExitCode::from(code);
    }
    let matches = Cli::command().get_matches();
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let colour = cli.colour;
    let mut out = Patient { to: std::io::stdout().lock(), gone: false };
    let done = dispatch(cli, &matches, &mut out).and_then(|exit| Ok(out.flush().map(|()| exit)?));
    match done {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(failure) => {
            let (text, exit) = match failure {
                Failure::Lab(error) => (error.to_string(), error.exit()),
                Failure::Core(error) => {
                    let usage =
                        matches!(error, longbit::Error::Unknown { .. } | longbit::Error::Parameter { .. });
                    (error.to_string(), if usage { Exit::Usage } else { Exit::Tool })
                }
                Failure::Usage(text) => (text, Exit::Usage),
            };
            let label = if on(colour, std::io::stderr().is_terminal()) {
                "\x1b[1;31merror:\x1b[0m"
            } else {
                "error:"
            };
            let _ = out.flush();
            let _ = writeln!(std::io::stderr(), "{label} {text}"); // nobody is left to tell
            ExitCode::from(exit.code())
        }
    }
}

/// Standard output whose reader may leave early (`| head`): the rest is dropped, and the verb keeps its own exit code.
struct Patient<W> {
    to: W,
    gone: bool,
}

impl<W> Patient<W> {
    /// `none` in place of an error that says only that the reader has gone.
    fn forgive<T>(&mut self, result: std::io::Result<T>, none: T) -> std::io::Result<T> {
        match result {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {
                self.gone = true;
                Ok(none)
            }
            other => other,
        }
    }
}

impl<W: Write> Write for Patient<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.gone {
            return Ok(bytes.len());
        }
        let written = self.to.write(bytes);
        self.forgive(written, bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if self.gone {
            return Ok(());
        }
        let flushed = self.to.flush();
        self.forgive(flushed, ())
    }
}

/// Why a verb failed.
enum Failure {
    Lab(LabError),
    Core(longbit::Error),
    /// A flag or file that cannot be used as it is; exit code 2.
    Usage(String),
}

impl From<LabError> for Failure {
    fn from(error: LabError) -> Self {
        Failure::Lab(error)
    }
}

impl From<longbit::Error> for Failure {
    fn from(error: longbit::Error) -> Self {
        Failure::Core(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::Lab(LabError::Output(error))
    }
}

/// Whether to colour, by the flag, `NO_COLOR` and the terminal.
fn on(colour: Colour, terminal: bool) -> bool {
    match colour {
        Colour::Always => true,
        Colour::Never => false,
        Colour::Auto => {
            let set = |name| std::env::var_os(name).is_some_and(|v| !v.is_empty());
            terminal && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
        }
    }
}

fn dispatch<W: Write>(cli: Cli, matches: &clap::ArgMatches, out: &mut Patient<W>) -> Result<Exit, Failure> {
    let color = on(cli.colour, std::io::stdout().is_terminal());
    let mut err = std::io::stderr();
    let options = |plan: args::PlanArgs, files| -> Result<run::RunOptions, Failure> {
        Ok(run::RunOptions { files, plan: plan.options(filters(matches))?, color, ..Default::default() })
    };
    Ok(match cli.command {
        Command::Run(a) => {
            let options = run::RunOptions {
                out: a.out,
                fresh: a.fresh,
                fail_fast: a.fail_fast,
                retry_failed: a.retry_failed,
                quiet: a.quiet,
                no_progress: a.no_progress,
                ..options(a.plan, a.files)?
            };
            run::run(&ProcessEngine::own()?, &options, out, &mut err)?
        }
        Command::Plan(a) => {
            let plan = a.plan.options(filters(matches))?;
            let format = if a.json { views::Format::Json } else { views::Format::Table };
            let view = views::PlanView { files: a.files, plan, list: a.list, format, machine: None };
            views::plan(&ProcessEngine::own()?, &view, out)?
        }
        Command::Verify(a) => {
            let options = run::RunOptions { quiet: a.quiet, ..options(a.plan, a.files)? };
            views::verify(&ProcessEngine::own()?, &options, out, &mut err)?
        }
        Command::Machine { json } => {
            let format = if json { views::Format::Json } else { views::Format::Table };
            views::machine(&ProcessEngine::own()?, format, out)?
        }
        Command::List { json } => {
            let format = if json { views::Format::Json } else { views::Format::Table };
            views::list(&ProcessEngine::own()?, format, out)?
        }
        Command::Cmp(a) => {
            cmp::cmp(&cmp::CmpOptions { result: a.result, format: a.format.into(), color }, out)?
        }
        Command::Check(a) => {
            let options = check::CheckOptions {
                base: a.base,
                head: a.head,
                strict: a.strict,
                allow_machine_mismatch: a.allow_machine_mismatch,
                format: a.format.into(),
                color,
                ..Default::default()
            };
            check::check(&options, out)?
        }
        Command::Report(a) => {
            let options = report::ReportOptions {
                results: a.results,
                format: a.format.into(),
                splice: a.splice,
                rebuild: a.rebuild,
                color,
            };
            report::report(&options, out)?
        }
        Command::Logits(a) => logits::run(&a, out)?,
        Command::Capture(a) => capture::run(&a, out)?,
        Command::Generate(a) => generate::run(&a, out)?,
        Command::Perplexity(a) => perplexity::run(&a, out)?,
        Command::Estimate(a) => estimate::run(&a, color, out)?,
        Command::Profile(a) => profile::run(&a, color, out)?,
        Command::Convert(a) => convert::run(&a, out)?,
        Command::Inspect(a) => inspect::run(&a, out)?,
    })
}
