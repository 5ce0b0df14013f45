//! What a VM takes of the kernel until it is refused: what it leaves to the host and to other VMs.

use std::path::Path;
use std::time::Duration;

use agentvm::error::Error;
use agentvm::vm::exec::{ExecOptions, exec};
use agentvm::vm::namespace::boot;
use agentvm::vm::{DynVm, GuestPath, User, file};
use nix::sys::resource::{Resource, getrlimit};
use tokio::time::timeout;

use super::isolation::{sh_as, users};
use super::limits::{cgroups, has_cgroups};
use super::vm::{booted, options, stdout};

/// For who would wait for ever.
const LONG: Duration = Duration::from_mins(1);

/// Says in `taken` what it has got, and why it got no more, and keeps it.
async fn takes(vm: &DynVm, user: User, script: &str) -> String {
    let path = GuestPath::new("/home/user/take.pl").unwrap();
    let say = r#"
        sub say_and_keep {
            open(my $file, ">", "/tmp/taking"); print $file "@_\n"; close $file;
            rename "/tmp/taking", "/tmp/taken";
            sleep 1000;
        }"#;
    let script = format!("use Errno; use Fcntl; use Socket;{say}\n{script}");
    file::write(&**vm, &path, script.into(), User::User)
        .await
        .unwrap();
    let take = "rm -f /tmp/taken; ulimit -n $(ulimit -Hn)
        perl /home/user/take.pl & until [ -e /tmp/taken ]; do sleep 0.01; kill -0 $! || exit; done
        cat /tmp/taken";
    let output = sh_as(vm, user, take).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.stdout.is_empty(), "{:?}: {said}", output.exit);
    String::from_utf8(output.stdout).unwrap()
}

/// Processes are started, and files are handed to the host.
async fn works(vm: &DynVm) {
    let path = GuestPath::new("/home/user/file").unwrap();
    let work = async {
        assert_eq!(stdout(vm, "echo alive").await, "alive\n");
        file::write(&**vm, &path, b"kept".to_vec(), User::User)
            .await
            .unwrap();
        let read = file::read(&**vm, &path, User::User).await.unwrap();
        assert_eq!(read, b"kept");
    };
    timeout(LONG, work).await.expect("a VM that works");
}

/// As many descriptors as can be on their way through sockets.
fn in_flight() -> String {
    let sendmsg = libc::SYS_sendmsg;
    format!(
        r#"
        my ($byte, $many) = ("x", 253);
        my $part = pack("P Q", $byte, 1);
        my $length = 16 + 4 * $many;
        my $rights = pack("Q l l l*", $length, {level}, {kind}, (0) x $many) . "\0" x 7;
        my $message = pack("Q L x4 P Q P Q l x4", 0, 0, $part, 1, $rights, $length, 0);
        my ($sent, @kept) = (0);
        while ($sent < 4e6) {{
            socketpair(my $from, my $to, AF_UNIX, SOCK_STREAM, 0) or last;
            push @kept, $from, $to;
            $sent += $many while syscall({sendmsg}, fileno($from), $message, {flags}) == 1;
            last if !$!{{EAGAIN}};
        }}
        say_and_keep($!{{ETOOMANYREFS}} ? "all" : "$sent $!");"#,
        level = libc::SOL_SOCKET,
        kind = libc::SCM_RIGHTS,
        flags = libc::MSG_DONTWAIT,
    )
}

