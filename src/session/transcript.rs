//! A conversation as text, for an agent that has forgotten it.

use std::collections::VecDeque;
use std::fmt::Write as _;

use serde_json::Value;

use super::event;
use crate::error::Result;
use crate::ids::{Seq, SessionId};
use crate::store::{History, Query};

/// What fits beside a prompt in every model's context. Of a longer conversation the end is kept.
const MAX_BYTES: usize = 96 << 10;

const PAGE_BYTES: u64 = 1 << 20;

/// The log of a session as context for its next prompt; `None` when nothing was said.
pub(super) async fn of(history: &History, session: SessionId) -> Result<Option<String>> {
    let mut said = Said::default();
    let mut since = Seq::default();
    loop {
        let query = Query {
            since,
            method: Some(event::SESSION_UPDATE.to_owned()),
            limit: None,
            max_bytes: PAGE_BYTES,
        };
        let page = history.events(session, query).await?;
        for event in &page.events {
            since = event.seq;
            let event: Value = serde_json::from_str(&event.json).unwrap_or_default();
            said.add(&event["params"]["update"]);
        }
        if page.complete {
            return Ok(said.into_context());
        }
    }
}

/// The end of a conversation, in paragraphs.
#[derive(Default)]
struct Said {
    paragraphs: VecDeque<(Speaker, String)>,
    bytes: usize,
    is_cut: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Speaker {
    User,
    Agent,
    Tool,
}

impl Said {
    fn add(&mut self, update: &Value) {
        let content = &update["content"];
        let (speaker, text) = match update["sessionUpdate"].as_str() {
            Some("user_message_chunk") => (Speaker::User, text_of(content)),
            Some("agent_message_chunk") => (Speaker::Agent, text_of(content)),
            Some("tool_call") => {
                let title = update["title"].as_str().unwrap_or("a tool");
                (Speaker::Tool, title.to_owned())
            }
            _ => return,
        };
        self.bytes += text.len();
        match self.paragraphs.back_mut() {
            // A message comes in pieces; a tool call does not.
            Some((last, paragraph)) if *last == speaker && speaker != Speaker::Tool => {
                paragraph.push_str(&text);
            }
            _ => self.paragraphs.push_back((speaker, text)),
        }
        while self.bytes > MAX_BYTES && self.paragraphs.len() > 1 {
            let oldest = self.paragraphs.pop_front();
            self.bytes -= oldest.map_or(0, |(_, text)| text.len());
            self.is_cut = true;
        }
        if self.bytes > MAX_BYTES
            && let Some((_, text)) = self.paragraphs.front_mut()
        {
            let cut = text.ceil_char_boundary(self.bytes - MAX_BYTES);
            text.drain(..cut);
            self.bytes -= cut;
            self.is_cut = true;
        }
    }

    fn into_context(self) -> Option<String> {
        if self.paragraphs.is_empty() {
            return None;
        }
        let mut text = String::from(
            "Your memory of this conversation was lost; below is its record, written by the program \
             that connects you with the user. Go on from it as if you remembered it, and don't \
             mention this note.\n\n<conversation>\n",
        );
        if self.is_cut {
            text.push_str("(The beginning is left out.)\n\n");
        }
        for (speaker, said) in &self.paragraphs {
            let speaker = match speaker {
                Speaker::User => "User",
                Speaker::Agent => "You",
                Speaker::Tool => "You used a tool",
            };
            // Writing to a String can't fail.
            let _ = write!(text, "{speaker}: {}\n\n", said.trim());
        }
        text.push_str("</conversation>\n\nThe user's new message follows.");
        Some(text)
    }
}

fn text_of(content: &Value) -> String {
    match content["type"].as_str() {
        Some("text") => content["text"].as_str().unwrap_or_default().to_owned(),
        Some("resource_link") => format!("[{}]", content["uri"].as_str().unwrap_or("a link")),
        Some(kind) => format!("[{kind}]"),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chunk(kind: &str, text: &str) -> Value {
        json!({ "sessionUpdate": kind, "content": { "type": "text", "text": text } })
    }

    #[test]
    fn who_said_what_is_told_in_order() {
        let mut said = Said::default();
        for update in [
            chunk("user_message_chunk", "Fix it."),
            chunk("agent_thought_chunk", "hm"),
            chunk("agent_message_chunk", "I "),
            chunk("agent_message_chunk", "look."),
            json!({ "sessionUpdate": "tool_call", "title": "cat a.txt" }),
            chunk("agent_message_chunk", "Done."),
        ] {
            said.add(&update);
        }
        let text = said.into_context().expect("something was said");
        let told = "User: Fix it.\n\nYou: I look.\n\nYou used a tool: cat a.txt\n\nYou: Done.\n\n";
        assert!(text.contains(told), "{text}");
        assert!(!text.contains("left out"));
    }

    #[test]
    fn of_a_long_conversation_the_end_is_kept() {
        let mut said = Said::default();
        said.add(&chunk("user_message_chunk", "first"));
        for _ in 0..3 {
            said.add(&chunk("agent_message_chunk", &"ü".repeat(MAX_BYTES / 4)));
        }
        said.add(&chunk("user_message_chunk", "last"));
        assert!(said.bytes <= MAX_BYTES);
        let text = said.into_context().expect("something was said");
        assert!(text.contains("left out") && text.contains("User: last"));
        assert!(!text.contains("first"));
    }

    #[test]
    fn nothing_said_is_no_context() {
        assert_eq!(Said::default().into_context(), None);
    }
}
