//! Agents that do not get as far as a session, and what is left of them: nothing.

use std::time::Duration;

use agentvm::error::Code;

use super::fixture::{Listener, World, code, options, within};

/// Fails to make a session; returns the error, after a look at what is left.
async fn failed(env: &[(&str, &str)]) -> agentvm::error::Error {
    let world = World::new().await;
    let error = world.create(env).await.unwrap_err();
    world.assert_nothing_half_made().await;
    world.close().await;
    error
}

#[tokio::test]
async fn an_agent_that_exits_while_it_starts_is_told_with_code_and_stderr() {
    let error = failed(&[("ON_START", "complain no config file\nexit 3")]).await;
    assert_eq!(error.code, Code::AgentExited);
    assert!(error.message.contains("exited with code 3"), "{error}");
    assert!(error.message.contains("no config file"), "{error}");
    assert!(error.message.contains("initialize"), "{error}");
}

#[tokio::test]
async fn an_agent_that_is_killed_during_initialize_is_told_with_the_signal() {
    let error = failed(&[("ON_INITIALIZE", "kill")]).await;
    assert_eq!(error.code, Code::AgentExited);
    assert!(error.message.contains("killed by signal 9"), "{error}");
}

#[tokio::test]
async fn an_agent_of_another_protocol_version_is_refused() {
    let answer = "line {\"id\":$ID,\"result\":{\"protocolVersion\":99}}\nhang";
    let error = failed(&[("ON_INITIALIZE", answer)]).await;
    assert_eq!(error.code, Code::AgentProtocol);
    assert!(error.message.contains("version"), "{error}");
}

#[tokio::test]
async fn malformed_answers_break_the_protocol() {
    for (moment, answer) in [
        ("ON_INITIALIZE", "line {\"id\":$ID,\"result\":[]}\nhang"),
        ("ON_INITIALIZE", "line {\"id\":$ID,\"result\":null}\nhang"),
        ("ON_NEW", "line {\"id\":$ID,\"result\":{}}\nhang"),
        (
            "ON_NEW",
            "line {\"id\":$ID,\"result\":{\"sessionId\":1}}\nhang",
        ),
    ] {
        let error = failed(&[(moment, answer)]).await;
        assert_eq!(error.code, Code::AgentProtocol, "{answer}: {error}");
    }
}

#[tokio::test]
async fn an_error_of_session_new_is_the_callers() {
    let answer =
        "line {\"id\":$ID,\"error\":{\"code\":-32603,\"message\":\"no model\",\"data\":[1]}}\nhang";
    let error = failed(&[("ON_NEW", answer)]).await;
    assert_eq!(error.code, Code::AgentError);
    assert!(error.message.contains("no model"), "{error}");
    let data = serde_json::json!({ "code": -32603, "data": [1] });
    assert_eq!(error.data, Some(data));
}

#[tokio::test]
async fn an_agent_that_dies_during_session_new_leaves_nothing() {
    let error = failed(&[("ON_NEW", "exit 0")]).await;
    assert_eq!(error.code, Code::AgentExited, "{error}");
    assert!(error.message.contains("session/new"), "{error}");
}

#[tokio::test]
async fn an_agent_that_prints_something_first_works_all_the_same() {
    let world = World::new().await;
    let noise = [("ON_START", "line Starting up…\nhex ff0a")];
    let session = world.session_with(&noise).await;
    assert_eq!(world.text(session, "say hi").await, "hi");
    world.close().await;
}

#[tokio::test]
async fn an_agent_that_is_stopped_by_a_line_over_the_limit_leaves_nothing() {
    let error = failed(&[("ON_INITIALIZE", "long 2000000\nhang")]).await;
    assert_eq!(error.code, Code::AgentProtocol, "{error}");
}

