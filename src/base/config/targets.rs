//! Targets of `PROXY_LOG` from before modules stood in folders by plane: users may have them in their settings.

use super::OWN_TARGET;

/// The first word of a module's path as it was, and the words that stand for it now. A module that is new does not
/// belong here, because no setting can have its old name.
const MOVED: &[(&str, &str)] = &[
    ("admin", "observe::pages"),
    ("affinity", "data::affinity"),
    ("backend", "pool::backend"),
    ("balance", "data::balance"),
    ("breaker", "pool::breaker"),
    ("budget", "pool::budget"),
    ("commands", "cli::commands"),
    ("config", "base::config"),
    ("discovery", "control::discovery"),
    ("error", "base::error"),
    ("fetch", "base::fetch"),
    ("foreign", "base::foreign"),
    ("http1", "wire::http1"),
    ("labels", "control::labels"),
    ("latency", "pool::latency"),
    ("lifecycle", "control::lifecycle"),
    ("listen", "data::listen"),
    ("load", "pool::load"),
    ("probe", "control::probe"),
    ("proxy", "data::proxy"),
    ("registry", "control::registry"),
    ("replay", "data::replay"),
    ("report", "observe::report"),
    ("scan", "wire::scan"),
    ("scrape", "control::scrape"),
    ("status", "observe::status"),
    ("table", "pool::table"),
    ("tally", "pool::tally"),
    ("upstream", "pool::upstream"),
    ("vital", "base::vital"),
    ("waiting", "pool::waiting"),
];

/// This part of a log filter with the target's name of today, if its target has moved.
pub(super) fn translated(part: &str) -> Option<String> {
    let path = part.strip_prefix(OWN_TARGET)?.strip_prefix("::")?;
    let end = path.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(path.len());
    let (first, rest) = path.split_at(end);
    let (_, now) = MOVED.iter().find(|(old, _)| *old == first)?;
    Some(format!("{OWN_TARGET}::{now}{rest}"))
}

/// The old target of this part of a log filter and that of today, if it has moved.
pub(super) fn renamed(part: &str) -> Option<(String, String)> {
    let target = |part: &str| part.split('=').next().unwrap_or_default().to_owned();
    Some((target(part), target(&translated(part)?)))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Config, Warning},
        *,
    };
    use std::path::Path;

    fn resolved(filter: &str) -> (String, Vec<Warning>) {
        let (config, warnings) = Config::from_vars([("PROXY_LOG", filter)]).unwrap();
        (config.log, warnings)
    }

    #[test]
    fn every_old_target_means_the_one_of_today_and_one_warning_names_it() {
        for (old, now) in MOVED {
            for rest in ["", "=debug", "::inner::part=trace"] {
                let (filter, warnings) = resolved(&format!("info,inference_proxy::{old}{rest}"));
                assert_eq!(filter, format!("info,inference_proxy::{now}{rest}"));
                let [warning] = &warnings[..] else { panic!("{warnings:?}") };
                let inner = rest.split('=').next().unwrap();
                assert_eq!(
                    warning.to_string(),
                    format!(
                        "PROXY_LOG has a target that was renamed and still works; write inference_proxy::{now}{inner} \
                         for inference_proxy::{old}{inner}"
                    )
                );
            }
        }
        let (filter, warnings) = resolved("warn,inference_proxy::proxy=debug, inference_proxy::registry,hyper=off");
        assert_eq!(filter, "warn,inference_proxy::data::proxy=debug,inference_proxy::control::registry,hyper=off");
        let [warning] = &warnings[..] else { panic!("{warnings:?}") };
        assert!(warning.to_string().ends_with(
            "; write inference_proxy::data::proxy for inference_proxy::proxy, inference_proxy::control::registry for \
             inference_proxy::registry"
        ));
    }

    #[test]
    fn every_other_target_is_left_as_it_is() {
        for filter in [
            "debug",
            "inference_proxy",
            "inference_proxy=debug",
            "inference_proxy::app=debug",
            "inference_proxy::control::registry=debug",
            "inference_proxy::data",
            "inference_proxy::telemetry::otlp=debug",
            "inference_proxy::registr=debug",
            "inference_proxy::registry2=debug",
            "inference_proxy::nonsense",
            "inference_proxy::=debug",
            "inference_proxy_fuzz::registry=debug",
            "registry=debug",
            "hyper::proxy=debug",
        ] {
            assert_eq!(resolved(filter), (filter.to_owned(), Vec::new()));
        }
    }

    #[test]
    fn every_target_of_today_is_a_module_and_no_old_one_is() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let is_module = |path: &str| {
            let path = path.replace("::", "/");
            src.join(format!("{path}.rs")).is_file() || src.join(path).join("mod.rs").is_file()
        };
        for (old, now) in MOVED {
            assert!(is_module(now), "{now} has moved: translate {old} to where it is now");
            assert!(!is_module(old), "{old} is a module again, and its name is translated to {now}");
        }
    }
}
