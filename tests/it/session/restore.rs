//! What a resumed session is: the conversation, the settings and the options that it had.

use agentvm::error::Code;
use agentvm::ids::SessionId;
use agentvm::session::{Change, McpServer, Resume, SessionOptions};
use serde_json::{Value, json};

use super::fixture::{World, code, options, within};

/// The request that opened the agent's present conversation; asked without a turn, which would log it.
async fn opening(world: &World, session: SessionId) -> Value {
    let answer = world.vm.raw_send(session, "test/opening", None);
    serde_json::from_str(within(answer).await.unwrap().get()).unwrap()
}

async fn created(world: &World, options: SessionOptions) -> SessionId {
    let created = world
        .vm
        .create_session("pi", options, std::future::pending());
    within(created).await.unwrap().id
}

async fn reopened(world: &World, session: SessionId) {
    world.vm.close_session(session).await.unwrap();
    let resumed = world.vm.resume_session(session, Resume::default());
    within(resumed).await.unwrap();
}

#[tokio::test]
async fn an_agent_that_can_resume_is_not_asked_to_repeat() {
    let world = World::new().await;
    let can = [("CAPABILITIES", r#"{"sessionCapabilities":{"resume":{}}}"#)];
    let session = world.session_with(&can).await;
    world.run(session, "say one").await.unwrap();
    reopened(&world, session).await;
    assert_eq!(opening(&world, session).await["method"], "session/resume");
    assert_eq!(
        world.log(session).await.of("_agentvm/session_restored"),
        Vec::<Value>::new()
    );
    world.close().await;
}

#[tokio::test]
async fn an_agent_that_refuses_to_resume_is_asked_to_load() {
    let world = World::new().await;
    let refusal = "line {\"id\":$ID,\"error\":{\"code\":-32603,\"message\":\"no\"}}\nhang";
    let session = world
        .session_with(&[
            ("CAPABILITIES", r#"{"sessionCapabilities":{"resume":{}}}"#),
            ("ON_RESUME", refusal),
        ])
        .await;
    world.run(session, "say one").await.unwrap();
    reopened(&world, session).await;
    assert_eq!(opening(&world, session).await["method"], "session/load");
    assert_eq!(world.text(session, "remember").await, "2");
    world.close().await;
}

#[tokio::test]
async fn an_agent_that_has_forgotten_is_told_the_transcript_once() {
    let world = World::new().await;
    let refusal = "line {\"id\":$ID,\"error\":{\"code\":-32002,\"message\":\"forgotten\"}}\nhang";
    for forgetful in [("NO_LOAD", "1"), ("ON_LOAD", refusal)] {
        let session = world.session_with(&[forgetful]).await;
        world.run(session, "say the answer is 42").await.unwrap();
        reopened(&world, session).await;
        assert_eq!(opening(&world, session).await["method"], "session/new");
        // The agent dies before it was told: the next one is.
        assert_eq!(code(world.run(session, "kill").await), Code::AgentExited);
        let told: Value = serde_json::from_str(&world.text(session, "blocks").await).unwrap();
        let context = told[0]["text"].as_str().unwrap();
        for said in ["User: say the answer is 42", "You: the answer is 42"] {
            assert!(context.contains(said), "{context}");
        }
        assert_eq!(told[1]["text"], "blocks");
        let again: Value = serde_json::from_str(&world.text(session, "blocks").await).unwrap();
        assert_eq!(again.as_array().map(Vec::len), Some(1));
        let log = world.log(session).await;
        let restored = &log.of("_agentvm/session_restored")[0];
        assert!(restored["fromTranscript"].is_string(), "{restored}");
        // The log has what the user wrote, and nothing else.
        let prompts = log.texts("user_message_chunk");
        assert_eq!(
            prompts,
            ["say the answer is 42", "kill", "blocks", "blocks"]
        );
    }
    world.close().await;
}

#[tokio::test]
async fn an_agent_without_a_key_is_not_taken_for_a_forgetful_one() {
    let world = World::new().await;
    let refusal = "line {\"id\":$ID,\"error\":{\"code\":-32000,\"message\":\"log in\"}}\nhang";
    let session = world.session_with(&[("ON_LOAD", refusal)]).await;
    world.vm.close_session(session).await.unwrap();
    assert_eq!(code(world.run(session, "say x").await), Code::AuthRequired);
    assert_eq!(world.agents().await, Vec::<String>::new());
    let given = Resume {
        env: Some(options(&[("OTHER", "1")]).env),
        ..Resume::default()
    };
    within(world.vm.resume_session(session, given))
        .await
        .unwrap();
    assert_eq!(world.text(session, "env OTHER").await, "1");
    world.close().await;
}

const CONFIGURATION: &str = r#"{
    "modes": {"currentModeId":"ask","availableModes":[{"id":"ask"},{"id":"code"},{"id":"broken"}]},
    "configOptions": [
        {"id":"llm","category":"model","type":"select","currentValue":"small",
         "options":[{"value":"small"},{"value":"big"}]},
        {"id":"effort","category":"thought_level","type":"select","currentValue":"low",
         "options":[{"value":"low"},{"value":"high"}]},
        {"id":"web","type":"boolean","currentValue":false}
    ]
}"#;

async fn settings(world: &World, session: SessionId) -> (Value, Vec<Value>) {
    let modes = world.vm.modes(session).await.unwrap().unwrap();
    let options = world.vm.config_options(session).await.unwrap();
    let values = options.iter().map(|option| option["currentValue"].clone());
    (modes["currentModeId"].clone(), values.collect())
}

#[tokio::test]
async fn settings_come_back_although_the_agent_forgets_them() {
    let world = World::new().await;
    let mut chosen = options(&[("CONFIGURATION", CONFIGURATION)]);
    chosen.model = Some("big".to_owned());
    let session = created(&world, chosen).await;
    for change in [
        Change::Mode("code"),
        Change::ThoughtLevel("high"),
        Change::Option {
            id: "web",
            value: &json!(true),
        },
    ] {
        within(world.vm.change(session, change)).await.unwrap();
    }
    let wanted = (
        json!("code"),
        vec![json!("big"), json!("high"), json!(true)],
    );
    assert_eq!(settings(&world, session).await, wanted);
    world.vm.sleep().await.unwrap();
    // What can be read while nothing runs is the same.
    assert_eq!(settings(&world, session).await, wanted);
    assert_eq!(world.text(session, "say back").await, "back");
    assert_eq!(settings(&world, session).await, wanted);
    let now = world.text(session, "configuration").await;
    let now: Value = serde_json::from_str(&now).unwrap();
    assert_eq!(now["modes"]["currentModeId"], "code");
    assert_eq!(now["configOptions"][1]["currentValue"], "high");
    assert_eq!(
        world.log(session).await.of("_agentvm/session_restored"),
        Vec::<Value>::new()
    );
    world.close().await;
}

#[tokio::test]
async fn a_setting_that_the_agent_no_longer_takes_is_told_and_holds_up_nothing() {
    let world = World::new().await;
    let session = world
        .session_with(&[("CONFIGURATION", CONFIGURATION)])
        .await;
    world.run(session, "mode broken").await.unwrap();
    reopened(&world, session).await;
    let log = world.log(session).await;
    let restored = &log.of("_agentvm/session_restored")[0];
    assert_eq!(restored["notRestored"][0]["setting"], "mode broken");
    assert!(
        restored["notRestored"][0]["error"]
            .as_str()
            .unwrap()
            .contains("broken")
    );
    assert_eq!(settings(&world, session).await.0, "ask");
    world.close().await;
}

#[tokio::test]
async fn servers_and_instructions_are_told_at_every_start() {
    let world = World::new().await;
    let can =
        r#"{"mcpCapabilities":{"http":true,"sse":true},"sessionCapabilities":{"systemPrompt":{}}}"#;
    let mut chosen = options(&[("CAPABILITIES", can)]);
    chosen.additional_instructions = Some("Write tests first.".to_owned());
    chosen.mcp_servers = serde_json::from_value(json!([
        { "type": "local", "name": "files", "command": "mcp-files", "args": ["/home/user"], "env": { "TOKEN": "secret-1" } },
        { "type": "remote", "name": "far", "url": "https://1.1.1.1/mcp", "headers": { "Authorization": "secret-2" } },
    ]))
    .unwrap();
    let session = created(&world, chosen).await;
    let first = opening(&world, session).await;
    assert_eq!(
        first["mcpServers"][0]["env"],
        json!([{ "name": "TOKEN", "value": "secret-1" }])
    );
    assert_eq!(first["mcpServers"][1]["type"], "http");
    let instructions = first["systemPrompt"]["content"][0]["text"]
        .as_str()
        .unwrap();
    for part in ["agentvm", "files", "far", "Write tests first."] {
        assert!(instructions.contains(part), "{instructions}");
    }
    assert_eq!(first["_meta"]["systemPrompt"]["append"], instructions);
    reopened(&world, session).await;
    let second = opening(&world, session).await;
    for told in ["mcpServers", "systemPrompt", "cwd", "_meta"] {
        assert_eq!(first[told], second[told]);
    }
    // Secrets are nowhere but in the session's own file.
    world.vm.sleep().await.unwrap();
    for name in ["vm.db", "vm.db-wal", "vm.json"] {
        let bytes = std::fs::read(world.directory().join(name)).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&bytes).contains("TOKEN"), "{name}");
    }
    world.close().await;
}

