//! Processes that callers start, and what they write.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use agentvm::error::Code;
use agentvm::session::{
    End, Interest, Output, OutputSubscription, Source, SpawnOptions, Stream, VmHandle,
};
use agentvm::vm::Exit;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::fixture::{World, code, within};

const BOTH: Interest = Interest {
    process_output: true,
    process_exit: true,
    shell_data: false,
    shell_exit: false,
};

const DONE: End = End {
    exit: Exit::Code(0),
    timed_out: false,
    with_vm: false,
};

async fn sh(vm: &VmHandle, script: &str) -> u32 {
    let argv = ["sh", "-c", script].map(ToOwned::to_owned);
    within(vm.spawn(argv.to_vec(), SpawnOptions::default()))
        .await
        .unwrap()
}

/// Takes everything that is told.
struct Heard {
    told: Arc<Mutex<Vec<Output>>>,
    count: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

impl Heard {
    fn of(vm: &VmHandle) -> Self {
        Self::from(vm.subscribe_output(BOTH).unwrap())
    }

    fn from(subscription: OutputSubscription) -> Self {
        let told: Arc<Mutex<Vec<Output>>> = Arc::default();
        let (counted, count) = watch::channel(0);
        let own = Arc::clone(&told);
        let task = tokio::spawn(async move {
            loop {
                let batch = subscription.next().await;
                let taken = batch.len();
                own.lock().unwrap().extend(batch);
                subscription.taken(taken);
                counted.send_modify(|count| *count += taken);
            }
        });
        Self { told, count, task }
    }

    fn text(&self, pid: u32, of: Stream) -> String {
        let told = self.told.lock().unwrap();
        let chunks = told.iter().filter_map(|output| match output {
            Output::Data {
                source: Source::Process(own),
                stream,
                data,
                ..
            } if (*own, *stream) == (pid, of) => Some(data.clone()),
            _ => None,
        });
        String::from_utf8(chunks.collect::<Vec<_>>().concat()).unwrap()
    }

    async fn until(&self, pid: u32, text: &str) {
        let mut count = self.count.clone();
        within(async {
            while !self.text(pid, Stream::Stdout).contains(text) {
                count.changed().await.unwrap();
            }
        })
        .await;
    }

