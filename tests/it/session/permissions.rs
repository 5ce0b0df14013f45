//! Requests for permission that wait for the caller.

use agentvm::error::Code;
use agentvm::ids::SessionId;
use agentvm::session::{Item, PermissionPolicy, PermissionRequest};
use serde_json::{Value, json};

use super::fixture::{Listener, World, code, options, within};

const USUAL: &str = "permission reject_once,allow_always,allow_once";

async fn asking(world: &World) -> SessionId {
    let mut ask = options(&[]);
    ask.permission_policy = PermissionPolicy::Ask;
    let created = world.vm.create_session("pi", ask, std::future::pending());
    within(created).await.unwrap().id
}

/// The first request that the listener is told.
async fn requested(listener: &Listener) -> PermissionRequest {
    let is_request = |item: &Item| matches!(item, Item::PermissionRequest { .. });
    listener.until(is_request).await;
    let mut items = listener.items().into_iter();
    let request = items.find_map(|item| match item {
        Item::PermissionRequest { request, .. } => Some(request),
        _ => None,
    });
    request.unwrap()
}

async fn waiting(world: &World, session: SessionId) -> Vec<String> {
    let view = world.vm.session_view(session).await.unwrap();
    let pending = view.pending_permissions.iter();
    pending
        .map(|request| request.permission_id.to_string())
        .collect()
}

/// `(decidedBy, reason)` of the only outcome in the log.
async fn outcome(world: &World, session: SessionId) -> (Value, Value) {
    let outcomes = world.log(session).await.of("_agentvm/permission_outcome");
    assert_eq!(outcomes.len(), 1);
    (
        outcomes[0]["decidedBy"].clone(),
        outcomes[0]["reason"].clone(),
    )
}

#[tokio::test]
async fn a_request_waits_for_the_caller_and_the_first_answer_wins() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let session = asking(&world).await;
    let turn = world.start(session, USUAL);
    let request = requested(&listener).await;
    assert_eq!(
        (&*request.tool_name, &*request.description),
        ("execute", "rm -rf /")
    );
    assert_eq!(request.options[0]["kind"], "reject_once");
    let params: Value = serde_json::from_str(request.params.get()).unwrap();
    assert_eq!(params["sessionId"], session.to_string());
    let id = request.permission_id.to_string();
    assert_eq!(waiting(&world, session).await, std::slice::from_ref(&id));
    let wrong = within(world.vm.respond_permission(session, &id, "perhaps")).await;
    assert_eq!(code(wrong), Code::InvalidArgument);
    let first = world.vm.respond_permission(session, &id, "once");
    let second = world.vm.respond_permission(session, &id, "reject");
    let both = Box::pin(async { tokio::join!(second, first) });
    let (second, first) = within(both).await;
    let allowed = json!({ "outcome": "selected", "optionId": "id-allow_once" });
    assert_eq!(first.unwrap(), allowed);
    assert_eq!(code(second), Code::PermissionNotFound);
    let text = within(turn).await.unwrap().unwrap().text;
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), allowed);
    assert_eq!(
        outcome(&world, session).await,
        (json!("caller"), Value::Null)
    );
    assert_eq!(waiting(&world, session).await, Vec::<String>::new());
    world.close().await;
}

#[tokio::test]
async fn a_request_that_nobody_heard_waits_for_the_next_listener() {
    let world = World::new().await;
    let session = asking(&world).await;
    let turn = world.start(session, USUAL);
    let pending = async {
        loop {
            if let [(own, request)] = &world.pending()[..] {
                assert_eq!(*own, session);
                return request.permission_id.to_string();
            }
            tokio::task::yield_now().await;
        }
    };
    let id = within(pending).await;
    let answered = world.vm.respond_permission(session, &id, "id-allow_always");
    assert_eq!(
        within(answered).await.unwrap()["optionId"],
        "id-allow_always"
    );
    within(turn).await.unwrap().unwrap();
    world.close().await;
}

#[tokio::test]
async fn a_cancelled_turn_answers_what_it_asked_and_what_it_asks_then() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let session = asking(&world).await;
    let turn = world.start(session, &format!("{USUAL}\n{USUAL}\ncancel"));
    let id = requested(&listener).await.permission_id.to_string();
    assert!(within(world.vm.cancel_prompt(session)).await.unwrap());
    assert_eq!(
        within(turn).await.unwrap().unwrap().stop_reason,
        "cancelled"
    );
    let outcomes = world.log(session).await.of("_agentvm/permission_outcome");
    assert_eq!(outcomes.len(), 2);
    for outcome in outcomes {
        assert_eq!(outcome["outcome"]["outcome"], "cancelled");
        assert_eq!(outcome["reason"], "cancelled");
    }
    let late = within(world.vm.respond_permission(session, &id, "once")).await;
    assert_eq!(code(late), Code::PermissionNotFound);
    world.close().await;
}

