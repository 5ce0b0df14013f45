//! File operations as a caller of the crate sees them.

use agentvm::error::Error;
use agentvm::vm::files::FileKind::{Directory, Fifo, File, Symlink};
use agentvm::vm::files::{Answers, Change, Event, FileKind, Record, Task, Write};
use agentvm::vm::{DynVm, GuestPath, Result, User};

use super::{booted, sh, stdout};

fn path(text: &str) -> GuestPath {
    GuestPath::new(text).unwrap()
}

fn code<T: std::fmt::Debug>(result: Result<T>) -> String {
    Error::from(result.unwrap_err()).code.as_str().to_owned()
}

async fn all(mut answers: Answers) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    while let Some(record) = answers.next().await? {
        records.push(record);
    }
    Ok(records)
}

async fn list(vm: &DynVm, at: &str, recursive: bool) -> Result<Vec<(String, FileKind)>> {
    let task = Task::List {
        path: path(at),
        recursive,
        skip_unreadable: false,
        at_leisure: false,
    };
    let mut entries = Vec::new();
    for record in all(vm.begin(task, User::User).await?).await? {
        let Record::Entry { path, kind } = record else {
            panic!("{record:?}");
        };
        entries.push((String::from_utf8(path).unwrap(), kind));
    }
    entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok(entries)
}

async fn remove(vm: &DynVm, at: &str) -> Result<()> {
    let answers = vm.begin(Task::RemoveTree(path(at)), User::User).await?;
    all(answers).await.map(|records| assert_eq!(records, []))
}

#[tokio::test]
async fn a_directory_is_listed_with_types_and_a_tree_with_paths() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(
        &vm,
        "mkdir -p t/d/e; touch t/f t/d/g; ln -s / t/l; mkfifo t/p",
    )
    .await;
    let named = |entries: &[(&str, FileKind)]| {
        let named = |(name, kind): &(&str, FileKind)| ((*name).to_owned(), *kind);
        entries.iter().map(named).collect::<Vec<_>>()
    };
    let top = [("d", Directory), ("f", File), ("l", Symlink), ("p", Fifo)];
    assert_eq!(list(&vm, "t", false).await.unwrap(), named(&top));
    let below = [
        ("d", Directory),
        ("d/e", Directory),
        ("d/g", File),
        ("f", File),
        ("l", Symlink),
        ("p", Fifo),
    ];
    assert_eq!(list(&vm, "t", true).await.unwrap(), named(&below));
    assert_eq!(code(list(&vm, "none", false).await), "ENOENT");
    assert_eq!(code(list(&vm, "t/f", false).await), "ENOTDIR");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_hundred_thousand_files_are_listed_and_removed() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let make = "mkdir many && cd many && for d in $(seq 100); do mkdir $d; done && \
                seq 100 | while read d; do (cd $d && seq 1000 | xargs touch); done";
    stdout(&vm, make).await;
    assert_eq!(list(&vm, "many", true).await.unwrap().len(), 100_100);
    remove(&vm, "many").await.unwrap();
    assert_eq!(stdout(&vm, "ls").await, "");
    vm.shutdown().await;
}

