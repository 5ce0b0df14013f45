//! The network of a VM, as programs in it meet it.

mod floods;
mod policy;
mod secrets;
mod tls_server;
mod world;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agentvm::net::{Denial, Policy};
use agentvm::vm::exec::{ExecEnd, ExecOptions, ExecOutput, exec};
use agentvm::vm::namespace::{BootOptions, boot};
use agentvm::vm::{DynVm, Exit, GuestPath, User, file};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc::UnboundedSender;

use self::world::{COUNT, ECHO, HOST_V4, HOST_V6, SERVER_V4, SERVER_V6, in_a_world, ip};
use super::child::{block_on, in_child};

/// Generous: a refusal takes 0.2 ms, an attempt that nobody answers over a minute.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Copies stdin to a connection and the connection to stdout, ending each when the other side does.
const DUPLEX: &str = r#"
use IO::Socket::IP;
my $s = IO::Socket::IP->new(PeerHost => shift, PeerPort => shift) or die "$!\n";
my $pid = fork // die;
if (!$pid) {
    while (sysread(STDIN, my $b, 65536)) {
        for (my $o = 0; $o < length $b;) { $o += syswrite($s, $b, length($b) - $o, $o) // die "$!\n" }
    }
    shutdown($s, 1);
    exit 0;
}
while (1) {
    my $n = sysread($s, my $b, 65536) // die "$!\n";
    last if !$n;
    syswrite(STDOUT, $b);
}
waitpid($pid, 0);
exit($? != 0);
"#;

fn options(data: &Path, exempt_ports: &[u16]) -> BootOptions {
    options_under(data, Policy::new(exempt_ports), None)
}

fn options_under(
    data: &Path,
    policy: Policy,
    denials: Option<UnboundedSender<Denial>>,
) -> BootOptions {
    BootOptions {
        dir: data.join("vms/a"),
        key: r#"["a"]"#.to_owned(),
        base_cache: data.join("base"),
        agents: data.join("agents"),
        policy: Arc::new(policy),
        denials,
        limits: agentvm::vm::Limits::default(),
        mounts: Vec::new(),
        private: Vec::new(),
        image: None,
        secrets: agentvm::net::secrets::Secrets::default(),
    }
}

async fn booted(data: &Path, exempt_ports: &[u16]) -> DynVm {
    booted_with(options(data, exempt_ports)).await
}

async fn booted_under(
    data: &Path,
    policy: Policy,
    denials: Option<UnboundedSender<Denial>>,
) -> DynVm {
    booted_with(options_under(data, policy, denials)).await
}

async fn booted_with(options: BootOptions) -> DynVm {
    let vm = boot(options).await.unwrap().vm;
    let path = GuestPath::new("duplex.pl").unwrap();
    file::write(&*vm, &path, DUPLEX.into(), User::User)
        .await
        .unwrap();
    vm
}

async fn sh(vm: &DynVm, command: &str) -> ExecOutput {
    match exec(vm, command, ExecOptions::default()).await.unwrap() {
        ExecEnd::Exited(output) => output,
        ExecEnd::TimedOut(_) => unreachable!("no time limit was given"),
    }
}

async fn stdout(vm: &DynVm, command: &str) -> String {
    let output = sh(vm, command).await;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.exit, Exit::Code(0), "{command}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a program says that fails.
async fn failure(vm: &DynVm, command: &str) -> String {
    let output = sh(vm, command).await;
    assert_ne!(output.exit, Exit::Code(0), "{command} succeeded");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn assert_refused(vm: &DynVm, address: &str, port: u16) {
    let start = Instant::now();
    let said = failure(vm, &format!("echo hi | perl duplex.pl {address} {port}")).await;
    assert_eq!(said, "Connection refused\n", "{address} {port}");
    assert!(start.elapsed() < AT_ONCE, "{address} {port}");
}

/// A server on the host's loopback that says hello; and its port.
async fn host_server(address: &str) -> u16 {
    let listener = TcpListener::bind((address, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.write_all(b"hello from the host\n").await.unwrap();
        }
    });
    port
}

#[tokio::test]
async fn an_exempt_port_of_loopback_is_the_hosts() {
    let data = tempfile::tempdir().unwrap();
    let (v4, v6) = (host_server("127.0.0.1").await, host_server("::1").await);
    let vm = booted(data.path(), &[v4, v6]).await;
    for (address, port) in [("127.0.0.1", v4), ("localhost", v4), ("::1", v6)] {
        let command = format!("perl duplex.pl {address} {port} < /dev/null");
        assert_eq!(
            stdout(&vm, &command).await,
            "hello from the host\n",
            "{address}"
        );
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn other_ports_of_loopback_are_the_vms() {
    let data = tempfile::tempdir().unwrap();
    let (v4, v6) = (host_server("127.0.0.1").await, host_server("::1").await);
    let exempt = host_server("127.0.0.1").await;
    let vm = booted(data.path(), &[exempt]).await;
    assert_refused(&vm, "127.0.0.1", v4).await;
    assert_refused(&vm, "::1", v6).await;
    // Only 127.0.0.1 itself leads to the host.
    assert_refused(&vm, "127.0.0.2", exempt).await;
    vm.shutdown().await;
}

#[tokio::test]
async fn an_exempt_port_without_a_server_is_a_reset() {
    let data = tempfile::tempdir().unwrap();
    let unused = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().port()
    };
    let vm = booted(data.path(), &[unused]).await;
    let said = failure(
        &vm,
        &format!("perl duplex.pl 127.0.0.1 {unused} < /dev/null"),
    )
    .await;
    assert_eq!(said, "Connection reset by peer\n");
    vm.shutdown().await;
}

#[tokio::test]
async fn programs_of_a_vm_reach_each_other() {
    const SERVER: &str = r#"
        use IO::Socket::IP;
        my $s = IO::Socket::IP->new(LocalHost => shift, LocalPort => 8080, Listen => 5,
            ReuseAddr => 1) or die "$!\n";
        print "listening\n";
        close STDOUT;
        my $c = $s->accept;
        print $c "hello from ", $c->sockhost, "\n";
    "#;
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), &[]).await;
    let path = GuestPath::new("server.pl").unwrap();
    file::write(&*vm, &path, SERVER.into(), User::User)
        .await
        .unwrap();
    for (listen, connect, says) in [
        ("127.0.0.1", "127.0.0.1", "hello from 127.0.0.1\n"),
        ("127.0.0.1", "localhost", "hello from 127.0.0.1\n"),
        ("::1", "::1", "hello from ::1\n"),
        ("0.0.0.0", "127.0.0.9", "hello from 127.0.0.9\n"),
        // The VM's own address.
        ("0.0.0.0", "192.0.2.1", "hello from 192.0.2.1\n"),
    ] {
        let command = format!(
            "perl server.pl {listen} > out & \
             until grep -q listening out 2>/dev/null; do :; done; \
             perl duplex.pl {connect} 8080 < /dev/null; rm out"
        );
        assert_eq!(stdout(&vm, &command).await, says);
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn what_is_not_public_is_refused_at_once() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), &[]).await;
    for address in [
        "10.0.0.1",
        "100.64.0.1",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "192.168.1.1",
        "198.51.100.1",
        "64:ff9b::a00:1",
        "2002:a00:1::1",
        "fd00:ec2::254",
        "::ffff:10.0.0.1",
    ] {
        assert_refused(&vm, address, 80).await;
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn addresses_of_the_host_are_refused_at_once() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), &[]).await;
    let addresses = nix::ifaddrs::getifaddrs().unwrap().filter_map(|interface| {
        let address = interface.address?;
        Some(address.as_sockaddr_in()?.ip())
    });
    for address in addresses.filter(|address| !address.is_loopback()) {
        assert_refused(&vm, &address.to_string(), 22).await;
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn other_udp_is_refused_at_once() {
    const UDP: &str = r#"
        use IO::Socket::IP;
        my $s = IO::Socket::IP->new(PeerHost => shift, PeerPort => 443, Type => SOCK_DGRAM)
            or die "$!\n";
        # The kernel may report it at once, or with the next call.
        $s->send("x") && $s->recv(my $b, 100);
        print "$!\n";
    "#;
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), &[]).await;
    for address in [SERVER_V4, SERVER_V6, "10.0.0.1", "224.0.0.251"] {
        let start = Instant::now();
        let said = stdout(&vm, &format!("perl -e '{UDP}' {address}")).await;
        assert!(
            ["Connection refused\n", "Operation not permitted\n"].contains(&said.as_str()),
            "{address}: {said}"
        );
        assert!(start.elapsed() < AT_ONCE, "{address}");
    }
    vm.shutdown().await;
}