#[tokio::test]
async fn a_request_that_outlives_its_turn_ends_with_it() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let session = asking(&world).await;
    let turn = world.start(session, "announced\nuntil /home/user/go");
    let request = requested(&listener).await;
    world.sh("touch /home/user/go").await;
    within(turn).await.unwrap().unwrap();
    // What the request leaves out is known from the tool call before it.
    assert_eq!(
        (&*request.tool_name, &*request.description),
        ("execute", "Run make")
    );
    assert_eq!(
        outcome(&world, session).await,
        (json!("agentvm"), json!("turn_ended"))
    );
    let log = world.log(session).await.events();
    let methods: Vec<_> = log
        .iter()
        .map(|event| event["method"].as_str().unwrap())
        .collect();
    let end = &methods[methods.len() - 3..];
    assert_eq!(
        end,
        [
            "_agentvm/permission_request",
            "_agentvm/permission_outcome",
            "_agentvm/turn_end"
        ]
    );
    world.close().await;
}

#[tokio::test]
async fn a_request_of_an_agent_that_dies_ends_with_it() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let session = asking(&world).await;
    let pid = world.text(session, "pid").await;
    let turn = world.start(session, USUAL);
    requested(&listener).await;
    world.sh(&format!("kill -9 {pid}")).await;
    assert_eq!(code(within(turn).await.unwrap()), Code::AgentExited);
    assert_eq!(
        outcome(&world, session).await,
        (json!("agentvm"), json!("agent_exited"))
    );
    assert_eq!(waiting(&world, session).await, Vec::<String>::new());
    world.close().await;
}

#[tokio::test]
async fn a_request_of_a_session_that_is_closed_or_sleeps_ends_with_it() {
    let world = World::new().await;
    for sleeps in [false, true] {
        let listener = Listener::of(&world.vm);
        let session = asking(&world).await;
        let turn = world.start(session, &format!("{USUAL}\ncancel"));
        let id = requested(&listener).await.permission_id.to_string();
        if sleeps {
            within(world.vm.sleep()).await.unwrap();
        } else {
            within(world.vm.close_session(session)).await.unwrap();
        }
        assert_eq!(
            within(turn).await.unwrap().unwrap().stop_reason,
            "cancelled"
        );
        let late = within(world.vm.respond_permission(session, &id, "once")).await;
        assert_eq!(code(late), Code::PermissionNotFound);
        assert_eq!(outcome(&world, session).await.0, "agentvm");
    }
    world.close().await;
}

#[tokio::test]
async fn two_sessions_ask_for_themselves() {
    let world = World::new().await;
    let (one, two) = (asking(&world).await, asking(&world).await);
    let turns = [one, two].map(|session| world.start(session, USUAL));
    let both = async {
        loop {
            let pending = world.pending();
            if pending.len() == 2 {
                return pending;
            }
            tokio::task::yield_now().await;
        }
    };
    for (session, request) in within(both).await {
        let id = request.permission_id.to_string();
        let other = if session == one { two } else { one };
        let foreign = within(world.vm.respond_permission(other, &id, "once")).await;
        assert_eq!(code(foreign), Code::PermissionNotFound);
        within(world.vm.respond_permission(session, &id, "once"))
            .await
            .unwrap();
    }
    for turn in turns {
        within(turn).await.unwrap().unwrap();
    }
    world.close().await;
}

#[tokio::test]
async fn what_a_tool_is_called_with_hides_no_request() {
    let world = World::new().await;
    let listener = Listener::of(&world.vm);
    let session = asking(&world).await;
    // Valid JSON, but more than a parsed number or tree can hold.
    let deep = format!("{}{}", "[".repeat(1000), "]".repeat(1000));
    let line = format!(
        r#"{{"id":"odd","method":"session/request_permission","params":{{"sessionId":"$SESSION","toolCall":{{"toolCallId":"t","title":"Odd","rawInput":{{"n":1e400,"deep":{deep}}}}},"options":[{{"optionId":"yes","name":"Yes","kind":"allow_once"}}]}}}}"#
    );
    let turn = world.start(session, &format!("line {line}\ncancel"));
    let request = requested(&listener).await;
    assert_eq!(request.description, "Odd");
    assert!(request.params.get().contains(&deep));
    let id = request.permission_id.to_string();
    let allowed = within(world.vm.respond_permission(session, &id, "once")).await;
    let selected = json!({ "outcome": "selected", "optionId": "yes" });
    assert_eq!(allowed.unwrap(), selected);
    assert!(world.vm.cancel_prompt(session).await.unwrap());
    turn.await.unwrap().unwrap();
    world.close().await;
}
