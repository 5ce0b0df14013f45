//! Secrets that a VM uses and does not have.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agentvm::net::Policy;
use agentvm::net::secrets::{Misdirected, Place, Secret, SecretOptions, Secrets};
use agentvm::vm::DynVm;
use agentvm::vm::namespace::boot;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::policy::allowing;
use super::tls_server::{Pki, Server};
use super::world::{SERVER_V4, in_a_world};
use super::{options, sh, stdout};
use crate::child::{block_on, in_child};

const VALUE: &str = "the-value-that-no-vm-may-have";

const PROTOCOLS: [&str; 2] = ["h2", "http/1.1"];

fn secret(name: &str, value: &str, hosts: &[String]) -> Secret {
    let options = SecretOptions {
        value: value.to_owned().into(),
        hosts: hosts.to_vec(),
        headers: None,
        query: vec!["key".to_owned()],
        placeholder: None,
    };
    Secret::new(name, options).unwrap()
}

async fn booted(data: &Path, ports: &[u16], secrets: Vec<Secret>) -> DynVm {
    let options = agentvm::vm::namespace::BootOptions {
        secrets: Secrets::new(secrets).unwrap(),
        ..options(data, ports)
    };
    boot(options).await.unwrap().vm
}

/// Runs `test` in a child that trusts the authority of test servers.
fn with_pki<F: Future<Output = ()>>(name: &str, test: impl FnOnce(Pki) -> F) {
    in_child(&[], &format!("net::secrets::{name}"), || {
        let directory = tempfile::tempdir().unwrap();
        let pki = Pki::new();
        pki.trust(directory.path());
        tracing::subscriber::set_global_default(Log).unwrap();
        tracing::trace!("the test begins");
        block_on(test(pki));
        let log = LOG.lock().unwrap();
        assert!(log.contains("the test begins"), "nothing is kept");
        let line = log.lines().find(|line| line.contains(VALUE));
        assert_eq!(line, None, "a value was logged");
    });
}

/// All that anything in this process logs, at every level.
static LOG: Mutex<String> = Mutex::new(String::new());

struct Log;

impl tracing::Subscriber for Log {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        span.record(&mut Fields);
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, values: &tracing::span::Record<'_>) {
        values.record(&mut Fields);
    }

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        event.record(&mut Fields);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

struct Fields;

impl tracing::field::Visit for Fields {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        let mut log = LOG.lock().unwrap();
        writeln!(log, "{field}: {value:?}").unwrap();
    }
}

/// A VM with the secret KEY for a server, and the server.
async fn with_key(pki: &Pki, data: &Path, protocols: &[&str]) -> (DynVm, Server) {
    let server = Server::start(pki, protocols).await;
    let hosts = [format!("localhost:{}", server.port)];
    let vm = booted(data, &[server.port], vec![secret("KEY", VALUE, &hosts)]).await;
    (vm, server)
}

async fn misdirected(vm: &DynVm) -> Vec<Misdirected> {
    let sightings = vm.misdirected_secrets().unwrap();
    let next = tokio::time::timeout(Duration::from_secs(10), sightings.next());
    next.await.expect("nothing was reported")
}