/// Only as root: the kernel counts these for the user who runs the host process, other tests included,
/// where all VMs are that user.
#[tokio::test]
async fn who_has_all_descriptors_on_their_way_keeps_nobody_from_handing_out_others() {
    if !users().contains(&User::Root) {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let (vm, other) = (
        booted(data.path(), "a").await,
        booted(data.path(), "b").await,
    );
    for user in users() {
        assert_eq!(takes(&vm, user, &in_flight()).await, "all\n", "{user:?}");
        works(&vm).await;
        works(&other).await;
        let late = timeout(LONG, booted(data.path(), "c")).await;
        let late = late.expect("a VM that boots");
        works(&late).await;
        late.shutdown().await;
    }
    // Nor who becomes whom the first process of another is.
    let first = stdout(&other, "awk '/^Uid/ {print $2}' /proc/1/status").await;
    let become_first = format!("($<, $>) = ({0}, {0}); $> == {0} or die;", first.trim());
    let script = format!("{become_first}\n{}", in_flight());
    assert_eq!(takes(&vm, User::Root, &script).await, "all\n");
    works(&other).await;
    let late = timeout(LONG, booted(data.path(), "d")).await;
    late.expect("a VM that boots").shutdown().await;
    vm.shutdown().await;
    other.shutdown().await;
}

#[tokio::test]
async fn programs_may_have_fewer_descriptors_than_who_hands_them_out() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let (_, hosts) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let own = stdout(&vm, "awk '/open files/ {print $4, $5}' /proc/1/limits").await;
    assert_eq!(own, format!("{hosts} {hosts}\n"));
    // Root's VMs have ids of their own.
    let most = if users().contains(&User::Root) {
        hosts
    } else {
        hosts / 2
    };
    let programs = stdout(&vm, "ulimit -Hn").await;
    assert_eq!(programs, format!("{}\n", most.min(1 << 20)));
    vm.shutdown().await;
}

/// A VM of 64 MiB.
async fn small(data: &Path, name: &str) -> DynVm {
    let mut options = options(data, name);
    options.limits.memory_bytes = Some(64 << 20);
    boot(options).await.unwrap().vm
}

/// Fills buffers until nothing more goes into any, or 256 MiB are in them.
const FILL: &str = r#"
    my ($sent, @kept) = (0);
    my $chunk = "x" x 32768;
    sub fill {
        my ($from, @others) = @_;
        push @kept, $from, @others;
        fcntl($from, F_SETFL, O_NONBLOCK);
        while ($sent < 256 << 20) { $sent += syswrite($from, $chunk) || last }
        return $sent < 256 << 20;
    }"#;

