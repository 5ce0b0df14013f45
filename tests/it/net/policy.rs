//! Rules of the network: what they let through, what they refuse, and who hears of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use agentvm::net::{Denial, Otherwise, Policy, Protocol, Rule, Rules};
use agentvm::vm::{DynVm, Exit, GuestPath, User, file};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::timeout;

use super::world::{
    COUNT, ECHO, GREET, GREETING, OTHER_V4, OTHER_V6, PRIVATE, SERVER_V4, SERVER_V6, SILENT_V4,
    in_a_world,
};
use super::{AT_ONCE, assert_refused, booted_under, failure, sh, stdout};

pub(super) fn rules(otherwise: Otherwise, allow: &[&str], deny: &[&str]) -> Rules {
    let parse = |texts: &[&str]| {
        texts
            .iter()
            .map(|text| Rule::parse(text).unwrap())
            .collect()
    };
    Rules {
        otherwise,
        allow: parse(allow),
        deny: parse(deny),
    }
}

pub(super) fn allowing(allow: &[&str]) -> Rules {
    rules(Otherwise::Allowlist, allow, &[])
}

pub(super) struct Ruled {
    pub(super) vm: DynVm,
    pub(super) denials: UnboundedReceiver<Denial>,
    _data: tempfile::TempDir,
}

pub(super) async fn booted(rules: Rules) -> Ruled {
    let data = tempfile::tempdir().unwrap();
    let (sender, denials) = unbounded_channel();
    let policy = Policy::new(&[]).with_rules(rules);
    let vm = booted_under(data.path(), policy, Some(sender)).await;
    Ruled {
        vm,
        denials,
        _data: data,
    }
}

impl Ruled {
    /// The next event of this host, with its rule.
    async fn hears_of(&mut self, host: &str, port: u16, protocol: Protocol) -> String {
        let event = async {
            loop {
                let Denial { refused, .. } = self.denials.recv().await.expect("the VM runs");
                if (refused.host.as_str(), refused.port, refused.protocol) == (host, port, protocol)
                {
                    return refused.rule.expect("of one").to_string();
                }
            }
        };
        let waited = timeout(AT_ONCE, event).await;
        waited.unwrap_or_else(|_| panic!("nothing was told of {host}:{port}"))
    }

    pub(super) async fn echoes(&self, host: &str, port: u16) {
        let command = format!("echo hello | perl duplex.pl {host} {port}");
        assert_eq!(stdout(&self.vm, &command).await, "hello\n", "{host}");
    }

    async fn resets(&self, host: &str, port: u16) {
        let start = Instant::now();
        let command = format!("perl duplex.pl {host} {port} < /dev/null");
        assert_eq!(
            failure(&self.vm, &command).await,
            "Connection reset by peer\n",
            "{host}"
        );
        assert!(start.elapsed() < AT_ONCE, "{host}");
    }

    async fn does_not_resolve(&self, name: &str) {
        let start = Instant::now();
        let output = sh(&self.vm, &format!("getent ahosts {name}")).await;
        assert_eq!(output.exit, Exit::Code(2), "{name}");
        assert!(start.elapsed() < AT_ONCE, "{name}");
    }

    pub(super) async fn write(&self, path: &str, content: Vec<u8>) {
        let path = GuestPath::new(path).unwrap();
        file::write(&*self.vm, &path, content, User::User)
            .await
            .unwrap();
    }
}

