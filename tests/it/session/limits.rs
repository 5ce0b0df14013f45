//! Agents that meet the limits of their VM.

use agentvm::error::Code;
use agentvm::session::{Item, Notice};
use agentvm::vm::Limit;

use super::fixture::{World, code, within};

#[tokio::test]
async fn a_turn_whose_agent_is_killed_for_want_of_memory_says_so_and_the_session_goes_on() {
    let mut world = World::new().await;
    if !crate::limits::has_cgroups() {
        return;
    }
    world.settings.vm.limits.memory_bytes = Some(200 << 20);
    let world = world.beside();
    let session = world.session().await;
    let told = world.vm.subscribe().unwrap();
    let (tell, mut limits) = tokio::sync::mpsc::unbounded_channel();
    // To the end: a turn is over when all who listen have been told.
    let listening = tokio::spawn(async move {
        loop {
            let items = told.next().await.unwrap();
            told.taken(&items);
            for item in items {
                if let Item::Notice(Notice::LimitReached { limit, .. }) = item {
                    tell.send(limit).unwrap();
                }
            }
        }
    });
    let error = world.run(session, "hog").await.unwrap_err();
    assert_eq!(error.code, Code::VmLimit, "{error}");
    assert!(error.message.contains("limits.memoryBytes"), "{error}");
    assert_eq!(within(limits.recv()).await, Some(Limit::Memory));
    assert_eq!(world.text(session, "say again").await, "again");
    listening.abort();
    world.close().await;
}

#[tokio::test]
async fn an_agent_that_kills_itself_has_met_no_limit() {
    let world = World::new().await;
    let session = world.session().await;
    assert_eq!(code(world.run(session, "kill").await), Code::AgentExited);
    world.close().await;
}