#[test]
fn the_value_takes_the_placeholders_place_on_the_way_out() {
    with_pki(
        "the_value_takes_the_placeholders_place_on_the_way_out",
        |pki| async move {
            let data = tempfile::tempdir().unwrap();
            let (vm, server) = with_key(&pki, data.path(), &PROTOCOLS).await;
            for version in ["1.1", "2"] {
                let curl = format!("curl -sS --http{version}");
                let url = server.url("/v1?a=b&key=");
                let headers = r#"-H "x-api-key: $KEY" -H "Authorization: Bearer $KEY""#;
                stdout(&vm, &format!("{curl} {headers} \"{url}$KEY\"")).await;
                let head = server.last();
                assert!(
                    head.starts_with(if version == "2" { "h2 " } else { "h1 " }),
                    "{head}"
                );
                assert!(head.contains(&format!("x-api-key: {VALUE}\n")), "{head}");
                assert!(
                    head.contains(&format!("authorization: Bearer {VALUE}\n")),
                    "{head}"
                );
                assert!(head.contains(&format!("/v1?a=b&key={VALUE}\n")), "{head}");
                stdout(&vm, &format!("{curl} -u \"me:$KEY\" {}", server.url("/"))).await;
                // "me:" and the value, in base64.
                let basic = "authorization: Basic bWU6dGhlLXZhbHVlLXRoYXQtbm8tdm0tbWF5LWhhdmU=\n";
                assert!(server.last().contains(basic), "{}", server.last());
            }
            // Several requests over one connection, and a body whose length is not said before.
            let url = server.url("/count");
            let body = "head -c 5000000 /dev/zero | curl -sS --http1.1 -T - -X POST";
            assert_eq!(stdout(&vm, &format!("{body} {url}")).await, "5000000");
            let heads = stdout(
                &vm,
                &format!(
                    "curl -sS --http1.1 -H \"x-api-key: $KEY\" {0} {0}",
                    server.url("/")
                ),
            )
            .await;
            assert_eq!(
                heads.matches(VALUE).count(),
                2,
                "this server says what it was sent"
            );
            vm.shutdown().await;
        },
    );
}

#[test]
fn what_a_request_says_of_its_body_and_itself_is_kept_or_refused() {
    with_pki(
        "what_a_request_says_of_its_body_and_itself_is_kept_or_refused",
        |pki| async move {
            let data = tempfile::tempdir().unwrap();
            let (vm, server) = with_key(&pki, data.path(), &["http/1.1"]).await;
            let curl = async |arguments: &str, path: &str| {
                let command = format!(
                    "printf 12345 | curl -sS -w ' %{{http_code}}' {arguments} {}",
                    server.url(path)
                );
                stdout(&vm, &command).await
            };
            for method in ["GET", "POST", "DELETE"] {
                let chunked = format!("-X {method} -T - -H 'Transfer-Encoding: chunked'");
                assert_eq!(curl(&chunked, "/count").await, "5 200", "{method}");
            }
            let before = server.seen.lock().unwrap().len();
            for (arguments, status) in [
                ("-T - -H 'Transfer-Encoding: gzip, chunked'", "501"),
                ("-X trace", "405"),
                ("-X Track", "405"),
                // More than a head may have.
                (
                    "-H \"x-api-key: $(printf \"$KEY%.0s\" $(seq 2500))\"",
                    "431",
                ),
            ] {
                let answer = curl(arguments, "/").await;
                assert_eq!(answer.rsplit(' ').next(), Some(status), "{arguments}");
            }
            assert_eq!(server.seen.lock().unwrap().len(), before);
            let many = "$(seq -f '-H x-%g:1' 300)";
            assert!(curl(many, "/").await.ends_with(" 200"));
            assert!(server.last().contains("x-300: 1\n"));
            curl(
                "-H 'Connection: Upgrade, HTTP2-Settings' -H 'Upgrade: H2C' -H 'HTTP2-Settings: x'",
                "/",
            )
            .await;
            let head = server.last();
            assert!(
                !head.contains("upgrade: ") && !head.contains("settings: x"),
                "{head}"
            );
            vm.shutdown().await;
        },
    );
}