#[tokio::test]
async fn an_aborted_start_leaves_nothing_whenever_it_is_aborted() {
    let world = World::new().await;
    // One that is through tells how long it takes.
    let began = std::time::Instant::now();
    world.session().await;
    let whole = began.elapsed();
    world.vm.destroy().await.unwrap();
    for part in 0..8 {
        let abort = tokio::time::sleep(whole * part / 10);
        let created = within(world.vm.create_session("pi", options(&[("A", "b")]), abort)).await;
        match created {
            Err(error) => {
                assert_eq!(error.code, Code::Aborted);
                world.vm.wake().await.unwrap();
                assert_eq!(world.vm.sessions().await.unwrap(), []);
                assert_eq!(world.env_files().len(), 0);
                assert_eq!(world.state_directories().await, "");
                assert_eq!(world.agents().await, Vec::<String>::new());
            }
            Ok(_) => world.vm.destroy().await.unwrap(),
        }
    }
    world.close().await;
}

#[tokio::test]
async fn an_agent_that_never_answers_can_be_aborted() {
    let world = World::new().await;
    for moment in ["ON_INITIALIZE", "ON_NEW"] {
        let abort = tokio::time::sleep(Duration::from_millis(300));
        let hangs = options(&[(moment, "hang")]);
        let created = within(world.vm.create_session("pi", hangs, abort)).await;
        assert_eq!(code(created), Code::Aborted);
    }
    world.assert_nothing_half_made().await;
    world.close().await;
}

async fn close_while_it_starts(world: &World, moment: &str) -> Code {
    let vm = world.vm.clone();
    let hangs = options(&[(moment, "say started\nhang")]);
    let listener = Listener::of(&world.vm);
    let created =
        tokio::spawn(async move { vm.create_session("pi", hangs, std::future::pending()).await });
    if moment == "ON_NEW" {
        listener.said("started").await;
    }
    within(world.client.close()).await.unwrap();
    code(within(created).await.unwrap())
}

#[tokio::test]
async fn closing_the_client_ends_a_start_and_the_next_opener_finds_nothing_of_it() {
    let world = World::new().await;
    for moment in ["ON_INITIALIZE", "ON_NEW"] {
        let started = world.beside();
        // It may not have come to its agent yet.
        started.vm.wake().await.unwrap();
        let code = close_while_it_starts(&started, moment).await;
        assert_eq!(code, Code::ClientClosed, "{moment}");
    }
    let session = world.session().await;
    assert_eq!(world.vm.sessions().await.unwrap().len(), 1);
    assert_eq!(world.env_files().len(), 1);
    assert_eq!(world.state_directories().await, format!("{session}\n"));
    world.close().await;
}

#[tokio::test]
async fn a_working_directory_that_is_a_file_is_refused_by_name() {
    let world = World::new().await;
    let mut wrong = options(&[]);
    wrong.cwd = agentvm::vm::GuestPath::new("/etc/passwd").unwrap();
    let created = world.vm.create_session("pi", wrong, std::future::pending());
    let error = within(created).await.unwrap_err();
    assert_eq!(error.code, Code::InvalidArgument);
    assert!(error.message.contains("/etc/passwd"), "{error}");
    world.close().await;
}

#[tokio::test]
async fn a_session_gets_its_environment_and_directory_and_nothing_of_the_hosts() {
    let world = World::new().await;
    let mut own = options(&[("MINE", "1")]);
    own.cwd = agentvm::vm::GuestPath::new("/home/user/deep/er").unwrap();
    let created = world.vm.create_session("pi", own, std::future::pending());
    let session = within(created).await.unwrap().id;
    for _ in 0..2 {
        assert_eq!(world.text(session, "env MINE").await, "1");
        assert_eq!(world.text(session, "env CARGO_PKG_NAME").await, "unset");
        assert_eq!(world.text(session, "cwd").await, "/home/user/deep/er");
        world.vm.close_session(session).await.unwrap();
    }
    world.close().await;
}

#[tokio::test]
async fn capabilities_are_handed_on_as_they_came() {
    let world = World::new().await;
    let created = world.create(&[]).await.unwrap();
    let capabilities = r#"{"loadSession":true,"unknown":[1e+30]}"#;
    assert_eq!(created.capabilities.unwrap().get(), capabilities);
    let record = world.record(created.id).await;
    assert_eq!(&*record.capabilities, capabilities);
    assert_eq!(&*record.agent_info, r#"{"name":"test","version":"1"}"#);
    world.close().await;
}
