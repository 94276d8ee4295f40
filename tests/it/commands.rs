//! O5: the commands as people call them: the real program, in a terminal of some size and behind a pipe.

use std::{
    fs::File,
    io::Read as _,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
};

use rustix::{
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::support::*;

/// The program with these arguments, and nothing in its environment.
fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_inference-proxy"));
    command.args(args).env_clear().stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// What it says until it ends.
async fn output(command: &mut Command) -> Output {
    soon("the program has ended", command.output()).await.unwrap()
}

/// The program in a terminal.
struct Terminal {
    /// The end at which a person would sit.
    front: Arc<File>,
    child: Child,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    fn run(args: &[&str], columns: u16, rows: u16) -> Terminal {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let front = openpt(flags).unwrap();
        unlockpt(&front).unwrap();
        let back = ioctl_tiocgptpeer(&front, flags).unwrap();
        let front = Arc::new(File::from(front));
        let shown = Arc::<Mutex<Vec<u8>>>::default();
        resize(&front, columns, rows);
        let child = program(args).stdout(back).spawn().unwrap();
        let (reading, to) = (front.clone(), shown.clone());
        // Ends when the program does: nobody else has the other end.
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(n @ 1..) = (&*reading).read(&mut piece) {
                to.lock().unwrap().extend_from_slice(&piece[..n]);
            }
        });
        Terminal { front, child, shown }
    }

    /// All that was shown, with plain line ends.
    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).replace('\r', "")
    }

    /// The lines of the last picture that is complete, without colours and the like, if there is one yet.
    fn picture(&self) -> Option<Vec<String>> {
        let shown = self.shown();
        let pictures: Vec<&str> = shown.split("\x1b[H").skip(1).collect();
        let [.., complete, _] = pictures[..] else { return None };
        Some(complete.split('\n').map(plain).collect())
    }

    async fn ended(&mut self) -> Option<i32> {
        soon("the program has ended", self.child.wait()).await.unwrap().code()
    }
}

fn resize(terminal: &File, columns: u16, rows: u16) {
    tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}

/// A line without what a terminal does not show.
fn plain(line: &str) -> String {
    let mut parts = line.split("\x1b[");
    let first = parts.next().unwrap().to_owned();
    parts.fold(first, |line, part| line + part.trim_start_matches(|c: char| !c.is_alphabetic()).get(1..).unwrap_or(""))
}

/// A proxy that sees containers of which none is live, and where to ask it.
async fn busy() -> (TestApp, String) {
    let app = TestApp::start().await;
    let nobody = "127.0.0.1:9".parse().unwrap();
    for name in ["a", "b", "c", "d", "e", "f"] {
        app.announce(Spec::at(name, nobody).label("inference.weight", "as much as it can take")).await;
    }
    let url = format!("http://{}", app.addr());
    eventually("all are seen", async || {
        let status = app.ask(&Request::get("/status")).await.json();
        status["containers"].as_array().unwrap().len() == 6
    })
    .await;
    (app, url)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_the_table_is_as_wide_as_its_terminal() {
    let (_app, url) = busy().await;
    // Rows of the table are as long as they are.
    let longest = |text: &str| {
        let texts = text.lines().map(plain).filter(|line| line.starts_with("    "));
        texts.map(|line| line.chars().count()).max().unwrap()
    };
    let piped = output(&mut program(&["status", "--url", &url])).await;
    assert!((61..=100).contains(&longest(&String::from_utf8(piped.stdout).unwrap())));
    let mut terminal = Terminal::run(&["status", "--url", &url], 60, 10);
    assert_eq!(terminal.ended().await, Some(0));
    eventually("all of it is shown", async || terminal.shown().contains("LATELY")).await;
    assert!(longest(&terminal.shown()) <= 60, "{}", terminal.shown());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_what_is_watched_fits_the_terminal_when_its_size_changes_too() {
    let (_app, url) = busy().await;
    let terminal = Terminal::run(&["status", "--watch", "--url", &url], 100, 10);
    eventually("a picture is shown", async || terminal.picture().is_some()).await;
    let picture = terminal.picture().unwrap();
    assert!(picture[0].starts_with("inference-proxy"), "{picture:?}");
    assert_eq!(picture.len(), 10, "{picture:?}");
    assert!(picture[9].starts_with("… ") && picture[9].ends_with(" more lines"), "{picture:?}");
    resize(&terminal.front, 100, 200);
    eventually("there is room for everything", async || {
        let picture = terminal.picture().unwrap();
        picture.iter().any(|line| line == "LATELY") && !picture.iter().any(|line| line.ends_with(" more lines"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_watching_leaves_the_terminal_as_it_was() {
    let (_app, url) = busy().await;
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut terminal = Terminal::run(&["status", "--watch", "--url", &url], 100, 30);
        eventually("something is shown", async || terminal.shown().contains("inference-proxy")).await;
        assert!(terminal.shown().starts_with("\x1b[?1049h\x1b[?25l"), "{:?}", terminal.shown());
        let pid = terminal.child.id().unwrap();
        kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), signal).unwrap();
        assert_eq!(terminal.ended().await, Some(0), "{signal:?}");
        eventually(format!("the terminal is as it was after {signal:?}"), async || {
            terminal.shown().ends_with("\x1b[?25h\x1b[?1049l")
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_watching_ends_when_nobody_reads_any_more() {
    let (_app, url) = busy().await;
    let mut child =
        program(&["status", "--watch", "--url", &url]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(soon("a line", lines.next_line()).await.unwrap().unwrap().starts_with("inference-proxy"));
    drop(lines);
    let Output { status, stderr, .. } = soon("the program has ended", child.wait_with_output()).await.unwrap();
    assert_eq!((status.code(), String::from_utf8(stderr).unwrap().as_str()), (Some(0), ""));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o05_a_url_that_cannot_be_is_said_with_what_can() {
    for (url, expected) in [
        ("http://127.0.0.1:99999", "no port or one from 1 to 65535"),
        ("127.0.0.1:18505", "expected a URL that begins with http://"),
        ("https://127.0.0.1:18505", "expected a URL that begins with http://"),
    ] {
        for args in [&["status"][..], &["status", "--watch"], &["healthcheck"]] {
            let output = output(program(args).args(["--url", url])).await;
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{args:?} {said}");
            assert!(said.contains(url) && said.contains(expected) && !said.contains(":80:"), "{args:?} {said}");
            assert!(!said.contains("nobody listens") && !said.contains("is the proxy running"), "{args:?} {said}");
        }
    }
    let mut serve = program(&[]);
    serve.env("PROXY_PORT", "0").env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:99999");
    let Output { status, stderr, .. } = output(&mut serve).await;
    let said = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains("OTEL_EXPORTER_OTLP_ENDPOINT") && said.contains("1 to 65535"), "{said}");
}