#[test]
fn a_vm_never_has_the_value() {
    with_pki("a_vm_never_has_the_value", |pki| async move {
        let data = tempfile::tempdir().unwrap();
        let (vm, server) = with_key(&pki, data.path(), &PROTOCOLS).await;
        let environment = stdout(&vm, "env").await;
        let key = environment
            .lines()
            .find(|line| line.starts_with("KEY="))
            .unwrap();
        assert!(
            key.starts_with("KEY=agentvm-secret-") && key.len() == 4 + 15 + 32,
            "{key}"
        );
        assert!(!environment.contains(VALUE));
        // With a connection to the server open, and a response of it read.
        stdout(
            &vm,
            &format!(
                "curl -sS -H \"x-api-key: $KEY\" {} > /dev/null",
                server.url("/count")
            ),
        )
        .await;
        // The value is not in the search for it.
        let search = format!(
            r#"curl -sS -H "x-api-key: $KEY" {} & pid=$!
            perl -e '
                my $v = reverse shift; my $found = 0; my $read = 0;
                open my $maps, "<", "/proc/$ARGV[0]/maps" or die "$!";
                open my $mem, "<:raw", "/proc/$ARGV[0]/mem" or die "$!";
                while (<$maps>) {{
                    my ($from, $to) = /^([0-9a-f]+)-([0-9a-f]+) r/ or next;
                    no warnings "portable";
                    sysseek $mem, hex $from, 0 or next;
                    $read += sysread($mem, my $b, hex($to) - hex($from)) // 0;
                    $found++ if index($b, $v) >= 0;
                }}
                print "$found\n"; die "nothing read" if $read < 100000;
            ' {} $pid; kill $pid
            printf %s {} | rev | grep -rlsF -f - /home /tmp /run /etc /var /proc/[0-9]*/environ /proc/[0-9]*/cmdline | wc -l"#,
            server.url("/hang"),
            VALUE.chars().rev().collect::<String>(),
            VALUE.chars().rev().collect::<String>(),
        );
        assert_eq!(stdout(&vm, &search).await, "0\n0\n");
        vm.shutdown().await;
        assert_eq!(
            files_with(data.path(), VALUE.as_bytes()),
            Vec::<String>::new()
        );
    });
}

fn files_with(directory: &Path, bytes: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            found.extend(files_with(&path, bytes));
        } else if fs::read(&path).is_ok_and(|file| memchr::memmem::find(&file, bytes).is_some()) {
            found.push(path.display().to_string());
        }
    }
    found
}

#[test]
fn a_placeholder_is_the_same_at_the_next_boot_and_the_callers_variable_wins() {
    let name = "a_placeholder_is_the_same_at_the_next_boot_and_the_callers_variable_wins";
    with_pki(name, |pki| async move {
        let data = tempfile::tempdir().unwrap();
        let (vm, server) = with_key(&pki, data.path(), &PROTOCOLS).await;
        let first = stdout(&vm, "printf %s $KEY; cat /run/agentvm/own-authorities.pem").await;
        vm.shutdown().await;
        let secrets = vec![secret(
            "KEY",
            "rotated",
            &[format!("localhost:{}", server.port)],
        )];
        let vm = booted(data.path(), &[server.port], secrets).await;
        let second = stdout(&vm, "printf %s $KEY; cat /run/agentvm/own-authorities.pem").await;
        let length = "agentvm-secret-".len() + 32;
        assert_eq!(first[..length], second[..length]);
        assert_ne!(first, second, "each run has an authority of its own");
        let own = agentvm::vm::exec::ExecOptions {
            env: vec![("KEY".to_owned(), "own".to_owned())],
            ..Default::default()
        };
        let ended = agentvm::vm::exec::exec(&vm, "printf %s $KEY", own)
            .await
            .unwrap();
        let agentvm::vm::exec::ExecEnd::Exited(output) = ended else {
            panic!("it timed out");
        };
        assert_eq!(output.stdout, b"own");
        vm.shutdown().await;
    });
}

