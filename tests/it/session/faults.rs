//! What a fault of one agent leaves whole: what it said before, what listeners have of it, its session,
//! and the turns of others in the same VM. What the fault itself comes to is told in `output`.

use agentvm::error::{Code, Error};
use agentvm::ids::SessionId;
use agentvm::session::TurnResult;
use tokio::task::JoinHandle;

use super::fixture::{LIMIT, Listener, Log, World};

/// What the agent says before its fault.
const BEFORE: usize = 100;

type Turn = JoinHandle<Result<TurnResult, Error>>;

/// A session whose agent is about to be at fault, and one whose turn is under way all the time.
struct Scene {
    world: World,
    session: SessionId,
    listener: Listener,
    other: SessionId,
    other_turn: Turn,
}

impl Scene {
    async fn new() -> Self {
        let world = World::new().await;
        let (session, other) = (world.session().await, world.session().await);
        let listener = Listener::of(&world.vm);
        let other_turn = world.start(other, "say undisturbed\ncancel");
        listener.said("undisturbed").await;
        Self {
            world,
            session,
            listener,
            other,
            other_turn,
        }
    }

    /// The turn with the fault.
    async fn commit(&self, fault: &str) -> Result<TurnResult, Error> {
        let script = format!("stream {BEFORE}\n{fault}");
        let result = self.world.run(self.session, &script).await;
        let log = self.world.log(self.session).await;
        let handed = self.listener.numbers(self.session);
        assert_eq!(handed.len(), log.0.len(), "the listener lacks events");
        result
    }

    /// Everything that the fault had no right to touch is as it should be. Returns the log of the
    /// session, which has had another turn.
    async fn find_whole(self) -> Log {
        let world = &self.world;
        let next = world.text(self.session, "remember").await;
        assert_eq!(next, "2", "the agent knows of its turn");
        let log = world.log(self.session).await;
        let before: Vec<_> = (1..=BEFORE).map(|n| format!("{n} ")).collect();
        let texts = log.agent_texts();
        assert_eq!(texts[..BEFORE], before);
        assert_eq!(texts.last().unwrap(), "2");
        assert_eq!(log.turn_ends().len(), 2);
        let handed = self.listener.numbers(self.session);
        let all: Vec<_> = (1..=log.0.len() as u64).collect();
        assert_eq!(handed, all, "the listener has each event once");

        assert!(world.vm.cancel_prompt(self.other).await.unwrap());
        let turn = self.other_turn.await.unwrap().unwrap();
        assert_eq!(
            (&*turn.text, &*turn.stop_reason),
            ("undisturbed", "cancelled")
        );
        assert_eq!(world.text(self.other, "say on").await, "on");
        assert_eq!(
            world.log(self.other).await.agent_texts(),
            ["undisturbed", "on"]
        );
        self.world.close().await;
        log
    }
}

/// A fault that the turn survives.
async fn passes(fault: &str) -> (TurnResult, Log) {
    let scene = Scene::new().await;
    let turn = scene.commit(fault).await.unwrap();
    (turn, scene.find_whole().await)
}

/// A fault that ends the turn.
async fn fails(fault: &str) -> Error {
    let scene = Scene::new().await;
    let error = scene.commit(fault).await.unwrap_err();
    let log = scene.find_whole().await;
    assert_eq!(log.turn_ends()[0]["error"]["code"], error.code.as_str());
    error
}

#[tokio::test]
async fn a_line_over_the_limit() {
    let error = fails(&format!("long {LIMIT}")).await;
    assert_eq!(error.code, Code::AgentProtocol);
}

#[tokio::test]
async fn an_endless_line_is_not_waited_for_to_end() {
    let error = fails(&format!("endless {}", 10 * LIMIT)).await;
    assert_eq!(error.code, Code::AgentProtocol);
}

#[tokio::test]
async fn a_line_in_writes_of_one_byte() {
    let line = r#"{"method":"session/update","params":{"sessionId":"$SESSION","update":{"sessionUpdate":"agent_message_chunk","content":{"type":"text","text":"slow"}}}}"#;
    let (turn, _) = passes(&format!("slowly {line}")).await;
    assert!(turn.text.ends_with(" slow"), "{}", turn.text);
}

#[tokio::test]
async fn invalid_utf_8() {
    // Alone, and where text belongs in an update that is well-formed otherwise.
    let update = r#"{"method":"session/update","params":{"sessionId":"private-1","update":{"sessionUpdate":"agent_message_chunk","content":{"type":"text","text":"#;
    let script = format!("hex fffe0a\npart {update}\nhex 22c328227d7d7d7d0a\nsay fine");
    let (turn, log) = passes(&script).await;
    assert!(turn.text.ends_with(" fine"), "{}", turn.text);
    assert_eq!(log.agent_texts().len(), BEFORE + 2);
}