#[test]
fn public_addresses_are_reached() {
    in_a_world("net::public_addresses_are_reached", |_world| async {
        let data = tempfile::tempdir().unwrap();
        let vm = booted(data.path(), &[]).await;
        for address in [SERVER_V4, SERVER_V6] {
            let command = format!("echo hello | perl duplex.pl {address} {ECHO}");
            assert_eq!(stdout(&vm, &command).await, "hello\n", "{address}");
        }
        vm.shutdown().await;
    });
}

#[test]
fn a_port_that_nobody_listens_on_is_a_reset() {
    in_a_world(
        "net::a_port_that_nobody_listens_on_is_a_reset",
        |_world| async {
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), &[]).await;
            for address in [SERVER_V4, SERVER_V6] {
                let said = failure(&vm, &format!("perl duplex.pl {address} 81 < /dev/null")).await;
                assert_eq!(said, "Connection reset by peer\n", "{address}");
            }
            vm.shutdown().await;
        },
    );
}

#[test]
fn public_addresses_of_the_host_are_denied() {
    in_a_world(
        "net::public_addresses_of_the_host_are_denied",
        |_world| async {
            const LATER: &str = "5.6.7.9";
            let data = tempfile::tempdir().unwrap();
            let listener = TcpListener::bind("[::]:80").await.unwrap();
            let vm = booted(data.path(), &[]).await;
            assert_refused(&vm, HOST_V4, 80).await;
            assert_refused(&vm, HOST_V6, 80).await;
            // One that the VM's rules can't know is denied when it is dialled.
            ip(&format!("addr add {LATER}/24 dev wan"));
            let said = failure(&vm, &format!("perl duplex.pl {LATER} 80 < /dev/null")).await;
            assert_eq!(said, "Connection reset by peer\n");
            vm.shutdown().await;
            let nobody = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
            assert!(nobody.is_err(), "the host's server got a connection");
        },
    );
}