#[test]
fn elsewhere_the_placeholder_stays_and_is_reported() {
    with_pki(
        "elsewhere_the_placeholder_stays_and_is_reported",
        |pki| async move {
            let data = tempfile::tempdir().unwrap();
            let (own, other) = (
                Server::start(&pki, &PROTOCOLS).await,
                Server::start(&pki, &PROTOCOLS).await,
            );
            let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let plain_port = plain.local_addr().unwrap().port();
            let hosts = |server: &Server| [format!("localhost:{}", server.port)];
            let secrets = vec![
                secret("KEY", VALUE, &hosts(&own)),
                secret("OTHER", "other-value", &hosts(&other)),
            ];
            let vm = booted(data.path(), &[own.port, other.port, plain_port], secrets).await;
            let key = stdout(&vm, "printf %s $KEY").await;
            let report = |host: &str, port, place| {
                let (secret, host) = ("KEY".to_owned(), host.to_owned());
                vec![Misdirected {
                    secret,
                    host,
                    port,
                    place,
                    count: 1,
                }]
            };

            stdout(
                &vm,
                &format!("curl -sS -H \"x-api-key: $KEY\" {}", other.url("/")),
            )
            .await;
            assert!(
                other.last().contains(&format!("x-api-key: {key}\n")),
                "{}",
                other.last()
            );
            assert_eq!(
                misdirected(&vm).await,
                report("localhost", other.port, Place::Header)
            );

            stdout(
                &vm,
                &format!("curl -sS -H \"x-other: $KEY\" {}", own.url("/")),
            )
            .await;
            assert!(
                own.last().contains(&format!("x-other: {key}\n")),
                "{}",
                own.last()
            );
            assert_eq!(
                misdirected(&vm).await,
                report("localhost", own.port, Place::Header)
            );

            stdout(&vm, &format!("curl -sS \"{}/$KEY?x=1\"", own.url(""))).await;
            assert!(
                own.last().contains(&format!("/{key}?x=1")),
                "{}",
                own.last()
            );
            assert_eq!(
                misdirected(&vm).await,
                report("localhost", own.port, Place::Url)
            );

            let asked =
                format!("curl -sS -m 9 -H \"x-api-key: $KEY\" http://localhost:{plain_port}/");
            let (said, ()) = tokio::join!(stdout(&vm, &asked), async {
                let (mut stream, _) = plain.accept().await.unwrap();
                let mut head = vec![0; 4096];
                let count = stream.read(&mut head).await.unwrap();
                let head = String::from_utf8_lossy(&head[..count]);
                assert!(head.contains(&key) && !head.contains(VALUE), "{head}");
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
                stream.write_all(answer).await.unwrap();
            });
            assert_eq!(said, "hi");
            assert_eq!(
                misdirected(&vm).await,
                report("localhost", plain_port, Place::Plaintext)
            );
            vm.shutdown().await;
        },
    );
}

#[test]
fn a_connection_is_for_the_host_that_tls_has_asked_for() {
    with_pki(
        "a_connection_is_for_the_host_that_tls_has_asked_for",
        |pki| async move {
            let data = tempfile::tempdir().unwrap();
            let (vm, own) = with_key(&pki, data.path(), &PROTOCOLS).await;
            let report = |host: &str, port, place| {
                let (secret, host) = ("KEY".to_owned(), host.to_owned());
                vec![Misdirected {
                    secret,
                    host,
                    port,
                    place,
                    count: 1,
                }]
            };
            // Another host's name over a connection to this one.
            for version in ["1.1", "2"] {
                let fronted = format!(
                    "curl -sS --http{version} -o /dev/null -w '%{{http_code}}' -H 'Host: evil.example' -H \"x-api-key: $KEY\" {}",
                    own.url("/")
                );
                let before = own.seen.lock().unwrap().len();
                assert_eq!(stdout(&vm, &fronted).await, "421");
                assert_eq!(
                    own.seen.lock().unwrap().len(),
                    before,
                    "nothing was passed on"
                );
                assert_eq!(
                    misdirected(&vm).await,
                    report("evil.example", own.port, Place::Header)
                );
            }
            let traced = format!(
                "curl -sS -X TRACE -o /dev/null -w '%{{http_code}}' {}",
                own.url("/")
            );
            assert_eq!(stdout(&vm, &traced).await, "405");
            vm.shutdown().await;
        },
    );
}

#[test]
fn tls_to_other_names_is_relayed_untouched() {
    with_pki(
        "tls_to_other_names_is_relayed_untouched",
        |pki| async move {
            let data = tempfile::tempdir().unwrap();
            let (vm, server) = with_key(&pki, data.path(), &PROTOCOLS).await;
            // The certificate is the server's own, which the VM does not trust.
            let other = format!(
                "curl -sS --resolve other.localhost:{0}:127.0.0.1 -H \"x-api-key: $KEY\" https://other.localhost:{0}/",
                server.port
            );
            let output = sh(&vm, &other).await;
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.contains("certificate"), "{said}");
            let heads = stdout(&vm, &other.replace("-sS", "-sS -k")).await;
            assert!(heads.contains("x-api-key: agentvm-secret-"), "{heads}");
            vm.shutdown().await;
        },
    );
}