/// What a TLS client begins with.
fn hello(server: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let server = ServerName::try_from(server.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::new(config), server).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

#[test]
fn an_allowlist_is_names_wildcards_and_ports() {
    let name = "net::policy::an_allowlist_is_names_wildcards_and_ports";
    in_a_world(name, |world| async move {
        let allow = format!("site.example:{ECHO}");
        let mut ruled = booted(allowing(&[&allow, "*.b.example"])).await;
        // Nobody has asked for it yet.
        ruled.resets(SERVER_V4, ECHO).await;
        assert_eq!(
            ruled.hears_of(SERVER_V4, ECHO, Protocol::Tcp).await,
            "allowlist"
        );
        ruled.echoes("site.example", ECHO).await;
        ruled.resets("site.example", COUNT).await;
        assert_eq!(
            ruled.hears_of("site.example", COUNT, Protocol::Tcp).await,
            "allowlist"
        );
        ruled.echoes("a.b.example", ECHO).await;
        for denied in ["b.example", "other.example"] {
            ruled.does_not_resolve(denied).await;
            assert_eq!(ruled.hears_of(denied, 53, Protocol::Dns).await, "allowlist");
        }
        ruled.resets(OTHER_V4, ECHO).await;
        let asked = world.asked.lock().unwrap().clone();
        assert!(asked.contains(&"site.example.".to_owned()));
        for denied in ["b.example.", "other.example."] {
            assert!(
                !asked.contains(&denied.to_owned()),
                "{denied} was asked for outside"
            );
        }
        ruled.vm.shutdown().await;
    });
}

#[test]
fn names_are_held_to_their_ipv6_addresses_too() {
    let name = "net::policy::names_are_held_to_their_ipv6_addresses_too";
    in_a_world(name, |_world| async {
        let mut ruled = booted(allowing(&["site.example"])).await;
        stdout(&ruled.vm, "getent ahostsv6 site.example").await;
        ruled.echoes(SERVER_V6, ECHO).await;
        ruled.resets(OTHER_V6, ECHO).await;
        assert_eq!(
            ruled.hears_of(OTHER_V6, ECHO, Protocol::Tcp).await,
            "allowlist"
        );
        ruled.vm.shutdown().await;
    });
}

#[test]
fn where_an_address_does_not_answer_another_of_its_name_does_that_is_allowed() {
    let name =
        "net::policy::where_an_address_does_not_answer_another_of_its_name_does_that_is_allowed";
    in_a_world(name, |world| async move {
        let ruled = booted(rules(Otherwise::Public, &[], &[])).await;
        stdout(&ruled.vm, "getent ahosts half.example").await;
        ruled.echoes(SILENT_V4, ECHO).await;
        ruled.vm.shutdown().await;

        let ruled = booted(rules(Otherwise::Public, &[], &[SERVER_V6])).await;
        stdout(&ruled.vm, "getent ahosts half.example").await;
        let command = format!("timeout 2 perl duplex.pl {SILENT_V4} {ECHO}");
        assert_eq!(sh(&ruled.vm, &command).await.exit, Exit::Code(124));
        assert_eq!(*world.open.borrow(), 0);
        ruled.vm.shutdown().await;
    });
}

#[test]
fn an_address_in_another_form_is_the_same_address() {
    let name = "net::policy::an_address_in_another_form_is_the_same_address";
    in_a_world(name, |_world| async {
        let ruled = booted(allowing(&["site.example"])).await;
        // 1.2.3.5 and, by the last, what a NAT64 makes of it.
        for form in [
            "16909061",
            "0x1020305",
            "1.2.773",
            "::ffff:1.2.3.5",
            "64:ff9b::102:305",
        ] {
            ruled.resets(form, ECHO).await;
        }
        for form in [
            "0x0a000001",
            "167772161",
            "::ffff:10.0.0.1",
            "64:ff9b::a00:1",
        ] {
            assert_refused(&ruled.vm, form, ECHO).await;
        }
        ruled.vm.shutdown().await;
    });
}

#[test]
fn a_name_does_not_lead_into_a_private_network() {
    let name = "net::policy::a_name_does_not_lead_into_a_private_network";
    in_a_world(name, |_world| async {
        let mut ruled = booted(allowing(&["*.example"])).await;
        // Public the first time, private the second.
        ruled.echoes("rebind.example", ECHO).await;
        ruled.does_not_resolve("rebind.example").await;
        assert_eq!(
            ruled.hears_of("rebind.example", 53, Protocol::Dns).await,
            "private"
        );
        assert_refused(&ruled.vm, PRIVATE, ECHO).await;
        assert_eq!(
            ruled.hears_of(PRIVATE, ECHO, Protocol::Tcp).await,
            "private"
        );
        ruled.does_not_resolve("to-private.example").await;
        ruled.vm.shutdown().await;
    });
}

#[test]
fn a_denied_name_is_not_reached_by_an_alias() {
    let name = "net::policy::a_denied_name_is_not_reached_by_an_alias";
    in_a_world(name, |_world| async {
        let mut ruled = booted(rules(Otherwise::Public, &[], &["other.example"])).await;
        ruled.does_not_resolve("other.example").await;
        ruled.does_not_resolve("to-other.example").await;
        let rule = ruled.hears_of("to-other.example", 53, Protocol::Dns).await;
        assert_eq!(rule, "other.example");
        ruled.echoes("site.example", ECHO).await;
        ruled.vm.shutdown().await;
    });
}

#[test]
fn tls_is_for_a_name_that_is_allowed() {
    let name = "net::policy::tls_is_for_a_name_that_is_allowed";
    in_a_world(name, |_world| async {
        let mut ruled = booted(allowing(&["site.example"])).await;
        for (file, server) in [
            ("site", "site.example"),
            ("other", "other.example"),
            ("none", "1.2.3.4"),
        ] {
            ruled.write(file, hello(server)).await;
        }
        ruled
            .write("broken", b"\x16\x03\x01\x00\x01\x02".to_vec())
            .await;
        // Some servers pass over a warning that comes first.
        let warned = [
            &b"\x15\x03\x01\x00\x02\x01\x70"[..],
            &hello("other.example"),
        ]
        .concat();
        ruled.write("warned", warned).await;
        let begin = |file: &str| format!("perl duplex.pl site.example {ECHO} < {file}");
        let same = format!("{} | cmp - site", begin("site"));
        assert_eq!(stdout(&ruled.vm, &same).await, "");
        for (file, host, rule) in [
            ("other", "other.example", "allowlist"),
            ("none", "site.example", "tls"),
            ("broken", "site.example", "tls"),
            ("warned", "site.example", "tls"),
        ] {
            let said = failure(&ruled.vm, &begin(file)).await;
            assert_eq!(said, "Connection reset by peer\n", "{file}");
            assert_eq!(ruled.hears_of(host, ECHO, Protocol::Tcp).await, rule);
        }
        let pieces = format!(
            "(for at in $(seq 0 50 600); do dd if=site bs=1 skip=$at count=50 2>/dev/null; sleep 0.01; done) \
             | perl duplex.pl site.example {ECHO} | cmp - site"
        );
        assert_eq!(stdout(&ruled.vm, &pieces).await, "");
        ruled.vm.shutdown().await;
    });
}

#[test]
fn tls_is_not_for_a_name_that_is_denied() {
    let name = "net::policy::tls_is_not_for_a_name_that_is_denied";
    in_a_world(name, |_world| async {
        let mut ruled = booted(rules(Otherwise::Public, &[], &["*.evil.example"])).await;
        ruled.write("evil", hello("a.evil.example")).await;
        ruled.write("site", hello("site.example")).await;
        let begin = |file: &str| format!("perl duplex.pl {SERVER_V4} {ECHO} < {file}");
        stdout(&ruled.vm, &format!("{} | cmp - site", begin("site"))).await;
        failure(&ruled.vm, &begin("evil")).await;
        let rule = ruled.hears_of("a.evil.example", ECHO, Protocol::Tcp).await;
        assert_eq!(rule, "*.evil.example");
        ruled.vm.shutdown().await;
    });
}

#[test]
fn a_server_that_speaks_first_is_heard() {
    let name = "net::policy::a_server_that_speaks_first_is_heard";
    in_a_world(name, |_world| async {
        let ruled = booted(allowing(&["site.example"])).await;
        // The guest answers only what it has heard.
        let talk = format!(
            "perl -e 'use IO::Socket::IP; my $s = IO::Socket::IP->new(PeerHost => \"site.example\", \
             PeerPort => {GREET}) or die; print scalar <$s>; print $s \"EHLO\\n\"; print scalar <$s>'"
        );
        let said = timeout(AT_ONCE, stdout(&ruled.vm, &talk))
            .await
            .expect("no delay");
        assert_eq!(said, format!("{GREETING}EHLO\n"));
        ruled.vm.shutdown().await;
    });
}

#[test]
fn a_change_ends_what_it_no_longer_allows_and_forgets_no_answer() {
    let name = "net::policy::a_change_ends_what_it_no_longer_allows_and_forgets_no_answer";
    in_a_world(name, |mut world| async move {
        let mut ruled = booted(allowing(&["site.example", "other.example"])).await;
        let held = format!("sleep 1000 | perl duplex.pl site.example {ECHO} > /dev/null 2> said &");
        stdout(&ruled.vm, &held).await;
        world.open.wait_for(|open| *open == 1).await.unwrap();
        stdout(&ruled.vm, "getent ahosts other.example").await;
        ruled
            .vm
            .set_network(allowing(&["*.example"]))
            .await
            .unwrap();
        ruled.echoes(OTHER_V4, ECHO).await;
        assert_eq!(*world.open.borrow(), 1);
        ruled
            .vm
            .set_network(allowing(&["other.example"]))
            .await
            .unwrap();
        world.open.wait_for(|open| *open == 0).await.unwrap();
        assert_eq!(
            ruled.hears_of("site.example", ECHO, Protocol::Tcp).await,
            "allowlist"
        );
        // The old answer is of no use any more.
        ruled.resets(SERVER_V4, ECHO).await;
        ruled.echoes(OTHER_V4, ECHO).await;
        ruled
            .vm
            .set_network(rules(Otherwise::None, &[], &[]))
            .await
            .unwrap();
        assert_refused(&ruled.vm, OTHER_V4, ECHO).await;
        assert_refused(&ruled.vm, SERVER_V6, ECHO).await;
        assert_eq!(
            ruled.hears_of("site.example", ECHO, Protocol::Tcp).await,
            "none"
        );
        ruled.does_not_resolve("site.example").await;
        ruled.vm.set_network(Rules::default()).await.unwrap();
        ruled.echoes(SERVER_V4, ECHO).await;
        ruled.echoes(SERVER_V6, ECHO).await;
        ruled.vm.shutdown().await;
    });
}

#[test]
fn a_later_rule_ends_tls_to_a_name_that_nothing_was_denied_of() {
    let name = "net::policy::a_later_rule_ends_tls_to_a_name_that_nothing_was_denied_of";
    in_a_world(name, |mut world| async move {
        let mut ruled = booted(Rules::default()).await;
        ruled.write("evil", hello("a.evil.example")).await;
        ruled.write("site", hello("site.example")).await;
        // What has said for whom it is by then, and what says so only later.
        for before in ["evil", "/dev/null"] {
            let said = format!("{before}.said").replace('/', "_");
            let held = format!(
                "(cat {before}; until [ -e go ]; do sleep 0.01; done; cat evil; sleep 1000) \
                 | perl duplex.pl {SERVER_V4} {ECHO} > {said} 2>&1 &"
            );
            stdout(&ruled.vm, &held).await;
        }
        let held = format!("(cat site; sleep 1000) | perl duplex.pl {SERVER_V4} {ECHO} > said &");
        stdout(&ruled.vm, &held).await;
        world.open.wait_for(|open| *open == 3).await.unwrap();
        let echoed = "until cmp -s evil.said evil && cmp -s said site; do sleep 0.01; done";
        stdout(&ruled.vm, echoed).await;
        let denying = rules(Otherwise::Public, &[], &["*.evil.example"]);
        ruled.vm.set_network(denying).await.unwrap();
        for left in [2, 1] {
            world.open.wait_for(|open| *open == left).await.unwrap();
            let rule = ruled.hears_of("a.evil.example", ECHO, Protocol::Tcp).await;
            assert_eq!(rule, "*.evil.example");
            stdout(&ruled.vm, "touch go").await;
        }
        // An allowlist knows its names too.
        let allowing = allowing(&[SERVER_V4, "site.example"]);
        ruled.vm.set_network(allowing).await.unwrap();
        assert_eq!(*world.open.borrow(), 1);
        ruled.vm.shutdown().await;
    });
}

#[test]
fn as_many_rules_as_there_may_be_are_refused_at_once() {
    let name = "net::policy::as_many_rules_as_there_may_be_are_refused_at_once";
    in_a_world(name, |_world| async {
        // None touches another: each is an interval of its own.
        let denied = |prefix: &str| -> Rules {
            let texts: Vec<_> = (0..4096)
                .map(|index| format!("{prefix}{:x}", index * 2 + 1))
                .collect();
            let texts: Vec<_> = texts.iter().map(String::as_str).collect();
            rules(Otherwise::Public, &[], &texts)
        };
        let ruled = booted(denied("2606:4700::")).await;
        assert_refused(&ruled.vm, SERVER_V6, ECHO).await;
        assert_refused(&ruled.vm, "2606:4700::1fff", ECHO).await;
        ruled.echoes(OTHER_V6, ECHO).await;
        ruled.vm.set_network(denied("2606:4701::")).await.unwrap();
        ruled.echoes(SERVER_V6, ECHO).await;
        assert_refused(&ruled.vm, "2606:4701::1fff", ECHO).await;
        ruled.vm.set_network(Rules::default()).await.unwrap();
        ruled.echoes(SERVER_V6, ECHO).await;
        ruled.vm.shutdown().await;
    });
}

#[test]
fn a_private_network_is_opened_by_its_address_also_later() {
    let name = "net::policy::a_private_network_is_opened_by_its_address_also_later";
    in_a_world(name, |_world| async {
        let ruled = booted(rules(Otherwise::Public, &["*", "0.0.0.0/0"], &[])).await;
        assert_refused(&ruled.vm, PRIVATE, ECHO).await;
        let opens = rules(Otherwise::Public, &["10.9.9.0/24:7"], &[]);
        ruled.vm.set_network(opens).await.unwrap();
        ruled.echoes(PRIVATE, ECHO).await;
        ruled.resets(PRIVATE, COUNT).await;
        assert_refused(&ruled.vm, "10.9.8.1", ECHO).await;
        ruled.vm.set_network(Rules::default()).await.unwrap();
        assert_refused(&ruled.vm, PRIVATE, ECHO).await;
        ruled.vm.shutdown().await;
    });
}

#[test]
fn a_port_of_the_hosts_public_address_is_opened_alone() {
    let name = "net::policy::a_port_of_the_hosts_public_address_is_opened_alone";
    in_a_world(name, |_world| async {
        let listen = || TcpListener::bind((super::HOST_V4, 0));
        let (opened, other) = (listen().await.unwrap(), listen().await.unwrap());
        let [port, refused] = [&opened, &other].map(|own| own.local_addr().unwrap().port());
        let opens = format!("{}:{port}", super::HOST_V4);
        let mut ruled = booted(rules(Otherwise::Public, &[&opens], &[])).await;
        let connect = |port| format!("timeout 10 bash -c '</dev/tcp/{}/{port}'", super::HOST_V4);
        assert_eq!(stdout(&ruled.vm, &connect(port)).await, "");
        let (connected, _) = opened.accept().await.unwrap();
        drop(connected);
        // It is there inside before it is judged, and reset then.
        drop(sh(&ruled.vm, &connect(refused)).await);
        let told = ruled.hears_of(super::HOST_V4, refused, Protocol::Tcp);
        assert_eq!(told.await, "host");
        ruled.vm.shutdown().await;
    });
}

#[test]
fn what_the_vms_own_rules_refuse_is_told() {
    let name = "net::policy::what_the_vms_own_rules_refuse_is_told";
    in_a_world(name, |_world| async {
        let mut ruled = booted(rules(Otherwise::Public, &[], &["1.2.3.0/24"])).await;
        for (address, rule) in [
            ("10.0.0.1", "private"),
            ("169.254.169.254", "link-local"),
            ("168.63.129.16", "metadata"),
            ("fd00:ec2::254", "private"),
            (super::HOST_V4, "host"),
            (super::HOST_V6, "host"),
            (SERVER_V4, "1.2.3.0/24"),
        ] {
            assert_refused(&ruled.vm, address, 80).await;
            assert_eq!(
                ruled.hears_of(address, 80, Protocol::Tcp).await,
                rule,
                "{address}"
            );
        }
        let udp = format!(
            "perl -e 'use IO::Socket::IP; my $s = IO::Socket::IP->new(PeerHost => \"{SERVER_V6}\", \
             PeerPort => 443, Type => SOCK_DGRAM); $s->send(\"x\")'"
        );
        // No rule would let it out.
        for rules in [rules(Otherwise::Public, &[], &[]), allowing(&["a.test"])] {
            ruled.vm.set_network(rules).await.unwrap();
            stdout(&ruled.vm, &udp).await;
            assert_eq!(
                ruled.hears_of(SERVER_V6, 443, Protocol::Udp).await,
                "protocol"
            );
        }
        // By the rules of that moment, however soon others follow.
        for _ in 0..10 {
            ruled.vm.set_network(allowing(&[])).await.unwrap();
            assert_refused(&ruled.vm, SERVER_V4, 80).await;
            let open = rules(Otherwise::Public, &[], &[]);
            ruled.vm.set_network(open).await.unwrap();
            assert_eq!(
                ruled.hears_of(SERVER_V4, 80, Protocol::Tcp).await,
                "allowlist"
            );
        }
        ruled.vm.shutdown().await;
    });
}

#[test]
fn a_flood_of_refusals_is_few_events_and_all_are_counted() {
    let name = "net::policy::a_flood_of_refusals_is_few_events_and_all_are_counted";
    in_a_world(name, |_world| async {
        const TRIES: u64 = 2000;
        let mut ruled = booted(Rules::default()).await;
        let flood = format!(
            "perl -e 'use IO::Socket::IP; IO::Socket::IP->new(PeerHost => \"10.0.0.1\", PeerPort => $_) \
             for 1001..1000 + {TRIES}'"
        );
        let start = Instant::now();
        stdout(&ruled.vm, &flood).await;
        // What the kernel had no room for is known by the number of the next one.
        assert_refused(&ruled.vm, "10.0.0.2", 80).await;
        let (mut events, mut count) = (0_u64, 0);
        while count <= TRIES {
            let denial = timeout(Duration::from_secs(10), ruled.denials.recv()).await;
            count += denial.expect("all are told").expect("the VM runs").count;
            events += 1;
        }
        assert_eq!(count, TRIES + 1);
        let most = (start.elapsed().as_secs() + 1) * 2 * 257;
        assert!(events <= most, "{events} events");
        ruled.vm.shutdown().await;
    });
}