#[tokio::test]
async fn invalid_json() {
    let script = "line {\"method\":\"session/update\",\nline {]}\nline \"\nline null\nsay fine";
    let (turn, log) = passes(script).await;
    assert!(turn.text.ends_with(" fine"), "{}", turn.text);
    assert_eq!(log.agent_texts().len(), BEFORE + 2);
}

#[tokio::test]
async fn two_answers_to_one_request() {
    let answer = r#"line {"jsonrpc":"2.0","id":$ID,"result":{"stopReason":"max_tokens"}}"#;
    let (turn, log) = passes(answer).await;
    assert_eq!(turn.stop_reason, "max_tokens");
    assert_eq!(log.turn_ends()[0]["stopReason"], "max_tokens");
    assert_eq!(log.turn_ends()[1]["stopReason"], "end_turn");
}

#[tokio::test]
async fn answers_to_requests_that_nobody_made() {
    let script = "line {\"id\":99999,\"result\":{\"stopReason\":\"end_turn\"}}\n\
                  line {\"id\":\"1\",\"result\":{}}\nline {\"id\":null,\"result\":{}}\n\
                  line {\"id\":-1,\"error\":{\"code\":1,\"message\":\"no\"}}\nsay fine";
    let (turn, _) = passes(script).await;
    assert!(turn.text.ends_with(" fine"), "{}", turn.text);
}

#[tokio::test]
async fn no_answer_at_all() {
    let scene = Scene::new().await;
    let turn = scene
        .world
        .start(scene.session, &format!("stream {BEFORE}\nhang"));
    scene.listener.said(&format!("{BEFORE} ")).await;
    assert!(scene.world.vm.cancel_prompt(scene.session).await.unwrap());
    assert_eq!(turn.await.unwrap().unwrap().stop_reason, "cancelled");
    scene.find_whole().await;
}

#[tokio::test]
async fn a_flood_on_stderr() {
    let (turn, _) = passes("stderr 5000000\nsay fine").await;
    assert!(turn.text.ends_with(" fine"), "{}", turn.text);
}

#[tokio::test]
async fn an_output_that_is_closed_by_an_agent_that_lives() {
    let error = fails("deaf\nclose-stdout\nhang").await;
    assert_eq!(error.code, Code::AgentExited);
}

#[tokio::test]
async fn a_death_in_the_middle_of_a_line() {
    let error = fails("part {\"method\":\"session/upd\nkill").await;
    assert_eq!(error.code, Code::AgentExited);
}

#[tokio::test]
async fn an_exit_with_a_line_that_lacks_only_its_end() {
    let line = r#"{"method":"session/update","params":{"sessionId":"private-1","update":{"sessionUpdate":"agent_message_chunk","content":{"type":"text","text":"cut off"}}}}"#;
    let error = fails(&format!("part {line}\nexit 0")).await;
    assert_eq!(error.code, Code::AgentExited);
}

#[tokio::test]
async fn updates_of_another_session() {
    let scene = Scene::new().await;
    // The agents' own ids of the two are the same; that of the other to its callers is known too.
    let ids = ["other".to_owned(), scene.other.to_string()];
    let lines = ids.map(|id| {
        format!(r#"line {{"method":"session/update","params":{{"sessionId":"{id}","update":{{"sessionUpdate":"agent_message_chunk","content":{{"type":"text","text":"not mine"}}}}}}}}"#)
    });
    let script = format!("{}\nsay mine", lines.join("\n"));
    let turn = scene.commit(&script).await.unwrap();
    assert!(turn.text.ends_with(" mine"), "{}", turn.text);
    let log = scene.find_whole().await;
    assert_eq!(log.agent_texts().len(), BEFORE + 2);
}

#[tokio::test]
async fn updates_after_the_answer() {
    let answer = "line {\"id\":$ID,\"result\":{\"stopReason\":\"end_turn\"}}";
    let scene = Scene::new().await;
    let script = format!("stream {BEFORE}\n{answer}\nstream 49\nsay too late\nhang");
    let turn = scene.world.run(scene.session, &script).await.unwrap();
    assert!(turn.text.ends_with(&format!(" {BEFORE} ")), "{}", turn.text);
    // One that comes when the next turn has begun is taken for a part of that.
    scene.listener.said("too late").await;
    let log = scene.find_whole().await;
    // None is lost, wherever the end of the turn fell between them.
    assert_eq!(log.agent_texts().len(), BEFORE + 50 + 1);
}
