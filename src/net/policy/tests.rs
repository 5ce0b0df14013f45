use super::*;

fn rules(texts: &[&str]) -> Vec<Rule> {
    let parse = |text: &&str| Rule::parse(text).expect(text);
    texts.iter().map(parse).collect()
}

fn policy(otherwise: Otherwise, allow: &[&str], deny: &[&str]) -> Policy {
    Policy::new(&[]).with_rules(Rules {
        otherwise,
        allow: rules(allow),
        deny: rules(deny),
    })
}

fn judge_for(policy: &Policy, destination: &str, names: &[&str]) -> Verdict {
    policy.judge(destination.parse().expect("an address with a port"), names)
}

fn judge(policy: &Policy, destination: &str) -> Verdict {
    judge_for(policy, destination, &[])
}

const ALLOWED: Verdict = Verdict::Allow(Terms::Anything);
const BY_NAME: Verdict = Verdict::Allow(Terms::Allowed);

fn denied(by: &str) -> Verdict {
    Verdict::Deny(Reason::Rule(by.into()))
}

const fn not_public(scope: Scope) -> Verdict {
    Verdict::Deny(Reason::NotPublic(scope))
}

#[test]
fn only_exempt_ports_of_loopback_are_allowed() {
    for otherwise in [Otherwise::Public, Otherwise::None, Otherwise::Allowlist] {
        let policy = Policy::new(&[8080]).with_rules(Rules {
            otherwise,
            ..Rules::default()
        });
        let loopback = not_public(Scope::Loopback);
        assert_eq!(judge(&policy, "127.0.0.1:8080"), ALLOWED);
        assert_eq!(judge(&policy, "[::1]:8080"), ALLOWED);
        assert_eq!(judge(&policy, "127.0.0.1:8081"), loopback);
        assert_eq!(judge(&policy, "[::1]:8081"), loopback);
        assert_eq!(judge(&policy, "127.0.0.2:8080"), loopback);
    }
}

#[test]
fn an_exempt_port_opens_no_other_address() {
    let policy = Policy::new(&[80]);
    for destination in ["10.0.0.1:80", "169.254.169.254:80", "[::ffff:127.0.0.1]:80"] {
        assert!(
            matches!(judge(&policy, destination), Verdict::Deny(_)),
            "{destination}"
        );
    }
}

#[test]
fn public_addresses_are_allowed() {
    let policy = Policy::new(&[]);
    assert_eq!(judge(&policy, "1.2.3.4:443"), ALLOWED);
    assert_eq!(judge(&policy, "[2606:4700::1]:443"), ALLOWED);
}

#[test]
fn nothing_is_allowed_under_none() {
    let policy = policy(Otherwise::None, &[], &[]);
    assert_eq!(
        judge(&policy, "1.2.3.4:443"),
        Verdict::Deny(Reason::Nothing)
    );
    assert_eq!(policy.judge_name("a.test"), Some(Reason::Nothing));
}

#[test]
fn deny_comes_before_allow() {
    let policy = policy(
        Otherwise::Allowlist,
        &["*.example.com", "1.2.0.0/16"],
        &["bad.example.com", "1.2.3.0/24:80"],
    );
    assert_eq!(policy.judge_name("good.example.com"), None);
    let bad = Some(Reason::Rule("bad.example.com".into()));
    assert_eq!(policy.judge_name("bad.example.com"), bad);
    assert_eq!(judge(&policy, "1.2.3.4:80"), denied("1.2.3.0/24:80"));
    let allowed = Verdict::Allow(Terms::NotDenied);
    assert_eq!(judge(&policy, "1.2.3.4:443"), allowed);
}