#[tokio::test]
async fn servers_that_were_not_kept_are_asked_for() {
    let world = World::new().await;
    let server = json!({ "type": "local", "name": "files", "command": "mcp-files" });
    let servers: Vec<McpServer> = serde_json::from_value(json!([server])).unwrap();
    let mut forget = options(&[("KEY", "x")]);
    forget.persist_env = false;
    forget.mcp_servers.clone_from(&servers);
    let session = created(&world, forget).await;
    world.vm.close_session(session).await.unwrap();
    let given = |mcp_servers| Resume {
        env: Some(options(&[]).env),
        mcp_servers,
    };
    let missing = within(world.vm.resume_session(session, given(None))).await;
    assert_eq!(code(missing), Code::EnvRequired);
    within(world.vm.resume_session(session, given(Some(servers))))
        .await
        .unwrap();
    let told = opening(&world, session).await;
    assert_eq!(told["mcpServers"][0]["command"], "mcp-files");
    world.close().await;
}

#[tokio::test]
async fn a_server_that_the_agent_or_the_network_cannot_have_is_refused_and_leaves_nothing() {
    let world = World::new().await;
    let remote = |url: &str| {
        let mut options = options(&[]);
        let server = json!([{ "type": "remote", "url": url }]);
        options.mcp_servers = serde_json::from_value(server).unwrap();
        options
    };
    for (url, expected) in [
        ("https://1.1.1.1/mcp", Code::AgentUnsupported),
        ("http://127.0.0.1:9/mcp", Code::NetworkDenied),
    ] {
        let abort = std::future::pending();
        let refused = within(world.vm.create_session("pi", remote(url), abort)).await;
        assert_eq!(code(refused), expected);
    }
    world.assert_nothing_half_made().await;
    world.close().await;
}
