//! The command line of drupe.
#![forbid(unsafe_code)]

mod cli;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::NonEmptyStringValueParser;
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use cli::CliError;
use cri_server::config::{Config, DEFAULT_YAML};
use cri_server::{check, serve};

const DEFAULT_CONFIG: &str = "/etc/drupe/config.yaml";

/// A container runtime in which every pod has its own kernel.
#[derive(Parser)]
#[command(name = "drupe", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve CRI v1 on a unix socket until told to stop. Pods outlive it.
    Serve {
        /// The configuration; without one, /etc/drupe/config.yaml if it
        /// exists, else the defaults.
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Tell what this node can do and what is missing, with the remedy. Exits
    /// with 1 if a pod could not run.
    Check {
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Print the default configuration, every key with its meaning.
    Config,
    /// List the node's pods, with the time that each one's start took.
    Pods {
        /// The configuration that the daemon serves by.
        #[arg(long)]
        config: Option<PathBuf>,
        #[arg(short, long, value_enum, default_value = "table")]
        output: cli::pods::Format,
    },
    /// Show what the pods that run use, again and again.
    Top {
        /// The configuration that the daemon serves by.
        #[arg(long)]
        config: Option<PathBuf>,
        #[command(flatten)]
        options: cli::top::Options,
    },
    /// Show what a pod's guest has printed on its console, of which the newest
    /// 128 to 256 KiB are kept. Logs of containers are shown by `crictl logs`.
    Logs {
        /// The configuration that the daemon serves by.
        #[arg(long)]
        config: Option<PathBuf>,
        /// The guest's console: its kernel and its agent.
        #[arg(long, required = true)]
        console: bool,
        /// Go on with what it prints, until the pod's machine ends.
        #[arg(short, long)]
        follow: bool,
        /// The beginning of its id, or namespace/name.
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        pod: String,
    },
    /// Run a root shell in a pod's guest, or another command. The guest has no
    /// programs of its own: an image on the node brings them, and the guest's
    /// files are at /guest. Off unless debug.shells of the configuration is
    /// true. Exits with what the command exits with.
    Debug {
        /// The configuration that the daemon serves by.
        #[arg(long)]
        config: Option<PathBuf>,
        #[command(flatten)]
        options: cli::debug::Options,
    },
    /// Measure what pods cost this node beyond their containers, and tell what
    /// a RuntimeClass should declare as overhead.
    Overhead {
        /// The configuration that the daemon serves by.
        #[arg(long)]
        config: Option<PathBuf>,
        #[arg(short, long, value_enum, default_value = "table")]
        output: cli::overhead::Format,
        #[command(flatten)]
        options: cli::overhead::Options,
    },
    /// Print a RuntimeClass for each handler of the configuration, with the
    /// overhead that is measured on this node; --apply installs them.
    Runtimeclass {
        /// The configuration that the daemon serves by.
        #[arg(long)]
        config: Option<PathBuf>,
        #[command(flatten)]
        options: cli::runtimeclass::Options,
    },
    /// Print what makes a shell complete this command line.
    Completions { shell: Shell },
    /// Print this program's page for man, or that of one of its commands.
    Man { command: Option<String> },
}

/// The description of this command line.
fn command() -> clap::Command {
    Cli::command()
}

fn main() -> ExitCode {
    end_on_panic();
    match Cli::parse().command {
        Command::Config => {
            print!("{}", DEFAULT_YAML);
            ExitCode::SUCCESS
        }
        Command::Check { config } => with_config(config, |config| {
            if check::report(&config) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }),
        Command::Serve { config } => with_config(config, |config| {
            start_log(&config);
            match serve::run(config) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    tracing::error!("{error:#}");
                    ExitCode::FAILURE
                }
            }
        }),
        Command::Pods { config, output } => with_config(config, |config| {
            told(cli::pods::run(&config.socket, output))
        }),
        Command::Top { config, options } => with_config(config, |config| {
            told(cli::top::run(&config.socket, &options))
        }),
        Command::Logs {
            config,
            follow,
            pod,
            ..
        } => with_config(config, |config| {
            told(cli::logs::run(&config.socket, &pod, follow))
        }),
        Command::Debug { config, options } => with_config(config, |config| {
            match cli::debug::run(&config.socket, &options) {
                Ok(code) => ExitCode::from(code),
                Err(error) => told(Err(error)),
            }
        }),
        Command::Overhead {
            config,
            output,
            options,
        } => with_config(config, |config| {
            told(cli::overhead::run(&config, &options, output))
        }),
        Command::Runtimeclass { config, options } => with_config(config, |config| {
            told(cli::runtimeclass::run(&config, &options))
        }),
        Command::Completions { shell } => told(cli::documents::completions(command(), shell)),
        Command::Man { command: of } => match cli::documents::man(command(), of.as_deref()) {
            Some(outcome) => told(outcome),
            None => {
                let of = of.unwrap_or_default();
                eprintln!("drupe: there is no command {of:?}: `drupe help` lists them");
                ExitCode::from(2)
            }
        },
    }
}

/// An error is one line.
fn told(outcome: Result<(), CliError>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is_closed_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("drupe: {:#}", anyhow::Error::new(error));
            ExitCode::FAILURE
        }
    }
}

/// A fault in one task must not leave a daemon that only looks alive: it ends,
/// is started again and takes its pods up, but not one that ends it again.
fn end_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        podsandbox::faults::note_panic();
        std::process::abort();
    }));
}

fn with_config(path: Option<PathBuf>, then: impl FnOnce(Config) -> ExitCode) -> ExitCode {
    let default = PathBuf::from(DEFAULT_CONFIG);
    let loaded = match path {
        Some(path) => Config::load(&path),
        None if default.exists() => Config::load(&default),
        None => Ok(Config::default()),
    };
    match loaded {
        Ok(config) => then(config),
        Err(error) => {
            eprintln!("drupe: {error}");
            ExitCode::from(2)
        }
    }
}

fn start_log(config: &Config) {
    let filter = format!(
        "{level},h2=warn,hyper=warn,tower=warn",
        level = config.log_level.as_str()
    );
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
}