/// The kernel keeps a pool of memory for the TCP of all, and one for UDP.
#[tokio::test]
async fn buffers_of_the_network_are_bounded_with_the_memory() {
    const TCP: &str = r"
        my $any = pack_sockaddr_in(0, INADDR_LOOPBACK);
        my ($listener, $from, $to);
        socket($listener, AF_INET, SOCK_STREAM, 0) && bind($listener, $any)
            && listen($listener, 8) or die $!;
        for (1..200) {
            ($from, $to) = ();
            socket($from, AF_INET, SOCK_STREAM, 0) && connect($from, getsockname($listener))
                && accept($to, $listener) or die $!;
            fill($from, $to) or last;
        }";
    const UDP: &str = r"
        my $any = pack_sockaddr_in(0, INADDR_LOOPBACK);
        my ($from, $to);
        for (1..2000) {
            ($from, $to) = ();
            socket($to, AF_INET, SOCK_DGRAM, 0) && bind($to, $any)
                && socket($from, AF_INET, SOCK_DGRAM, 0) && connect($from, getsockname($to))
                or die $!;
            push @kept, $from, $to;
            for (1..4) { $sent += syswrite($from, $chunk) || last }
        }";
    if !has_cgroups() {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let other = booted(data.path(), "b").await;
    for (kind, fill) in [("TCP", TCP), ("UDP", UDP)] {
        let vm = small(data.path(), "a").await;
        let script = format!("{FILL}{fill} say_and_keep($sent);");
        let sent: u64 = takes(&vm, User::User, &script)
            .await
            .trim()
            .parse()
            .unwrap();
        // Datagrams are lost, and a connection always gets some more.
        assert!(kind == "UDP" || sent < 64 << 20, "{sent} bytes over TCP");
        let held = held_by_network();
        assert!(
            (4 << 20..48 << 20).contains(&held),
            "{held} bytes of {kind}"
        );
        works(&vm).await;
        works(&other).await;
        vm.shutdown().await;
    }
    other.shutdown().await;
}

/// Bytes in the buffers of the one VM of this process that has a cgroup.
fn held_by_network() -> u64 {
    let counter =
        |cgroup| std::fs::read_to_string(format!("{cgroup}/memory.kmem.tcp.usage_in_bytes"));
    let counted = cgroups()
        .into_iter()
        .find_map(|cgroup| counter(cgroup).ok());
    counted.unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn buffers_of_local_sockets_are_memory_of_the_vm() {
    const UNIX: &str = r"
        for (1..4000) {
            socketpair(my $from, my $to, AF_UNIX, SOCK_STREAM, 0) or die $!;
            fill($from, $to) or last;
        }";
    if !has_cgroups() {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let (vm, other) = (
        small(data.path(), "a").await,
        booted(data.path(), "b").await,
    );
    let path = GuestPath::new("fill.pl").unwrap();
    let script = format!("use Fcntl; use Socket;{FILL}{UNIX} print $sent;");
    file::write(&*vm, &path, script.into(), User::User)
        .await
        .unwrap();
    let fill = "ulimit -n $(ulimit -Hn); exec perl fill.pl";
    let ended = timeout(LONG, exec(&vm, fill, ExecOptions::default())).await;
    let error = Error::from(ended.unwrap().unwrap_err());
    assert_eq!(error.code.as_str(), "VM_LIMIT", "{error}");
    assert!(error.message.contains("memoryBytes (67108864)"), "{error}");
    works(&vm).await;
    works(&other).await;
    vm.shutdown().await;
    other.shutdown().await;
}

/// As many POSIX queues as there may be, each as full as it may be. Says how many there were, and how many
/// messages.
fn queues() -> String {
    let (open, send) = (libc::SYS_mq_open, libc::SYS_mq_timedsend);
    let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_NONBLOCK;
    format!(
        r#"
        my ($made, $sent, $full, $message) = (0, 0, 0, "x" x 8192);
        while ($made < 1e4) {{
            my $queue = syscall({open}, "q$made", {flags}, 0600, 0);
            last if $queue < 0;
            $made++;
            $sent++ while syscall({send}, $queue, $message, length $message, 0, 0) == 0;
            $full++ if $!{{EAGAIN}};
        }}
        say_and_keep($full == $made && $!{{EMFILE}} ? "full $made $sent" : "$made $sent $!");"#
    )
}

/// The one test that takes them: of an ordinary user, the kernel counts those of all tests together.
#[tokio::test]
async fn full_posix_queues_are_one_vms_and_gone_with_it() {
    let data = tempfile::tempdir().unwrap();
    for user in users() {
        let (vm, other) = (
            booted(data.path(), "a").await,
            booted(data.path(), "b").await,
        );
        let taken = takes(&vm, user, &queues()).await;
        assert!(taken.starts_with("full "), "{user:?}: {taken}");
        works(&vm).await;
        // The other VM has as many, and the host its own.
        assert_eq!(takes(&other, user, &queues()).await, taken, "{user:?}");
        let hosts = format!("/agentvm-test-{}", std::process::id());
        make_queue(&hosts);
        vm.shutdown().await;
        other.shutdown().await;
        // Nothing of the name is left, nor counted.
        let vm = booted(data.path(), "a").await;
        assert_eq!(takes(&vm, user, &queues()).await, taken, "{user:?}");
        vm.shutdown().await;
    }
}

/// Makes and removes one of the host's, in which one small message has room.
fn make_queue(name: &str) {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: a struct of integers.
    let mut attributes: libc::mq_attr = unsafe { std::mem::zeroed() };
    (attributes.mq_maxmsg, attributes.mq_msgsize) = (1, 1);
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
    // SAFETY: a string and a struct that outlive the call.
    let queue = unsafe { libc::mq_open(name.as_ptr(), flags, 0o600, &raw const attributes) };
    assert!(queue >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: a descriptor of our own, and a string that outlives the call.
    let gone = unsafe { (libc::mq_close(queue), libc::mq_unlink(name.as_ptr())) };
    assert_eq!(gone, (0, 0));
}
