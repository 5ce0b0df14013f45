//! What an agent may write to its stdout and stderr, and what becomes of it.

use agentvm::error::Code;
use serde_json::{Value, json};

use super::fixture::{LIMIT, Listener, World, code};

#[tokio::test]
async fn a_turn_streams_into_the_log_between_its_start_and_its_end() {
    let world = World::new().await;
    let session = world.session().await;
    let turn = world.run(session, "stream 3").await.unwrap();
    assert_eq!(turn.text, "1 2 3 ");
    assert_eq!(turn.stop_reason, "end_turn");
    assert_eq!(turn.response.get(), r#"{"stopReason":"end_turn"}"#);
    let log = world.log(session).await;
    let methods: Vec<_> = log.0.iter().map(|event| &*event.method).collect();
    let update = "session/update";
    let (start, end) = ("_agentvm/turn_start", "_agentvm/turn_end");
    assert_eq!(methods, [start, update, update, update, update, end]);
    assert_eq!(log.texts("user_message_chunk"), ["stream 3"]);
    assert_eq!(log.agent_texts(), ["1 ", "2 ", "3 "]);
    assert_eq!(log.turn_ends()[0]["stopReason"], "end_turn");
    world.close().await;
}

#[tokio::test]
async fn an_update_is_logged_as_the_exact_json_that_came() {
    let world = World::new().await;
    let session = world.session().await;
    let line = r#"{ "zz":[1e400, -0, 12345678901234567890123], "params":{"update" :{"sessionUpdate":"never_heard_of","x":{"sessionId":"inner","b":1,"a":2}},"sessionId":"$SESSION"},"method":"session/update","jsonrpc":"2.0"}"#;
    world.run(session, &format!("line {line}")).await.unwrap();
    let log = world.log(session).await;
    assert_eq!(
        &*log.0[2].json,
        line.replace("$SESSION", &session.to_string())
    );
    world.close().await;
}

#[tokio::test]
async fn a_notification_of_an_unknown_method_is_logged_under_its_name() {
    let world = World::new().await;
    let session = world.session().await;
    let line = r#"{"jsonrpc":"2.0","method":"_vendor/news","params":{"n":1}}"#;
    world.run(session, &format!("line {line}")).await.unwrap();
    let event = &world.log(session).await.0[2];
    assert_eq!((&*event.method, &*event.json), ("_vendor/news", line));
    world.close().await;
}

#[tokio::test]
async fn lines_that_are_no_protocol_are_passed_over() {
    let world = World::new().await;
    let session = world.session().await;
    let script = "line debug: hello\nhex fffe0a\nline {\"method\":\nline []\nline 42\n\
                  line {\"id\":99999,\"result\":{}}\nline {\"id\":\"odd\",\"result\":{}}\nsay fine";
    assert_eq!(world.text(session, script).await, "fine");
    assert_eq!(world.log(session).await.0.len(), 4);
    assert_eq!(world.text(session, "say again").await, "again");
    world.close().await;
}

#[tokio::test]
async fn a_line_in_writes_of_one_byte_is_one_line() {
    let world = World::new().await;
    let session = world.session().await;
    let line = r#"{"method":"session/update","params":{"sessionId":"$SESSION","update":{"sessionUpdate":"agent_message_chunk","content":{"type":"text","text":"ü"}}}}"#;
    assert_eq!(world.text(session, &format!("slowly {line}")).await, "ü");
    world.close().await;
}

#[tokio::test]
async fn a_line_over_the_limit_ends_the_agent_and_the_next_prompt_resumes() {
    let world = World::new().await;
    let session = world.session().await;
    let error = world
        .run(session, &format!("say before\nlong {}", LIMIT + 1))
        .await
        .unwrap_err();
    assert_eq!(error.code, Code::AgentProtocol, "{error}");
    assert!(error.message.contains(&LIMIT.to_string()), "{error}");
    assert_eq!(world.log(session).await.agent_texts(), ["before"]);
    assert_eq!(world.text(session, "remember").await, "2");
    world.close().await;
}

#[tokio::test]
async fn an_update_just_under_the_limit_arrives_whole() {
    let world = World::new().await;
    let session = world.session().await;
    let length = LIMIT - 1000;
    let text = world.text(session, &format!("long {length}")).await;
    assert_eq!(text.len(), length);
    world.close().await;
}

#[tokio::test]
async fn the_first_of_two_answers_counts() {
    let world = World::new().await;
    let session = world.session().await;
    let script = r#"line {"jsonrpc":"2.0","id":$ID,"result":{"stopReason":"max_tokens"}}"#;
    // The usual answer follows.
    let turn = world.run(session, script).await.unwrap();
    assert_eq!(turn.stop_reason, "max_tokens");
    let turn = world.run(session, "say next").await.unwrap();
    assert_eq!((&*turn.text, &*turn.stop_reason), ("next", "end_turn"));
    world.close().await;
}

#[tokio::test]
async fn what_comes_after_the_answer_is_logged_but_is_no_text_of_the_turn() {
    let world = World::new().await;
    let session = world.session().await;
    let listener = Listener::of(&world.vm);
    let script = "line {\"id\":$ID,\"result\":{\"stopReason\":\"end_turn\"}}\nsay late\nhang";
    let turn = world.run(session, script).await.unwrap();
    assert_eq!(turn.text, "");
    // What comes after the next prompt would be text of that one.
    listener.said("late").await;
    assert_eq!(world.text(session, "say next").await, "next");
    assert_eq!(world.log(session).await.agent_texts(), ["late", "next"]);
    world.close().await;
}

#[tokio::test]
async fn updates_of_another_session_are_not_logged() {
    let world = World::new().await;
    let session = world.session().await;
    let line = r#"{"method":"session/update","params":{"sessionId":"other","update":{"sessionUpdate":"agent_message_chunk","content":{"type":"text","text":"not mine"}}}}"#;
    let text = world.text(session, &format!("line {line}\nsay mine")).await;
    assert_eq!(text, "mine");
    assert_eq!(world.log(session).await.agent_texts(), ["mine"]);
    world.close().await;
}

#[tokio::test]
async fn text_of_an_attempt_that_was_taken_back_is_not_in_the_result() {
    let world = World::new().await;
    let session = world.session().await;
    let chunk = |id: &str, text: &str| {
        format!(
            r#"line {{"method":"session/update","params":{{"sessionId":"$SESSION","update":{{"sessionUpdate":"agent_message_chunk","messageId":"{id}","content":{{"type":"text","text":"{text}"}}}}}}}}"#
        )
    };
    let retry = r#"line {"method":"_agentvm/retry","params":{"sessionId":"$SESSION","attempt":1,"discardedMessageId":"m2"}}"#;
    let script = [
        chunk("m1", "kept"),
        chunk("m2", "half of"),
        chunk("m2", " it"),
        retry.to_owned(),
        chunk("m3", "whole"),
    ];
    let text = world.text(session, &script.join("\n")).await;
    assert_eq!(text, "kept\n\nwhole");
    // The log is what happened: nothing is taken out of it.
    assert_eq!(world.log(session).await.agent_texts().len(), 4);
    world.close().await;
}

#[tokio::test]
async fn a_flood_on_stderr_stops_nobody_and_its_end_explains_an_exit() {
    let world = World::new().await;
    let session = world.session().await;
    let script = "stderr 2000000\nsay alive";
    assert_eq!(world.text(session, script).await, "alive");
    let error = world
        .run(session, "stderr 2000000\ncomplain out of coffee\nexit 7")
        .await
        .unwrap_err();
    assert_eq!(error.code, Code::AgentExited);
    assert!(error.message.contains("exited with code 7"), "{error}");
    assert!(error.message.ends_with("out of coffee"), "{error}");
    assert!(error.message.len() < 20_000);
    world.close().await;
}

#[tokio::test]
async fn an_agent_that_dies_in_the_middle_of_a_line_is_told_with_what_it_said() {
    let world = World::new().await;
    let session = world.session().await;
    let error = world
        .run(session, "say before\npart {\"method\":\"sess\nkill")
        .await
        .unwrap_err();
    assert_eq!(error.code, Code::AgentExited);
    assert!(error.message.contains("killed by signal 9"), "{error}");
    assert!(error.message.contains(r#"{"method":"sess"#), "{error}");
    let log = world.log(session).await;
    assert_eq!(log.agent_texts(), ["before"]);
    assert_eq!(log.turn_ends()[0]["error"]["code"], "AGENT_EXITED");
    assert_eq!(world.text(session, "remember").await, "2");
    world.close().await;
}

#[tokio::test]
async fn an_agent_that_closes_its_output_but_lives_is_stopped() {
    let world = World::new().await;
    let session = world.session().await;
    let error = world
        .run(session, "deaf\nclose-stdout\nhang")
        .await
        .unwrap_err();
    assert_eq!(error.code, Code::AgentExited, "{error}");
    assert!(error.message.contains("closed its output"), "{error}");
    assert_eq!(world.agents().await, Vec::<String>::new());
    assert_eq!(world.text(session, "remember").await, "2");
    world.close().await;
}

#[tokio::test]
async fn a_process_that_keeps_the_pipes_does_not_delay_the_end_of_its_agent() {
    let world = World::new().await;
    let session = world.session().await;
    let error = world
        .run(session, "say before\ngrandchild\nexit 0")
        .await
        .unwrap_err();
    assert_eq!(error.code, Code::AgentExited, "{error}");
    assert_eq!(world.log(session).await.agent_texts(), ["before"]);
    assert_eq!(world.text(session, "remember").await, "2");
    world.close().await;
}

#[tokio::test]
async fn an_error_answer_rejects_with_the_agents_code_and_data() {
    let world = World::new().await;
    let session = world.session().await;
    let script = r#"line {"id":$ID,"error":{"code":-32603,"message":"overloaded","data":{"status":529}}}
hang"#;
    let error = world.run(session, script).await.unwrap_err();
    assert_eq!(error.code, Code::AgentError);
    assert!(error.message.contains("overloaded"), "{error}");
    let data = json!({ "code": -32603, "data": { "status": 529 } });
    assert_eq!(error.data, Some(data.clone()));
    let ended = &world.log(session).await.turn_ends()[0];
    assert_eq!(ended["error"]["data"], data);
    let script = "line {\"id\":$ID,\"error\":{\"code\":-32000,\"message\":\"no key\"}}\nhang";
    assert_eq!(code(world.run(session, script).await), Code::AuthRequired);
    world.close().await;
}

#[tokio::test]
async fn an_answer_without_stop_reason_breaks_the_protocol() {
    let world = World::new().await;
    let session = world.session().await;
    let script = "line {\"id\":$ID,\"result\":{}}\nhang";
    assert_eq!(code(world.run(session, script).await), Code::AgentProtocol);
    world.close().await;
}

#[tokio::test]
async fn cancelled_that_nobody_asked_for_is_an_error() {
    let world = World::new().await;
    let session = world.session().await;
    let script = "line {\"id\":$ID,\"result\":{\"stopReason\":\"cancelled\"}}\nhang";
    assert_eq!(code(world.run(session, script).await), Code::AgentError);
    world.close().await;
}

#[tokio::test]
async fn a_policy_answers_permission_requests_and_the_log_says_how() {
    let world = World::new().await;
    let session = world.session().await;
    let outcome = |text: String| serde_json::from_str::<Value>(&text).unwrap();
    let kinds = "permission reject_once,allow_always,allow_once";
    let told = outcome(world.text(session, kinds).await);
    let allowed = json!({ "outcome": "selected", "optionId": "id-allow_once" });
    assert_eq!(told, allowed);
    let log = world.log(session).await;
    let asked = &log.of("_agentvm/permission_request")[0];
    assert_eq!(asked["request"]["toolCall"]["title"], "rm -rf /");
    assert_eq!(asked["request"]["sessionId"], session.to_string());
    let decided = &log.of("_agentvm/permission_outcome")[0];
    assert_eq!(decided["outcome"], allowed);
    assert_eq!(decided["decidedBy"], "policy");
    assert_eq!(decided["permissionId"], asked["permissionId"]);
    for none in ["permission reject_once", "permission"] {
        let told = outcome(world.text(session, none).await);
        assert_eq!(told, json!({ "outcome": "cancelled" }));
    }
    world.close().await;
}

#[tokio::test]
async fn the_reject_policy_outlives_a_resume() {
    use super::fixture::{options, within};
    use agentvm::session::PermissionPolicy;
    let world = World::new().await;
    let mut reject = options(&[]);
    reject.permission_policy = PermissionPolicy::Reject;
    let created = world
        .vm
        .create_session("pi", reject, std::future::pending());
    let session = within(created).await.unwrap().id;
    for _ in 0..2 {
        let told = world
            .text(session, "permission allow_once,reject_once")
            .await;
        assert!(told.contains("id-reject_once"), "{told}");
        world.vm.close_session(session).await.unwrap();
    }
    world.close().await;
}

#[tokio::test]
async fn what_the_client_does_not_offer_is_refused_as_unknown() {
    let world = World::new().await;
    let session = world.session().await;
    for method in ["fs/read_text_file", "terminal/create", "_vendor/x"] {
        let told = world.text(session, &format!("call {method}")).await;
        assert!(told.contains("-32601"), "{told}");
        assert!(told.contains(method), "{told}");
    }
    world.close().await;
}
