//! A conversation as text, for an agent that has forgotten it.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt::Write as _;

use serde::Deserialize;
use serde_json::value::RawValue;

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
            // One that can't be read says nothing to anybody.
            if let Ok(event) = serde_json::from_str::<Event<'_>>(&event.json) {
                said.add(&event.params.update);
            }
        }
        if page.complete {
            return Ok(said.into_context());
        }
    }
}

/// The parts of an event that somebody said. Not a `Value`: a parsed one takes many times its text, and
/// an agent decides how large that is.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow)]
    params: Params<'a>,
}

#[derive(Deserialize)]
struct Params<'a> {
    #[serde(borrow)]
    update: Update<'a>,
}

#[derive(Deserialize)]
struct Update<'a> {
    #[serde(borrow, rename = "sessionUpdate")]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    title: Option<&'a RawValue>,
}

/// A content block, as far as it can be put into words.
#[derive(Default, Deserialize)]
struct Block<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow, default)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    uri: Option<Cow<'a, str>>,
}

fn read<'a, T: Deserialize<'a>>(raw: Option<&'a RawValue>) -> Option<T> {
    raw.and_then(|raw| serde_json::from_str(raw.get()).ok())
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
    fn add(&mut self, update: &Update<'_>) {
        let (speaker, text) = match &*update.kind {
            "user_message_chunk" => (Speaker::User, text_of(update.content)),
            "agent_message_chunk" => (Speaker::Agent, text_of(update.content)),
            "tool_call" => {
                let title = read(update.title).unwrap_or_else(|| "a tool".to_owned());
                (Speaker::Tool, title)
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

fn text_of(content: Option<&RawValue>) -> String {
    let block: Block<'_> = read(content).unwrap_or_default();
    match &*block.kind {
        "" => String::new(),
        "text" => block.text.unwrap_or_default().into_owned(),
        "resource_link" => format!("[{}]", block.uri.as_deref().unwrap_or("a link")),
        kind => format!("[{kind}]"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn add(said: &mut Said, update: &Value) {
        said.add(&serde_json::from_str(&update.to_string()).expect("an update"));
    }

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
            add(&mut said, &update);
        }
        let text = said.into_context().expect("something was said");
        let told = "User: Fix it.\n\nYou: I look.\n\nYou used a tool: cat a.txt\n\nYou: Done.\n\n";
        assert!(text.contains(told), "{text}");
        assert!(!text.contains("left out"));
    }

    #[test]
    fn of_a_long_conversation_the_end_is_kept() {
        let mut said = Said::default();
        add(&mut said, &chunk("user_message_chunk", "first"));
        for _ in 0..3 {
            add(
                &mut said,
                &chunk("agent_message_chunk", &"ü".repeat(MAX_BYTES / 4)),
            );
        }
        add(&mut said, &chunk("user_message_chunk", "last"));
        assert!(said.bytes <= MAX_BYTES);
        let text = said.into_context().expect("something was said");
        assert!(text.contains("left out") && text.contains("User: last"));
        assert!(!text.contains("first"));
    }

    #[test]
    fn nothing_said_is_no_context() {
        assert_eq!(Said::default().into_context(), None);
    }

    #[test]
    fn what_cannot_be_read_in_a_tool_call_does_not_hide_it() {
        let call = r#"{"sessionUpdate":"tool_call","title":"make","rawInput":1e400,"content":[]}"#;
        let mut said = Said::default();
        said.add(&serde_json::from_str(call).expect("an update"));
        let text = said.into_context().expect("something was said");
        assert!(text.contains("You used a tool: make"), "{text}");
    }
}
