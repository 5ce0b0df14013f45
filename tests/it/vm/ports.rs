//! Servers inside a VM, as the host reaches them.

use std::sync::Arc;

use agentvm::error::Error;
use agentvm::net::Policy;
use agentvm::vm::namespace::boot;
use agentvm::vm::{DynVm, VmError};

use super::{booted, options, sh, stdout};

/// Listens on an address and answers one connection with its client's address.
const SERVER: &str = r"
use IO::Socket::IP;
my $s = IO::Socket::IP->new(LocalHost => shift, LocalPort => shift, Listen => 5) or die $!;
exit if fork;
while (my $c = $s->accept) { print $c $c->peerhost; close $c }
";

/// Runs a program that goes on in the background once it is ready.
async fn start(vm: &DynVm, program: &str, arguments: &str) {
    stdout(vm, &format!("perl -e '{program}' {arguments}")).await;
}

async fn serve(vm: &DynVm, address: &str, port: u16) {
    start(vm, SERVER, &format!("{address} {port}")).await;
}

async fn answer(vm: &DynVm, port: u16) -> String {
    let connection = vm.connect(port).await.unwrap();
    let mut all = Vec::new();
    loop {
        let chunk = connection.read(usize::MAX).await.unwrap();
        if chunk.is_empty() {
            return String::from_utf8(all).unwrap();
        }
        all.extend(chunk);
    }
}

#[tokio::test]
async fn a_server_is_met_from_its_own_loopback() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    serve(&vm, "127.0.0.1", 3000).await;
    serve(&vm, "::1", 3001).await;
    serve(&vm, "0.0.0.0", 3002).await;
    assert_eq!(answer(&vm, 3000).await, "127.0.0.1");
    assert_eq!(answer(&vm, 3001).await, "::1");
    assert_eq!(answer(&vm, 3002).await, "127.0.0.1");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_port_where_nothing_listens_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let error = Error::from(vm.connect(3000).await.unwrap_err());
    assert_eq!(error.code.as_str(), "ECONNREFUSED");
    assert!(error.message.contains("port 3000"), "{error}");
    vm.shutdown().await;
}

#[tokio::test]
async fn what_listens_is_listed_without_what_agentvm_needs_itself() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    assert_eq!(vm.listeners().await.unwrap(), []);
    serve(&vm, "::1", 3001).await;
    serve(&vm, "127.0.0.1", 3000).await;
    // Connections are not listed, and do not hide what listens.
    let _open = vm.connect(3000).await.unwrap();
    let found: Vec<String> = vm
        .listeners()
        .await
        .unwrap()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(found, ["127.0.0.1:3000", "[::1]:3001"]);
    vm.shutdown().await;
}

#[tokio::test]
async fn a_port_that_is_the_hosts_is_not_mistaken_for_the_vms() {
    let data = tempfile::tempdir().unwrap();
    let mut options = options(data.path(), "a");
    options.policy = Arc::new(Policy::new(&[3000]));
    let vm: DynVm = boot(options).await.unwrap().vm;
    let error = vm.connect(3000).await.unwrap_err();
    assert!(matches!(error, VmError::ExemptPort(3000)), "{error}");
    vm.shutdown().await;
}

#[tokio::test]
async fn a_server_with_a_full_backlog_keeps_nobody_else_waiting() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let full = r"
use IO::Socket::IP;
my $s = IO::Socket::IP->new(LocalHost => q{127.0.0.1}, LocalPort => 3000, Listen => 1) or die $!;
my @c = map { IO::Socket::IP->new(PeerHost => q{127.0.0.1}, PeerPort => 3000) } 1 .. 2;
exit if fork;
sleep 1000;
";
    start(&vm, full, "").await;
    let waits = vm.connect(3000);
    tokio::pin!(waits);
    tokio::select! {
        connected = &mut waits => panic!("{connected:?}"),
        ran = sh(&vm, "echo other") => assert_eq!(ran.stdout, b"other\n"),
    }
    vm.shutdown().await;
}

#[tokio::test]
async fn a_vm_that_ends_ends_its_connections() {
    let data = tempfile::tempdir().unwrap();
    let vm = booted(data.path(), "a").await;
    let silent = r"
use IO::Socket::IP;
my $s = IO::Socket::IP->new(LocalHost => q{127.0.0.1}, LocalPort => 3000, Listen => 1) or die $!;
exit if fork;
my $c = $s->accept;
sleep 1000;
";
    start(&vm, silent, "").await;
    let connection = vm.connect(3000).await.unwrap();
    vm.shutdown().await;
    let read = connection.read(usize::MAX).await;
    assert!(matches!(read.as_deref(), Ok([]) | Err(_)), "{read:?}");
}
