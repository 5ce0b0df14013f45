//! Agents that a client configures itself.

use agentvm::agents::{AgentStore, ClientAgents, OwnAgent};
use agentvm::error::Code;
use agentvm::session::Settings;
use agentvm::vm::{GuestPath, User};

use super::fixture::{World, code, options, within};

fn own(name: &str, command: &str, args: &[&str], env: &[(&str, &str)]) -> ClientAgents {
    let args = args.iter().map(|arg| (*arg).to_owned()).collect();
    let env = env
        .iter()
        .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
        .collect();
    let agent = OwnAgent::new(name.to_owned(), command.to_owned(), args, env);
    std::iter::once(agent.unwrap()).collect()
}

/// `agent.js` as an agent of the client's own, at `/home/user/bot.mjs`. There is no agent store, and
/// none can be made.
async fn world_with(agents: ClientAgents) -> World {
    let directory = tempfile::tempdir().unwrap();
    let no_directory = directory.path().join("file");
    std::fs::write(&no_directory, "").unwrap();
    let store = AgentStore::new(no_directory.join("agents"), "/none".into(), "/none".into());
    let settings = Settings {
        configured_agents: agents,
        auto_install: false,
        ..Settings::new(store)
    };
    let data = directory.path().join("data");
    let world = World::with(directory, data, settings);
    let script = include_str!("agent.js").into();
    let path = GuestPath::new("bot.mjs").unwrap();
    let written = world.vm.write_file(&path, script, User::User);
    within(written).await.unwrap();
    world
}

async fn session(world: &World, env: &[(&str, &str)]) -> agentvm::ids::SessionId {
    let abort = std::future::pending();
    let created = world.vm.create_session("mybot", options(env), abort);
    within(created).await.unwrap().id
}

#[tokio::test]
async fn an_own_agent_runs_without_any_agent_store_and_keeps_its_session() {
    let world = world_with(own("mybot", "node", &["/home/user/bot.mjs"], &[])).await;
    let session = session(&world, &[]).await;
    assert_eq!(world.text(session, "remember").await, "1");
    assert_eq!(world.record(session).await.agent_type, "mybot");
    within(world.client.close()).await.unwrap();
    let world = world.beside();
    assert_eq!(world.text(session, "remember").await, "2");
    world.close().await;
}

#[tokio::test]
async fn an_own_agent_is_found_on_the_path_or_by_its_absolute_path() {
    for command in ["bot", "/home/user/bin/bot"] {
        let path = ("PATH", "/home/user/bin:/usr/local/bin:/usr/bin:/bin");
        let world = world_with(own("mybot", command, &[], &[path])).await;
        world
            .sh("mkdir bin && printf '#!/bin/sh\\nexec node ~/bot.mjs' > bin/bot && chmod +x bin/bot")
            .await;
        let session = session(&world, &[]).await;
        assert_eq!(world.text(session, "say hello").await, "hello");
        world.close().await;
    }
}

#[tokio::test]
async fn the_sessions_environment_wins_over_that_of_its_own_agent() {
    let env = [("OF_AGENT", "agent"), ("OF_BOTH", "agent")];
    let world = world_with(own("mybot", "node", &["/home/user/bot.mjs"], &env)).await;
    let session = session(&world, &[("OF_BOTH", "session")]).await;
    assert_eq!(world.text(session, "env OF_AGENT").await, "agent");
    assert_eq!(world.text(session, "env OF_BOTH").await, "session");
    let state = world.text(session, "env AGENTVM_STATE_DIR").await;
    assert!(state.ends_with(&session.to_string()), "{state}");
    world.close().await;
}

#[tokio::test]
async fn a_program_that_is_not_in_the_vm_is_named() {
    for command in ["nobot", "/srv/nobot", "/home/user/bot.mjs"] {
        let world = world_with(own("mybot", command, &[], &[])).await;
        let created = world
            .vm
            .create_session("mybot", options(&[]), std::future::pending());
        let error = within(created).await.unwrap_err();
        assert_eq!(error.code, Code::AgentNotInstalled, "{error}");
        for named in ["\"mybot\"", command] {
            assert!(error.message.contains(named), "{error}");
        }
        assert!(!error.message.contains("directory in"), "{error}");
        world.assert_nothing_half_made().await;
        world.close().await;
    }
}

#[tokio::test]
async fn a_session_whose_agent_is_configured_no_more_names_the_option() {
    let world = world_with(own("mybot", "node", &["/home/user/bot.mjs"], &[])).await;
    let session = session(&world, &[]).await;
    within(world.client.close()).await.unwrap();
    let mut settings = world.settings.clone();
    settings.configured_agents = ClientAgents::default();
    let data = world.data.clone();
    let without = World::with(tempfile::tempdir().unwrap(), data, settings);
    let error = without.run(session, "say x").await.unwrap_err();
    assert_eq!(error.code, Code::AgentUnknown);
    assert!(error.message.contains("agents: { \"mybot\""), "{error}");
    within(without.client.close()).await.unwrap();
    let again = world.beside();
    assert_eq!(again.text(session, "say back").await, "back");
    again.close().await;
}

#[tokio::test]
async fn an_unknown_agent_is_refused_before_anything_boots() {
    let world = World::new().await;
    let created = world
        .vm
        .create_session("nobot", options(&[]), std::future::pending());
    assert_eq!(code(within(created).await), Code::AgentUnknown);
    assert!(!world.directory().exists());
    world.close().await;
}