#[test]
fn a_stream_arrives_piece_by_piece() {
    with_pki("a_stream_arrives_piece_by_piece", |pki| async move {
        let data = tempfile::tempdir().unwrap();
        let (vm, server) = with_key(&pki, data.path(), &PROTOCOLS).await;
        for version in ["1.1", "2"] {
            let command = format!(
                "curl -sSN -m 20 --http{version} {} | while read line; do echo $line; curl -sS {}; done",
                server.url("/stream"),
                server.url("/acknowledge"),
            );
            assert_eq!(
                stdout(&vm, &command).await,
                "one\ntwo\nthree\n",
                "{version}"
            );
            let much = format!("curl -sS --http{version} {} | wc -c", server.url("/much"));
            assert_eq!(stdout(&vm, &much).await.trim(), (64 << 20).to_string());
        }
        vm.shutdown().await;
    });
}

#[test]
fn a_client_is_told_what_the_server_speaks() {
    with_pki(
        "a_client_is_told_what_the_server_speaks",
        |pki| async move {
            let data = tempfile::tempdir().unwrap();
            let (vm, server) = with_key(&pki, data.path(), &["http/1.1"]).await;
            let curl = format!(
                "curl -sS --http2 -w '%{{http_version}}' -o /dev/null {}",
                server.url("/")
            );
            assert_eq!(stdout(&vm, &curl).await, "1.1");
            // Without a word of protocols, and in the oldest version.
            let curl = format!(
                "curl -sS --no-alpn --http1.0 -H \"x-api-key: $KEY\" {}",
                server.url("/")
            );
            assert!(stdout(&vm, &curl).await.contains(VALUE));
            vm.shutdown().await;
        },
    );
}

#[test]
fn a_refusal_before_the_end_of_an_upload_reaches_its_client() {
    with_pki(
        "a_refusal_before_the_end_of_an_upload_reaches_its_client",
        |pki| async move {
            let data = tempfile::tempdir().unwrap();
            let (vm, server) = with_key(&pki, data.path(), &PROTOCOLS).await;
            stdout(&vm, "head -c 3000000 /dev/zero > zeros").await;
            let curl = "curl -sS --http2 -w '%{http_code}' -o /dev/null -T zeros";
            // It is a race.
            let uploads = format!(
                "for i in $(seq 20); do {curl} {}; done",
                server.url("/refused")
            );
            assert_eq!(stdout(&vm, &uploads).await, "413".repeat(20));
            vm.shutdown().await;
        },
    );
}

#[test]
fn a_client_that_goes_away_takes_its_request_along() {
    with_pki(
        "a_client_that_goes_away_takes_its_request_along",
        |pki| async move {
            let data = tempfile::tempdir().unwrap();
            let (vm, mut server) = with_key(&pki, data.path(), &PROTOCOLS).await;
            for version in ["1.1", "2"] {
                let url = server.url("/hang");
                let curl = format!("curl -sS --http{version} {url} & echo $! > pid; wait $! || :");
                let gone = async {
                    server
                        .hanging
                        .wait_for(|hanging| *hanging == 1)
                        .await
                        .unwrap();
                    stdout(&vm, "kill -9 $(cat pid)").await;
                    let gone = server.hanging.wait_for(|hanging| *hanging == 0);
                    let gone = tokio::time::timeout(Duration::from_secs(5), gone).await;
                    gone.expect("the request goes on").unwrap();
                };
                tokio::join!(stdout(&vm, &curl), gone);
            }
            vm.shutdown().await;
        },
    );
}

