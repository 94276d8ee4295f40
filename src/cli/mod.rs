//! The command line: what each subcommand takes, and the help that lists every variable and every label with its default.

pub mod commands;

use std::{net::IpAddr, time::Duration};

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::{
    base::config::{KNOBS, LogFormat},
    control::labels,
    demo::DemoOptions,
    observe::status::text::Form,
};

/// What the user asked for.
#[derive(Debug)]
pub struct Cli {
    /// The subcommand.
    pub call: Call,
    /// `-v` and `-q`: a filter that overrides `PROXY_LOG`.
    pub log: Option<&'static str>,
    /// `-L`: overrides `PROXY_LOG_FORMAT`.
    pub log_format: Option<LogFormat>,
}

/// One subcommand with its arguments.
#[derive(Debug)]
pub enum Call {
    /// Run the proxy.
    Serve,
    /// Ask a running proxy whether it lives.
    Healthcheck {
        /// Takes to ask; `None`: the proxy of this environment.
        url: Option<String>,
    },
    /// Show what a running proxy knows.
    Status {
        /// Takes to ask; `None`: the proxy of this environment.
        url: Option<String>,
        /// As what.
        form: Form,
    },
    /// Run a small inference server without a model.
    DemoBackend(DemoOptions),
    /// Hold memory; the demo backend's child process for trying out-of-memory kills.
    AllocateMb(usize),
}