#[tokio::test]
async fn what_is_deeper_than_a_path_can_say_is_removed() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let name = "d".repeat(200);
    stdout(
        &vm,
        &format!("i=0; while [ $i -lt 100 ]; do mkdir {name} f$i && cd {name}; i=$((i+1)); done"),
    )
    .await;
    assert_eq!(code(list(&vm, ".", true).await), "ENAMETOOLONG");
    remove(&vm, &name).await.unwrap();
    assert_eq!(stdout(&vm, "ls").await, "f0\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_directory_that_turns_into_a_link_leads_nobody_out_of_the_tree() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(
        &vm,
        "mkdir -p keep && touch keep/me && mkdir -p real/sub && touch real/sub/x",
    )
    .await;
    let swap = "( while [ ! -e stop ]; do mkdir -p t; \
                for i in 1 2 3 4 5 6 7 8; do mkdir -p t/$i; done; \
                for i in 1 2 3 4 5 6 7 8; do rmdir t/$i; ln -s ../keep t/$i; rm -f t/$i; done; \
                done ) >/dev/null 2>&1 &";
    stdout(&vm, swap).await;
    for _ in 0..200 {
        // What is put there meanwhile may be too much; but never is anything else removed.
        let _ = remove(&vm, "t").await;
    }
    assert_eq!(stdout(&vm, "touch stop; ls keep").await, "me\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_link_to_a_directory_is_removed_and_not_what_it_leads_to() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(&vm, "mkdir d t; touch d/f; ln -s ../d t/l; ln -s d l").await;
    remove(&vm, "l").await.unwrap();
    remove(&vm, "t").await.unwrap();
    assert_eq!(stdout(&vm, "ls; ls d").await, "d\nf\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn no_magic_link_leads_to_what_pid_1_has_open() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(
        &vm,
        "ln -s /proc/self/root magic; ln -s /proc/1/fd/3 control; ln -s /proc/self/fd fds",
    )
    .await;
    for name in ["magic/etc", "magic", "control"] {
        let stat = vm.stat(&path(name), true, User::User).await;
        assert!(matches!(code(stat).as_str(), "ELOOP" | "EACCES"), "{name}");
        assert!(list(&vm, name, false).await.is_err(), "{name}");
        let made = Change::MakeDirectory {
            path: path(&format!("{name}/made")),
            mode: 0o777,
            parents: true,
        };
        assert!(vm.change(&made, User::User).await.is_err(), "{name}");
        let mode = Change::SetMode {
            path: path(name),
            mode: 0o777,
        };
        assert!(vm.change(&mode, User::User).await.is_err(), "{name}");
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn a_name_that_is_not_utf_8_comes_back_as_it_is() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(&vm, r"mkdir d; touch d/$(printf 'b\377d')").await;
    let task = Task::List {
        path: path("d"),
        recursive: false,
        skip_unreadable: false,
        at_leisure: false,
    };
    let records = all(vm.begin(task, User::User).await.unwrap())
        .await
        .unwrap();
    let [Record::Entry { path: name, .. }] = &records[..] else {
        panic!("{records:?}");
    };
    assert_eq!(name, b"b\xffd");
    let found = GuestPath::from_bytes([b"d/", &name[..]].concat()).unwrap();
    assert_eq!(vm.stat(&found, false, User::User).await.unwrap().size, 0);
    vm.shutdown().await;
}

#[tokio::test]
async fn long_work_keeps_nobody_waiting() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(&vm, "mkdir d; cd d; seq 20000 | xargs touch").await;
    let task = || Task::List {
        path: path("d"),
        recursive: false,
        skip_unreadable: false,
        at_leisure: false,
    };
    // Nobody reads them: their pipes are full.
    let mut waiting = Vec::new();
    for _ in 0..16 {
        waiting.push(vm.begin(task(), User::User).await.unwrap());
    }
    vm.stat(&path("d"), true, User::User).await.unwrap();
    assert_eq!(stdout(&vm, "echo hi").await, "hi\n");
    drop(waiting);
    assert_eq!(list(&vm, "d", false).await.unwrap().len(), 20_000);
    // Given up, they end.
    stdout(&vm, "while pgrep agentvm-files; do :; done").await;
    vm.shutdown().await;
}

async fn event(answers: &mut Answers) -> Event {
    match answers.next().await.unwrap() {
        Some(Record::Event(event)) => event,
        other => panic!("{other:?}"),
    }
}

async fn watch(vm: &DynVm, at: &str, recursive: bool) -> Answers {
    let task = Task::Watch {
        path: path(at),
        recursive,
    };
    let mut answers = vm.begin(task, User::User).await.unwrap();
    assert_eq!(answers.next().await.unwrap(), Some(Record::Watching));
    answers
}

fn bytes(text: &str) -> Vec<u8> {
    text.as_bytes().to_vec()
}

#[tokio::test]
async fn changes_are_told_in_order_and_a_move_as_one() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(&vm, "mkdir -p w/d").await;
    let mut answers = watch(&vm, "w", true).await;
    stdout(
        &vm,
        "cd w; mkfifo d/a; mv d/a b; mv d e; rm b; mkfifo e/c; mv e ..",
    )
    .await;
    let created = |path: &str| Event::Created {
        path: bytes(path),
        directory: false,
    };
    let moved = |from: &str, to: &str, directory| Event::Moved {
        from: bytes(from),
        path: bytes(to),
        directory,
    };
    let deleted = |path: &str, directory| Event::Deleted {
        path: bytes(path),
        directory,
    };
    for expected in [
        created("d/a"),
        moved("d/a", "b", false),
        moved("d", "e", true),
        deleted("b", false),
        created("e/c"),
        deleted("e", true),
    ] {
        assert_eq!(event(&mut answers).await, expected);
    }
    // Out of it, nothing is told any more.
    stdout(&vm, "mkfifo e/x; mkfifo w/end").await;
    assert_eq!(event(&mut answers).await, created("end"));
    vm.shutdown().await;
}

