//! O1, O4, O7: `/metrics` as Prometheus reads it, and the dashboard as Grafana would ask for it.
//!
//! Where `promtool` and `prometheus` are installed they are asked; `PROMETHEUS_REQUIRED=1` makes their absence a failure.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use inference_proxy::telemetry::families::{self, Kind};
use serde_json::Value;

use crate::support::*;

/// A program that may not be installed; without it there is nothing to test, unless it is required.
#[expect(clippy::disallowed_methods, reason = "whether it is required is said by who runs the tests")]
fn program(name: &str) -> Option<PathBuf> {
    let folders = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.exists());
    assert!(found.is_some() || env::var_os("PROMETHEUS_REQUIRED").is_none(), "{name} is required, and not installed");
    if found.is_none() {
        eprintln!("{name} is not installed: nothing tested");
    }
    found
}

/// A model's name with what must be escaped, as it stands in JSON.
const ODD_MODEL: &str = r#"m \"1\"\\n"#;

/// A proxy on whose page nearly every series has something to say.
async fn lively() -> (TestApp, [Upstream; 2]) {
    let (a, b) = (Upstream::start("a", &[ODD_MODEL]).await, Upstream::start("b", &["n"]).await);
    let app = TestApp::start().await;
    app.add(Spec::of(&a).label("inference.max_inflight", 1)).await;
    app.add(Spec::of(&b)).await;
    traffic(&app, &a).await;
    (app, [a, b])
}

async fn traffic(app: &TestApp, a: &Upstream) {
    for _ in 0..3 {
        a.script(sse_reply(&[
            "data: {\"choices\":[{\"delta\":{\"content\":\"t\"}}]}\n\n",
            "data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n\n",
            "data: {\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":5,\"prompt_tokens_details\":{\"cached_tokens\":1}}}\n\n",
        ]));
        assert_eq!(app.ask(&Request::chat(ODD_MODEL)).await.status, 200);
    }
    assert_eq!(app.ask(&Request::chat("unheard-of")).await.status, 404);
    a.script(reply("500 Internal Server Error", "", "no"));
    assert_eq!(app.ask(&Request::chat(ODD_MODEL)).await.status, 500);
    // One waits for the other.
    let gate = Gate::shut();
    let index = a.count();
    a.script(held_reply(&gate));
    let (mut first, mut second) = (app.client().await, app.client().await);
    first.send(Request::chat(ODD_MODEL).bytes()).await;
    a.whole(index).await;
    second.send(Request::chat(ODD_MODEL).bytes()).await;
    eventually("one stands in line", async || app.metric("proxy_queue_depth", &[]).await == Some(1.0)).await;
    gate.open();
    assert_eq!((first.answer().await.status, second.answer().await.status), (200, 200));
}