/// Reads the arguments; prints help or complaints and ends the process where clap does so.
///
/// # Errors
/// What clap says about the arguments, help and version included.
pub fn parse(args: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Cli, clap::Error> {
    let matches = command().try_get_matches_from(args)?;
    let log = match (matches.get_count("verbose"), matches.get_count("quiet")) {
        (0, 0) => None,
        (1, 0) => Some("debug"),
        (_, 0) => Some("trace"),
        (_, 1) => Some("warn"),
        (_, _) => Some("error"),
    };
    let log_format = matches.get_one::<String>("log-format").and_then(|text| LogFormat::parse(text));
    let url = |matches: &ArgMatches| matches.get_one::<String>("url").cloned();
    let call = match matches.subcommand() {
        Some(("healthcheck", m)) => Call::Healthcheck { url: url(m) },
        Some(("status", m)) => {
            let form = match (m.get_flag("json"), m.get_flag("watch")) {
                (true, _) => Form::Json,
                (false, true) => Form::Watch,
                (false, false) => Form::Table,
            };
            Call::Status { url: url(m), form }
        }
        Some(("demo-backend", m)) => match m.get_one::<usize>("allocate-mb") {
            Some(megabytes) => Call::AllocateMb(*megabytes),
            None => Call::DemoBackend(demo_options(m)),
        },
        _ => Call::Serve,
    };
    Ok(Cli { call, log, log_format })
}

fn demo_options(matches: &ArgMatches) -> DemoOptions {
    let defaults = DemoOptions::default();
    let millis = |name: &str, default: Duration| matches.get_one(name).map_or(default, |ms| Duration::from_millis(*ms));
    DemoOptions {
        bind: matches.get_one("bind").copied().unwrap_or(defaults.bind),
        port: matches.get_one("port").copied().unwrap_or(defaults.port),
        name: matches.get_one::<String>("name").cloned().or(defaults.name),
        models: matches.get_many::<String>("model").map_or(defaults.models, |models| models.cloned().collect()),
        latency: millis("latency-ms", defaults.latency),
        tokens: matches.get_one("tokens").copied().unwrap_or(defaults.tokens),
        token_gap: millis("token-gap-ms", defaults.token_gap),
        control: matches.get_flag("control"),
    }
}

fn demo_backend() -> Command {
    Command::new("demo-backend")
        .about("Run a small OpenAI/Anthropic-compatible server that needs no GPU and no weights")
        .arg(
            Arg::new("bind")
                .long("bind")
                .value_name("IP")
                .value_parser(value_parser!(IpAddr))
                .help("address to listen on [default: all]"),
        )
        .arg(
            Arg::new("port")
                .long("port")
                .value_name("PORT")
                .value_parser(value_parser!(u16))
                .help("port to listen on [default: 8000]"),
        )
        .arg(Arg::new("name").long("name").value_name("NAME").help("name in its answers [default: the host's]"))
        .arg(
            Arg::new("model")
                .long("model")
                .value_name("NAME")
                .action(ArgAction::Append)
                .help("model to serve, may be repeated [default: demo]"),
        )
        .arg(
            Arg::new("latency-ms")
                .long("latency-ms")
                .value_name("N")
                .value_parser(value_parser!(u64))
                .help("time before the first byte of an answer, in milliseconds [default: 0]"),
        )
        .arg(
            Arg::new("tokens")
                .long("tokens")
                .value_name("N")
                .value_parser(value_parser!(u32))
                .help("length of an answer, in tokens [default: 16]"),
        )
        .arg(
            Arg::new("token-gap-ms")
                .long("token-gap-ms")
                .value_name("N")
                .value_parser(value_parser!(u64))
                .help("time between two tokens, in milliseconds [default: 20]"),
        )
        .arg(
            Arg::new("control")
                .long("control")
                .action(ArgAction::SetTrue)
                .help("let GET /_ctl change its behaviour, so that you can try its failures"),
        )
        .arg(Arg::new("allocate-mb").long("allocate-mb").value_parser(value_parser!(usize)).hide(true))
}

/// The command line as clap sees it.
pub fn command() -> Command {
    let url = |help: &'static str| Arg::new("url").long("url").value_name("URL").help(help);
    Command::new("inference-proxy")
        .version(env!("CARGO_PKG_VERSION"))
        .about(
            "One API for all the inference servers that run as Docker containers with the label inference.enable=true",
        )
        .after_help(format!("{}\n\n{}", variables(), container_labels()))
        .arg(
            Arg::new("verbose").short('v').action(ArgAction::Count).global(true).help("log more; twice for everything"),
        )
        .arg(
            Arg::new("quiet")
                .short('q')
                .action(ArgAction::Count)
                .global(true)
                .help("log warnings only; twice for errors only"),
        )
        .arg(
            Arg::new("log-format")
                .short('L')
                .value_name("FORMAT")
                .value_parser(["json", "text", "yaml"])
                .global(true)
                .help("format of the log"),
        )
        .subcommand(Command::new("serve").about("Run the proxy (the default)"))
        .subcommand(
            Command::new("healthcheck")
                .about("Exit with 0 if the proxy answers, else with 1; for HEALTHCHECK in images without a shell")
                .arg(url("URL to ask; an answer 2xx is healthy [default: /healthz of the proxy here]")),
        )
        .subcommand(
            Command::new("status")
                .about("Show every labelled container, its state, and why it is or is not routed")
                .arg(url("the proxy to ask [default: the proxy here]"))
                .arg(
                    Arg::new("json")
                        .long("json")
                        .action(ArgAction::SetTrue)
                        .conflicts_with("watch")
                        .help("print the JSON of GET /status"),
                )
                .arg(
                    Arg::new("watch")
                        .long("watch")
                        .action(ArgAction::SetTrue)
                        .help("show the table again every second, as much as fits the terminal, until Ctrl-C"),
                ),
        )
        .subcommand(demo_backend())
}

fn variables() -> String {
    section("Environment", KNOBS.iter().map(|knob| (knob.name, knob.default, knob.help)))
}

fn container_labels() -> String {
    let rows = labels::KNOWN.iter().map(|label| (label.name, label.default, label.help));
    section("Labels, on the inference containers", rows)
}

/// A part of the help: what each name means, with its default.
fn section<'a>(title: &str, rows: impl Iterator<Item = (&'a str, &'a str, &'a str)> + Clone) -> String {
    let width = rows.clone().map(|(name, ..)| name.len()).max().unwrap_or(0);
    let line = |(name, default, help): (&str, &str, &str)| {
        let default = if default.is_empty() { String::new() } else { format!(" [default: {default}]") };
        format!("  {name:width$}  {help}{default}")
    };
    let lines: Vec<String> = rows.map(line).collect();
    format!("{title}:\n{}", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Cli, clap::Error> {
        parse(std::iter::once("inference-proxy").chain(args.iter().copied()).map(Into::into))
    }

    #[test]
    fn the_command_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn no_subcommand_serves() {
        assert!(matches!(parsed(&[]).unwrap().call, Call::Serve));
        assert!(matches!(parsed(&["serve", "-v"]).unwrap(), Cli { call: Call::Serve, log: Some("debug"), .. }));
        assert!(matches!(
            parsed(&["-qq", "-L", "yaml"]).unwrap(),
            Cli { log: Some("error"), log_format: Some(LogFormat::Yaml), .. }
        ));
    }

    #[test]
    fn subcommands_take_their_arguments() {
        let Call::DemoBackend(options) =
            parsed(&["demo-backend", "--port", "9", "--model", "a", "--model", "b", "--latency-ms", "7"]).unwrap().call
        else {
            panic!("not a demo backend");
        };
        assert_eq!((options.port, options.latency), (9, Duration::from_millis(7)));
        assert_eq!(options.models, ["a", "b"]);
        for (args, expected) in
            [(&["status"][..], Form::Table), (&["status", "--json"], Form::Json), (&["status", "--watch"], Form::Watch)]
        {
            assert!(matches!(parsed(args).unwrap().call, Call::Status { form, url: None } if form == expected));
        }
        assert!(parsed(&["status", "--json", "--watch"]).is_err());
        assert!(parsed(&["serve", "--port", "1"]).is_err());
        assert!(parsed(&["-L", "xml"]).is_err());
    }

    #[test]
    fn help_lists_every_variable_with_its_default() {
        let help = command().render_help().to_string();
        for knob in KNOBS {
            assert!(help.contains(knob.name) && help.contains(knob.default), "{}", knob.name);
        }
    }

    /// A message about a label that is none sends its reader here.
    #[test]
    fn help_lists_every_label_with_its_default() {
        let help = command().render_help().to_string();
        for label in labels::KNOWN {
            let line = help.lines().find(|line| line.trim_start().starts_with(&format!("{} ", label.name)));
            let line = line.unwrap_or_else(|| panic!("{} is not in {help}", label.name));
            assert!(line.contains(label.help) && line.contains(label.default), "{line}");
        }
    }
}
