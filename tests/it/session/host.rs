//! Another process on the same data directory: a test, run again as a role that it may kill.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};

use super::fixture::World;
use crate::child::again;

/// Set in the role: the data directory.
const DATA: &str = "AGENTVM_TEST_DATA";

/// What a role reports are the lines that begin with this: the test harness writes there too.
const MARK: char = '=';

pub(super) struct Host {
    process: Child,
    output: BufReader<ChildStdout>,
}

impl Host {
    /// Starts `test` again as `role`, through `wrapper` if there is one.
    pub(super) fn start(wrapper: &[&str], test: &str, role: &str, data: &Path) -> Self {
        let mut process = again(wrapper, test, role)
            .env(DATA, data)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        Self { process, output }
    }

    /// What it reports next; `None`: it has ended. A report that its end cut off is none.
    pub(super) fn report(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            self.output.read_line(&mut line).unwrap();
            let report = line.strip_suffix('\n')?.strip_prefix(MARK);
            if let Some(report) = report {
                return Some(report.to_owned());
            }
        }
    }

    /// The rest of the next report, which has to begin with `word`.
    pub(super) fn expect(&mut self, word: &str) -> String {
        let report = self.report();
        let report = report.unwrap_or_else(|| panic!("it ended before it reported {word:?}"));
        let rest = report.strip_prefix(word);
        rest.unwrap_or_else(|| panic!("{report:?} where {word:?} was due"))
            .trim()
            .to_owned()
    }

    /// SIGKILL. Returns what it had still reported.
    pub(super) fn kill(mut self) -> Vec<String> {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        std::iter::from_fn(|| self.report()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Gone already, unless the test fails.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// In a role: the data directory that it was given.
pub(super) fn data() -> PathBuf {
    std::env::var_os(DATA).unwrap().into()
}

/// In a role: a client on the data directory that it was given. Its own files lie beside that, so that
/// they go with it when the role is killed.
pub(super) async fn world() -> World {
    let data = data();
    let own = tempfile::tempdir_in(data.parent().unwrap()).unwrap();
    World::at(own, data).await
}

/// In a role: tells the test.
pub(super) fn report(what: impl std::fmt::Display) {
    // The harness leaves its own line unfinished.
    report_all(&format!("\n{MARK}{what}\n"));
}

/// In a role: lines of which each is a report, at once.
pub(super) fn report_lines(lines: impl Iterator<Item = String>) {
    let mut text = String::new();
    for line in lines {
        text.push(MARK);
        text.push_str(&line);
        text.push('\n');
    }
    report_all(&text);
}

fn report_all(text: &str) {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).unwrap();
    stdout.flush().unwrap();
}