#[test]
fn an_upgraded_connection_goes_both_ways() {
    with_pki("an_upgraded_connection_goes_both_ways", |pki| async move {
        let data = tempfile::tempdir().unwrap();
        let (vm, server) = with_key(&pki, data.path(), &PROTOCOLS).await;
        let command = format!(
            r"(printf 'GET /upgrade HTTP/1.1\r\nHost: localhost:{0}\r\nConnection: Upgrade\r\nUpgrade: echo\r\nAuthorization: Bearer %s\r\n\r\n' $KEY
            sleep 1; echo ping; sleep 1) | openssl s_client -quiet -no_ign_eof -verify_return_error -servername localhost -connect 127.0.0.1:{0} 2> /dev/null",
            server.port
        );
        let said = stdout(&vm, &command).await;
        assert!(said.starts_with("HTTP/1.1 101 "), "{said}");
        assert!(said.ends_with("\r\n\r\nping\n"), "{said}");
        assert!(
            server
                .last()
                .contains(&format!("authorization: Bearer {VALUE}\n"))
        );
        vm.shutdown().await;
    });
}

#[test]
fn what_node_is_told_to_trust_is_trusted() {
    const TEST: &str = "net::secrets::what_node_is_told_to_trust_is_trusted";
    in_child(&[], TEST, || {
        let data = tempfile::tempdir().unwrap();
        let pki = Pki::new();
        pki.name_in("NODE_EXTRA_CA_CERTS", data.path());
        block_on(async {
            let (vm, server) = with_key(&pki, data.path(), &PROTOCOLS).await;
            let command = format!("curl -sS -H \"x-api-key: $KEY\" {}", server.url("/"));
            stdout(&vm, &command).await;
            assert_eq!(server.seen.lock().unwrap().len(), 1);
            vm.shutdown().await;
        });
    });
}

#[test]
fn a_server_that_the_host_does_not_trust_gets_nothing() {
    with_pki(
        "a_server_that_the_host_does_not_trust_gets_nothing",
        |_| async move {
            let data = tempfile::tempdir().unwrap();
            let (vm, server) = with_key(&Pki::new(), data.path(), &PROTOCOLS).await;
            for version in ["1.1", "2"] {
                let command = format!(
                    "timeout 5 curl -v --http{version} -w '%{{http_code}}' -H \"x-api-key: $KEY\" {}",
                    server.url("/")
                );
                let said = stdout(&vm, &command).await;
                assert!(
                    said.contains("invalid peer certificate") && said.ends_with("502"),
                    "{said}"
                );
            }
            assert!(server.seen.lock().unwrap().is_empty());
            vm.shutdown().await;
        },
    );
}

#[test]
fn an_answer_that_is_no_http_is_a_bad_gateway() {
    with_pki(
        "an_answer_that_is_no_http_is_a_bad_gateway",
        |pki| async move {
            let data = tempfile::tempdir().unwrap();
            for (version, protocol, is_first, is_endless) in [
                ("1.1", "http/1.1", false, false),
                ("1.1", "http/1.1", true, false),
                ("1.1", "http/1.1", false, true),
                ("2", "h2", false, false),
                ("2", "h2", true, false),
            ] {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let port = listener.local_addr().unwrap().port();
                let acceptor = TlsAcceptor::from(Arc::new(pki.config(&[protocol])));
                let hosts = [format!("localhost:{port}")];
                let vm = booted(data.path(), &[port], vec![secret("KEY", VALUE, &hosts)]).await;
                // Of one that speaks first, and of one that has heard its client.
                let answer = async {
                    let (stream, _) = listener.accept().await.unwrap();
                    let mut stream = acceptor.accept(stream).await.unwrap();
                    let mut heard = [0; 1024];
                    if !is_first {
                        stream.read_exact(&mut heard[..16]).await.unwrap();
                    }
                    let answer = if is_endless {
                        "HTTP/1.1 103 Early Hints\r\n\r\n".repeat(1000)
                    } else {
                        "220 mail.example ESMTP\r\n".to_owned()
                    };
                    stream.write_all(answer.as_bytes()).await.unwrap();
                    while let Ok(1..) = stream.read(&mut heard).await {}
                };
                let curl = format!(
                    "curl -sS --http{version} -w '%{{http_code}}' https://localhost:{port}/"
                );
                let ((), said) = tokio::join!(answer, stdout(&vm, &curl));
                assert!(
                    said.contains("can't be read") && said.ends_with("502"),
                    "HTTP/{version}, {is_first}: {said}"
                );
                vm.shutdown().await;
            }
        },
    );
}

