//! Several sessions in one VM at the same time.

use std::collections::VecDeque;

use agentvm::error::Code;
use agentvm::ids::SessionId;
use agentvm::store::Status;
use tokio::task::JoinSet;

use super::fixture::{Listener, World, code, options, within};

const SESSIONS: usize = 6;

/// Sessions that are made at the same time, each with its number in its environment.
async fn sessions(world: &World) -> Vec<SessionId> {
    let making: Vec<_> = numbers()
        .iter()
        .map(|number| {
            let (vm, options) = (world.vm.clone(), options(&[("NUMBER", number)]));
            let made = async move {
                vm.create_session("pi", options, std::future::pending())
                    .await
            };
            tokio::spawn(within(made))
        })
        .collect();
    let mut sessions = Vec::new();
    for made in making {
        sessions.push(made.await.unwrap().unwrap().id);
    }
    sessions
}

fn numbers() -> Vec<String> {
    (0..SESSIONS).map(|number| number.to_string()).collect()
}

/// What the agents of these sessions say in turns that run at the same time.
async fn texts(world: &World, sessions: &[SessionId], script: &str) -> Vec<String> {
    let turns: Vec<_> = sessions
        .iter()
        .map(|session| world.start(*session, script))
        .collect();
    let mut texts = Vec::new();
    for turn in turns {
        texts.push(turn.await.unwrap().unwrap().text);
    }
    texts
}

#[tokio::test]
async fn sessions_that_are_made_at_once_have_agents_and_environments_of_their_own() {
    let world = World::new().await;
    let sessions = sessions(&world).await;
    assert_eq!(world.agents().await.len(), SESSIONS);
    assert_eq!(texts(&world, &sessions, "env NUMBER").await, numbers());
    let mut pids = texts(&world, &sessions, "pid").await;
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), SESSIONS);
    assert_eq!(world.env_files().len(), SESSIONS);
    world.close().await;
}

/// Each turn waits for all others to be under way: were they one after the other, none would end.
#[tokio::test]
async fn turns_of_different_sessions_run_at_the_same_time() {
    let world = World::new().await;
    let sessions = sessions(&world).await;
    let meet = format!("meet {SESSIONS}\nstream 200");
    for text in texts(&world, &sessions, &meet).await {
        assert!(text.starts_with("met 1 2 "), "{text}");
    }
    for session in &sessions {
        // Its own numbers, without a gap: `Log` looks.
        let log = world.log(*session).await;
        assert_eq!(log.0.len(), 2 + 1 + 200 + 1);
        let own = session.to_string();
        assert!(log.0.iter().all(|event| event.json.contains(&own)));
    }
    world.close().await;
}

#[tokio::test]
async fn sessions_share_the_files_of_their_vm() {
    let world = World::new().await;
    let (one, two) = (world.session().await, world.session().await);
    world.run(one, "write shared from the first").await.unwrap();
    assert_eq!(world.text(two, "read shared").await, "from the first");
    assert_eq!(world.sh("cat shared").await, "from the first");
    world.close().await;
}

#[tokio::test]
async fn only_a_session_that_is_in_a_turn_is_busy() {
    let world = World::new().await;
    let sessions = sessions(&world).await;
    let listener = Listener::of(&world.vm);
    let turn = world.start(sessions[0], "say working\ncancel");
    listener.said("working").await;
    assert_eq!(
        code(world.run(sessions[0], "say x").await),
        Code::SessionBusy
    );
    let others = texts(&world, &sessions[1..], "say free").await;
    assert_eq!(others, ["free"; SESSIONS - 1]);
    assert!(world.vm.cancel_prompt(sessions[0]).await.unwrap());
    turn.await.unwrap().unwrap();
    world.close().await;
}

#[tokio::test]
async fn the_death_of_an_agent_harms_no_other() {
    let world = World::new().await;
    let sessions = sessions(&world).await;
    let listener = Listener::of(&world.vm);
    let mut turns = VecDeque::new();
    for (n, session) in sessions.iter().enumerate() {
        turns.push_back(world.start(*session, &format!("pid\nsay working {n}\ncancel")));
    }
    for n in 0..SESSIONS {
        listener.said(&format!("working {n}")).await;
    }
    let victim = world.log(sessions[0]).await.agent_texts().remove(0);
    world.sh(&format!("kill -KILL {victim}")).await;
    let died = turns.pop_front().unwrap().await.unwrap().unwrap_err();
    assert_eq!(died.code, Code::AgentExited);
    assert!(died.message.contains("signal 9"), "{died}");
    assert_eq!(world.record(sessions[0]).await.status, Status::Suspended);
    assert_eq!(world.agents().await.len(), SESSIONS - 1);
    for (session, turn) in sessions[1..].iter().zip(turns) {
        assert_eq!(world.record(*session).await.status, Status::Open);
        assert!(world.vm.cancel_prompt(*session).await.unwrap());
        assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    }
    assert_eq!(texts(&world, &sessions, "remember").await, ["2"; SESSIONS]);
    world.close().await;
}

#[tokio::test]
async fn sessions_that_resume_at_once_each_have_one_agent() {
    let world = World::new().await;
    let sessions = sessions(&world).await;
    world.vm.sleep().await.unwrap();
    assert_eq!(texts(&world, &sessions, "env NUMBER").await, numbers());
    assert_eq!(world.agents().await.len(), SESSIONS);
    world.close().await;
}

#[tokio::test]
async fn of_many_prompts_at_once_to_a_session_at_rest_one_runs() {
    let world = World::new().await;
    let session = world.session().await;
    world.vm.close_session(session).await.unwrap();
    let mut turns = JoinSet::new();
    for _ in 0..SESSIONS {
        let turn = world.start(session, "say working\ncancel");
        turns.spawn(async move { turn.await.unwrap() });
    }
    for _ in 1..SESSIONS {
        let refused = turns.join_next().await.unwrap().unwrap();
        assert_eq!(code(refused), Code::SessionBusy);
    }
    assert!(world.vm.cancel_prompt(session).await.unwrap());
    let run = turns.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(run.stop_reason, "cancelled");
    assert_eq!(world.agents().await.len(), 1);
    assert_eq!(world.log(session).await.turn_ends().len(), 1);
    world.close().await;
}
