//! Programs that ask and connect as fast as they can: what stays bounded, and who does not notice.

use std::fs;
use std::time::{Duration, Instant};

use agentvm::net::{Denial, Protocol};
use agentvm::vm::Exit;
use tokio::time::timeout;

use super::policy::{Ruled, allowing, booted};
use super::world::{ECHO, OTHER_V4, PRIVATE, SERVER_V4, in_a_world};
use super::{sh, stdout};

/// For who would wait for ever.
const LONG: Duration = Duration::from_mins(1);

/// What a flood may add to this process, in KiB, whatever its length.
const GROWTH_KIB: u64 = 64 << 10;

/// Descriptors that a VM's DNS may take: its connections, and one for each question that is looked up.
const DNS_DESCRIPTORS: usize = 32 + 64 + 16;

/// Different kinds of refusals that are told in a second, and one for all others.
const KINDS: u64 = 257;

/// Questions for names that are denied, allowed, and allowed and not there, without a pause or a look at
/// the answers: by UDP, or over connections. Says in a file when it has sent 20,000 of them, and goes on.
const ASK: &str = r#"
    use IO::Socket::IP;
    my $way = shift;
    $SIG{PIPE} = "IGNORE";
    my $question = sub {
        my $labels = join "", map { pack("C/a*", $_) } @_;
        return pack("n6", 7, 0x100, 1, 0, 0, 0) . $labels . pack("Cn2", 0, 1, 1);
    };
    my $connect = sub {
        my $type = $way eq "tcp" ? SOCK_STREAM : SOCK_DGRAM;
        return IO::Socket::IP->new(PeerHost => "127.0.0.53", PeerPort => 53, Type => $type) or die $!;
    };
    my @sockets = map { $connect->() } 1..($way eq "tcp" ? 40 : 1);
    $_->blocking(0) for @sockets;
    for (my $sent = 0; ; $sent++) {
        if ($sent == 20000) { open(my $file, ">", "$way-flood"); close $file }
        my @names = (["n$sent", "denied", "example"], ["site", "example"], ["n$sent", "none", "example"]);
        my $message = $question->(@{$names[$sent % 3]});
        my $at = $sent % @sockets;
        my $bytes = $way eq "tcp" ? pack("n/a*", $message) : $message;
        my $done = syswrite($sockets[$at], $bytes);
        # What was cut or ended is no stream of questions any more.
        if ($way eq "tcp" && ($done // -1) != length $bytes && !$!{EAGAIN}) {
            $sockets[$at] = $connect->();
            $sockets[$at]->blocking(0);
        }
    }
"#;

/// How a name is answered: the code of RFC 1035, section 4.1.1.
const CODE: &str = r#"
    use IO::Socket::IP;
    my $labels = join "", map { pack("C/a*", $_) } split /\./, shift;
    my $question = pack("n6", 7, 0x100, 1, 0, 0, 0) . $labels . pack("Cn2", 0, 1, 1);
    my $socket = IO::Socket::IP->new(PeerHost => "127.0.0.53", PeerPort => 53) or die $!;
    syswrite($socket, pack("n/a*", $question));
    read($socket, my $length, 2) or die $!;
    read($socket, my $answer, unpack("n", $length)) or die $!;
    print unpack("x3C", $answer) & 15;
"#;

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.unwrap().split_whitespace().next().unwrap();
    number.parse().unwrap()
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

async fn resolves(ruled: &Ruled) {
    // A datagram may be lost.
    let ask = "RES_OPTIONS='timeout:1 attempts:5' getent ahostsv4 site.example";
    let found = timeout(LONG, stdout(&ruled.vm, ask)).await;
    let found = found.expect("an answer");
    assert!(found.starts_with(SERVER_V4), "{found}");
}

#[test]
fn a_flood_of_questions_takes_nothing_from_anybody_else() {
    let name = "net::floods::a_flood_of_questions_takes_nothing_from_anybody_else";
    in_a_world(name, |world| async move {
        let names = ["site.example", "*.none.example"];
        let mut flooding = booted(allowing(&names)).await;
        let other = booted(allowing(&names)).await;
        for ruled in [&flooding, &other] {
            ruled.write("ask.pl", ASK.into()).await;
            ruled.write("code.pl", CODE.into()).await;
            resolves(ruled).await;
        }
        let (memory, files, began) = (resident_kib(), descriptors(), Instant::now());
        for way in ["udp", "tcp"] {
            let begin = format!(
                "perl ask.pl {way} > said 2>&1 & \
                 until [ -e {way}-flood ]; do sleep 0.01; kill -0 $! || {{ cat said >&2; exit 1; }}; done"
            );
            let begun = timeout(LONG, stdout(&flooding.vm, &begin)).await;
            begun.expect("a flood");
            for _ in 0..5 {
                resolves(&other).await;
                let taken = descriptors().saturating_sub(files);
                assert!(taken <= DNS_DESCRIPTORS, "{taken} descriptors");
            }
        }
        let denied = stdout(&other.vm, "perl code.pl a.denied.example").await;
        assert_eq!(denied, "5"); // REFUSED
        let grown = resident_kib().saturating_sub(memory);
        assert!(grown < GROWTH_KIB, "{grown} KiB");
        sh(&flooding.vm, "pkill -9 perl").await;
        resolves(&flooding).await;
        let denied = stdout(&flooding.vm, "perl code.pl a.denied.example").await;
        assert_eq!(denied, "5");
        // A second is begun by what comes in it.
        let seconds = began.elapsed().as_secs() + 2;
        let (mut events, mut dns) = (0, 0);
        while let Ok(Denial { refused, count }) = flooding.denials.try_recv() {
            events += 1;
            dns += u64::from(refused.protocol == Protocol::Dns) * count;
        }
        assert!(events <= seconds * KINDS * 2, "{events} events");
        assert!(dns > 0);
        let asked = world.asked.lock().unwrap().clone();
        let of = |name: &str| asked.iter().filter(|own| own.ends_with(name)).count();
        assert_eq!(of("denied.example."), 0);
        assert!(of("none.example.") > 0);
        flooding.vm.shutdown().await;
        other.vm.shutdown().await;
    });
}

/// Tries what is refused: so many datagrams, connections that the VM's own rules refuse, and connections
/// that the host process does.
const TRY: &str = r#"
    use Socket;
    my ($private, $denied, $datagrams, $refused, $reset) = @ARGV;
    socket(my $socket, AF_INET, SOCK_DGRAM, 0) or die $!;
    # Not connected: it hears of no refusal, which would take the place of the next call.
    send($socket, "x", 0, pack_sockaddr_in(1024 + $_ % 60000, inet_aton($private)))
        for 1..$datagrams;
    my $connect = sub {
        my ($address, $port) = @_;
        socket(my $socket, AF_INET, SOCK_STREAM, 0) or die $!;
        connect($socket, pack_sockaddr_in($port, inet_aton($address))) or return;
        sysread($socket, my $end, 1);
    };
    $connect->($private, 1024 + $_ % 60000) for 1..$refused;
    $connect->($denied, 1024 + $_) for 1..$reset;
"#;

#[test]
fn a_flood_of_what_is_refused_is_counted_and_nothing_else_is_lost() {
    let name = "net::floods::a_flood_of_what_is_refused_is_counted_and_nothing_else_is_lost";
    in_a_world(name, |_world| async {
        const DATAGRAMS: u64 = 20_000;
        const REFUSED: u64 = 20_000;
        const RESET: u64 = 1500;
        let mut flooding = booted(allowing(&["site.example"])).await;
        flooding.write("try.pl", TRY.into()).await;
        let (memory, files, began) = (resident_kib(), descriptors(), Instant::now());
        let flood = format!(
            "perl try.pl {PRIVATE} {OTHER_V4} {DATAGRAMS} {REFUSED} {RESET} > said 2>&1; echo $? > done"
        );
        stdout(&flooding.vm, &format!("({flood}) > /dev/null 2>&1 &")).await;
        loop {
            // Meanwhile all that is allowed goes through.
            flooding.echoes("site.example", ECHO).await;
            let grown = resident_kib().saturating_sub(memory);
            assert!(grown < GROWTH_KIB, "{grown} KiB");
            let taken = descriptors().saturating_sub(files);
            assert!(taken < 100, "{taken} descriptors");
            if sh(&flooding.vm, "[ -e done ]").await.exit == Exit::Code(0) {
                break;
            }
        }
        assert_eq!(stdout(&flooding.vm, "cat done said").await, "0\n");
        // What the kernel had no room for is known by the number of the next one.
        stdout(
            &flooding.vm,
            &format!("perl try.pl {PRIVATE} {PRIVATE} 0 1 0"),
        )
        .await;
        let expected = DATAGRAMS + REFUSED + RESET + 1;
        let (mut events, mut count) = (0, 0);
        while count < expected {
            let denial = timeout(LONG, flooding.denials.recv()).await;
            let denial = denial.unwrap_or_else(|_| panic!("{count} were told"));
            count += denial.expect("the VM runs").count;
            events += 1;
        }
        assert_eq!(count, expected);
        let seconds = began.elapsed().as_secs() + 2;
        assert!(events <= seconds * KINDS * 2, "{events} events");
        flooding.vm.shutdown().await;
    });
}