#[test]
fn both_directions_carry_much_and_end_apart() {
    in_a_world(
        "net::both_directions_carry_much_and_end_apart",
        |_world| async {
            const BYTES: u64 = 64 << 20;
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), &[]).await;
            stdout(&vm, &format!("head -c {BYTES} /dev/urandom > data")).await;
            for address in [SERVER_V4, SERVER_V6] {
                let echo = format!("perl duplex.pl {address} {ECHO} < data | cmp - data");
                assert_eq!(stdout(&vm, &echo).await, "", "{address}");
                // Answers only after the end of the guest's stream.
                let count = format!("perl duplex.pl {address} {COUNT} < data");
                assert_eq!(stdout(&vm, &count).await, format!("{BYTES}\n"), "{address}");
            }
            vm.shutdown().await;
        },
    );
}

#[test]
fn many_connections_at_once_are_kept_apart() {
    in_a_world(
        "net::many_connections_at_once_are_kept_apart",
        |_world| async {
            const MANY: &str = r#"
            use IO::Socket::IP;
            my @s = map { IO::Socket::IP->new(PeerHost => $ARGV[0], PeerPort => $ARGV[1])
                or die "$_: $!\n" } 1..250;
            for my $i (0..$#s) { syswrite($s[$i], "number $i\n") or die "$!\n" }
            for my $i (0..$#s) {
                my $line = readline($s[$i]);
                $line eq "number $i\n" or die "$i got $line\n";
            }
        "#;
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), &[]).await;
            stdout(&vm, &format!("perl -e '{MANY}' {SERVER_V4} {ECHO}")).await;
            vm.shutdown().await;
        },
    );
}