#[test]
fn an_address_is_reached_by_the_name_that_it_was_given_out_for() {
    let policy = policy(Otherwise::Allowlist, &["api.test:443"], &[]);
    let none = Verdict::Deny(Reason::Allowlist);
    assert_eq!(judge_for(&policy, "1.2.3.4:443", &["api.test"]), BY_NAME);
    assert_eq!(judge_for(&policy, "1.2.3.4:80", &["api.test"]), none);
    assert_eq!(judge_for(&policy, "1.2.3.4:443", &["other.test"]), none);
    assert_eq!(judge(&policy, "1.2.3.4:443"), none);
    assert_eq!(
        judge_for(&policy, "10.0.0.1:443", &["api.test"]),
        not_public(Scope::Private)
    );
    for (server, reason) in [(None, Reason::Tls), (Some("other.test"), Reason::Allowlist)] {
        let denied = policy.judge_server(Terms::Allowed, server, 443);
        assert_eq!(denied, Some(reason), "{server:?}");
    }
    assert_eq!(
        policy.judge_server(Terms::Allowed, Some("api.test"), 443),
        None
    );
}

#[test]
fn denied_names_are_denied_by_what_tls_says_and_by_their_addresses() {
    let policy = policy(Otherwise::Public, &[], &["*.evil.test", "bad.test"]);
    let evil = Reason::Rule("*.evil.test".into());
    assert_eq!(policy.judge_name("a.evil.test"), Some(evil.clone()));
    assert_eq!(policy.judge_name("a.test"), None);
    let named = policy.judge_server(Terms::NotDenied, Some("a.evil.test"), 443);
    assert_eq!(named, Some(evil.clone()));
    let known = judge_for(&policy, "1.2.3.4:443", &["a.evil.test"]);
    assert_eq!(known, Verdict::Deny(evil));
    let last = judge_for(&policy, "1.2.3.4:443", &["a.evil.test", "bad.test"]);
    assert_eq!(last, denied("bad.test"));
    // One that others share is told by TLS.
    let shared = judge_for(&policy, "1.2.3.4:443", &["a.evil.test", "a.test"]);
    assert_eq!(shared, Verdict::Allow(Terms::NotDenied));
}

#[test]
fn a_denied_port_of_a_name_leaves_its_others() {
    let policy = policy(Otherwise::Public, &[], &["mail.test:25"]);
    assert_eq!(policy.judge_name("mail.test"), None);
    let at = |port| judge_for(&policy, &format!("1.2.3.4:{port}"), &["mail.test"]);
    assert_eq!(at(25), denied("mail.test:25"));
    assert_eq!(at(443), Verdict::Allow(Terms::NotDenied));
}

#[test]
fn what_is_not_public_is_opened_by_its_address_alone() {
    for otherwise in [Otherwise::Public, Otherwise::Allowlist] {
        let private = not_public(Scope::Private);
        for opens_nothing in [
            "*",
            "internal.test",
            "0.0.0.0/0",
            "8.0.0.0/5",
            "10.0.0.5:80",
        ] {
            let policy = policy(otherwise, &[opens_nothing], &[]);
            let judged = judge_for(&policy, "10.0.0.5:5432", &["internal.test"]);
            assert_eq!(judged, private, "{opens_nothing}");
        }
        for opens in ["10.0.0.0/8", "10.0.0.5", "10.0.0.5:5432"] {
            let policy = policy(otherwise, &[opens], &[]);
            assert_eq!(judge(&policy, "10.0.0.5:5432"), ALLOWED, "{opens}");
            assert_eq!(policy.denied_answer([10, 0, 0, 5].into()), None);
        }
    }
    let metadata = policy(
        Otherwise::Public,
        &["169.254.169.254:80", "fd00:ec2::254"],
        &[],
    );
    assert_eq!(judge(&metadata, "169.254.169.254:80"), ALLOWED);
    assert_eq!(judge(&metadata, "[fd00:ec2::254]:80"), ALLOWED);
    assert_eq!(
        judge(&metadata, "169.254.1.1:80"),
        not_public(Scope::LinkLocal)
    );
}