    fn ends(&self) -> Vec<(u32, End)> {
        let told = self.told.lock().unwrap();
        let ends = told.iter().filter_map(|output| match output {
            Output::Exit {
                source: Source::Process(pid),
                end,
            } => Some((*pid, *end)),
            _ => None,
        });
        ends.collect()
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test]
async fn the_end_of_a_process_comes_after_its_output() {
    let world = World::new().await;
    let heard = Heard::of(&world.vm);
    let pid = sh(&world.vm, "echo out; echo err >&2").await;
    assert_eq!(within(world.vm.wait_process(pid)).await.unwrap(), DONE);
    assert_eq!(heard.text(pid, Stream::Stdout), "out\n");
    assert_eq!(heard.text(pid, Stream::Stderr), "err\n");
    let told = heard.told.lock().unwrap().clone();
    assert!(matches!(told.last(), Some(Output::Exit { .. })), "{told:?}");
    world.close().await;
}

#[tokio::test]
async fn a_listener_that_does_not_take_stops_the_writer_and_nobody_else() {
    let world = World::new().await;
    let slow = world.vm.subscribe_output(BOTH).unwrap();
    let pid = sh(&world.vm, "head -c 10000000 /dev/zero; echo done >&2").await;
    let first = within(slow.next()).await;
    assert!(!first.is_empty());
    // It is stuck, and other calls are not.
    let listed = world.vm.get_process(pid).unwrap();
    assert_eq!(listed.end, None);
    assert_eq!(world.sh("echo other").await, "other\n");
    let waited = tokio::time::timeout(Duration::from_millis(200), world.vm.wait_process(pid));
    assert!(
        waited.await.is_err(),
        "it has written more than anybody took"
    );
    slow.taken(first.len());
    let heard = Heard::from(slow);
    assert_eq!(within(world.vm.wait_process(pid)).await.unwrap(), DONE);
    assert_eq!(heard.text(pid, Stream::Stderr), "done\n");
    world.close().await;
}

#[tokio::test]
async fn a_listener_that_goes_lets_the_writer_go_on() {
    let world = World::new().await;
    let slow = world.vm.subscribe_output(BOTH).unwrap();
    let pid = sh(&world.vm, "head -c 10000000 /dev/zero").await;
    within(slow.next()).await;
    drop(slow);
    assert_eq!(within(world.vm.wait_process(pid)).await.unwrap(), DONE);
    world.close().await;
}

#[tokio::test]
async fn two_clients_of_a_vm_hear_the_same() {
    let world = World::new().await;
    let (other, vm) = world.another_client();
    let both = [&world.vm, &vm].map(Heard::of);
    let pid = sh(&world.vm, "echo hello").await;
    within(vm.wait_process(pid)).await.unwrap();
    for heard in both {
        assert_eq!(heard.text(pid, Stream::Stdout), "hello\n");
        assert_eq!(heard.ends(), [(pid, DONE)]);
    }
    within(other.close()).await.unwrap();
    world.close().await;
}

#[tokio::test]
async fn a_process_outlives_one_of_two_clients_and_waits_of_the_closed_one_are_refused() {
    let world = World::new().await;
    let (other, vm) = world.another_client();
    let pid = sh(&vm, "read line").await;
    let waiting = tokio::spawn(async move { vm.wait_process(pid).await });
    within(other.close()).await.unwrap();
    assert_eq!(code(within(waiting).await.unwrap()), Code::ClientClosed);
    within(world.vm.close_process_stdin(pid)).await.unwrap();
    let end = within(world.vm.wait_process(pid)).await.unwrap();
    assert_eq!(end.exit, Exit::Code(1));
    world.close().await;
}

#[tokio::test]
async fn the_death_of_a_vm_is_the_end_of_its_processes() {
    let world = World::new().await;
    let heard = Heard::of(&world.vm);
    let pid = sh(&world.vm, "echo ready; sleep 1000").await;
    heard.until(pid, "ready\n").await;
    let killed = world.vm.exec(
        "kill -9 -1; true",
        agentvm::vm::exec::ExecOptions::default(),
    );
    // PID 1 itself does not hear it: only what it runs does.
    drop(within(killed).await);
    let end = within(world.vm.wait_process(pid)).await.unwrap();
    assert_eq!(end.exit, Exit::Signal(9));
    assert!(!end.with_vm);
    world.close().await;
}

#[tokio::test]
async fn a_new_process_takes_the_place_of_one_that_had_its_number() {
    let world = World::new().await;
    let first = sh(&world.vm, "exit 1").await;
    within(world.vm.wait_process(first)).await.unwrap();
    // The VM counts from the beginning again.
    world.vm.sleep().await.unwrap();
    let second = sh(&world.vm, "exit 2").await;
    assert_eq!(first, second);
    let end = within(world.vm.wait_process(second)).await.unwrap();
    assert_eq!(end.exit, Exit::Code(2));
    assert_eq!(world.vm.list_processes().unwrap().len(), 1);
    world.close().await;
}

#[tokio::test]
async fn an_end_of_the_vm_does_not_wait_for_who_ignores_it() {
    let world = World::new().await;
    let heard = Heard::of(&world.vm);
    let stubborn = sh(
        &world.vm,
        "trap '' TERM; echo ready; while :; do sleep 1; done",
    )
    .await;
    let stopped = sh(&world.vm, "trap 'exit 7' TERM; echo ready; kill -STOP $$").await;
    heard.until(stubborn, "ready\n").await;
    heard.until(stopped, "ready\n").await;
    within(world.vm.sleep()).await.unwrap();
    let ends = heard.ends();
    let of = |pid: u32| ends.iter().find(|(own, _)| *own == pid).unwrap().1;
    assert_eq!(of(stubborn).exit, Exit::Signal(9));
    assert_eq!(of(stopped).exit, Exit::Code(7));
    assert!(of(stubborn).with_vm && of(stopped).with_vm);
    world.close().await;
}

#[tokio::test]
async fn a_call_that_is_given_up_leaves_no_process() {
    let world = World::new().await;
    world.sh("true").await;
    let argv = ["sleep", "1000"].map(ToOwned::to_owned).to_vec();
    let mut spawning = Box::pin(world.vm.spawn(argv, SpawnOptions::default()));
    let polled = std::future::poll_fn(|context| {
        std::task::Poll::Ready(spawning.as_mut().poll(context).is_pending())
    });
    assert!(polled.await);
    drop(spawning);
    assert_eq!(
        world
            .sh("while pgrep -x sleep > /dev/null; do :; done")
            .await,
        ""
    );
    assert!(world.vm.list_processes().unwrap().is_empty());
    world.close().await;
}

#[tokio::test]
async fn thousands_of_processes_with_long_command_lines_are_listed() {
    let world = World::new().await;
    let script = "i=0; while [ $i -lt 300 ]; do sh -c 'read x' \"$0\" < fifo & i=$((i+1)); done; echo ready; wait";
    world.sh("mkfifo fifo").await;
    let heard = Heard::of(&world.vm);
    let long = "x".repeat(10_000);
    let argv = ["sh", "-c", script, &long].map(ToOwned::to_owned).to_vec();
    let spawned = world.vm.spawn(argv, SpawnOptions::default());
    let pid = within(spawned).await.unwrap();
    heard.until(pid, "ready\n").await;
    let processes = within(world.vm.all_processes()).await.unwrap();
    let own = processes.iter().filter(|process| process.parent == pid);
    assert_eq!(own.count(), 300);
    let pids: Vec<_> = processes.iter().map(|process| process.pid).collect();
    assert!(pids.is_sorted(), "{pids:?}");
    assert!(
        processes
            .iter()
            .all(|process| process.command.concat().len() <= 2048)
    );
    world.close().await;
}