async fn page(app: &TestApp) -> String {
    app.ask(&Request::get("/metrics")).await.text()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o04_every_metric_is_described_with_its_kind_and_unit() {
    let (app, _upstreams) = lively().await;
    let page = page(&app).await;
    for family in families::ALL {
        let name = family.name;
        assert!(
            page.contains(&format!("# HELP {name} {}\n# TYPE {name} {}\n", family.help, family.kind.as_str())),
            "{name}"
        );
        let unit = family.unit().map(|unit| format!("# UNIT {name} {unit}\n"));
        assert!(unit.is_none_or(|unit| page.contains(&unit)), "{name}");
    }
    assert_eq!(page.matches("# TYPE ").count(), families::ALL.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o01_promtool_finds_nothing_to_complain_of() {
    let Some(promtool) = program("promtool") else { return };
    let (app, _upstreams) = lively().await;
    let page = page(&app).await;
    let check = |page: &str| {
        let mut child = Command::new(&promtool)
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    };
    assert_eq!(check(&page), (true, String::new()), "{page}");
    let (is_fine, said) = check("# TYPE a_total gauge\na_total 1\n");
    assert!(!is_fine && said.contains("a_total"), "it does complain where it should: {said}");
    let settings = root().join("docs/observability/prometheus.yml");
    let status =
        Command::new(&promtool).args(["check", "config"]).arg(settings).stdout(Stdio::null()).status().unwrap();
    assert!(status.success());
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// One panel's query.
struct Query {
    panel: String,
    text: String,
}

/// All queries of the dashboard, its variables filled in.
fn queries() -> Vec<Query> {
    let path = root().join("docs/observability/grafana/dashboards/inference-proxy.json");
    let dashboard: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        for target in panel["targets"].as_array().into_iter().flatten() {
            let text = target["expr"].as_str().unwrap();
            let text = text
                .replace("$model", ".*")
                .replace("$operation", ".*")
                .replace("$job", "inference-proxy")
                .replace("$__rate_interval", "1m");
            assert!(!text.contains('$'), "{title}: an unknown variable in {text}");
            queries.push(Query { panel: title.to_owned(), text });
        }
    }
    queries
}

/// Words of a query, with the byte before and after each.
fn words(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
        .map(move |word| (word.as_ptr() as usize - text.as_ptr() as usize, word))
}

/// The names of metrics in a query: what begins as ours do, outside of quotes.
fn metrics_in(query: &str) -> BTreeSet<&str> {
    let unquoted = |at: usize| query[..at].matches('"').count().is_multiple_of(2);
    let ours = |word: &str| word.starts_with("proxy_") || word.starts_with("process_");
    words(query).filter(|(at, word)| ours(word) && unquoted(*at)).map(|(_, word)| word).collect()
}

/// The labels that a query names: in front of `=`, `=~` and `!=`, and in the brackets of `by`.
fn labels_in(query: &str) -> BTreeSet<&str> {
    let mut labels = BTreeSet::new();
    for (at, word) in words(query) {
        let rest = query[at + word.len()..].trim_start();
        if rest.starts_with('=') || rest.starts_with("!=") || rest.starts_with("!~") {
            labels.insert(word);
        }
        if let Some(list) = rest.strip_prefix('(').filter(|_| word == "by") {
            labels.extend(list.split(')').next().unwrap().split(',').map(str::trim));
        }
    }
    labels
}

/// Labels that Prometheus adds to what it scrapes.
const OF_THE_SCRAPE: [&str; 2] = ["instance", "job"];

#[test]
fn what_is_read_out_of_a_query_is_what_is_in_it() {
    let query = "sum by (le, model) (rate(proxy_x_bucket{a=~\"proxy_y\", b!=\"c\"}[1m])) / process_z";
    assert_eq!(metrics_in(query), ["process_z", "proxy_x_bucket"].into());
    assert_eq!(labels_in(query), ["a", "b", "le", "model"].into());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o07_every_query_of_the_dashboard_asks_for_what_there_is() {
    let (app, _upstreams) = lively().await;
    let page = page(&app).await;
    let kinds: BTreeMap<&str, &str> =
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    let mut asked = BTreeSet::new();
    for Query { panel, text } in queries() {
        let metrics = metrics_in(&text);
        assert!(!metrics.is_empty(), "{panel}: no metric in {text}");
        let mut known: BTreeSet<&str> = OF_THE_SCRAPE.into();
        for metric in metrics {
            let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| metric.strip_suffix(suffix));
            let name = of_histogram.filter(|name| kinds.get(name) == Some(&"histogram")).unwrap_or(metric);
            let kind = kinds.get(name).unwrap_or_else(|| panic!("{panel}: there is no {metric}: {text}"));
            assert_eq!(*kind == "histogram", name != metric, "{panel}: {text}");
            let family = families::ALL.iter().find(|family| family.name == name).unwrap();
            known.extend(family.labels);
            if metric.ends_with("_bucket") {
                known.insert("le");
            }
            let is_counter = matches!(family.kind, Kind::Counter | Kind::Histogram);
            assert!(!is_counter || text.contains("rate(") || text.contains("increase("), "{panel}: {text}");
            asked.insert(name.to_owned());
        }
        let unknown: Vec<&str> = labels_in(&text).difference(&known).copied().collect();
        assert!(unknown.is_empty(), "{panel}: no label {unknown:?}: {text}");
    }
    let unasked: Vec<&str> =
        families::ALL.iter().map(|family| family.name).filter(|name| !asked.contains(*name)).collect();
    assert!(unasked.is_empty(), "on no panel: {unasked:?}");
}

#[test]
fn o07_what_the_example_mounts_is_there() {
    let example = std::fs::read_to_string(root().join("compose.example.yml")).unwrap();
    let mounted: Vec<&str> = example
        .lines()
        .filter_map(|line| line.trim_start_matches([' ', '-']).strip_prefix("./")?.split(':').next())
        .collect();
    assert_eq!(mounted.len(), 4, "{mounted:?}");
    for path in mounted {
        assert!(root().join(path).exists(), "{path}");
    }
    // Where Grafana is told to look for dashboards is where they are put.
    let provider = root().join("docs/observability/grafana/provisioning/dashboards/dashboards.yml");
    let provider = std::fs::read_to_string(provider).unwrap();
    assert!(provider.contains("path: /etc/grafana/dashboards\n") && example.contains(":/etc/grafana/dashboards:ro\n"));
}

/// A Prometheus that scrapes one proxy every second; ends when dropped.
struct Prometheus {
    child: Child,
    folder: PathBuf,
    addr: std::net::SocketAddr,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Prometheus {
    fn start(program: &Path, proxy: std::net::SocketAddr) -> Prometheus {
        let folder = env::temp_dir().join(format!("it-prometheus-{}", fastrand::u64(..)));
        std::fs::create_dir_all(&folder).unwrap();
        let settings = format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: inference-proxy\n  static_configs: [{{targets: ['{proxy}']}}]\n"
        );
        std::fs::write(folder.join("prometheus.yml"), settings).unwrap();
        // It cannot be told to take any free port: another process could take this one first, but hardly does.
        let addr = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child = Command::new(program)
            .arg(format!("--config.file={}", folder.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address={addr}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Prometheus { child, folder, addr }
    }

    /// The series that a query leads to.
    async fn ask(&self, query: &str) -> Result<Vec<Value>, String> {
        let Ok(stream) = tokio::net::TcpStream::connect(self.addr).await else {
            return Err("it does not listen".to_owned());
        };
        let query = percent_encoding::utf8_percent_encode(query, percent_encoding::NON_ALPHANUMERIC);
        let answer = Client::on(stream).ask(&Request::get(&format!("/api/v1/query?query={query}"))).await;
        if answer.status != 200 {
            return Err(answer.text());
        }
        Ok(answer.json()["data"]["result"].as_array().cloned().unwrap_or_default())
    }
}

/// What may be silent in a proxy that is well, and whose containers are fed by hand.
const MAY_BE_SILENT: [&str; 2] = ["Events of the engine", "Load by their own account"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o07_a_real_prometheus_answers_every_query_of_the_dashboard() {
    let Some(program) = program("prometheus") else { return };
    let (app, [a, _b]) = lively().await;
    let prometheus = Prometheus::start(&program, app.addr());
    let scraped = async |times: &str| {
        eventually("the proxy has been scraped", async || {
            let found = prometheus.ask(&format!("count_over_time(proxy_backends_active[1m]) >= {times}")).await;
            found.is_ok_and(|series| !series.is_empty())
        })
        .await;
    };
    scraped("2").await;
    traffic(&app, &a).await;
    scraped("4").await;
    let up = prometheus.ask("up{job=\"inference-proxy\"}").await.unwrap();
    assert_eq!(up[0]["value"][1], "1", "{up:?}");
    let mut empty = Vec::new();
    for Query { panel, text } in queries() {
        match prometheus.ask(&text).await {
            Err(error) => panic!("{panel}: {text}: {error}"),
            Ok(series) if series.is_empty() && !MAY_BE_SILENT.contains(&&*panel) => empty.push((panel, text)),
            Ok(_) => {}
        }
    }
    assert!(empty.is_empty(), "nothing to show: {empty:#?}");
    // What is told twice is dropped without a word otherwise.
    let scraped = prometheus.ask("scrape_samples_scraped - scrape_samples_post_metric_relabeling").await.unwrap();
    assert_eq!(scraped[0]["value"][1], "0", "{scraped:?}");
}