#[test]
fn secrets_are_exchanged_while_the_vm_runs() {
    with_pki(
        "secrets_are_exchanged_while_the_vm_runs",
        |pki| async move {
            let data = tempfile::tempdir().unwrap();
            let (vm, server) = with_key(&pki, data.path(), &["http/1.1"]).await;
            let curl = format!("curl -sS -H \"x-api-key: $KEY\" {}", server.url("/"));
            let hosts = [format!("localhost:{}", server.port)];
            let rotated = Secrets::new(vec![secret("KEY", "rotated", &hosts)]).unwrap();
            assert!(vm.set_secrets(&rotated));
            assert!(stdout(&vm, &curl).await.contains("x-api-key: rotated\n"));
            vm.shutdown().await;
            let without: DynVm = boot(options(data.path(), &[server.port])).await.unwrap().vm;
            assert!(!without.set_secrets(&rotated));
            let said = stdout(&without, "printf \"$KEY$SSL_CERT_FILE\"; ls /run").await;
            assert!(!said.contains("agentvm"), "{said}");
            without.shutdown().await;
        },
    );
}

#[test]
fn a_change_of_the_rules_resets_what_ends_here_as_what_is_relayed() {
    const NAME: &str =
        "net::secrets::a_change_of_the_rules_resets_what_ends_here_as_what_is_relayed";
    in_child(&[], NAME, || {
        let trusted = tempfile::tempdir().unwrap();
        let pki = Pki::new();
        pki.trust(trusted.path());
        in_a_world(NAME, |world| async move {
            // One that answers, and one that says nothing in TLS.
            let config = pki.config(&PROTOCOLS);
            let address = format!("{SERVER_V4}:443");
            let at = async move { Server::at(&address, config).await };
            let mut server = world.outside(at).await;
            let silent = async { TcpListener::bind((SERVER_V4, 444)).await.unwrap() };
            let silent = world.outside(silent).await;
            let data = tempfile::tempdir().unwrap();
            let hosts = ["site.example", "site.example:444"].map(str::to_owned);
            let rules = allowing(&["site.example", "a.b.example"]);
            let vm = boot(agentvm::vm::namespace::BootOptions {
                secrets: Secrets::new(vec![secret("KEY", VALUE, &hosts)]).unwrap(),
                policy: Arc::new(Policy::new(&[]).with_rules(rules)),
                ..options(data.path(), &[])
            });
            let vm: DynVm = vm.await.unwrap().vm;
            let curl = "curl -sS -H \"x-api-key: $KEY\"";
            let begun = [
                format!("{curl} --http1.1 https://site.example/hang"),
                format!("{curl} --http2 https://site.example/hang"),
                format!("{curl} -N --http1.1 https://site.example/stream"),
                format!("{curl} -N --http2 https://site.example/stream"),
                format!("{curl} https://site.example:444/"),
                // Relayed, as no secret is for this name.
                format!("{curl} -k https://a.b.example/hang"),
            ];
            let mut all = String::new();
            for (number, command) in begun.iter().enumerate() {
                write!(all, "{command} > out{number} 2> said{number} & ").unwrap();
            }
            let all = all + "wait";
            let change = async {
                let hanging = server.hanging.wait_for(|hanging| *hanging == 3);
                hanging.await.unwrap();
                let streams = "until test -s out2 && test -s out3; do sleep 0.01; done";
                stdout(&vm, streams).await;
                let (mut stream, _) = silent.accept().await.unwrap();
                stream.read_u8().await.unwrap();
                vm.set_network(allowing(&["other.example"])).await.unwrap();
                stream
            };
            let (_ended, _silent) = tokio::join!(stdout(&vm, &all), change);
            for (number, command) in begun.iter().enumerate() {
                let said = stdout(&vm, &format!("cat said{number}")).await;
                assert!(
                    said.contains("Connection reset by peer"),
                    "{command}: {said}"
                );
            }
            vm.shutdown().await;
        });
    });
}