#[tokio::test]
async fn directories_that_come_later_are_watched_too() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(&vm, "mkdir w").await;
    let mut answers = watch(&vm, "w", true).await;
    stdout(&vm, "mkdir -p w/1/2/3").await;
    // Whether the kernel or the look into the new directory told of one: once they are there, they are
    // watched.
    loop {
        if let Event::Created { path, .. } = event(&mut answers).await
            && path == b"1/2/3"
        {
            break;
        }
    }
    stdout(&vm, "mkfifo w/1/2/3/f").await;
    loop {
        if let Event::Created { path, .. } = event(&mut answers).await
            && path == b"1/2/3/f"
        {
            break;
        }
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn what_a_slow_watcher_loses_is_told() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(&vm, "mkdir w").await;
    let mut answers = watch(&vm, "w", false).await;
    stdout(&vm, "cd w; seq 60000 | xargs touch; rm -rf ../w").await;
    let mut overflows = 0;
    let mut events = 0;
    while let Some(record) = answers.next().await.unwrap() {
        events += 1;
        if record == Record::Event(Event::Overflow) {
            overflows += 1;
        }
    }
    assert!(overflows >= 1, "{events} events");
    vm.shutdown().await;
}

#[tokio::test]
async fn the_end_of_the_vm_ends_a_watch() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let mut answers = watch(&vm, ".", false).await;
    vm.shutdown().await;
    // That it was the VM's end, and not its worker's alone, is for the session to find out.
    assert_eq!(code(answers.next().await), "EINTR");
}

#[tokio::test]
async fn a_program_of_user_can_neither_trace_nor_stop_a_worker_that_acts_as_it() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    if !nix::unistd::geteuid().is_root() {
        // There is one id only: what a user stops is his own call.
        return vm.shutdown().await;
    }
    let mut answers = watch(&vm, ".", false).await;
    let killed = sh(&vm, "kill -9 $(pgrep agentvm-files)").await;
    assert!(String::from_utf8_lossy(&killed.stderr).contains("not permitted"));
    let memory = sh(&vm, "head -c 1 /proc/$(pgrep agentvm-files)/maps").await;
    assert_eq!(memory.stdout, b"");
    stdout(&vm, "mkfifo f").await;
    assert!(matches!(event(&mut answers).await, Event::Created { .. }));
    vm.shutdown().await;
}

async fn new(vm: &DynVm, at: &str) -> std::fs::File {
    let at = path(at);
    let opened = vm.open_to_write(&at, Write::New, 0o600, User::User);
    opened.await.unwrap()
}

#[tokio::test]
async fn the_mode_of_an_open_file_is_no_other_files_whatever_is_at_its_path() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let file = new(&vm, "f").await;
    stdout(
        &vm,
        "touch other && chmod 600 other && mv f moved && ln -s other f",
    )
    .await;
    vm.set_mode_of(&file, &path("f"), 0o755, User::User)
        .await
        .unwrap();
    let modes = stdout(&vm, "stat -c %a moved other").await;
    assert_eq!(modes, "755\n600\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_file_is_put_in_place_with_its_mode() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    stdout(&vm, "ln -s other f").await;
    let file = new(&vm, "part").await;
    vm.put_in_place(&file, &path("part"), &path("f"), Some(0o640), User::User)
        .await
        .unwrap();
    let shown = stdout(&vm, "stat -c '%F %a' f; ls").await;
    assert_eq!(shown, "regular empty file 640\nf\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn what_was_exchanged_for_a_file_is_not_put_in_its_place() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    for exchange in ["ln -s other part", "mkdir part", "touch part", "true"] {
        let file = new(&vm, "part").await;
        stdout(&vm, "rm -rf other && touch other && chmod 600 other").await;
        // Not removed: another file could get its inode.
        stdout(&vm, &format!("mv part away && {exchange}")).await;
        let put = vm
            .put_in_place(&file, &path("part"), &path("f"), Some(0o777), User::User)
            .await;
        let expected = if exchange == "true" {
            "ENOENT"
        } else {
            "ESTALE"
        };
        assert_eq!(code(put), expected, "{exchange}");
        assert_eq!(stdout(&vm, "stat -c %a other; ls -d f || :").await, "600\n");
        stdout(&vm, "rm -rf part away").await;
    }
    vm.shutdown().await;
}
