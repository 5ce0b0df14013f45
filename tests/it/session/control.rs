//! What a caller asks of a session beside prompts.

use agentvm::error::Code;
use agentvm::session::{Change, Notice, SessionState};
use agentvm::store::Status;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::fixture::{Listener, World, code, options, within};

const MODES: &str = r#"{"modes":{"currentModeId":"ask",
    "availableModes":[{"id":"ask"},{"id":"code"},{"id":"loud"},{"id":"broken"}]},
    "models":{"currentModelId":"a","availableModels":[{"modelId":"a"},{"modelId":"b"}]}}"#;

fn updates(log: &super::fixture::Log, kind: &str) -> Vec<Value> {
    let mut updates = log.of("session/update");
    updates.retain(|params| params["update"]["sessionUpdate"] == kind);
    updates
}

#[tokio::test]
async fn a_change_returns_the_agents_answer_and_is_in_the_log_once() {
    let world = World::new().await;
    let session = world.session_with(&[("CONFIGURATION", MODES)]).await;
    let answer = within(world.vm.change(session, Change::Model("b")))
        .await
        .unwrap();
    assert_eq!(answer.get(), r#"{"model":"b"}"#);
    within(world.vm.change(session, Change::Mode("code")))
        .await
        .unwrap();
    let told = updates(&world.log(session).await, "current_mode_update");
    assert_eq!(told.len(), 1);
    assert_eq!(told[0]["update"]["currentModeId"], "code");
    assert_eq!(told[0]["_meta"]["agentvm"]["synthetic"], true);
    // What the agent tells itself needs no other word.
    world.run(session, "mode ask").await.unwrap();
    let told = updates(&world.log(session).await, "current_mode_update");
    assert_eq!(told.len(), 2);
    assert_eq!(told[1]["_meta"], Value::Null);
    assert_eq!(
        world.vm.modes(session).await.unwrap().unwrap()["currentModeId"],
        "ask"
    );
    world.close().await;
}

#[tokio::test]
async fn what_the_agent_refuses_is_the_callers_error() {
    let world = World::new().await;
    let session = world.session_with(&[("CONFIGURATION", MODES)]).await;
    let broken = within(world.vm.change(session, Change::Mode("broken"))).await;
    let error = broken.unwrap_err();
    assert_eq!(error.code, Code::AgentError);
    assert!(error.message.contains("this mode is broken"), "{error}");
    let unknown = within(world.vm.change(session, Change::Mode("fly"))).await;
    assert!(
        unknown
            .unwrap_err()
            .message
            .contains("ask, code, loud, broken")
    );
    let level = within(world.vm.change(session, Change::ThoughtLevel("high"))).await;
    assert_eq!(code(level), Code::AgentUnsupported);
    assert_eq!(
        world.vm.modes(session).await.unwrap().unwrap()["currentModeId"],
        "ask"
    );
    world.close().await;
}

#[tokio::test]
async fn a_session_that_cannot_have_its_settings_is_not_made() {
    let world = World::new().await;
    for (env, mode) in [
        ([("CONFIGURATION", MODES)], "broken"),
        ([("A", "")], "code"),
    ] {
        let mut wanted = options(&env);
        wanted.mode = Some(mode.to_owned());
        let made = world
            .vm
            .create_session("pi", wanted, std::future::pending());
        within(made).await.unwrap_err();
    }
    world.assert_nothing_half_made().await;
    world.close().await;
}

#[tokio::test]
async fn any_method_reaches_the_agent_with_its_own_session_id() {
    let world = World::new().await;
    let session = world.session().await;
    let echo = async |params: Option<String>| {
        let params = params.map(|params| RawValue::from_string(params).unwrap());
        let answer = world.vm.raw_send(session, "test/echo", params.as_deref());
        within(answer).await.unwrap().get().to_owned()
    };
    assert_eq!(echo(None).await, r#"{"sessionId":"private-1"}"#);
    let public = format!(r#"{{"sessionId":"{session}"}}"#);
    assert_eq!(echo(Some(public)).await, r#"{"sessionId":"private-1"}"#);
    let other = r#"{"sessionId":"else"}"#;
    assert_eq!(echo(Some(other.to_owned())).await, other);
    for reserved in [
        "session/prompt",
        "session/cancel",
        "session/close",
        "initialize",
    ] {
        let refused = within(world.vm.raw_send(session, reserved, None)).await;
        assert_eq!(code(refused), Code::InvalidArgument);
    }
    let unknown = within(world.vm.raw_send(session, "no/such", None)).await;
    let error = unknown.unwrap_err();
    assert_eq!(error.code, Code::AgentError);
    assert_eq!(error.data.unwrap()["code"], -32601);
    world.close().await;
}

#[tokio::test]
async fn a_session_is_shown_with_its_turn_and_without_booting() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let session = world.session().await;
    assert_eq!(world.vm.session_view(session).await.unwrap().turn, None);
    let turn = world.start(session, "say begun\ncancel");
    listener.said("begun").await;
    let shown = world.vm.session_view(session).await.unwrap();
    let (id, started_at) = shown.turn.unwrap();
    let logged = world.log(session).await.of("_agentvm/turn_start");
    assert_eq!(logged[0]["turnId"], id.to_string());
    assert!(started_at > 0);
    assert!(world.vm.cancel_prompt(session).await.unwrap());
    turn.await.unwrap().unwrap();
    world.vm.sleep().await.unwrap();
    let shown = world.vm.session_views().await.unwrap();
    assert_eq!(shown[0].turn, None);
    assert_eq!(shown[0].record.status, Status::Suspended);
    assert_eq!(listener.notices(), ["booted", "Sleep"]);
    world.close().await;
}

#[tokio::test]
async fn who_listens_is_told_what_a_session_does() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let session = world.session().await;
    let is = |wanted: fn(&SessionState) -> bool| move |item: &agentvm::session::Item| matches!(item, agentvm::session::Item::Notice(Notice::SessionStatus { state, .. }) if wanted(state));
    listener
        .until(is(|state| {
            matches!(state, SessionState::Open { turn: None, .. })
        }))
        .await;
    let turn = world.start(session, "cancel");
    listener
        .until(is(|state| {
            matches!(state, SessionState::Open { turn: Some(_), .. })
        }))
        .await;
    world.vm.cancel_prompt(session).await.unwrap();
    turn.await.unwrap().unwrap();
    world.vm.close_session(session).await.unwrap();
    listener
        .until(is(|state| matches!(state, SessionState::Closed)))
        .await;
    world.vm.destroy_session(session).await.unwrap();
    listener
        .until(is(|state| matches!(state, SessionState::Destroyed)))
        .await;
    world.close().await;
}

#[tokio::test]
async fn an_agent_that_dies_between_turns_suspends_its_session() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let session = world.session().await;
    let pid = world.text(session, "pid").await;
    world.sh(&format!("kill -9 {pid}")).await;
    let suspended = |item: &agentvm::session::Item| {
        matches!(
            item,
            agentvm::session::Item::Notice(Notice::SessionStatus {
                state: SessionState::Suspended,
                ..
            })
        )
    };
    listener.until(suspended).await;
    assert_eq!(world.record(session).await.status, Status::Suspended);
    assert_eq!(world.text(session, "say again").await, "again");
    world.close().await;
}

#[tokio::test]
async fn a_destroyed_session_leaves_nothing_and_can_be_destroyed_again() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let (kept, session) = (world.session().await, world.session().await);
    world.run(kept, "say kept").await.unwrap();
    let turn = world.start(session, "say begun\ncancel");
    listener.said("begun").await;
    within(world.vm.destroy_session(session)).await.unwrap();
    drop(turn.await.unwrap());
    within(world.vm.destroy_session(session)).await.unwrap();
    assert_eq!(
        code(world.run(session, "say x").await),
        Code::SessionNotFound
    );
    assert_eq!(world.env_files().len(), 1);
    assert_eq!(world.state_directories().await.trim(), kept.to_string());
    assert_eq!(world.agents().await.len(), 1);
    assert_eq!(world.log(kept).await.agent_texts(), ["kept"]);
    // One that sleeps can be destroyed too.
    world.vm.sleep().await.unwrap();
    within(world.vm.destroy_session(kept)).await.unwrap();
    world.assert_nothing_half_made().await;
    world.close().await;
}

