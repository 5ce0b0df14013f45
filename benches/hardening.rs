//! What the hardening costs a boot: the same build with it and without it, in turn.
//!
//! `cargo bench --bench hardening --features weaken --profile weak [-- <turns> [<layers>]]`. Each way is a
//! process of its own, as a host process would be.

#![expect(
    clippy::unwrap_used,
    reason = "a benchmark stops at the first surprise"
)]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agentvm::net::Policy;
use agentvm::net::secrets::Secrets;
use agentvm::vm::exec::{ExecOptions, exec};
use agentvm::vm::namespace::{BootOptions, boot};
use agentvm::vm::{DynVm, Limits};

/// All that a boot does only to confine what runs in the VM, but for its namespaces and limits.
const HARDENING: &str = "keyring,owner,see its own cgroup as the root,forbid nested namespaces,\
                         mask /proc,drop capabilities,no_new_privs,landlock,seccomp";

const TURNS: usize = 300;
/// Before those that count.
const WARM_UP: usize = 10;
/// The kernel takes the last VM's namespaces down meanwhile.
const SETTLE: Duration = Duration::from_millis(30);

/// Set in a competitor, to what the feature takes away.
const WITHOUT: &str = "AGENTVM_WEAKEN";
const ROLE: &str = "AGENTVM_BENCH_COMPETITOR";

fn main() {
    if std::env::var_os(ROLE).is_some() {
        return compete();
    }
    // Cargo adds an option of its own.
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench");
    let turns = arguments
        .next()
        .map_or(TURNS, |turns| turns.parse().unwrap());
    let layers = arguments.next().unwrap_or_else(|| HARDENING.to_owned());
    let mut competitors = [Competitor::new(""), Competitor::new(&layers)];
    let mut times = [Vec::new(), Vec::new()];
    for turn in 0..WARM_UP + turns {
        // Each goes first as often as the other.
        for nth in [turn % 2, (turn + 1) % 2] {
            std::thread::sleep(SETTLE);
            let time = competitors[nth].run();
            if turn >= WARM_UP {
                times[nth].push(time);
            }
        }
    }
    let mut ratios: Vec<f64> = times[0]
        .iter()
        .zip(&times[1])
        .map(|(hardened, bare)| hardened / bare)
        .collect();
    ratios.sort_by(f64::total_cmp);
    println!("boot + exec('true'), {turns} turns, with and without {layers}");
    for (name, times) in ["hardened", "without hardening"].iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let [p50, p99] = [50, 99].map(|percent| times[times.len() * percent / 100]);
        println!("  {name:<18} p50 {p50:.2} ms, p99 {p99:.2} ms");
    }
    let [low, p50, high] = median_with_interval(&ratios);
    println!("  hardened ÷ without, of each turn: {p50:.3} ({low:.3} to {high:.3})");
}

/// The median of what is sorted, and where it is with 95 % confidence, whatever the distribution.
fn median_with_interval(sorted: &[f64]) -> [f64; 3] {
    let count = sorted.len();
    // The order statistics that the binomial distribution (n, ½) leaves 2.5 % beyond, each.
    let below = (count.saturating_sub(2 * count.isqrt())) / 2;
    [below, count / 2, count - 1 - below].map(|rank| sorted[rank])
}

struct Competitor {
    process: Child,
    turns: ChildStdin,
    times: BufReader<ChildStdout>,
}

impl Competitor {
    fn new(without: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .env(ROLE, "")
            .env(WITHOUT, without)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            turns: process.stdin.take().unwrap(),
            times: BufReader::new(process.stdout.take().unwrap()),
            process,
        }
    }

    /// Milliseconds.
    fn run(&mut self) -> f64 {
        self.turns.write_all(b"\n").unwrap();
        let mut line = String::new();
        self.times.read_line(&mut line).unwrap();
        line.trim().parse().unwrap()
    }
}

impl Drop for Competitor {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A boot for each line that is read, until there are no more.
fn compete() {
    let data = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    for _ in std::io::stdin().lines() {
        let began = Instant::now();
        let vm = runtime.block_on(async {
            let vm: DynVm = boot(options(data.path())).await.unwrap().vm;
            exec(&vm, "true", ExecOptions::default()).await.unwrap();
            vm
        });
        println!("{}", began.elapsed().as_secs_f64() * 1e3);
        runtime.block_on(vm.shutdown());
    }
}

fn options(data: &Path) -> BootOptions {
    BootOptions {
        dir: data.join("vms").join("bench"),
        key: "bench".to_owned(),
        base_cache: data.join("base"),
        agents: data.join("agents"),
        policy: Arc::new(Policy::new(&[])),
        denials: None,
        limits: Limits::default(),
        mounts: Vec::new(),
        private: Vec::new(),
        image: None,
        secrets: Secrets::default(),
    }
}