#[test]
fn a_vms_connections_leave_the_process_descriptors() {
    // Held by a child that goes on.
    const MANY: &str = r#"
        use IO::Socket::IP;
        my @s = map {
            IO::Socket::IP->new(PeerHost => "127.0.0.1", PeerPort => $ARGV[0]) or die "$!\n"
        } 1..100;
        fork or sleep 1000;
    "#;
    let name = "net::a_vms_connections_leave_the_process_descriptors";
    in_child(&["prlimit", "--nofile=256"], name, || {
        block_on(async {
            let port = host_server("127.0.0.1").await;
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), &[port]).await;
            // The VM's programs have no more descriptors than the process either.
            for _ in 0..4 {
                stdout(&vm, &format!("perl -e '{MANY}' {port}")).await;
            }
            assert_eq!(stdout(&vm, "echo works").await, "works\n");
            vm.shutdown().await;
        });
    });
}

#[test]
fn a_vms_connections_end_with_it_and_leave_no_descriptor() {
    let name = "net::a_vms_connections_end_with_it_and_leave_no_descriptor";
    in_a_world(name, |mut world| async move {
        let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let data = tempfile::tempdir().unwrap();
        // What is made once for the process stays: the guest's program, for example.
        booted(data.path(), &[]).await.shutdown().await;
        let before = descriptors();
        let vm = booted(data.path(), &[]).await;
        let held = format!("sleep 1000 | perl duplex.pl {SERVER_V4} {ECHO} > /dev/null &");
        stdout(&vm, &held).await;
        world.open.wait_for(|open| *open == 1).await.unwrap();
        vm.shutdown().await;
        world.open.wait_for(|open| *open == 0).await.unwrap();
        drop(vm);
        // Descriptors of tasks that are being cancelled close in their own time.
        while descriptors() > before {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn names_are_resolved_over_udp_and_tcp() {
    in_a_world("net::names_are_resolved_over_udp_and_tcp", |_world| async {
        let data = tempfile::tempdir().unwrap();
        let vm = booted(data.path(), &[]).await;
        for options in ["", "use-vc"] {
            let ask = |database, name| {
                format!(
                    "RES_OPTIONS='{options}' getent {database} {name} | awk '{{print $1; exit}}'"
                )
            };
            let v4 = stdout(&vm, &ask("ahostsv4", "site.example")).await;
            assert_eq!(v4, format!("{SERVER_V4}\n"), "{options}");
            let v6 = stdout(&vm, &ask("ahostsv6", "site.example")).await;
            assert_eq!(v6, format!("{SERVER_V6}\n"), "{options}");
        }
        let by_name = format!("echo hello | perl duplex.pl site.example {ECHO}");
        assert_eq!(stdout(&vm, &by_name).await, "hello\n");
        vm.shutdown().await;
    });
}

#[test]
fn names_without_a_public_address_do_not_resolve() {
    let name = "net::names_without_a_public_address_do_not_resolve";
    in_a_world(name, |_world| async {
        let data = tempfile::tempdir().unwrap();
        let vm = booted(data.path(), &[]).await;
        for name in ["private.example", "metadata.example", "missing.example"] {
            let output = sh(&vm, &format!("getent ahosts {name}")).await;
            assert_eq!(output.exit, Exit::Code(2), "{name}");
            assert_eq!(output.stdout, b"", "{name}");
        }
        vm.shutdown().await;
    });
}

#[test]
fn names_have_ipv6_addresses_only_where_the_host_has_an_ipv6_route() {
    let name = "net::names_have_ipv6_addresses_only_where_the_host_has_an_ipv6_route";
    in_a_world(name, |_world| async {
        let data = tempfile::tempdir().unwrap();
        let vm = booted(data.path(), &[]).await;
        ip("-6 route del default");
        let output = sh(&vm, "getent ahostsv6 site.example").await;
        // It also shows IPv4 addresses, in IPv6 clothes.
        let found = String::from_utf8(output.stdout).unwrap();
        assert!(!found.contains(SERVER_V6), "{found}");
        let v4 = stdout(&vm, "getent ahostsv4 site.example").await;
        assert!(v4.starts_with(SERVER_V4), "{v4}");
        vm.shutdown().await;
    });
}

#[test]
fn our_resolver_answers_whichever_is_asked() {
    in_a_world(
        "net::our_resolver_answers_whichever_is_asked",
        |_world| async {
            const ASK: &str = r#"
            use IO::Socket::IP;
            my $q = pack("n6", 7, 0x100, 1, 0, 0, 0) . "\4site\7example\0" . pack("n2", 1, 1);
            my ($server, $tcp) = @ARGV;
            my $type = $tcp ? SOCK_STREAM : SOCK_DGRAM;
            my $s = IO::Socket::IP->new(PeerHost => $server, PeerPort => 53, Type => $type)
                or die "$!\n";
            if ($tcp) { syswrite($s, pack("n/a*", $q)) } else { $s->send($q) }
            sysread($s, my $a, 1500) // die "$!\n";
            print join(".", unpack("C4", substr($a, -4))), "\n";
        "#;
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), &[]).await;
            for server in ["127.0.0.53", "8.8.8.8", "10.0.0.2"] {
                for tcp in ["", "tcp"] {
                    let answer = stdout(&vm, &format!("perl -e '{ASK}' {server} {tcp}")).await;
                    assert_eq!(answer, format!("{SERVER_V4}\n"), "{server} {tcp}");
                }
            }
            vm.shutdown().await;
        },
    );
}

#[test]
fn an_answer_too_long_for_udp_comes_over_tcp() {
    in_a_world(
        "net::an_answer_too_long_for_udp_comes_over_tcp",
        |_world| async {
            const ASK: &str = r#"
            use IO::Socket::IP;
            my $q = pack("n6", 7, 0x100, 1, 0, 0, 0) . "\4long\7example\0" . pack("n2", 16, 1);
            my $udp = IO::Socket::IP->new(PeerHost => "127.0.0.53", PeerPort => 53,
                Type => SOCK_DGRAM) or die "$!\n";
            $udp->send($q);
            $udp->recv(my $a, 65536);
            print "truncated\n" if unpack("x2n", $a) & 0x200;
            my $tcp = IO::Socket::IP->new(PeerHost => "127.0.0.53", PeerPort => 53) or die "$!\n";
            syswrite($tcp, pack("n/a*", $q));
            read($tcp, my $len, 2);
            read($tcp, $a, unpack("n", $len));
            print $a =~ tr/x//, "\n";
        "#;
            let data = tempfile::tempdir().unwrap();
            let vm = booted(data.path(), &[]).await;
            let said = stdout(&vm, &format!("perl -e '{ASK}'")).await;
            assert_eq!(
                said,
                format!("truncated\n{}\n", 8 * 250 + "example".matches('x').count())
            );
            vm.shutdown().await;
        },
    );
}

#[tokio::test]
async fn a_connection_from_the_host_sees_an_ended_stream_when_the_program_dies() {
    let data = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let vm = booted(data.path(), &[port]).await;
    let run = format!("sleep 1000 | perl duplex.pl 127.0.0.1 {port} > /dev/null 2>&1 &");
    stdout(&vm, &run).await;
    let (mut stream, _) = listener.accept().await.unwrap();
    stdout(&vm, "pkill -9 perl").await;
    let mut rest = Vec::new();
    // Either end of a dead program's stream will do.
    drop(stream.read_to_end(&mut rest).await);
    assert_eq!(rest, b"");
    vm.shutdown().await;
}