#[tokio::test]
async fn a_prompt_that_waits_for_a_destroyed_session_finds_none() {
    let world = World::new().await;
    let session = world.session().await;
    let destroyed = world.vm.destroy_session(session);
    let prompt = world.run(session, "say x");
    let (destroyed, prompt) = tokio::join!(destroyed, prompt);
    destroyed.unwrap();
    // Whichever came first, it ended.
    assert!(prompt.is_ok() || prompt.is_err());
    let gone = world.run(session, "say x").await;
    assert_eq!(code(gone), Code::SessionNotFound);
    world.close().await;
}

#[tokio::test]
async fn boolean_options_are_sent_as_such() {
    let world = World::new().await;
    let offered = r#"{"configOptions":[{"id":"web","type":"boolean","currentValue":false}]}"#;
    let session = world.session_with(&[("CONFIGURATION", offered)]).await;
    let value = json!(true);
    let change = Change::Option {
        id: "web",
        value: &value,
    };
    let answer = within(world.vm.change(session, change)).await.unwrap();
    assert!(answer.get().contains(r#""currentValue":true"#), "{answer}");
    let told = updates(&world.log(session).await, "config_option_update");
    assert_eq!(told.len(), 1);
    assert_eq!(told[0]["update"]["configOptions"][0]["currentValue"], true);
    world.close().await;
}