#[test]
fn an_address_of_the_host_is_opened_by_a_rule_of_exactly_it() {
    let own = host_address::all().expect("interfaces").into_iter();
    let Some(own) = { own }.find(|own| own.is_ipv4() && !own.is_loopback()) else {
        return; // a host without a network: tests in a world of their own have one
    };
    let host = Verdict::Deny(Reason::Host);
    let network = format!("{}/24", Block::new(own, 24).first());
    let destination = format!("{own}:22");
    let by_network = policy(Otherwise::Public, &[&network], &[]);
    assert_eq!(judge(&by_network, &destination), host);
    let exactly = policy(Otherwise::Public, &[&own.to_string()], &[]);
    assert_eq!(judge(&exactly, &destination), ALLOWED);
}

#[test]
fn no_rule_opens_what_leads_nowhere_or_to_loopback() {
    let policy = policy(
        Otherwise::Allowlist,
        &["0.0.0.0/0", "::/0", "64:ff9b::/96"],
        &[],
    );
    for destination in [
        "0.0.0.0:80",
        "127.0.0.1:80",
        "[::]:80",
        "[::1]:80",
        "[::ffff:127.0.0.1]:80",
        "[::127.0.0.1]:80",
        "[64:ff9b::127.0.0.1]:80",
    ] {
        let judged = judge(&policy, destination);
        assert!(
            matches!(judged, Verdict::Deny(Reason::NotPublic(_))),
            "{destination}: {judged:?}"
        );
    }
}

#[test]
fn an_ipv4_rule_is_of_its_nat64_address_as_well() {
    let policy = policy(Otherwise::Public, &["10.0.0.0/8"], &["1.2.3.4"]);
    assert_eq!(judge(&policy, "[64:ff9b::1.2.3.4]:80"), denied("1.2.3.4"));
    // Whose 10.0.0.1 that is, is not known.
    assert_eq!(
        judge(&policy, "[64:ff9b::10.0.0.1]:80"),
        not_public(Scope::Private)
    );
}

/// Whether the VM's own rules refuse it.
fn in_guest(policy: &Policy, address: &str) -> bool {
    let config = policy.guest_config();
    match address.parse().expect("an address") {
        IpAddr::V4(address) => config
            .denied_v4
            .iter()
            .any(|range| range.first <= address && address <= range.last),
        IpAddr::V6(address) => config
            .denied_v6
            .iter()
            .any(|range| range.first <= address && address <= range.last),
    }
}

#[test]
fn the_guest_refuses_what_can_only_be_denied() {
    let public = policy(
        Otherwise::Public,
        &["10.0.0.0/8:80", "0.0.0.0/0"],
        &["1.2.3.0/24", "9.9.9.9:53"],
    );
    let none = policy(Otherwise::None, &[], &[]);
    let addresses = policy(Otherwise::Allowlist, &["1.2.3.0/24", "fd00::/8"], &[]);
    let names = policy(Otherwise::Allowlist, &["a.test"], &[]);
    for (policy, refused, let_through) in [
        (
            &public,
            &[
                "1.2.3.4",
                "192.168.0.1",
                "127.0.0.1",
                "0.0.0.0",
                "64:ff9b::1.2.3.4",
            ][..],
            &["10.1.1.1", "9.9.9.9", "1.1.1.1"][..],
        ),
        (
            &none,
            &[
                "1.1.1.1",
                "10.0.0.1",
                "2606:4700::1",
                "255.255.255.255",
                "::1",
            ],
            &[],
        ),
        (
            &addresses,
            &["1.1.1.1", "10.0.0.1", "2606:4700::1"],
            &["1.2.3.4", "fd00::1", "64:ff9b::1.2.3.4"],
        ),
        (
            &names,
            &["10.0.0.1", "fd00::1"],
            &["1.1.1.1", "2606:4700::1"],
        ),
    ] {
        for address in refused {
            assert!(in_guest(policy, address), "{address}");
        }
        for address in let_through {
            assert!(!in_guest(policy, address), "{address}");
        }
        let config = policy.guest_config();
        assert!(config.denied_v4.is_sorted_by(|a, b| a.last < b.first));
        assert!(config.denied_v6.is_sorted_by(|a, b| a.last < b.first));
    }
}
