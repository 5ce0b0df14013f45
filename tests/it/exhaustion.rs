//! What a VM takes of the kernel until it is refused: what it leaves to the host and to other VMs.

use std::time::Duration;

use agentvm::vm::{DynVm, GuestPath, User, file};
use nix::sys::resource::{Resource, getrlimit};
use tokio::time::timeout;

use super::isolation::{sh_as, users};
use super::vm::{booted, stdout};

/// For who would wait for ever.
const LONG: Duration = Duration::from_secs(20);

/// Says in `taken` what it has got, and why it got no more, and keeps it.
async fn takes(vm: &DynVm, user: User, script: &str) -> String {
    let path = GuestPath::new("/home/user/take.pl").unwrap();
    let say = r#"
        sub say_and_keep {
            open(my $file, ">", "/tmp/taking"); print $file "@_\n"; close $file;
            rename "/tmp/taking", "/tmp/taken";
            sleep 1000;
        }"#;
    let script = format!("use Errno; use Socket;{say}\n{script}");
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
